"""What `pack` made of the samples that go: which final shard counts each, and what it counted."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.pack.final_shard import final_members
from pipeline.pack.selection import SampleSelector, SelectionConfig, ShardRange
from pipeline.takedown.records import CountChange
from shards_spec.files import exists, join, read_buffer
from shards_spec.layout import PLAN, RAW, SHARDS, plan_parquet, raw_tar
from shards_spec.manifest import finished_shards, read_done
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_sample

RANGE = re.compile(r"(\d+)\[(\d+):(\d+)\]")  # of a record's input "samples"
RAW_TAR = re.compile(rf"{RAW}/(\d+)\.tar")


@dataclass(frozen=True)
class _PackedRange:
    """Rows ``start`` to ``stop`` (None: the end) of a raw shard that a final shard was made of."""

    start: int
    stop: int | None
    final: int


def pack_outcomes(root: str, keys_by_shard: Mapping[int, set[str]]) -> dict[int, CountChange]:
    """What each final shard's counts and facts lose with these samples of raw tars, apart from those it has packed.

    Captions or lists that pack read and that are gone since leave the facts, and the counts of dropped samples, as they
    are. Raises DataError for a broken file.
    """
    changes = dict[int, CountChange]()
    ranges = _ranges(root)
    if not ranges:
        return changes
    done = read_done(join(root, SHARDS), min(packed.final for packed in next(iter(ranges.values()))))
    if done is None:
        return changes
    selection = SelectionConfig.of_record(root, done.config)
    for shard, keys in keys_by_shard.items():
        inputs = [path for _, path in selection.inputs(shard)]
        if not all(exists(join(root, path)) for path in inputs):
            continue
        places = _places(root, shard, keys)
        selector = SampleSelector(root, ShardRange(shard, keys=tuple(keys)), selection)
        for number, sample in _samples(raw_tar(root, shard), keys):
            final = _final_of(ranges.get(shard, []), places.get(sample.key, number))
            if final is not None:
                changes.setdefault(final, CountChange()).add(_outcome(selector, sample))
    return changes


def _samples(path: str, keys: set[str]) -> Iterator[tuple[int, Sample]]:
    """Number and content of the samples of some keys in a tar."""
    with read_buffer(path) as buffer:
        for number, (key, members) in enumerate(index_shard(buffer, path)):
            if key in keys:
                yield number, read_sample(buffer, key, members)


def _ranges(root: str) -> dict[int, list[_PackedRange]]:
    """Raw shard to the ranges of it that final shards were made of, by their done-records."""
    ranges = defaultdict[int, list[_PackedRange]](list)
    for final in finished_shards(join(root, SHARDS)):
        done = read_done(join(root, SHARDS), final)
        inputs: dict[str, Any] = done.inputs if done else {}
        if "samples" in inputs:
            for shard, start, stop in RANGE.findall(inputs["samples"]):
                ranges[int(shard)].append(_PackedRange(int(start), int(stop), final))
            continue
        for path in inputs:
            if match := RAW_TAR.fullmatch(path):
                ranges[int(match[1])].append(_PackedRange(0, None, final))
    return ranges


def _places(root: str, shard: int, keys: set[str]) -> dict[str, int]:
    """Key to row of a raw shard's plan, which earlier takedowns do not shift; empty without a plan."""
    path = plan_parquet(root, shard)
    if not exists(join(root, PLAN)) or not exists(path):
        return {}
    rows = read_table(path, ["key"]).column("key").to_pylist()
    return {key: row for row, key in enumerate(rows) if key in keys}


def _final_of(ranges: list[_PackedRange], place: int) -> int | None:
    for packed in ranges:
        if packed.start <= place and (packed.stop is None or place < packed.stop):
            return packed.final
    return None


def _outcome(selector: SampleSelector, sample: Sample) -> CountChange:
    """What a sample's final shard counted for it, with the sign that takes it away; not that it was packed."""
    selected = selector.select(sample)
    if isinstance(selected, str):
        return CountChange(Counter({selected: -1}))
    final_members(sample, selected, [])  # for its note on what the json member could not keep
    return CountChange(facts=Counter({note: -selected.notes.count(note) for note in selected.notes}))
