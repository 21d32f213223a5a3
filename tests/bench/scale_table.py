"""The table of tests/bench/scale.py: what each row costs at several numbers of shards, and which rows are not flat."""

import textwrap
from itertools import pairwise
from typing import Any

from plan import markdown

FLAT = 1.5  # times that a shard's CPU seconds may grow from one size to the next
FLAT_KB = 1.0  # of memory per further shard
LITTLE_S, LITTLE_MIB = 1.0, 20.0  # at the larger size, and of growth; below them start-up and the clock's steps count


def scale_table(report: dict[str, Any]) -> str:
    """The table of a run of the bench, with what it was run on and what is not flat.

    Args:
        report: ``machine``, ``date``, ``sizes`` in shards, and ``rows`` with ``title``, ``measured`` (by size: ``CPU``
            and ``seconds`` in seconds, ``MiB``, ``worker MiB``) and, where strace was there, ``operations`` per shard
            by kind.
    """
    sizes = report["sizes"]
    rows = [["", *(f"{size:,} shards: CPU s, s, MiB" for size in sizes), "operations per shard"]]
    for row in report["rows"]:
        measured = [of_size(row, size) for size in sizes]
        rows.append([row["title"], *map(cell, measured), operations(row.get("operations"))])
    run = f"one run with `--shards {' '.join(map(str, sizes))}` on {report['machine']}, {report['date']}"
    note = f"Measured by {run}. {growth(report)}"
    return f"{markdown(rows)}\n\n{textwrap.fill(note, 120)}"


def of_size(row: dict[str, Any], size: int) -> dict[str, float]:
    """A row's figures at a size, whose number is a text in JSON."""
    measured = row["measured"]
    found: dict[str, float] = measured[size] if size in measured else measured[str(size)]
    return found


def cell(measured: dict[str, float]) -> str:
    """Figures of one size: CPU seconds, seconds of the clock, MiB, and those of the largest worker if there is one."""
    worker = f" (worker {measured['worker MiB']:.0f})" if measured["worker MiB"] else ""
    return "{CPU:.2f}, {seconds:.2f}, {MiB:.0f}".format(**measured) + worker


def operations(per_shard: dict[str, float] | None) -> str:
    """Operations in words."""
    if per_shard is None:
        return "not counted"
    return ", ".join(f"{number:.3g} {kind}" for kind, number in per_shard.items() if number >= 0.01) or "none"


def growth(report: dict[str, Any]) -> str:
    """A sentence on the rows of which a further shard costs more at a larger size."""
    found = []
    for row in report["rows"]:
        for small, large in pairwise(report["sizes"]):
            before, after = of_size(row, small), of_size(row, large)
            where = f"from {small:,} to {large:,}"
            times = (after["CPU"] / large) / max(before["CPU"] / small, 1e-9)
            if after["CPU"] >= LITTLE_S and times > FLAT:
                found.append(f"{row['title']} (CPU time per shard, {times:.1f} times {where})")
            more = after["MiB"] - before["MiB"]
            if more >= LITTLE_MIB and (kilobytes := more * 2**20 / 1e3 / (large - small)) > FLAT_KB:
                found.append(f"{row['title']} (memory, {kilobytes:.1f} kB per shard {where})")
    if found:
        return f"Not flat: {'; '.join(found)}."
    return f"All is flat: CPU time per shard within {FLAT:g} times, memory within {FLAT_KB:g} kB per further shard."
