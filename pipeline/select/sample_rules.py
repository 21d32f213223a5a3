"""The rules of `select` that look at one sample at a time: lists of samples, conditions of samples and captions."""

from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np

from pipeline.select.against import Against, find_copies
from pipeline.select.expression import FactCondition
from pipeline.select.facts import FactSources, ShardFacts
from pipeline.select.sample_lists import SampleList
from shards_spec.counter_rng import uniform_draws
from shards_spec.files import UserError
from shards_spec.selection import MOST_COPIES, ShardSelection

NO_CAPTION = "no caption meets --captions-where"  # reasons on disk
NOT_LISTED = "not in the list of --from"
DROPPED = "in the list of --drop"
NOT_DRAWN = "not drawn by --weight"


@dataclass(frozen=True)
class Weights:
    """How often an epoch has a sample: a number of its facts, whose part behind the point is drawn by seed and key."""

    number: FactCondition
    seed: int

    def copies(self, facts: ShardFacts) -> np.ndarray:
        """Of each sample, uint8 (n,): 0 also for a number that is not known or below 0. Raises UserError above 255."""
        numbers = np.nan_to_num(self.number.numbers(facts.of_samples, len(facts)), nan=0.0, posinf=np.inf).clip(0)
        if (numbers > MOST_COPIES).any():
            row = int((numbers > MOST_COPIES).argmax())
            raise UserError(
                f"--weight {self.number.text!r}: {numbers[row]:g} for key {facts.keys[row]}; an epoch can have a "
                f"sample {MOST_COPIES} times, give smaller weights"
            )
        draws = np.array([uniform_draws(f"{self.seed}/weight/{key}", 1)[0] for key in facts.keys])
        copies: np.ndarray = (np.floor(numbers) + (draws < numbers % 1)).astype(np.uint8)
        return copies


@dataclass(frozen=True)
class SampleRules:
    """What a sample and its captions have to meet; sent to worker processes."""

    conditions: tuple[FactCondition, ...]
    caption_conditions: tuple[FactCondition, ...]
    sources: FactSources
    only: SampleList | None = None
    without: SampleList | None = None
    against: Against | None = None
    weights: Weights | None = None

    def describe(self) -> dict[str, Any]:
        """What a done-record says of them."""
        lists = {"from": self.only, "drop": self.without}
        return {
            "where": [condition.text for condition in self.conditions],
            "captions_where": [condition.text for condition in self.caption_conditions],
            "teacher": list(self.sources.teachers),
            "captioner": self.sources.captioner,
            **{name: list(own.hashes) for name, own in lists.items() if own is not None},
            **(self.against.describe() if self.against else {}),
            **({"weight": self.weights.number.text, "seed": self.weights.seed} if self.weights else {}),
        }

    def apply(self, facts: ShardFacts) -> ShardSelection:
        """Which samples and captions of a shard meet the rules; a reason is the first rule that is not met."""
        reasons = _listed(facts, self)
        for condition in self.conditions:
            holds = condition.holds(facts.of_samples, len(facts)).to_pylist()
            reasons = [own or (None if meets else condition.reason) for own, meets in zip(reasons, holds, strict=True)]
        pairs: list[str | None] | None = None
        if self.against is not None:
            kept = [row for row, reason in enumerate(reasons) if reason is None]
            copied = find_copies(facts.root, facts.shard, facts.keys, kept, self.against)
            reasons = [copied[row].reason if row in copied else own for row, own in enumerate(reasons)]
            pairs = [copied[row].pair if row in copied else None for row in range(len(facts))]
        captions = _captions(facts, self.caption_conditions)
        reasons = [own or (NO_CAPTION if shown == [] else None) for own, shown in zip(reasons, captions, strict=True)]
        copies = np.ones(len(facts), np.uint8) if self.weights is None else self.weights.copies(facts)
        reasons = [own or (None if times else NOT_DRAWN) for own, times in zip(reasons, copies.tolist(), strict=True)]
        captions = [None if own else shown for own, shown in zip(reasons, captions, strict=True)]
        copies[[reason is not None for reason in reasons]] = 0
        return ShardSelection(facts.keys, copies, reasons, captions, pairs)


def _listed(facts: ShardFacts, rules: SampleRules) -> list[str | None]:
    """Why each sample is left out by the lists, if it is."""
    reasons: list[str | None] = [None] * len(facts)
    if rules.without is not None:
        reasons = [DROPPED if dropped else None for dropped in rules.without.has(facts).tolist()]
    if rules.only is not None:
        listed = rules.only.has(facts).tolist()
        reasons = [own or (None if is_listed else NOT_LISTED) for own, is_listed in zip(reasons, listed, strict=True)]
    return reasons


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
