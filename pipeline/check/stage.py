"""`clipmill check`: validates a dataset shard by shard and names the first broken key of every broken file."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.check.config import CheckConfig
from pipeline.check.listing import FolderListing
from pipeline.check.parts import Part, PartCheck, PartNames
from pipeline.check.records import Findings, check_classes, check_dataset, check_vocabularies
from pipeline.check.total import Total
from pipeline.check.validators import shard_folders
from pipeline.core.process_map import map_in_order
from pipeline.core.taken_down import TAKEN_DOWN_SAMPLES, check_takedown_hashes
from shards_spec.files import DataError, exists, join, read_json
from shards_spec.layout import RAW, SHARDS, TAKEDOWN, dataset_json, shard_name, sizes_json, tar_path
from shards_spec.manifest import Done, check_no_takedown, finished_shards, read_done
from shards_spec.messages import counted

SAMPLES_PER_WORKER = 5_000  # that are checked in the seconds that another process takes to start
ASSUMED_SAMPLES = 500  # of a shard, where no block says how many there are


def check(config: CheckConfig) -> list[str]:
    """Problems found, each naming file and key; empty for a valid dataset.

    Memory: a few numbers a shard and, in each process, the shards of one number in all folders. Keys of more than two
    million samples are compared in a temporary folder, 16 to 32 bytes each.
    """
    root = config.root
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        return [f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset"]
    findings, blocks = begin(root)
    whole = DatasetParts(root, blocks)
    sum_up(whole, map_in_order(whole.check, whole.names(), whole.processes(config.workers)), findings)
    return findings.problems


def begin(root: str) -> tuple[Findings, dict[str, Any] | None]:
    """What is found before any shard, and the blocks of ``dataset.json`` as `check_dataset` gives them."""
    findings = Findings()
    with findings.of(join(root, TAKEDOWN)):
        check_no_takedown(root)
        check_takedown_hashes(root)
    return findings, check_dataset(root, findings)


def sum_up(whole: "DatasetParts", parts: Iterable[Part], findings: Findings) -> None:
    """Add what is found out of all parts of a dataset, in ascending order, and of the files that are no shard's."""
    root, blocks = whole.check.root, whole.blocks
    with tempfile.TemporaryDirectory(prefix="clipmill-check-") as scratch:
        total = Total(whole.check.folders, scratch)
        for part in parts:
            total.add(part)
        total.report(root, whole.listings, blocks, findings)
    with findings.of(sizes_json(root)):
        _check_sizes(root, blocks or {}, findings)
    check_classes(root, blocks or {}, findings)
    check_vocabularies(root, blocks or {}, findings)


class DatasetParts:
    """What a dataset is checked in: ``shards`` are all numbers that a folder has a finished shard of.

    ``blocks`` are those of its ``dataset.json``, {} where there is none, None where it is broken.
    """

    def __init__(self, root: str, blocks: dict[str, Any] | None) -> None:
        folders = tuple(shard_folders(root))
        self.blocks = blocks
        expected = {stage: block.get("shards", 0) for stage, block in (blocks or {}).items()}
        self.listings = {folder: FolderListing(root, folder, expected.get(stage, 0)) for folder, stage, _ in folders}
        self.check = PartCheck(root, folders, (blocks or {}).get("pack", {}))
        numbers = [listing.shards for listing in self.listings.values()]
        self.shards: list[int] = np.unique(np.concatenate([np.empty(0, np.int64), *numbers])).tolist()

    def names(self) -> Iterator[PartNames]:
        """The names of each part's files."""
        return map(self.names_of, self.shards)

    def names_of(self, shard: int) -> PartNames:
        """The names of one part's files."""
        has_it = {folder: listing for folder, listing in self.listings.items() if listing.has(shard)}
        return PartNames(shard, {folder: listing.names_of(shard) for folder, listing in has_it.items()})

    def processes(self, workers: int) -> int:
        """How many of ``workers`` processes are worth their start."""
        counts = [sum(block.get("counts", {}).values()) for block in (self.blocks or {}).values()]
        samples = max(counts, default=0) or ASSUMED_SAMPLES * len(self.shards)
        return max(1, min(workers, len(self.shards), samples // SAMPLES_PER_WORKER))


def _check_sizes(root: str, blocks: dict[str, Any], findings: Findings) -> None:
    """``shards/sizes.json`` against the final shards. Raises DataError when it is not there or no table of sizes."""
    path = sizes_json(root)
    if not exists(join(root, SHARDS)):
        return
    shards = finished_shards(join(root, SHARDS))
    expected = max(blocks.get("pack", {}).get("shards", 0), shards[-1] + 1 if shards else 0)
    if not exists(path):
        if len(shards) < expected:  # which is reported
            return
        raise DataError(f"{path}: is not there; `clipmill pack` has not finished")
    sizes = read_json(path)
    if not isinstance(sizes, dict):
        raise DataError(f"{path}: no object of sizes; delete it and run `clipmill pack` again")
    tars = {shard: tar_path(SHARDS, shard).removeprefix(f"{SHARDS}/") for shard in shards}
    for shard, tar in tars.items():
        done: Done | None = None
        with contextlib.suppress(DataError):  # `check_record` has reported it
            done = read_done(join(root, SHARDS), shard)
        if done is not None and done.shard == shard:
            _check_size(path, tar, done, listed=sizes.get(tar), is_last=shard == shards[-1], findings=findings)
    if unknown := sorted(set(sizes) - {f"{shard_name(shard)}.tar" for shard in range(expected)}):
        findings.add(f"{path}: {unknown[0]} is not there; delete the file and run `clipmill pack` again")
    planned, packed = (blocks.get(name, {}).get("counts") for name in ("plan", "pack"))
    if planned is not None and planned != packed:
        findings.add(f"{dataset_json(root)}: plan says {planned}, pack {packed}; run `clipmill pack` again")


def _check_size(path: str, tar: str, done: Done, *, listed: Any, is_last: bool, findings: Findings) -> None:
    """One final shard: what ``sizes.json`` lists, and the size that `pack --shard-size` asked for."""
    samples = done.successes
    places = samples + done.counters.get(TAKEN_DOWN_SAMPLES, 0)
    if listed != samples:
        findings.add(f"{path}: {tar} has {counted(samples, 'sample')}, the file says {listed}")
    wanted = done.config.get("shard_size")
    if not wanted or places == wanted or (is_last and places <= wanted):
        return
    findings.add(f"{path}: {tar} has {counted(samples, 'sample')}, not {wanted}; run `clipmill pack` again")
