"""The rules of `select` that look at all samples at once, and what they found.

They follow the rules that look at one sample at a time, on drafts of the selections that those leave
(`pipeline.select.survey`): semantic duplicates first, then the best share, then the balance.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.select.balance import EntryCounts, count_entries
from pipeline.select.expression import numbers_of
from pipeline.select.facts import ShardFacts
from pipeline.select.semantic_duplicates import DuplicateRule
from pipeline.select.top_share import TopShare, Values, find_top_share
from shards_spec.files import DataError, UserError, read_json
from shards_spec.manifest import SEAL, seal
from shards_spec.selection import ShardSelection

log = logging.getLogger(__name__)
NOT_BALANCED = "not drawn by --balance"  # reasons on disk
SEMANTIC_DUPLICATE = "semantic duplicate"
NO_ENTRY = "no synset in the caption"


@dataclass(frozen=True)
class DatasetRules:
    """What the options ask for; None where a rule is not asked for. Sent to worker processes."""

    duplicates: DuplicateRule | None = None
    top: float | None = None
    by: str | None = None
    balance: int | None = None
    seed: int = 0

    def __bool__(self) -> bool:
        return self.duplicates is not None or self.top is not None or self.balance is not None

    def describe(self) -> dict[str, Any]:
        """What a done-record says of them; the duplicates' teacher is the first of its teachers."""
        about = dict[str, Any]()
        if self.duplicates is not None:
            about |= {"semantic_duplicates": self.duplicates.above, "cells": self.duplicates.cells}
        if self.top is not None:
            about |= {"top": self.top, "by": self.by}
        if self.balance is not None:
            about |= {"balance": self.balance, "seed": self.seed}
        return about

    def not_best(self, top: TopShare) -> str:
        """A reason on disk, which names the threshold."""
        begins = "" if top.threshold is None else f", which begins at {top.threshold:.4g}"
        return f"not in the top {self.top} by {self.by}{begins}"


@dataclass(frozen=True)
class Draft:
    """The selection of a shard by the rules of one sample, and what the rules of all samples need.

    ``values`` float64 (n,): the fact that the best share is by, NaN where not known. ``entries``: the synsets of each
    sample's caption, each once; None where no rule needs them. ``repeated``: rows that repeat a sample that stays, and
    that one's key; empty before they are known.
    """

    selection: ShardSelection
    values: np.ndarray
    entries: pa.ListArray
    repeated: dict[int, str]

    @property
    def rows(self) -> np.ndarray:
        """The rows that stay, int64 (n,)."""
        return kept_rows(self.selection.reasons)


@dataclass(frozen=True)
class Verdict:
    """What the rules found in all samples; a rule that is not asked for, or not applied yet, is None.

    ``repeated`` maps paths below ROOT, of the files with the samples that repeat another, to their sha256.
    """

    top: TopShare | None = None
    entries: EntryCounts | None = None
    repeated: dict[str, str] = field(default_factory=dict)

    def apply(self, draft: Draft, rules: DatasetRules) -> ShardSelection:
        """The selection of a shard."""
        reasons = list(draft.selection.reasons)
        pairs = draft.selection.pairs
        if rules.duplicates is not None:
            _leave_out(reasons, np.array([*draft.repeated], np.int64), SEMANTIC_DUPLICATE)
            pairs = [draft.repeated.get(row, own) for row, own in enumerate(pairs or [None] * len(reasons))]
        rows = kept_rows(reasons)
        if self.top is not None:
            keeps = self.top.keeps(draft.values[rows], [draft.selection.keys[row] for row in rows])
            _leave_out(reasons, rows[~keeps], rules.not_best(self.top))
            rows = rows[keeps]
        if self.entries is not None:
            own = draft.entries.take(pa.array(rows)).to_pylist()
            keeps = self.entries.keeps(own, [draft.selection.keys[row] for row in rows])
            _leave_out(reasons, rows[~keeps], NOT_BALANCED)
            _leave_out(reasons, rows[[not entries for entries in own]], NO_ENTRY)
        captions = [None if own else shown for own, shown in zip(reasons, draft.selection.captions, strict=True)]
        copies = np.where([reason is None for reason in reasons], draft.selection.copies, 0).astype(np.uint8)
        return ShardSelection(draft.selection.keys, copies, reasons, captions, pairs)

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """As `read_verdict` takes it; ``fingerprint`` is of the rules and the samples."""
        stored = {
            "fingerprint": fingerprint,
            "top": self.top and asdict(self.top),
            "entries": self.entries and asdict(self.entries),
            "repeated": self.repeated,
        }
        return stored | {SEAL: seal(stored)}


def read_verdict(path: str, fingerprint: str) -> Verdict | None:
    """The verdict in a file; None when it is not there, damaged, or of other samples or rules."""
    try:
        stored = read_json(path)
    except (FileNotFoundError, DataError):
        return None
    if not isinstance(stored, dict) or stored.get(SEAL) != seal(stored) or stored.get("fingerprint") != fingerprint:
        return None
    top, entries = stored["top"], stored["entries"]
    return Verdict(TopShare(**top) if top else None, EntryCounts(**entries) if entries else None, stored["repeated"])


def judge(rules: DatasetRules, read: Callable[[], Iterable[Draft]]) -> Verdict:
    """What the rules find in all drafts, which ``read`` gives every time it is called. Raises UserError.

    One rule follows the other, on what those before leave; what repeats a sample is known by the drafts.
    """
    verdict = Verdict()
    if rules.top is not None:
        top = find_top_share(rules.top, lambda: (_values(draft, verdict, rules) for draft in read()))
        if top.samples and not top.kept:
            raise UserError(f"--by {rules.by}: no sample has a number there; name a fact that is one")
        log.info("select: the best %d of %d samples, %s from %s on", top.kept, top.samples, rules.by, top.threshold)
        verdict = Verdict(top=top)
    if rules.balance is not None:
        kept = (draft.entries.take(pa.array(_rows_left(draft, verdict, rules))) for draft in read())
        verdict = Verdict(verdict.top, EntryCounts(count_entries(kept), rules.balance, rules.seed))
    return verdict


def _values(draft: Draft, verdict: Verdict, rules: DatasetRules) -> Values:
    rows = _rows_left(draft, verdict, rules)
    return draft.values[rows], [draft.selection.keys[row] for row in rows]


def _rows_left(draft: Draft, verdict: Verdict, rules: DatasetRules) -> np.ndarray:
    return kept_rows(verdict.apply(draft, rules).reasons)


def values_of(facts: ShardFacts, name: str) -> np.ndarray:
    """float64 (n,): a fact as numbers, NaN where not known. Raises UserError for one that has none."""
    try:
        values = numbers_of(facts.of_samples(name))
    except pa.ArrowException as error:
        raise UserError(f"--by {name}: no number ({str(error).splitlines()[0]}); name a fact that is one") from error
    numbers: np.ndarray = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
    return numbers


def entries_of(facts: ShardFacts) -> list[list[str]]:
    """The synsets of each sample's original caption, or where it has none of its first other one; each once."""
    entries = []
    for texts, synsets in zip(facts.texts, facts.synsets, strict=True):
        first = next((own for text, own in zip(texts, synsets, strict=True) if text.strip()), [])
        entries.append(sorted(set(first)))
    return entries


def kept_rows(reasons: list[str | None]) -> np.ndarray:
    """The rows without a reason to be left out, int64 (n,)."""
    return np.flatnonzero([reason is None for reason in reasons])


def _leave_out(reasons: list[str | None], rows: np.ndarray, reason: str) -> None:
    for row in rows.tolist():
        reasons[row] = reason
