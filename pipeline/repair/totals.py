"""``dataset.json`` written again from what is sound in it and from the done-records."""

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from pipeline.check.records import Totals
from pipeline.core.runner import VERSIONED_PACKAGES
from pipeline.repair.recorded import Recorded, RecordedBlock, is_foreign, sound_record
from shards_spec import SPEC_VERSION
from shards_spec.files import exists, join, sha256_json, write_json
from shards_spec.layout import STAGES, dataset_json, stage_output
from shards_spec.manifest import SEAL, finished_shards, head_seal, seal, write_stage


def write_dataset(recorded: Recorded) -> None:
    """Write the head and the sound blocks; those of other stages follow when their shards are whole."""
    dataset: dict[str, Any] = {
        "spec_version": SPEC_VERSION,
        "name": recorded.name,
        "source": recorded.source,
        "stages": {key: {**block, SEAL: seal(block)} for key, block in sorted(recorded.blocks.items())},
    }
    write_json(dataset_json(recorded.root), {**dataset, SEAL: head_seal(dataset)})


def block_of_records(root: str, key: str) -> RecordedBlock | None:
    """The block that a stage's records add up to; None when one is damaged, another tool's, or none is there."""
    shards = finished_shards(join(root, stage_output(key) or ""))
    totals = Totals()
    for shard in shards:
        done = sound_record(root, key, shard)
        if done is None:
            return None
        totals.add(shard, done)
    if not shards or shards != list(range(len(shards))):
        return None
    first = sound_record(root, key, shards[0])
    assert first is not None  # it was sound a moment ago
    facts = _positive(totals.facts)
    return {
        "config": first.config,
        "config_sha256": sha256_json(first.config),
        "shards": len(shards),
        "counts": _positive(totals.counts),
        **({"facts": facts} if facts else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED_PACKAGES}},
    }


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {reason: number for reason, number in sorted(counts.items()) if number}


def update_block(recorded: Recorded, key: str, *, dry_run: bool) -> bool:
    """Write a stage's block when the one that is there is damaged or does not fit the records; whether it did not."""
    block = block_of_records(recorded.root, key)
    if block is None:
        return False
    before = recorded.blocks.get(key)
    if before is not None and before.get("shards", 0) > block["shards"]:
        return False  # a shard is gone and was not made again: that must stay a problem
    names = ("config", "shards", "counts", "facts")
    if before is not None and all(_same(before.get(name), block.get(name)) for name in names if name in before):
        return False
    if not dry_run:
        write_stage(recorded.root, key, block)
        recorded.blocks[key] = block
    return True


def _same(one: Any, other: Any) -> bool:
    """Whether two fields of blocks say the same: no facts are as good as none that count something."""
    drop_zeros = isinstance(one, dict) and all(isinstance(number, int) for number in one.values())
    return ({what: number for what, number in one.items() if number} if drop_zeros else one) == (other or {})


def is_ours(recorded: Recorded) -> bool:
    """Whether the dataset has, or had, a ``dataset.json`` of ours: not when all of it is img2dataset's raw shards."""
    if exists(dataset_json(recorded.root)):
        return True
    raw = finished_shards(join(recorded.root, STAGES["ingest"].writes))
    others = [key for key in recorded.stages() if key != "ingest"]
    return bool(others) or any(not is_foreign(recorded.root, shard) for shard in raw)
