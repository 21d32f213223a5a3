#!/usr/bin/env python3
"""A dataset of many shards: what listing, adding up, checking and opening it cost, at N/100, N/10 and N shards.

    python tests/bench/scale.py [--shards 100000] [--work FOLDER] [--only NAME ...]

Each shard holds one image of 8 pixels with two captions, so that everything but contents is as in a real dataset:
raw/, dedup/, captions/, shards/ and teacher/ with tar, Parquet and done-record each. The stages themselves make the
first shard; the others are copies of it with their own key, names and hashes (no flushing to disk, which takes minutes
at 100,000 shards). `check` proves all of it. Sparse tars: about 5 GB.

Every line is a process of its own: seconds of CPU and of the clock after imports, largest resident memory less that
after the imports, and operations on files below ROOT per shard by strace where it is installed, at N/100 and N/10:
opened, looked up by name, pages of folder listings, flushed to disk, renamed, linked or removed. What was just written
is in the page cache, as far as that holds it: a network file system adds its round trip to each operation.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from shards_spec.files import sha256_bytes, sha256_json, write_json
from shards_spec.layout import shard_name
from shards_spec.manifest import Done, finished_shards, read_dataset, read_done

KEY = "x98765432"  # the first shard's; nothing else in its files looks like that
FOLDERS = ("raw", "dedup", "captions/cap", "shards", "teacher/tea")
KINDS = {
    "open": "open openat openat2",
    "look up": "stat lstat statx newfstatat access faccessat faccessat2 readlink readlinkat",
    "list": "getdents64",
    "flush": "fsync fdatasync",
    "write": "rename renameat renameat2 unlink unlinkat link linkat mkdir mkdirat rmdir symlink utimensat",
}
KIND: dict[str, str] = {}
for kind, calls in KINDS.items():
    KIND |= dict.fromkeys(calls.split(), kind)


# the dataset


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


class Copies:
    """The other shards of ROOT, from its first one."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.tars: dict[str, bytes] = {}
        self.tables: dict[str, bytes] = {}
        self.dones = {folder: read_done(f"{root}/{folder}", 0) for folder in FOLDERS}
        for folder in FOLDERS:
            if folder in ("raw", "shards"):
                self.tars[folder] = Path(root, folder, "00000.tar").read_bytes()
            self.tables[folder] = Path(root, folder, "00000.parquet").read_bytes()
        self.blocks = read_dataset(root)["stages"]
        self.hashes = dict[str, str]()
        self.raw = [self.dones["raw"].outputs[f"raw/00000{ending}"] for ending in (".parquet", ".tar")]

    def grow(self, start: int, stop: int) -> None:
        """Shards ``start`` to ``stop``, then what speaks of all of them."""
        os.fsync = lambda _: None  # of this process alone: copies need not outlive a power cut
        for shard in range(start, stop):
            self.hashes = {}
            for folder in FOLDERS:
                name = f"{self.root}/{folder}/{shard_name(shard)}"
                key = f"{shard_name(shard)}0000".encode()
                if folder in self.tars:
                    self._write(f"{name}.tar", renamed(self.tars[folder], key))
                self._write(f"{name}.parquet", self.tables[folder].replace(KEY.encode(), key))
                if folder != "dedup":
                    self._done(folder, shard)
            self.raw += [self.hashes[f"raw/{shard_name(shard)}{ending}"] for ending in (".parquet", ".tar")]
        done, of_all = self.dones["dedup"], {"raw": sha256_json(self.raw)}
        for shard in range(stop):
            outputs = {path.replace("00000", shard_name(shard)): digest for path, digest in done.outputs.items()}
            dataclasses.replace(done, shard=shard, inputs=of_all, outputs=outputs).write(f"{self.root}/dedup")
        write_json(f"{self.root}/shards/sizes.json", {f"{shard_name(shard)}.tar": 1 for shard in range(stop)})
        stages = {name: {**block, "shards": stop, "counts": {"success": stop}} for name, block in self.blocks.items()}
        write_json(f"{self.root}/dataset.json", {**read_dataset(self.root), "stages": stages})

    def _write(self, path: str, data: bytes) -> None:
        body = data.rstrip(b"\0") if path.endswith(".tar") else data
        with open(path, "wb") as file:
            file.write(body)
            file.truncate(len(data))
        self.hashes[path.removeprefix(f"{self.root}/")] = sha256_bytes(data)

    def _done(self, folder: str, shard: int) -> None:
        done, name = self.dones[folder], shard_name(shard)
        own = {
            what: {
                path.replace("00000", name): self.hashes.get(path.replace("00000", name), digest)
                for path, digest in getattr(done, what).items()
            }
            for what in ("inputs", "outputs")
        }
        dataclasses.replace(done, shard=shard, **own).write(f"{self.root}/{folder}")


def renamed(tar: bytes, key: bytes) -> bytes:
    """A tar of one sample under another key, the members' checksums with it."""
    data = bytearray(tar.replace(KEY.encode(), key))
    for start in (match.start() - 257 for match in re.finditer(rb"ustar\0", bytes(data))):
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


# what is measured


def _submit(root: str) -> object:
    from slurm.submit import submit

    words = ["cache", root, "--model", "RN50", "--name", "new", "--array", "1000", "--cluster", "slurm", "--dry-run"]
    return submit(words, lambda _: 0)


def _jobs(root: str) -> object:
    from slurm.options import read_site
    from slurm.status import JobsConfig, jobs
    from slurm.step import COMMANDS
    from slurm.submission import Submission, jobs_folder

    place = jobs_folder(root, read_site(None, "jobs", COMMANDS))
    shards = read_dataset(root)["stages"]["pack"]["shards"]
    for number in range(5):
        one = Submission(
            f"{number}",
            "pack",
            "",
            "slurm",
            root,
            "shards",
            shards,
            1000,
            ["1"],
            "2",
            [],
            "",
        )
        write_json(str(place / one.id / "submission.json"), dataclasses.asdict(one))
    return jobs(JobsConfig(root))


def _pack(root: str, array: bool = False) -> object:
    from pipeline.core.runner import ALL
    from pipeline.pack.config import PackConfig
    from pipeline.pack.stage import pack
    from slurm.claims import Claims, Failures, WorkStealing

    if not array:
        return pack(PackConfig(root, workers=1), ALL)
    with Claims(f"{root}/logs/jobs/claims/shards", "bench", 180.0) as claims:
        return pack(
            PackConfig(root, workers=1), WorkStealing(claims, Failures(f"{root}/logs/jobs", "s"), f"{root}/shards")
        )


def _claims(root: str) -> None:
    from slurm.claims import Assigned, Claims, Failures

    shards = range(read_dataset(root)["stages"]["pack"]["shards"])
    place = f"{root}/logs/jobs/claims/new"
    with Claims(place, "bench", 180.0) as claims:
        assignment = Assigned(claims, Failures(place, "s"), shards)
        for shard in shards:
            assert assignment.claim(shard)
            assignment.complete(shard, True)


def _order(root: str) -> object:
    from training.data.order import Order

    order = Order([20_000] * read_dataset(root)["stages"]["pack"]["shards"], 0)
    return order.locate(0), order.locate(order.total // 2)


def _check(root: str) -> object:
    from pipeline.check.config import CheckConfig
    from pipeline.check.stage import check

    problems = check(CheckConfig(root))
    assert not problems, problems[:3]
    return problems


def _vocab(root: str) -> object:
    from pipeline.labels.vocab_stage import VocabConfig, vocab

    return vocab(VocabConfig(root, min_count=0))


def _open(root: str, teacher: str = "") -> object:
    import open_clip

    from shards_spec.models import LoadedModel
    from training.config import DataConfig, TeacherCacheConfig, ViewConfig
    from training.data.samples import open_samples

    student = LoadedModel(None, open_clip.get_tokenizer("ViT-B-32"), {}, 32, (0.5,) * 3, (0.5,) * 3)
    samples = open_samples(
        DataConfig(data=root), TeacherCacheConfig((teacher,)) if teacher else ViewConfig(), student, 0
    )
    assert isinstance(samples[samples.order.total // 2], dict)
    return samples


Measure = Callable[[str], object]
MEASURES: dict[str, tuple[str, Measure]] = {
    "list": ("list one folder (finished shards)", lambda root: finished_shards(f"{root}/raw")),
    "submit": ("submit cache --dry-run, all missing", _submit),
    "jobs": ("jobs, five submissions", _jobs),
    "array": ("a task of pack's array, nothing left for it", lambda root: _pack(root, array=True)),
    "claims": ("claim every shard and give it back", _claims),
    "pack": ("pack again, nothing missing: the totals", _pack),
    "vocab": ("vocab", _vocab),
    "check": ("check", _check),
    "open": ("open for training, first sample", _open),
    "teacher": ("the same with a teacher cache", lambda root: _open(root, "tea")),
    "order": ("a place in the order, shards of 20,000", _order),
}
HEAVY = dict.fromkeys(("open", "teacher", "order"), ("open_clip", "training.data.samples"))
LIGHT = (
    "pipeline.pack.stage",
    "pipeline.check.stage",
    "pipeline.labels.vocab_stage",
    "slurm.submit",
    "slurm.status",
    "slurm.claims",
    "tyro",
    "submitit",
)


def measure(name: str, root: str) -> None:
    """Print seconds and memory of one measure, in this process, as JSON."""
    for module in (*LIGHT, *HEAVY.get(name, ())):
        __import__(module)
    before = resident()
    start = time.perf_counter()
    cpu = time.process_time()
    said, sys.stdout = sys.stdout, io.StringIO()
    MEASURES[name][1](root)
    sys.stdout = said
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    print(json.dumps({"CPU": cpu, "seconds": seconds, "MiB": resident() - before}))


def resident() -> float:
    """Largest resident memory of this process so far, MiB; what a parent had before is not in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def child(*words: str) -> dict[str, float]:
    """What `measure` printed in a process of its own; words before it are a tracer's."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tracer(log: str) -> list[str]:
    """Return the command line of strace; its lines name the file of each operation."""
    return ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-e", f"trace=?{',?'.join(KIND)}", "-o", log]


def operations(log: str, root: str) -> Counter[str]:
    """Operations on files below ``root`` that a trace has, by kind; asking an open file for its size is none."""
    found = Counter[str]()
    for line in Path(log).read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(?:<\.\.\. )?(\w+)", line)
        if match and match[1] in KIND and root in line and '"", ' not in line and "resumed>" not in line:
            found[KIND[match[1]]] += 1
    return found


# the table


def main() -> None:
    """Make the datasets, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000, help="the largest dataset, at most 100,000")
    parser.add_argument("--work", default=tempfile.gettempdir(), help="a folder for it; what is made is removed")
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    if not 100 <= options.shards <= 100_000:
        parser.error("--shards: 100 to 100,000")
    work = Path(tempfile.mkdtemp(prefix="clipmill-scale-", dir=options.work))
    try:
        table(str(work / "ds"), options)
    finally:
        shutil.rmtree(work)
    return None


def table(root: str, options: argparse.Namespace) -> None:
    """Grow ROOT in three steps and measure after each."""
    sizes = sorted({options.shards // 100, options.shards // 10, options.shards})
    first_shard(root)
    copies = Copies(root)
    there = 1
    found: dict[tuple[str, int], tuple[dict[str, float], Counter[str]]] = {}
    command = [sys.executable, __file__, "--measure"]
    for size in sizes:
        start = time.perf_counter()
        copies.grow(there, size)
        there = size
        if size == sizes[0]:
            verify(root, size)
        print(f"# {size} shards made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for name in options.only:
            taken = child(*command, name, root)
            log = f"{root}.trace"
            ops = Counter[str]()
            if shutil.which("strace") and size != sizes[-1]:
                child(*tracer(log), *command, name, root)
                ops = operations(log, root)
            found[name, size] = taken, ops
            print(f"# {size} {name}: {taken} {dict(ops)}", file=sys.stderr)
    print("| | " + " | ".join(f"{size:,} shards: CPU s, s, MiB" for size in sizes) + " | operations per shard |")
    print("|---" * (len(sizes) + 2) + "|")
    for name in options.only:
        cells = ["{CPU:.2f}, {seconds:.2f}, {MiB:.0f}".format(**found[name, size][0]) for size in sizes]
        few, more = (found[name, size][1] for size in sizes[:2])
        each = {kind: (more[kind] - few[kind]) / (sizes[1] - sizes[0]) for kind in KINDS}
        said = ", ".join(f"{number:.3g} {kind}" for kind, number in each.items() if number > 1e-4)
        print(f"| {MEASURES[name][0]} | " + " | ".join(cells) + f" | {said or 'none'} |")


def verify(root: str, size: int) -> None:
    """The copies are what the stages would have written: a Parquet file, a key."""
    for folder in FOLDERS[2:]:
        keys = pq.read_table(f"{root}/{folder}/{shard_name(size - 1)}.parquet").column("key").to_pylist()
        assert keys == [f"{shard_name(size - 1)}0000"], (folder, keys)
    done = read_done(f"{root}/shards", size - 1)
    assert isinstance(done, Done)
    assert sha256_bytes(Path(root, f"shards/{shard_name(size - 1)}.tar").read_bytes()) in done.outputs.values()


if __name__ == "__main__":
    main()
