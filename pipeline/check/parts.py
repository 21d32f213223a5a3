"""What `check` finds out of the shards of one number in all folders of a dataset: one part of its result."""

import contextlib
import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.check.files import DatasetFiles
from pipeline.check.records import Findings, unnamed_files
from pipeline.check.shard import check_shard, validate_none
from pipeline.check.validators import ShardFolder, vector_width
from pipeline.core.runner import ShardResult, ShardTask
from shards_spec.content_id import content_ids
from shards_spec.files import join, read_bytes, sha256_bytes, write_bytes
from shards_spec.layout import DEDUP, RAW, SHARDS, dedup_parquet, shard_name, tar_path
from shards_spec.manifest import Done, forget

FOLDERS_PER_TABLE = 64  # bits of a mask
KEYS = np.dtype([("id", "<u8"), ("mask", "<u8")])  # of a key, and the folders that have it: a bit each
SUMMED = ("shard", "config", "counts", "retried", "counters")  # fields of a record
READ_AGAIN = (RAW, DEDUP, SHARDS)  # folders whose files other folders are compared with


@dataclass(frozen=True)
class ShardFindings:
    """What is found of one shard of a folder.

    ``problems`` are those of its record and its files; ``unvalidated`` are those that are left when its contents are
    not compared with anything, for a shard whose final shard is another one now (`is_outdated`). ``unnamed`` are names
    of files with its number that its record does not name. ``record`` is its done-record as far as totals need it, {}
    where it is another tool's and None where it cannot be read. ``width`` is that of its vectors and the file that has
    them, ``width_problem`` what prevents reading it. ``is_valid``: its keys are among those of its part.
    ``is_surplus``: there is no final shard of its number.
    """

    problems: list[str] = field(default_factory=list)
    unvalidated: list[str] | None = None
    unnamed: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None
    width: tuple[str, int] | None = None
    width_problem: str | None = None
    is_valid: bool = False
    is_surplus: bool = False

    @property
    def is_outdated(self) -> bool:
        """Whether its record and that of its final shard name different tars."""
        return self.unvalidated is not None


@dataclass(frozen=True)
class Part:
    """The shards of one number: findings by folder, and their keys.

    ``keys`` (`KEYS`) are the content ids of the keys of valid shards; a bit of the mask is a folder, by its place in
    the list of folders less 64 · the place of the table. ``kept`` are the content ids of the keys that dedup's list
    names as those that stay, uint64, in the order of its rows; 0 for none.
    """

    shard: int
    folders: dict[str, ShardFindings]
    keys: list[np.ndarray]
    kept: np.ndarray

    def to_bytes(self) -> bytes:
        """As the file of a part."""
        findings = json.dumps({folder: asdict(own) for folder, own in self.folders.items()}).encode()
        arrays = {f"keys_{table}": keys for table, keys in enumerate(self.keys)}
        file = io.BytesIO()
        np.savez(file, findings=np.frombuffer(findings, np.uint8), kept=self.kept, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @staticmethod
    def from_bytes(shard: int, data: bytes) -> "Part":
        """The part that `to_bytes` made a file of."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            findings = json.loads(arrays["findings"].tobytes())
            keys = [arrays[f"keys_{table}"] for table in range(len(arrays.files) - 2)]
            folders = {folder: ShardFindings(**own) for folder, own in findings.items()}
            return Part(shard, folders, keys, arrays["kept"])


def part_path(folder: str, shard: int) -> str:
    """The file of a part in a folder."""
    return f"{folder}/{shard_name(shard)}.npz"


def read_part(folder: str, shard: int) -> Part:
    """One part of a folder, whose bytes the runner has compared with its record. Raises OSError."""
    return Part.from_bytes(shard, read_bytes(part_path(folder, shard)))


class PartNames(NamedTuple):
    """A shard number, and the names of the files that have it, by folder."""

    shard: int
    names: dict[str, list[str]]


@dataclass(frozen=True)
class PartCheck:
    """Checks the shards of one number; picklable.

    ``folders`` are all folders of shards of ``root``, ``packed`` is the block of `pack` in its ``dataset.json``, {}
    where there is none.
    """

    root: str
    folders: tuple[ShardFolder, ...]
    packed: dict[str, Any]

    def __call__(self, named: PartNames) -> Part:
        """The part of a shard number."""
        shard, names = named
        files = DatasetFiles(self.root)
        findings = dict[str, ShardFindings]()
        keys = dict[int, np.ndarray]()
        for place, shard_folder in enumerate(self.folders):
            folder = shard_folder.folder
            if folder not in names:
                continue
            unnamed = unnamed_files(files, folder, shard, names[folder])
            findings[folder], ids = self._check(files, shard_folder, shard, unnamed)
            if ids is not None:
                keys[place] = ids
            if folder not in READ_AGAIN:
                files.forget(folder)
        is_listed = DEDUP in findings and findings[DEDUP].is_valid
        kept = _kept_ids(files, shard) if is_listed else np.empty(0, np.uint64)
        return Part(shard, findings, key_tables(keys, len(self.folders)), kept)

    def _check(
        self, files: DatasetFiles, shard_folder: ShardFolder, shard: int, unnamed: list[str]
    ) -> tuple[ShardFindings, np.ndarray | None]:
        """One shard of one folder, and its keys as content ids; None where it is not valid, or outdated."""
        folder, stage, _ = shard_folder
        is_surplus = self._is_of_final_shards(stage) and shard >= self.packed["shards"]
        own = shard_folder._replace(validate=validate_none) if is_surplus else shard_folder
        findings = Findings()
        checked = check_shard(files, own, shard, findings)
        ids = checked.ids
        unvalidated: list[str] | None = None
        if is_surplus:
            unvalidated = findings.problems
        elif checked.has_record and self._is_of_final_shards(stage) and is_changed(files, folder, shard):
            without = Findings()
            check_shard(files, shard_folder._replace(validate=validate_none), shard, without)
            unvalidated, ids = without.problems, None
        width, width_problem = None, Findings()
        if checked.has_record and stage.startswith("cache/"):
            with width_problem.of(join(self.root, folder)):
                width = vector_width(files, folder, shard)
        result = ShardFindings(
            problems=findings.problems,
            unvalidated=unvalidated,
            unnamed=unnamed,
            record=_summed_fields(checked.done) if checked.has_record else None,
            width=width,
            width_problem=next(iter(width_problem.problems), None),
            is_valid=ids is not None,
            is_surplus=is_surplus,
        )
        return result, ids

    def _is_of_final_shards(self, stage: str) -> bool:
        """Whether the shards of a stage are made of the final shards that `pack` has finished."""
        kind, _, name = stage.partition("/")
        # the selection by which `pack` made them is of those that were there before
        is_applied = kind == "select" and self.packed.get("config", {}).get("select") == name
        return kind in ("cache", "select") and not is_applied and isinstance(self.packed.get("shards"), int)


@dataclass(frozen=True)
class PartWriter:
    """Checks the shards of one number and writes their part into a folder: work for `run_stage`."""

    check: PartCheck
    folder: str

    def __call__(self, root: str, task: ShardTask) -> ShardResult:
        """Write ``root/folder/NNNNN.npz``."""
        part = self.check(PartNames(task.shard, task.payload))
        forget(join(root, self.folder), task.shard)
        path, data = part_path(self.folder, task.shard), part.to_bytes()
        write_bytes(join(root, path), data)
        return ShardResult({}, {path: sha256_bytes(data)})


def is_changed(files: DatasetFiles, folder: str, shard: int) -> bool:
    """Whether the records of a shard and of its final shard name different tars; False where one cannot be read."""
    tar = tar_path(SHARDS, shard)
    with contextlib.suppress(Exception):  # damaged records raise anything; `check_record` reports them
        done, final = files.done(folder, shard), files.done(SHARDS, shard)
        if done is None or final is None or tar not in final.outputs:
            return False
        return done.inputs.get(tar) != final.outputs.get(tar)
    return False


def _summed_fields(done: Done | None) -> dict[str, Any]:
    """What totals need of a record (`ShardFindings.record`)."""
    return {} if done is None else {name: getattr(done, name) for name in SUMMED}


def key_tables(keys: dict[int, np.ndarray], folders: int) -> list[np.ndarray]:
    """The keys of a part (`Part.keys`) of the content ids by the place of their folder among so many."""
    tables = list[np.ndarray]()
    for first in range(0, folders, FOLDERS_PER_TABLE):
        parts = [np.empty(0, KEYS)]
        for place in range(first, min(first + FOLDERS_PER_TABLE, folders)):
            if place in keys:
                parts.append(np.empty(len(keys[place]), KEYS))
                parts[-1]["id"], parts[-1]["mask"] = keys[place], 1 << (place - first)
        tables.append(_merged(np.concatenate(parts)))
    return tables


def _merged(keys: np.ndarray) -> np.ndarray:
    """The keys (`KEYS`) by ascending ids, those of different folders as one; what a folder has twice stays two."""
    keys = keys[np.lexsort((keys["mask"], keys["id"]))]
    repeated = np.zeros(len(keys), bool)
    repeated[1:] = (keys["id"][1:] == keys["id"][:-1]) & (keys["mask"][1:] == keys["mask"][:-1])
    first = np.flatnonzero(~repeated)
    once = keys[first]
    starts = np.flatnonzero(np.append(True, once["id"][1:] != once["id"][:-1])[: len(once)])
    merged = once[starts]
    if len(starts):
        merged["mask"] = np.bitwise_or.reduceat(once["mask"], starts)
    return np.concatenate([merged, keys[repeated]])


def _kept_ids(files: DatasetFiles, shard: int) -> np.ndarray:
    """The content ids of the keys that stay, of each row of a list of duplicates: uint64 [rows], 0 for none."""
    return content_ids(row["kept"] for row in files.rows(dedup_parquet(files.root, shard), ["kept"]))
