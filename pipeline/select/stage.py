"""Stage `select`: final shards and what is known of them → ROOT/select/NAME, which `train` and `pack` obey.

Nothing is rewritten: a selection is a list beside each final shard.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from typing import Any

import numpy as np

from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardTask,
    Stage,
    Summary,
    run_stage,
    upstream_shards,
)
from pipeline.select.against import Against, find_copies, index_of
from pipeline.select.config import SelectConfig
from pipeline.select.expression import FactCondition, check_names
from pipeline.select.facts import FactSources, ShardFacts, find_sources, shard_inputs
from shards_spec.files import UserError
from shards_spec.layout import SHARDS, select_folder
from shards_spec.manifest import read_dataset
from shards_spec.selection import CAPTIONS_OF, COPIES, ShardSelection, captions_of, write_selection

NO_CAPTION = "no caption meets --captions-where"  # a reason on disk


@dataclass(frozen=True)
class Rules:
    """What a sample and its captions have to meet; sent to worker processes."""

    conditions: tuple[FactCondition, ...]
    caption_conditions: tuple[FactCondition, ...]
    sources: FactSources
    against: Against | None = None

    def describe(self) -> dict[str, Any]:
        """What a done-record says of them."""
        return {
            "where": [condition.text for condition in self.conditions],
            "captions_where": [condition.text for condition in self.caption_conditions],
            "teacher": list(self.sources.teachers),
            "captioner": self.sources.captioner,
            **({"against": self.against.sets} if self.against else {}),
        }


def select(config: SelectConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError, ShardsFailed."""
    root, name = config.root, config.name
    shards = upstream_shards(root, SHARDS, "pack")
    packed = read_dataset(root)["stages"].get("pack", {}).get("config", {})
    if packed.get("select") == name:
        raise UserError(f"--name {name}: `clipmill pack --select {name}` made these shards by it; take another name")
    with index_of(config.against, root, config.workers) as against:
        rules = replace(_rules(config, shards), against=against)
        identity = {**rules.describe(), CAPTIONS_OF: captions_of(packed)}
        stage = Stage(f"select/{name}", select_folder(name), identity)
        tasks = _tasks(root, shards, rules.sources, assignment)
        work = partial(select_shard, name=name, rules=rules)
        options = RunOptions(
            workers=min(config.workers, len(shards)),
            assignment=assignment,
            overwrite=config.overwrite,
            total=len(shards),
        )
        return run_stage(root, stage, tasks, work, options)


def _rules(config: SelectConfig, shards: list[int]) -> Rules:
    conditions, caption_conditions = config.conditions, config.caption_conditions
    if not conditions and not caption_conditions and not config.against:
        raise UserError("select needs a rule: give --where, --captions-where or --against")
    available = find_sources(config.root, config.teacher, config.captioner, shards)
    check_names(conditions, available.of_samples, "of samples")
    check_names(caption_conditions, available.of_captions, "of captions")
    sources = available.needed(_names(conditions), _names(caption_conditions))
    return Rules(conditions, caption_conditions, sources)


def _names(conditions: tuple[FactCondition, ...]) -> set[str]:
    return set[str]().union(*(condition.names() for condition in conditions))


def _tasks(root: str, shards: list[int], sources: FactSources, assignment: ShardAssignment) -> Iterator[ShardTask]:
    for shard in filter(assignment.claim, shards):
        yield ShardTask(shard, shard_inputs(root, shard, sources))


def select_shard(root: str, task: ShardTask, *, name: str, rules: Rules) -> ShardResult:
    """Write the selection of one final shard. Raises DataError when a file is broken or of another shard."""
    selection = apply_rules(ShardFacts(root, task.shard, rules.sources), rules)
    outputs = write_selection(root, name, task.shard, selection)
    counts = Counter(reason for reason in selection.reasons if reason is not None)
    counts["success"] = int((selection.copies > 0).sum())
    return ShardResult(dict(+counts), outputs, counters={COPIES: int(selection.copies.sum(dtype=np.int64))})


def apply_rules(facts: ShardFacts, rules: Rules) -> ShardSelection:
    """Which samples and captions of a shard meet the rules; a reason is the first rule that is not met."""
    reasons: list[str | None] = [None] * len(facts)
    for condition in rules.conditions:
        holds = condition.holds(facts.of_samples, len(facts)).to_pylist()
        reasons = [own or (None if meets else condition.reason) for own, meets in zip(reasons, holds, strict=True)]
    pairs: list[str | None] | None = None
    if rules.against is not None:
        kept = [key for key, reason in zip(facts.keys, reasons, strict=True) if reason is None]
        copied = find_copies(facts.root, facts.shard, kept, rules.against)
        reasons = [copied[key].reason if key in copied else own for key, own in zip(facts.keys, reasons, strict=True)]
        pairs = [copied[key].pair if key in copied else None for key in facts.keys]
    captions = _captions(facts, rules.caption_conditions)
    reasons = [own or (NO_CAPTION if shown == [] else None) for own, shown in zip(reasons, captions, strict=True)]
    captions = [None if own else shown for own, shown in zip(reasons, captions, strict=True)]
    copies = np.array([reason is None for reason in reasons], np.uint8)
    return ShardSelection(facts.keys, copies, reasons, captions, pairs)


def _captions(facts: ShardFacts, conditions: tuple[FactCondition, ...]) -> list[list[int] | None]:
    """The captions of each sample that meet all conditions; None where all do."""
    if not conditions:
        return [None] * len(facts)
    shown = np.array([bool(text.strip()) for text in chain.from_iterable(facts.texts)], bool)
    for condition in conditions:
        shown &= condition.holds(facts.of_captions, len(shown)).to_numpy(zero_copy_only=False)
    by_sample: list[list[int]] = [[] for _ in range(len(facts))]
    for owner, number in zip(compress(facts.owners, shown), compress(facts.numbers, shown), strict=True):
        by_sample[int(owner)].append(int(number))
    written = [sum(bool(text.strip()) for text in texts) for texts in facts.texts]
    return [None if own and len(own) == all_of else own for own, all_of in zip(by_sample, written, strict=True)]
