"""Shards that img2dataset made: copied byte for byte into ROOT/raw, or adopted where they are.

Only a done-record is added to their stats; the fields img2dataset wrote keep their values.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.core.runner import Result, Task
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
from shards_spec.layout import RAW, STATS_PATTERN, shard_name
from shards_spec.manifest import forget
from shards_spec.parquet import read_table
from shards_spec.sample import check_key
from shards_spec.tar import shard_keys

log = logging.getLogger(__name__)
OWN_FIELDS = (
    "count", "successes", "failed_to_download", "failed_to_resize", "duration", "start_time", "end_time",
)  # fmt: skip
COPY_BYTES = 1 << 20
MEND = "delete the shard's three files and let img2dataset make it again"


@dataclass(frozen=True)
class Img2datasetShard:
    """A finished shard of img2dataset: paths without their endings, ``inside`` when it already lies in ROOT/raw."""

    source: str
    inside: bool


def import_tasks(root: str, folder: str) -> list[Task]:
    """A task per finished shard of ``folder``, numbered without gaps.

    Unfinished ones are left out with a warning. Raises UserError when there is none, when a key stands in two
    shards, or when shards that stay where they are have gaps in their numbers.
    """
    inside = _same_folder(folder, join(root, RAW))
    bases = _finished(folder)
    if inside and bases != [shard_name(number) for number in range(len(bases))]:
        raise UserError(
            f"{folder}: its finished shards are not numbered {shard_name(0)} to {shard_name(len(bases) - 1)}; let "
            "img2dataset finish, or ingest them into another ROOT, where they get new numbers"
        )
    sources = [join(folder, base) for base in bases]
    _check_unique(sources)
    return [Task(number, _fingerprint(path), Img2datasetShard(path, inside)) for number, path in enumerate(sources)]


def _same_folder(one: str, other: str) -> bool:
    if is_url(one) or is_url(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


def _finished(folder: str) -> list[str]:
    """Base names of the shards with stats, in order of their numbers."""
    found = names(folder)
    done = {match[1] for name in found if (match := STATS_PATTERN.fullmatch(name))}
    started = {match[1] for name in found if (match := re.fullmatch(r"(\d+)\.tar", name))}
    if unfinished := sorted(started - done):
        log.warning("%s: left out %d unfinished shards (no stats): %s", folder, len(unfinished), unfinished[:10])
    if not done:
        raise UserError(f"--source {folder} has no finished img2dataset shard (NNNNN.tar with NNNNN_stats.json)")
    return sorted(done, key=int)


def _fingerprint(path: str) -> dict[str, str]:
    """The Parquet file holds the sha256 of every image, so its hash stands for the shard."""
    parquet = f"{path}.parquet"
    return {"parquet": sha256_file(parquet) if exists(parquet) else "not there"}


def _check_unique(sources: list[str]) -> None:
    """Compare the keys of shards whose key ranges overlap; img2dataset's own never do. Raises UserError."""
    ranges = sorted((min(keys), max(keys), path) for path in sources if (keys := _readable_keys(path)))
    before: list[tuple[str, str]] = []
    for first, last, path in ranges:
        before = [(end, other) for end, other in before if end >= first]
        for _, other in before:
            if twice := set(_keys(path)) & set(_keys(other)):
                raise UserError(
                    f"key {min(twice)} is in {other}.tar and in {path}.tar ({len(twice)} keys are in both); keys must "
                    "be unique in a dataset: ingest the two folders into two ROOTs, or make one of them again"
                )
        before.append((last, path))


def _readable_keys(path: str) -> list[str]:
    """Keys of a shard; none when its Parquet file is broken, which ``import_shard`` reports by name."""
    try:
        return _keys(path)
    except DataError:
        return []


def _keys(path: str) -> list[str]:
    """Keys of the samples by the Parquet file. Raises DataError when it is missing or broken."""
    rows = read_table(f"{path}.parquet", ["key", "status"], fix=MEND).to_pylist()
    return [row["key"] for row in rows if row["status"] == "success"]


def import_shard(root: str, task: Task) -> Result:
    """Check one shard and copy it. Raises DataError when it is broken or does not fit its stats."""
    found: Img2datasetShard = task.payload
    stats, listed = _read_stats(found.source), sorted(_keys(found.source))
    in_tar = sorted(map(check_key, shard_keys(f"{found.source}.tar")))
    if in_tar != listed or len(in_tar) != stats["successes"]:
        raise DataError(
            f"{found.source}.tar has {len(in_tar)} samples, its Parquet file {len(listed)}, its stats "
            f"{stats['successes']}, or their keys differ; {MEND}"
        )
    outputs = dict(_copies(root, task.shard, found))
    own = {name: stats[name] for name in OWN_FIELDS if name in stats}
    return Result(stats["status_dict"], outputs, own)


def _read_stats(path: str) -> dict[str, Any]:
    stats = read_json(f"{path}_stats.json")
    if not isinstance(stats, dict) or not {"status_dict", "successes", "count"} <= set(stats):
        raise DataError(f"{path}_stats.json lacks img2dataset's fields; {MEND}")
    return stats


def _copies(root: str, shard: int, found: Img2datasetShard) -> Iterator[tuple[str, str]]:
    """(path below ROOT, sha256) of the shard's files, copied unless they lie there already."""
    name = join(RAW, shard_name(shard))
    if not found.inside:
        forget(join(root, RAW), shard)
    for ending in (".tar", ".parquet"):
        if not found.inside:
            with open_read(found.source + ending) as source, atomic_writer(join(root, name + ending)) as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
        yield name + ending, sha256_file(join(root, name + ending))
