"""Stage `dedup`: duplicate images over all raw shards → ROOT/dedup, lists of the samples that pack leaves out.

The columns that are compared lie in temporary files of 8 bytes an image each and are read in buckets of the hash space,
so memory does not grow with the dataset. They come from a part of each raw shard; images are read only where a raw
shard has no hashes of them, and to verify near-duplicates.
"""

import contextlib
from collections import Counter
from functools import partial

from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardsFailed,
    ShardTask,
    Stage,
    Summary,
    read_compatible_record,
    run_stage,
    upstream_shards,
)
from pipeline.core.workers import workers_for
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.drop_list import hash_raw_shards, write_drop_list
from pipeline.dedup.raw_images import must_decode, signature_tasks, write_signatures
from pipeline.dedup.search import DuplicateSearch
from shards_spec.files import DataError, join
from shards_spec.layout import DEDUP, RAW, STAGES
from shards_spec.lock import locked
from shards_spec.manifest import finished_shards, remove_parts

LOCK = ".dedup.lock"  # below ROOT
VERIFICATION = 1  # version of the rules by which images confirm what signatures say (`fingerprints_match`)


def dedup(config: DedupConfig, assignment: ShardAssignment = ALL, *, images_in_memory: int | None = None) -> Summary:
    """Hash the images of each raw shard of the assignment; then compare those of all shards and write the lists.

    An assignment of some shards returns what it did of them. Memory: that of ``images_in_memory`` images (by default as
    many as the config allows) and three numbers a shard.

    Raises UserError, also when another process runs the stage on this ROOT, and ShardsFailed.
    """
    shards = upstream_shards(config.root, RAW, "ingest")
    path = join(config.root, LOCK)
    with locked(path, join(config.root, DEDUP), shared=not assignment.is_complete):
        return _dedup(config, assignment, shards, images_in_memory or config.images_in_memory)


def _dedup(config: DedupConfig, assignment: ShardAssignment, shards: list[int], images_in_memory: int) -> Summary:
    root = config.root
    rule = {"second_check": VERIFICATION} if config.near_bits >= 0 else {}
    stage = Stage("dedup", DEDUP, {"near_bits": config.near_bits, **rule})
    listed = [] if config.overwrite else _listed(root, stage)
    inputs = {"raw": hash_raw_shards(root, shards)} if assignment.is_complete or listed == shards else {}
    is_fresh = listed == shards and all(_is_fresh(root, stage, shard, inputs) for shard in shards)
    parts = Stage("dedup", STAGES["dedup"].array_folder(), {})
    hashed = _make_parts(config, parts, [] if is_fresh else shards, assignment)
    if not assignment.is_complete:
        return hashed
    tasks = (ShardTask(shard, inputs) for shard in shards)
    options = RunOptions(total=len(shards), overwrite=config.overwrite)
    with DuplicateSearch(config, shards, parts.folder, images_in_memory) as search:
        summary = run_stage(root, stage, tasks, _ListWriter(search), options)
    remove_parts(join(root, parts.folder))
    return summary


def _listed(root: str, stage: Stage) -> list[int]:
    """The shards that have a list. Raises UserError when the first of them was made by other rules."""
    folder = join(root, stage.folder)
    listed = finished_shards(folder)
    if listed:
        read_compatible_record(folder, stage, listed[0])
    return listed


def _is_fresh(root: str, stage: Stage, shard: int, inputs: dict[str, str]) -> bool:
    done = read_compatible_record(join(root, stage.folder), stage, shard)
    return done is not None and done.inputs == inputs


def _make_parts(config: DedupConfig, parts: Stage, shards: list[int], assignment: ShardAssignment) -> Summary:
    """Hash the images of these raw shards, in worker processes when they must be decoded."""
    root, with_signatures = config.root, config.near_bits >= 0
    workers = workers_for(len(shards), config.workers)
    with contextlib.suppress(DataError):  # of the first shard: its task says so
        if shards and must_decode(root, shards[0], with_signatures):
            workers = min(config.workers, len(shards))
    return run_stage(
        root,
        parts,
        signature_tasks(root, filter(assignment.claim, shards), with_signatures=with_signatures),
        partial(write_signatures, folder=parts.folder, with_signatures=with_signatures),
        RunOptions(workers=workers, assignment=assignment, total=len(shards), totals=False),
    )


class _ListWriter:
    """Writes the list of one shard after the other; the search runs when the first one is needed."""

    def __init__(self, search: DuplicateSearch) -> None:
        self._search = search
        self._searched = False

    def __call__(self, root: str, task: ShardTask) -> ShardResult:
        """Write one shard's list. Raises ShardsFailed when any raw shard is broken: no list can be made then."""
        if not self._searched:
            try:
                self._search.run()
            except DataError as error:
                raise ShardsFailed(f"dedup: a raw shard is broken\n  {error}") from error
            self._searched = True
        dropped = self._search.dropped(task.shard)
        counts = Counter(sample.reason for sample in dropped)
        counts["success"] = self._search.number_of_images(task.shard) - len(dropped)
        return ShardResult(dict(+counts), write_drop_list(root, task.shard, dropped))
