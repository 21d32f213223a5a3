"""Done-records and ``dataset.json`` after a takedown: counts less what went, hashes of the new files."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ingest.images import RESIZE
from shards_spec.manifest import SEAL, head_seal, seal, stats_seal

SUCCESS = "success"


@dataclass
class CountChange:
    """What is added to a record's counts of inputs by outcome, and to its facts; mostly negative numbers."""

    counts: Counter[str] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "CountChange") -> None:
        """Add another one's numbers."""
        for own, more in ((self.counts, other.counts), (self.facts, other.facts)):
            for name, number in more.items():
                own[name] += number

    def __bool__(self) -> bool:
        return any(self.counts.values()) or any(self.facts.values())


def renew_stats(
    stats: dict[str, Any], change: CountChange, hashes: Mapping[str, tuple[str, str]], inputs: Mapping[str, str]
) -> bool:
    """Bring a shard's stats up to date; returns whether anything changed.

    ``hashes`` maps paths below ROOT to the hashes before and after: a record that names another hash than the one
    before was made from other files, and stays so. ``inputs`` are further inputs by name. Stats that another tool
    wrote have counts alone.
    """
    before = repr(stats)
    counts = Counter(stats["status_dict"])
    for reason, number in change.counts.items():
        counts[reason] += number
    resized = sum(number for reason, number in change.counts.items() if reason.startswith(RESIZE))
    stats["status_dict"] = {reason: number for reason, number in sorted(counts.items()) if number}
    stats["count"] += change.counts.total()
    stats["successes"] += change.counts[SUCCESS]
    stats["failed_to_resize"] += resized
    stats["failed_to_download"] += change.counts.total() - change.counts[SUCCESS] - resized
    record = stats.get("clipmill")
    if record is not None:
        for table in ("inputs", "outputs"):
            record[table] = renewed_hashes(record[table], hashes)
        record["inputs"] |= inputs
        _add_facts(record, change.facts, "retried" if "retried" in record else "outputs")
        if SEAL in record:
            record[SEAL] = stats_seal(stats)
    return repr(stats) != before


def renewed_hashes(table: Mapping[str, str], hashes: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Path to hash, with the new hash of each file that had the old one."""
    return {
        path: hashes[path][1] if path in hashes and hashes[path][0] == digest else digest
        for path, digest in table.items()
    }


def renew_block(block: dict[str, Any], change: CountChange) -> None:
    """Bring a stage's block of ``dataset.json`` up to date."""
    if "counts" in block:
        counts = Counter(block["counts"])
        for reason, number in change.counts.items():
            counts[reason] += number
        block["counts"] = {reason: number for reason, number in sorted(counts.items()) if number}
    _add_facts(block, change.facts, "counts")
    if SEAL in block:
        block[SEAL] = seal(block)


def renew_head(dataset: dict[str, Any], was_sound: bool) -> None:
    """Seal the head of ``dataset.json`` again where it was sealed before."""
    if SEAL in dataset and was_sound:
        dataset[SEAL] = head_seal(dataset)


def _add_facts(record: dict[str, Any], change: Counter[str], after: str) -> None:
    """Add to the facts of a record or a block, which stand behind the field ``after``; one that is zero now stays."""
    if not any(change.values()):
        return
    facts = dict(record.get("facts", {}))
    for what, number in change.items():
        if number:
            facts[what] = facts.get(what, 0) + number
    before = dict(record)
    record.clear()
    for name, value in before.items():  # facts stand where the runner writes them
        if name != "facts":
            record[name] = value
        if name == after:
            record["facts"] = dict(sorted(facts.items()))
