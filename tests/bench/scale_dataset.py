"""A dataset of many shards for tests/bench/scale.py: one that the stages make, and copies of it.

Each shard holds one image of 8 pixels with two captions: raw/, dedup/, captions/, shards/ and teacher/ with tar,
Parquet and done-record each. Copies have their own key, names and hashes; nothing is flushed to disk, which takes
minutes at 100,000 shards. Tars are sparse: about 52 kB of disk per shard.
"""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.workers import die_with_parent, usable_cores
from shards_spec.files import sha256_bytes, sha256_json, write_json
from shards_spec.layout import shard_name, sizes_json
from shards_spec.manifest import Done, read_dataset, read_done, write_stage

KEY = "x98765432"  # the first shard's; nothing else in its files looks like that
FOLDERS = ("raw", "dedup", "captions/cap", "shards", "teacher/tea")
WITH_TARS = ("raw", "shards")
BYTES_PER_SHARD = 60_000  # of disk, in blocks of 4 kB
CHUNK = 500  # shards that a process writes at a time


def first_shard(root: str) -> None:
    """ROOT of one shard, by the stages; captioner and teacher are a CoCa of 2 layers with random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from small_data import tiny_coca

    from pipeline.cache.config import CacheConfig
    from pipeline.cache.stage import cache
    from pipeline.caption.config import CaptionConfig
    from pipeline.caption.decoding import Decoding
    from pipeline.caption.stage import caption
    from pipeline.core.runner import ShardResult, ShardTask, Stage, run_stage
    from pipeline.dedup.config import DedupConfig
    from pipeline.dedup.stage import dedup
    from pipeline.ingest.images import EncodedImage
    from pipeline.ingest.raw_shard import RawShardInput, write_raw_shard
    from pipeline.ingest.rows import Row
    from pipeline.pack.config import PackConfig
    from pipeline.pack.stage import pack

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", quality=30)
    data = file.getvalue()
    image = EncodedImage(data, 8, 8, 8, 8, "{}", hashlib.sha256(data).hexdigest(), "0" * 15 + "1")
    rows = [Row("a dog on a beach", "http://images.example.com/1.jpg")]
    stage = Stage("ingest", "raw", {"shard_size": 1})

    def write(*_: object) -> ShardResult:
        return write_raw_shard(root, 0, RawShardInput([KEY], rows), [image])

    run_stage(root, stage, [ShardTask(0, {"rows": "0"})], write)
    model = tiny_coca(Path(root).parent / "coca")
    dedup(DedupConfig(root, workers=1))
    caption(CaptionConfig(root, model, name="cap", num_captions=1, decoding=Decoding(max_tokens=8), threads=1))
    pack(PackConfig(root, workers=1))
    cache(CacheConfig(root, model, name="tea", views=1, threads=1))


class ShardTemplate:
    """The first shard of ROOT, from which others are written."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.tars = {folder: Path(root, folder, "00000.tar").read_bytes() for folder in WITH_TARS}
        self.tables = {folder: Path(root, folder, "00000.parquet").read_bytes() for folder in FOLDERS}
        self.dones = {folder: read_done(f"{root}/{folder}", 0) for folder in FOLDERS}

    def raw_hashes(self, hashes: dict[str, str], shard: int) -> list[str]:
        """What `dedup` hashes of a raw shard."""
        return [hashes[f"raw/{shard_name(shard)}{ending}"] for ending in (".parquet", ".tar")]

    def write(self, shards: range) -> list[str]:
        """Write all of these shards but `dedup`'s records; returns their `raw_hashes`."""
        found = list[str]()
        for shard in shards:
            hashes = self._write_files(shard)
            for folder in FOLDERS:
                if folder != "dedup":  # its records name the raw hashes of all shards
                    self._write_done(folder, shard, hashes)
            found += self.raw_hashes(hashes, shard)
        return found

    def write_dedup(self, of_all: str, shards: range) -> None:
        """Write `dedup`'s records of these shards, ``of_all`` being the hash of all raw hashes."""
        done = self.dones["dedup"]
        for shard in shards:
            outputs = {path.replace("00000", shard_name(shard)): digest for path, digest in done.outputs.items()}
            own = dataclasses.replace(done, shard=shard, inputs={"raw": of_all}, outputs=outputs)
            own.write(f"{self.root}/dedup")

    def _write_files(self, shard: int) -> dict[str, str]:
        name, key = shard_name(shard), f"{shard_name(shard)}0000".encode()
        hashes = dict[str, str]()
        for folder in FOLDERS:
            files = {".parquet": self.tables[folder].replace(KEY.encode(), key)}
            if folder in self.tars:
                files[".tar"] = renamed(self.tars[folder], key)
            for ending, data in files.items():
                write_sparse(f"{self.root}/{folder}/{name}{ending}", data)
                hashes[f"{folder}/{name}{ending}"] = sha256_bytes(data)
        return hashes

    def _write_done(self, folder: str, shard: int, hashes: dict[str, str]) -> None:
        done, name = self.dones[folder], shard_name(shard)
        own = {
            what: {
                path.replace("00000", name): hashes.get(path.replace("00000", name), digest)
                for path, digest in getattr(done, what).items()
            }
            for what in ("inputs", "outputs")
        }
        dataclasses.replace(done, shard=shard, **own).write(f"{self.root}/{folder}")


class Copies:
    """ROOT as it grows from its first shard."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.shards = 1
        self._template = ShardTemplate(root)
        self._blocks = read_dataset(root)["stages"]
        self._raw = self._template.raw_hashes(self._template.dones["raw"].outputs, 0)

    def grow(self, stop: int) -> None:
        """Make it ``stop`` shards, with what speaks of all of them."""
        self._raw += chain.from_iterable(in_processes(self._template.write, range(self.shards, stop)))
        done = in_processes(DedupRecords(self._template, sha256_json(self._raw)), range(stop))
        assert sum(1 for _ in done) > 0
        write_json(sizes_json(self.root), {f"{shard_name(shard)}.tar": 1 for shard in range(stop)})
        for name, block in self._blocks.items():
            facts = {fact: number * stop for fact, number in block.get("facts", {}).items()}
            whole = {**block, "shards": stop, "counts": {"success": stop}, **({"facts": facts} if facts else {})}
            write_stage(self.root, name, whole)
        self.shards = stop
        self.verify()

    def verify(self) -> None:
        """Raise AssertionError unless the last shard is what the stages would have written."""
        last = self.shards - 1
        for folder in FOLDERS[2:]:
            keys = pq.read_table(f"{self.root}/{folder}/{shard_name(last)}.parquet").column("key").to_pylist()
            assert keys == [f"{shard_name(last)}0000"], (folder, keys)
        done = read_done(f"{self.root}/shards", last)
        assert isinstance(done, Done)
        tar = Path(self.root, f"shards/{shard_name(last)}.tar").read_bytes()
        assert sha256_bytes(tar) in done.outputs.values()


@dataclasses.dataclass(frozen=True)
class DedupRecords:
    """`ShardTemplate.write_dedup` as a function of shards alone."""

    template: ShardTemplate
    of_all: str

    def __call__(self, shards: range) -> None:
        """Write the records of these shards."""
        self.template.write_dedup(self.of_all, shards)


def in_processes(write: Callable[[range], Any], shards: range) -> Iterator[Any]:
    """What ``write`` returns for each `CHUNK` of the shards, in order, from a process per core."""
    chunks: Iterable[range] = [shards[start : start + CHUNK] for start in range(0, len(shards), CHUNK)]
    with multiprocessing.get_context("fork").Pool(usable_cores(), _start_writer) as pool:
        yield from pool.imap(write, chunks)


def _start_writer() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a pool ends its processes
    die_with_parent()
    os.fsync = lambda _: None  # copies need not outlive a power cut


def write_sparse(path: str, data: bytes) -> None:
    """Write a file without the zeros at its end."""
    body = data.rstrip(b"\0") if path.endswith(".tar") else data
    with open(path, "wb") as file:
        file.write(body)
        file.truncate(len(data))


def renamed(tar: bytes, key: bytes) -> bytes:
    """A tar of one sample under another key, the members' checksums with it."""
    data = bytearray(tar.replace(KEY.encode(), key))
    for start in (match.start() - 257 for match in re.finditer(rb"ustar\0", bytes(data))):
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)
