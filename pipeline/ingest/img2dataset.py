"""Shards that img2dataset made: copied byte for byte into ROOT/raw, or used where they lie when they are there.

Only a done-record is added to their stats; the fields img2dataset wrote keep their values.
"""

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.file_edits import write_like, write_without_samples
from pipeline.core.runner import ShardResult, ShardTask
from pipeline.core.taken_down import NOTHING, TAKEN_DOWN, TakedownHashes, without_content
from shards_spec.files import (
    DataError,
    UserError,
    atomic_writer,
    exists,
    is_url,
    join,
    names,
    open_read,
    read_json,
    sha256_file,
)
from shards_spec.layout import RAW, STATS_PATTERN, parquet_path, shard_name, tar_path
from shards_spec.manifest import forget
from shards_spec.messages import counted
from shards_spec.parquet import read_table
from shards_spec.sample import check_key
from shards_spec.tar import shard_keys

log = logging.getLogger(__name__)
STATS_FIELDS = (  # of img2dataset's that are kept
    "count",
    "successes",
    "failed_to_download",
    "failed_to_resize",
    "duration",
    "start_time",
    "end_time",
)
COPY_BYTES = 1 << 20
OPTIONAL = ("url", "caption", "sha256", "error_message")  # columns that tell what was taken down
ADVICE = "delete the shard's three files and let img2dataset make it again"


@dataclass(frozen=True)
class Img2datasetShard:
    """A finished shard of img2dataset.

    Attributes:
        path: Of its files, without their endings.
        in_place: Whether it lies in ROOT/raw already.
    """

    path: str
    in_place: bool


def import_tasks(root: str, folder: str) -> list[ShardTask]:
    """A task per finished shard of ``folder``, numbered without gaps.

    Unfinished ones are left out with a warning. Raises UserError when there is none, when a key is in two shards, or
    when shards that stay where they are have gaps in their numbers.
    """
    in_place = _same_folder(folder, join(root, RAW))
    base_names = _finished(folder)
    if in_place and base_names != [shard_name(number) for number in range(len(base_names))]:
        raise UserError(
            f"{folder}: its finished shards are not numbered {shard_name(0)} to {shard_name(len(base_names) - 1)}; let "
            "img2dataset finish, or ingest them into another ROOT, where they get new numbers"
        )
    paths = [join(folder, name) for name in base_names]
    _check_unique(paths)
    return [
        ShardTask(number, _fingerprint(path), Img2datasetShard(path, in_place)) for number, path in enumerate(paths)
    ]


def _same_folder(one: str, other: str) -> bool:
    if is_url(one) or is_url(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


def _finished(folder: str) -> list[str]:
    """Base names of the shards with stats, in order of their numbers."""
    finished = set[str]()
    started = set[str]()
    for name in names(folder):
        if stats := STATS_PATTERN.fullmatch(name):
            finished.add(stats[1])
        elif tar := re.fullmatch(r"(\d+)\.tar", name):
            started.add(tar[1])
    if unfinished := sorted(started - finished):
        left_out = counted(len(unfinished), "unfinished shard")
        log.warning("%s: left out %s (no stats): %s", folder, left_out, ", ".join(unfinished[:10]))
    if not finished:
        raise UserError(f"--source {folder} has no finished img2dataset shard (NNNNN.tar with NNNNN_stats.json)")
    return sorted(finished, key=int)


def _fingerprint(path: str) -> dict[str, str]:
    """The Parquet file holds the sha256 of every image, so its hash stands for the shard."""
    parquet = f"{path}.parquet"
    return {"parquet": sha256_file(parquet) if exists(parquet) else "not there"}


def _check_unique(paths: list[str]) -> None:
    """Compare the keys of shards whose key ranges overlap; img2dataset's own never do. Raises UserError."""
    ranges = []
    for path in paths:
        if keys := _readable_keys(path):
            ranges.append((min(keys), max(keys), path))
    overlapping: list[tuple[str, str]] = []  # (last key, path) of shards before that may reach into the next one
    for first, last, path in sorted(ranges):
        overlapping = [(end, other) for end, other in overlapping if end >= first]
        for _, other in overlapping:
            if twice := set(_keys(path)) & set(_keys(other)):
                raise UserError(
                    f"key {min(twice)} is in {other}.tar and in {path}.tar ({len(twice)} in both); keys must "
                    "be unique in a dataset: ingest the two folders into two ROOTs, or make one of them again"
                )
        overlapping.append((last, path))


def _readable_keys(path: str) -> list[str]:
    """Keys of a shard; none when its Parquet file is broken, which `import_shard` reports by name."""
    try:
        return _keys(path)
    except DataError:
        return []


def _keys(path: str) -> list[str]:
    """Keys of the samples by the Parquet file. Raises DataError when it is missing or broken."""
    rows = read_table(f"{path}.parquet", ["key", "status"], fix=ADVICE).to_pylist()
    return [row["key"] for row in rows if row["status"] == "success"]


def import_shard(root: str, task: ShardTask, *, taken_down: TakedownHashes = NOTHING) -> ShardResult:
    """Check one shard and copy it, without what was taken down of the dataset.

    Raises DataError when it is broken or does not fit its stats.
    """
    shard: Img2datasetShard = task.payload
    stats = _read_stats(shard.path)
    listed = sorted(_keys(shard.path))
    in_tar = sorted(map(check_key, shard_keys(f"{shard.path}.tar")))
    if in_tar != listed or len(in_tar) != stats["successes"]:
        raise DataError(
            f"{shard.path}.tar has {counted(len(in_tar), 'sample')}, its Parquet file {len(listed)}, its stats "
            f"{stats['successes']}, or their keys differ; {ADVICE}"
        )
    outputs = dict(_copy_files(root, task.shard, shard))
    counts = Counter(stats["status_dict"])
    kept_stats = {name: stats[name] for name in STATS_FIELDS if name in stats}
    if gone := leave_out_taken_down(join(root, RAW), task.shard, taken_down):
        counted_as = Counter({reason: number for reason, number in gone.items() if counts[reason] >= number})
        counts.subtract(counted_as)  # img2dataset counts the most frequent reasons alone
        counts[TAKEN_DOWN] += counted_as.total()
        kept_stats["successes"] -= gone["success"]
        kept_stats["failed_to_download"] = kept_stats.get("failed_to_download", 0) + gone["success"]
        outputs = {path: sha256_file(join(root, path)) for path in outputs}
    return ShardResult(dict(+counts), outputs, kept_stats)


def leave_out_taken_down(folder: str, shard: int, hashes: TakedownHashes) -> Counter[str]:
    """Take what was taken down out of a shard's files; returns what the rows were counted as."""
    path, tar = parquet_path(folder, shard), tar_path(folder, shard)
    gone = Counter[str]()
    if not hashes.hashes:
        return gone
    table = read_table(path, fix=ADVICE)
    rows, keys = list[int](), set[str]()
    columns = ["key", "status", *(name for name in OPTIONAL if name in table.column_names)]
    for number, row in enumerate(table.select(columns).to_pylist()):
        if hashes.has_row(row.get("url"), row.get("caption")) or hashes.has_image(row.get("sha256")):
            rows.append(number)
            is_success = row["status"] == "success"
            gone["success" if is_success else str(row.get("error_message"))] += 1
            if is_success:
                keys.add(row["key"])
    if rows:
        write_without_samples(tar, tar, keys)
        write_like(path, path, without_content(table, np.array(rows), np.ones(len(rows), bool)))
    return gone


def _read_stats(path: str) -> dict[str, Any]:
    stats = read_json(f"{path}_stats.json")
    if not isinstance(stats, dict) or not {"status_dict", "successes", "count"} <= set(stats):
        raise DataError(f"{path}_stats.json lacks img2dataset's fields; {ADVICE}")
    return stats


def _copy_files(root: str, number: int, shard: Img2datasetShard) -> Iterator[tuple[str, str]]:
    """(path below ROOT, sha256) of the shard's files, copied unless they lie there already."""
    name = join(RAW, shard_name(number))
    if not shard.in_place:
        forget(join(root, RAW), number)
    for ending in (".tar", ".parquet"):
        if not shard.in_place:
            with open_read(shard.path + ending) as source, atomic_writer(join(root, name + ending)) as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
        yield name + ending, sha256_file(join(root, name + ending))
