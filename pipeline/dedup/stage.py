"""Stage `dedup`: images that are there twice, over all raw shards → ROOT/dedup, the keys that pack leaves out.

The columns it compares lie in temporary files of 8 bytes a sample each. They are gone through in buckets of the hash
space, so memory does not grow with the dataset; images are read only where a raw shard has no hashes of them.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from types import TracebackType

import numpy as np
import pyarrow as pa

from pipeline.core.near_duplicates import (
    EXACT_DUPLICATE,
    INDEX_BITS,
    INDEX_MASK,
    MAX_NEAR_BITS,
    NEAR_DUPLICATE,
    NO_ROW,
    band_masks,
    canonical_index,
    min_by_key,
    min_over_neighbours,
    parse_hashes,
)
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.core.runner import (
    Result,
    Root,
    RunOptions,
    ShardsFailed,
    Stage,
    Summary,
    Task,
    run_stage,
    upstream_shards,
)
from pipeline.core.workers import die_with_parent
from pipeline.dedup.disk_columns import Column, Keys
from pipeline.dedup.verification import look_again
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, UserError, join, sha256_bytes, sha256_json
from shards_spec.images import decode_rgb
from shards_spec.layout import DEDUP, RAW, parquet_path, raw_parquet, raw_tar, shard_name, tar_path
from shards_spec.manifest import file_hashes, finished_shards, read_done
from shards_spec.parquet import column_names, read_table
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import read_shard

log = logging.getLogger(__name__)
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("key", "reason", "kept")])
SECOND_CHECK = 1  # of the rules by which images confirm what signatures say (`alike`)
SAMPLE_BYTES = 150  # of memory, for each sample that is compared at once
NUMBERS = 1 << 32  # of images: a position has 32 bits
MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads hashes over the buckets (Fibonacci hashing)


@dataclass(frozen=True)
class DedupConfig:
    """List the images of raw/ that repeat an earlier one; pack leaves them out of the final shards."""

    root: Root
    """the dataset; reads raw/, writes dedup/"""
    near_bits: int = 3
    """images whose signatures (64-bit DCT hash) differ in at most so many bits, and that look alike in colours and
    details, are one; -1: equal files only"""
    workers: int = os.cpu_count() or 1
    """processes that decode images: those with near signatures, all of raw shards without a phash column"""
    memory_gb: float = 0.6
    """memory for the comparison, 0.15 GB per million images; with less all are gone through several times"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if not -1 <= self.near_bits <= MAX_NEAR_BITS:
            raise UserError(f"near_bits {self.near_bits} must be -1 (equal files only) to {MAX_NEAR_BITS}")
        if self.workers < 1:
            raise UserError(f"workers {self.workers} must be at least 1")
        if not self.memory_gb * 1e9 >= SAMPLE_BYTES:
            raise UserError(f"memory_gb {self.memory_gb} must be above 0")


def dedup(config: DedupConfig, in_memory: int | None = None) -> Summary:
    """Run the stage. Memory: ``in_memory`` samples (by default what fits into the config's), three numbers a shard.

    Raises UserError, ShardsFailed.
    """
    shards = upstream_shards(config.root, RAW, "ingest")
    inputs = {"raw": raw_hash(config.root, shards)}
    rule = {"second_check": SECOND_CHECK} if config.near_bits >= 0 else {}
    stage = Stage("dedup", DEDUP, {"near_bits": config.near_bits, **rule})
    tasks = (Task(shard, inputs) for shard in shards)
    with Search(config, shards, in_memory or int(config.memory_gb * 1e9 / SAMPLE_BYTES)) as search:
        options = RunOptions(total=len(shards), overwrite=config.overwrite)
        return run_stage(config.root, stage, tasks, search.shard, options)


def raw_hash(root: str, shards: list[int]) -> str:
    """One hash of all raw shards: what a shard's list repeats may stand in any of them."""
    hashes = list[str]()
    for shard in shards:
        hashes += file_hashes(root, RAW, shard, [parquet_path(RAW, shard), tar_path(RAW, shard)])
    return sha256_json(hashes)


def check_fresh(root: str, shards: list[int]) -> None:
    """Raise UserError unless ROOT/dedup was made, to its end, from the raw shards that are there."""
    found = finished_shards(join(root, DEDUP))
    if found != shards:
        raise UserError(
            f"{join(root, DEDUP)} has {len(found)} shards, raw/ has {len(shards)}: run `clipmill dedup {root}` again, "
            "or delete dedup/ to keep every image"
        )
    expected = {"raw": raw_hash(root, shards)}
    for shard in shards:
        done, name = read_done(join(root, DEDUP), shard), join(root, DEDUP, shard_name(shard))
        if done is None or done.inputs != expected:
            raise UserError(f"{name} was made from other raw shards: run `clipmill dedup {root}` again")


def read_dropped(path: str) -> dict[str, str]:
    """Key to reason of one shard's list. Raises DataError for a file that is no such list."""
    table = read_table(path, ["key", "reason"], fix="delete it and run dedup again")
    return dict(zip(table.column("key").to_pylist(), table.column("reason").to_pylist(), strict=True))


@dataclass(frozen=True)
class Entries:
    """The images of one raw shard, in its rows' order; the numbers are uint64 [images], 0: none."""

    keys: list[str]
    urls: np.ndarray
    files: np.ndarray
    signatures: np.ndarray


def read_entries(root: str, near: bool, shard: int) -> Entries:
    """What is compared of one raw shard; decodes the images when ``near`` and it has no phash column.

    Raises DataError naming file and key.
    """
    path = _raw_parquet(root, shard)
    wanted = ("key", "status", "url", "sha256", "phash")
    columns = _columns(path)
    there = [name for name in wanted if name in columns]
    if not {"key", "status"} <= set(there):
        raise DataError(f"{path}: no columns key and status; run ingest again")
    rows = [row for row in read_table(path, there, fix="run ingest again").to_pylist() if row["status"] == "success"]
    keys = [row["key"] for row in rows]
    if "sha256" not in there or (near and "phash" not in there):
        found = _from_tar(raw_tar(root, shard), near and "phash" not in there)
        if missing := [key for key in keys if key not in found]:
            raise DataError(f"{path}: key {missing[0]} is not in {shard_name(shard)}.tar; run ingest again")
        rows = [{"sha256": found[key][0], "phash": found[key][1], **row} for key, row in zip(keys, rows, strict=True)]
    try:
        signatures = parse_hashes([row["phash"] if near else None for row in rows])
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: its column phash has no 64-bit hashes ({error}); run ingest again") from error
    urls, files = (content_ids([row.get(name) for row in rows]) for name in ("url", "sha256"))
    return Entries(keys, urls, files, signatures)


def _raw_parquet(root: str, shard: int) -> str:
    return raw_parquet(root, shard)


def _columns(path: str) -> list[str]:
    return column_names(path, fix="run ingest again")


def _from_tar(path: str, near: bool) -> dict[str, tuple[str, str | None]]:
    """Key to sha256 of the image's bytes and signature (None when plain, undecodable or not asked for)."""
    found = dict[str, tuple[str, str | None]]()
    for sample in read_shard(path):
        try:
            data = sample.image
        except DataError as error:
            raise DataError(f"{path}: {error}; run ingest again") from error
        found[sample.key] = sha256_bytes(data), _signature(data) if near else None
    return found


def _signature(data: bytes) -> str | None:
    try:
        return perceptual_hash(decode_rgb(data))
    except DataError:
        return None  # pack drops it


Table = Callable[[int], tuple[np.ndarray, np.ndarray]]  # of a bucket: its keys, each once, ascending; their minima


class Search:
    """The comparison of all images, done when the first shard is asked for; its files live as long as the block."""

    def __init__(self, config: DedupConfig, shards: list[int], in_memory: int) -> None:
        self._config, self._shards, self._limit = config, shards, in_memory
        self._searched = False

    def __enter__(self) -> "Search":
        self._folder = tempfile.TemporaryDirectory(prefix="clipmill-dedup-")
        self._keys = Keys(join(self._folder.name, "keys"))
        columns = (
            "urls", "files", "signatures", "values", "exact", "near", "unique", "minima", "best", "twin", "first",
        )  # fmt: skip
        self._c = {name: Column(join(self._folder.name, name), max(1, self._limit // 4)) for name in columns}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keys.close()
        self._folder.cleanup()

    def shard(self, root: str, task: Task) -> Result:
        """Write one shard's list. Raises ShardsFailed when a raw shard is broken: none can be made then."""
        if not self._searched:
            try:
                self._search()
            except DataError as error:
                raise ShardsFailed(f"dedup: a raw shard is broken\n  {error}") from error
            self._searched = True
        start, stop = self._keys.starts[task.shard : task.shard + 2]
        exact, near = (self._c[name].read(start, stop) for name in ("exact", "near"))
        kept = np.where(exact != NO_ROW, exact, near)
        rows = [
            {
                "key": self._keys[start + i],
                "reason": EXACT_DUPLICATE if exact[i] != NO_ROW else NEAR_DUPLICATE,
                "kept": self._keys[int(kept[i])],
            }
            for i in np.flatnonzero(kept != NO_ROW).tolist()
        ]
        exacts = int((exact != NO_ROW).sum())
        counts = {"success": stop - start - len(rows), EXACT_DUPLICATE: exacts, NEAR_DUPLICATE: len(rows) - exacts}
        files = ShardWriter(root, DEDUP, task.shard)
        files.write_parquet(pa.Table.from_pylist(rows, SCHEMA))
        counts = {reason: count for reason, count in counts.items() if count}
        return Result(counts, files.outputs)

    def _search(self) -> None:
        log.info("dedup: reading %d raw shards", len(self._shards))
        for entries in self._all_entries():
            self._keys.append(entries.keys)
            for name in ("urls", "files", "signatures"):
                self._c[name].append(getattr(entries, name))
        if self._keys.starts[-1] >= NUMBERS:
            raise UserError(f"{self._config.root}: {self._keys.starts[-1]} images; dedup compares less than {NUMBERS}")
        log.info("dedup: comparing %d images", self._keys.starts[-1])
        for start, piece in self._c["urls"].pieces():
            own = np.arange(start, start + len(piece), dtype=np.uint64)
            self._c["values"].append(own << INDEX_BITS | own)
            for name in ("exact", "near"):
                self._c[name].append(np.full(len(piece), NO_ROW))
        self._each("urls", "values", self._minima("urls"), _canonical)
        self._each("files", "exact", self._minima("files"), canonical_index)
        if self._config.near_bits >= 0:
            self._each("signatures", "near", self._near(), canonical_index)
            self._confirm()
        self._resolve()

    def _confirm(self) -> None:
        """Keep of the pointers to near rows those that the images bear out, to the first row that does."""
        for _, piece in self._c["exact"].pieces():
            self._c["twin"].append(piece)
        self._resolve()  # now they point to the first of their group
        for start, piece in self._c["near"].pieces():
            twin = self._c["twin"].read(start, start + len(piece))
            self._c["first"].append(np.where(twin == NO_ROW, piece, NO_ROW))
            self._c["near"].write(start, np.full(len(piece), NO_ROW))
            self._c["exact"].write(start, twin)
        memory = self._limit * SAMPLE_BYTES
        look_again(self._config.root, self._shards, self._keys, self._c, memory, self._config.workers)

    def _all_entries(self) -> Iterator[Entries]:
        """Of every raw shard in order; in worker processes when images must be decoded."""
        root, near = self._config.root, self._config.near_bits >= 0
        read = partial(read_entries, root, near)
        workers = min(self._config.workers, len(self._shards))
        if workers == 1 or not near or "phash" in _columns(_raw_parquet(root, self._shards[0])):
            yield from map(read, self._shards)
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=die_with_parent) as pool:
            try:
                rest, waiting = iter(self._shards), deque[Future[Entries]]()
                waiting.extend(pool.submit(read, shard) for shard in islice(rest, 3 * workers))
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(read, shard) for shard in islice(rest, 1))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @property
    def _buckets(self) -> int:
        return max(1, -(-self._keys.starts[-1] // self._limit))

    def _in_bucket(self, keys: np.ndarray, bucket: int) -> np.ndarray:
        """Which of the keys belong to one bucket of the hash space; 0 (none) belongs to no bucket."""
        chosen = ((keys * MIX) >> INDEX_BITS) % np.uint64(self._buckets) == np.uint64(bucket)
        return chosen & (keys != 0)

    def _minima(self, keys: str) -> Table:
        """Per bucket: its keys, each once, ascending, with the smallest value of their rows."""

        def table(bucket: int) -> tuple[np.ndarray, np.ndarray]:
            parts, waiting = [(np.empty(0, np.uint64), np.empty(0, np.uint64))], 0
            for start, piece in self._c[keys].pieces():
                chosen = self._in_bucket(piece, bucket)
                values = self._c["values"].read(start, start + len(piece))
                parts.append((piece[chosen], values[chosen]))
                waiting += len(parts[-1][0])
                if waiting > self._limit:
                    parts, waiting = [_reduced(parts)], 0
            return _reduced(parts)

        return table

    def _each(self, keys: str, out: str, table: Table, rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Set ``out`` of every row that has a key to ``rule(its value, its key's minimum)``."""
        for bucket in range(self._buckets):
            unique, minima = table(bucket)
            for start, piece in self._c[keys].pieces():
                chosen = np.flatnonzero(self._in_bucket(piece, bucket))
                values, result = (self._c[name].read(start, start + len(piece)) for name in ("values", out))
                result[chosen] = rule(values[chosen], minima[np.searchsorted(unique, piece[chosen])])
                self._c[out].write(start, result)

    def _near(self) -> Table:
        """As ``_minima`` of the signatures, with the smallest value among all that are near."""
        reduced, edges = self._minima("signatures"), [0]
        for bucket in range(self._buckets):
            unique, minima = reduced(bucket)
            for name, values in (("unique", unique), ("minima", minima), ("best", minima)):
                self._c[name].append(values)
            edges.append(edges[-1] + len(unique))
        for mask in band_masks(self._config.near_bits, edges[-1]) if self._config.near_bits else []:
            for bucket in range(self._buckets):
                self._lower(mask, bucket)
        log.info("dedup: %d different signatures compared", edges[-1])

        def table(bucket: int) -> tuple[np.ndarray, np.ndarray]:
            unique, best = (self._c[name].read(edges[bucket], edges[bucket + 1]) for name in ("unique", "best"))
            return unique, best

        return table

    def _lower(self, mask: np.uint64, bucket: int) -> None:
        """Bring the minima of near signatures that share ``mask`` into ``best``, for one bucket of masked values."""
        parts = list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]()
        for start, piece in self._c["unique"].pieces():
            chosen = np.flatnonzero(((piece & mask) * MIX >> INDEX_BITS) % np.uint64(self._buckets) == bucket)
            values = self._c["minima"].read(start, start + len(piece))
            parts.append((start, chosen, piece[chosen], values[chosen]))
        if not parts:
            return
        hashes, values = (np.concatenate([part[column] for part in parts]) for column in (2, 3))
        lowered, done = min_over_neighbours(hashes, values, mask, self._config.near_bits), 0
        for start, chosen, _, _ in parts:
            best = self._c["best"].read(start, start + int(chosen[-1]) + 1 if len(chosen) else start)
            best[chosen] = np.minimum(best[chosen], lowered[done : done + len(chosen)])
            self._c["best"].write(start, best)
            done += len(chosen)

    def _resolve(self) -> None:
        """Point every row that goes to one that stays: the one it repeats may itself repeat an earlier one."""
        changed = True
        while changed:
            changed = False
            for name in ("exact", "near"):
                for start, piece in self._c[name].pieces():
                    gone = np.flatnonzero(piece != NO_ROW)
                    onward = [self._c[other].take(piece[gone]) for other in ("exact", "near")]
                    target = np.where(onward[0] != NO_ROW, *onward)
                    moves = target != NO_ROW
                    if moves.any():
                        piece[gone[moves]] = target[moves]
                        self._c[name].write(start, piece)
                        changed = True


def _reduced(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    keys, values = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    return min_by_key(keys, values)


def _canonical(values: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Values whose upper half is the position of the first row with the same URL."""
    return (minima & ~INDEX_MASK) | (values & INDEX_MASK)
