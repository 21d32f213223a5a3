"""Stage `dedup`: duplicate images over all raw shards → ROOT/dedup, lists of the samples that pack leaves out.

The columns that are compared lie in temporary files of 8 bytes an image each and are read in buckets of the hash space,
so memory does not grow with the dataset; images are read only where a raw shard has no hashes of them, and to verify
near-duplicates.
"""

from collections import Counter

from pipeline.core.runner import (
    RunOptions,
    ShardResult,
    ShardsFailed,
    ShardTask,
    Stage,
    Summary,
    run_stage,
    upstream_shards,
)
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.drop_list import hash_raw_shards, write_drop_list
from pipeline.dedup.search import DuplicateSearch
from shards_spec.files import DataError
from shards_spec.layout import DEDUP, RAW

VERIFICATION = 1  # version of the rules by which images confirm what signatures say (`fingerprints_match`)


def dedup(config: DedupConfig, images_in_memory: int | None = None) -> Summary:
    """Run the stage.

    Memory: that of ``images_in_memory`` images (by default as many as the config allows) and three numbers a shard.

    Raises UserError, ShardsFailed.
    """
    shards = upstream_shards(config.root, RAW, "ingest")
    inputs = {"raw": hash_raw_shards(config.root, shards)}
    rule = {"second_check": VERIFICATION} if config.near_bits >= 0 else {}
    stage = Stage("dedup", DEDUP, {"near_bits": config.near_bits, **rule})
    tasks = (ShardTask(shard, inputs) for shard in shards)
    options = RunOptions(total=len(shards), overwrite=config.overwrite)
    with DuplicateSearch(config, shards, images_in_memory or config.images_in_memory) as search:
        return run_stage(config.root, stage, tasks, _ListWriter(search), options)


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
