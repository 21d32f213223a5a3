"""One shard of one folder: its record, the hashes of its files, and how its contents fit what they were made from."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.check.files import DatasetFiles
from pipeline.check.records import Findings, check_record
from pipeline.check.validators import ShardFolder
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, exists, join
from shards_spec.layout import FILE_PATTERN, RAW, remake_advice, shard_name, stats_path, tar_path
from shards_spec.library_errors import short
from shards_spec.manifest import Done


class CheckedShard(NamedTuple):
    """``done`` is its record, None for another tool's, or where the record is broken (then it has no ``has_record``).

    ``ids`` are the content ids of its keys, uint64, None where its files are broken, or its record, by which they would
    be validated.
    """

    has_record: bool
    done: Done | None
    ids: np.ndarray | None


def check_shard(files: DatasetFiles, shard_folder: ShardFolder, shard: int, findings: Findings) -> CheckedShard:
    """Validate one shard. What does not fit a damaged file of another shard is no problem of its own."""
    folder, stage, validate = shard_folder
    done: Done | None = None
    has_record = False
    with findings.of(stats_path(join(files.root, folder), shard)):
        done = check_record(files, folder, stage, shard)
        has_record = True
    if not has_record:  # a record of another shard, stage or config would have sound files take the blame
        return CheckedShard(has_record, None, None)
    with findings.of(join(files.root, folder, shard_name(shard))):
        _check_hashes(files, shard_folder, shard, done)
        try:
            return CheckedShard(has_record, done, content_ids(validate(files, folder, shard)))
        except Exception:  # as `Findings.of` takes it
            if done is None or not _has_damaged_input(files, done):
                raise
    return CheckedShard(has_record, done, None)


def shard_problems(root: str, shard_folder: ShardFolder, shard: int) -> list[str]:
    """What is wrong with one finished shard: its record, its files, or how they fit what they were made from."""
    findings = Findings()
    check_shard(DatasetFiles(root), shard_folder, shard, findings)
    return findings.problems


def validate_none(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    """In place of the validator of a shard whose contents are not compared with anything."""
    return iter(())


def _check_hashes(files: DatasetFiles, shard_folder: ShardFolder, shard: int, done: Done | None) -> None:
    """Raise DataError for a file that is not the one in the done-record."""
    for path, expected in (done.outputs if done else {}).items():
        full = join(files.root, path)
        try:
            found = files.sha256(full)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{full}: is not there; {remake_advice(full)}") from error
        if found != expected:
            raise DataError(_describe_change(files, shard_folder, shard, path))


def _has_damaged_input(files: DatasetFiles, done: Done) -> bool:
    """Whether a file that a shard was made from is gone, or is not that of its own record: its shard is reported."""
    of_raw = [tar_path(RAW, done.shard)] if RAW in done.inputs else []  # dedup's records have one hash of all of raw/
    for path in (*done.inputs, *of_raw):
        folder, _, name = path.rpartition("/")
        if (match := FILE_PATTERN.fullmatch(name)) is None:
            continue  # a hash of something else
        try:
            made = files.done(folder, int(match[1]))
        except (DataError, OSError):
            return True
        if made is None:
            is_damaged = exists(join(files.root, folder)) and not exists(join(files.root, path))
        else:
            is_damaged = path in made.outputs and not _is_same(files, path, made.outputs[path])
        if is_damaged:
            return True
    return False


def _is_same(files: DatasetFiles, path: str, digest: str) -> bool:
    try:
        return files.sha256(join(files.root, path)) == digest
    except OSError:
        return False


def _describe_change(files: DatasetFiles, shard_folder: ShardFolder, shard: int, path: str) -> str:
    """The message for a file that is not what was written; it says where the file breaks first."""
    full = join(files.root, path)
    where = "its content changed"
    try:
        for _ in shard_folder.validate(files, shard_folder.folder, shard):
            pass
    except DataError as error:
        where = str(error).removeprefix(full).lstrip(": ").partition("; ")[0]  # the advice follows
    except Exception as error:  # over damaged bytes readers raise anything
        where = f"it cannot be read any more ({short(error)})"
    return f"{full}: not the file that was written: {where}; {remake_advice(full)}"
