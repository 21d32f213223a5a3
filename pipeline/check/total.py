"""What `check` finds out of all parts together: totals, gaps, repeated keys, duplicates of what is not there."""

import contextlib
from collections import Counter
from typing import Any

import numpy as np

from pipeline.check.key_ranges import KeyRanges, ranges
from pipeline.check.listing import FolderListing
from pipeline.check.parts import FOLDERS_PER_TABLE, KEYS, Part, ShardFindings
from pipeline.check.records import Findings, Totals, check_names, check_totals
from pipeline.check.validators import ShardFolder
from pipeline.core.taken_down import read_takedown_hashes
from pipeline.dedup.drop_list import check_fresh
from shards_spec.content_id import is_among
from shards_spec.files import join
from shards_spec.layout import DEDUP, RAW, SHARDS, dedup_parquet, remake_advice, resume_advice, stage_output
from shards_spec.manifest import Done, shard_ids
from shards_spec.messages import counted
from shards_spec.parquet import read_table

KEPT = np.dtype([("id", "<u8"), ("shard", "<u4"), ("row", "<u4")])  # a key that stays for the one of a list's row


class FolderTotal:
    """The shards of one folder: add them in ascending order. Memory: their problems, and a few numbers each."""

    def __init__(self, shard_folder: ShardFolder) -> None:
        self.folder, self.stage, _ = shard_folder
        self.shards = 0
        self.valid = 0
        self.totals = Totals()
        self.unnamed = list[str]()
        self.is_of_shards_gone = False
        self._outdated = 0
        self._problems = list[ShardFindings]()
        self._widths = dict[int, tuple[int, str, int]]()  # numbers of a vector to (place of the first, its file, files)
        self._width_problem: str | None = None

    def add(self, shard: int, findings: ShardFindings) -> None:
        """One more shard."""
        self.shards += 1
        self.valid += findings.is_valid
        self.unnamed += findings.unnamed
        if findings.record is not None:
            self.totals.add(shard, _done_of(findings.record))
        self._outdated += findings.is_outdated
        self.is_of_shards_gone |= findings.is_surplus
        if findings.problems or findings.unvalidated:
            self._problems.append(findings)
        self._width_problem = self._width_problem or findings.width_problem
        if findings.width is not None:
            path, width = findings.width
            place, first, files = self._widths.get(width, (self.shards, path, 0))
            self._widths[width] = (place, first, files + 1)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are valid."""
        return self.valid == self.shards

    def report(self, root: str, findings: Findings) -> None:
        """Add the problems of the shards, and how many are of other final shards than those that are there.

        A single one that has its final shard, with another content, is none of these: its own problems say what
        differs.
        """
        is_outdated = self.is_of_shards_gone or self._outdated > 1
        if is_outdated:
            findings.add(_describe_outdated(root, self.stage, self._outdated, self.shards))
        for own in self._problems:
            problems = own.unvalidated if is_outdated and own.unvalidated is not None else own.problems
            for problem in problems:
                findings.add(problem)

    def report_widths(self, findings: Findings) -> None:
        """Name the shards of a teacher cache whose vectors have another width than most of its shards."""
        if self._width_problem is not None:
            findings.add(self._width_problem)
            return
        files = Counter({width: number for width, (_, _, number) in self._widths.items()})
        agreed = files.most_common(1)
        others = sorted((*self._widths[width], width) for width in files if width != agreed[0][0])
        if others:
            _, path, _, width = others[0]
            number = sum(files.values()) - agreed[0][1]
            findings.add(
                f"{path}: its vectors have {width} numbers, those of most shards of {self.folder} {agreed[0][0]} "
                f"({counted(number, 'such shard')}); {remake_advice(path)}"
            )


def _done_of(record: dict[str, Any]) -> Done | None:
    return Done(stage="", inputs={}, outputs={}, **record) if record else None


def _describe_outdated(root: str, stage: str, outdated: int, shards: int) -> str:
    """One line for all shards of a folder that are of other final shards, with what to do."""
    folder = join(root, stage_output(stage) or "")
    what = f"{folder}: made from other shards than those in {join(root, SHARDS)} ({outdated} of {shards})"
    if stage.startswith("cache/"):
        return f"{what}; {resume_advice(folder)}, it copies the vectors of samples that stay in their shard"
    name = stage.partition("/")[2]
    return (
        f"{what}: it is of the shards before `clipmill pack`; delete the folder, or run "
        f"`clipmill select {root} --name {name} --overwrite` with its rules again"
    )


class Total:
    """All parts of a dataset: add them in ascending order, then report.

    ``scratch`` is a folder for files of keys that do not fit into memory: 16 bytes a sample, as much again where final
    shards have other samples than the raw shards of their numbers.
    """

    def __init__(self, folders: tuple[ShardFolder, ...], scratch: str) -> None:
        self._folders = [FolderTotal(shard_folder) for shard_folder in folders]
        tables = range(0, len(folders), FOLDERS_PER_TABLE)
        self._keys = [KeyRanges(f"{scratch}/keys-{first}", KEYS) for first in tables]
        self._kept = KeyRanges(f"{scratch}/kept", KEPT)
        self.repeated = [0] * len(folders)
        self._wrong = dict[int, int]()  # shards of dedup/ to the first row whose key that stays is not there

    def add(self, part: Part) -> None:
        """One more part."""
        for total in self._folders:
            if total.folder in part.folders:
                total.add(part.shard, part.folders[total.folder])
        for store, keys in zip(self._keys, part.keys, strict=True):
            store.add(keys)
        if len(part.kept):
            kept = np.empty(len(part.kept), KEPT)
            kept["id"], kept["shard"] = part.kept, part.shard
            kept["row"] = np.arange(len(kept))
            self._kept.add(kept)

    def report(
        self, root: str, listings: dict[str, FolderListing], blocks: dict[str, Any] | None, findings: Findings
    ) -> None:
        """Add what is wrong with the folders, ``listings``, and ``blocks`` of ``dataset.json`` that belong to them."""
        takedowns = False
        with contextlib.suppress(Exception):  # `_report_kept` reports it
            takedowns = bool(read_takedown_hashes(root).hashes)
        self.compare_keys(ignore_none=takedowns)
        for total, repeated in zip(self._folders, self.repeated, strict=True):
            check_names(root, listings[total.folder], total.unnamed, findings)
            total.report(root, findings)
            if total.stage.startswith("cache/"):
                total.report_widths(findings)
            check_totals(
                root,
                total.folder,
                total.stage,
                blocks=blocks,
                totals=total.totals,
                shards=total.shards,
                is_incomplete=bool(listings[total.folder].first_missing(1)),
                findings=findings,
            )
            if repeated:
                verb = "is" if repeated == 1 else "are"
                findings.add(
                    f"{total.folder}: {counted(repeated, 'key')} {verb} there more than once; keys must be unique in a "
                    "dataset"
                )
        complete = {total.folder for total in self._folders if total.is_complete}
        if all(folder in complete and not listings[folder].first_missing(1) for folder in (RAW, DEDUP)):
            with findings.of(join(root, DEDUP)):
                self._report_kept(root, findings)

    def compare_keys(self, ignore_none: bool) -> None:
        """Count keys that a folder has more than once, and find rows of dedup's lists whose kept key is not there.

        ``ignore_none``: rows without a key that stays are right, since it was taken down.
        """
        places = {total.folder: place for place, total in enumerate(self._folders)}
        masks = [np.uint64(1 << places[folder]) if folder in places else np.uint64(0) for folder in (RAW, DEDUP)]
        for *tables, kept in ranges(*self._keys, self._kept):
            for table, keys in enumerate(tables):
                for place, repeated in count_repeated(keys).items():
                    self.repeated[table * FOLDERS_PER_TABLE + place] += repeated
            if not len(kept):
                continue
            raw, dropped = (tables[0]["id"][tables[0]["mask"] & mask != 0] for mask in masks)
            wrong = ~is_among(kept["id"], raw) | is_among(kept["id"], dropped)
            if ignore_none:
                wrong &= kept["id"] != 0
            for _, shard, row in kept[wrong].tolist():
                self._wrong[shard] = min(row, self._wrong.get(shard, row))

    def _report_kept(self, root: str, findings: Findings) -> None:
        """The lists belong to raw/ as it is; the sample kept for a duplicate is in raw/ and is no duplicate itself."""
        check_fresh(root, shard_ids(join(root, RAW)))
        read_takedown_hashes(root)
        for shard, row in sorted(self._wrong.items()):
            path = dedup_parquet(root, shard)
            key, kept = (read_table(path, [name]).column(name)[row].as_py() for name in ("key", "kept"))
            findings.add(
                f"{path}: key {key} goes for key {kept}, which is not in raw/ or goes itself; "
                "run `clipmill dedup --overwrite`"
            )


def count_repeated(keys: np.ndarray) -> dict[int, int]:
    """Of keys (`KEYS`) by ascending ids: how many each bit has beyond the first of each id, where there are any."""
    is_first = np.append(True, keys["id"][1:] != keys["id"][:-1])[: len(keys)]
    starts = np.flatnonzero(is_first)
    if len(starts) == len(keys):
        return {}
    each = np.bitwise_or.reduceat(keys["mask"], starts)
    repeated = dict[int, int]()
    for place in range(FOLDERS_PER_TABLE):
        bit = np.uint64(1 << place)
        number = int(np.count_nonzero(keys["mask"] & bit)) - int(np.count_nonzero(each & bit))
        if number:
            repeated[place] = number
    return repeated
