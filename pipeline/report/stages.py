"""What each stage of a dataset did: its totals, its time, the funnel from the list to the shards, and the losses."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.report.text import flatten, json_lines, number
from shards_spec.files import exists, join, names, read_json
from shards_spec.layout import RAW, STAGE_COMMANDS, STAGES, STATS_PATTERN, stage_log
from shards_spec.messages import counted

LEAVES = {
    "ingest": "downloaded and decoded",
    "caption": "captioned",
    "pack": "in final shards",
    "cache": "cached",
    "select": "selected",
}
REASONS = 15  # rows per stage in the table of losses; the rest goes to one row
SUMMARY = 80  # characters of a stage's settings in its row


@dataclass(frozen=True)
class StageRow:
    """One stage's line. ``seconds`` and ``rate`` are None when no log of a run that made something is there."""

    name: str
    shards: int
    samples: int | None
    lost: int
    seconds: float | None
    rate: float | None
    config: list[tuple[str, str]]
    versions: list[tuple[str, str]]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Config and versions."""
        return [*self.config, *self.versions]

    @property
    def summary(self) -> str:
        """The first settings, in a line."""
        line = ", ".join(f"{name} {value}" for name, value in self.config if value != "–")
        return line if len(line) <= SUMMARY else line[: line.rfind(",", 0, SUMMARY) + 1 or SUMMARY] + " …"


@dataclass(frozen=True)
class Losses:
    """Inputs of one stage, its outputs, and each reason for the difference: (reason, count)."""

    stage: str
    inputs: int
    outputs: int
    reasons: list[tuple[str, int]]

    @property
    def lost(self) -> int:
        """The sum of the reasons."""
        return sum(count for _, count in self.reasons)


def ordered(stages: dict[str, Any]) -> dict[str, Any]:
    """The blocks of ``dataset.json`` in the order of the stages, those without a command last."""

    def place(name: str) -> tuple[int, str]:
        kind = name.split("/")[0]
        return (STAGE_COMMANDS.index(kind) if kind in STAGE_COMMANDS else len(STAGE_COMMANDS)), name

    return {name: stages[name] for name in sorted(stages, key=place)}


def foreign_counts(root: str) -> dict[str, int]:
    """Status counts of raw shards that img2dataset made."""
    counts = Counter[str]()
    for name in names(join(root, RAW)):
        if STATS_PATTERN.fullmatch(name):
            counts.update(read_json(join(root, RAW, name)).get("status_dict") or {})
    return dict(counts)


def stage_row(root: str, name: str, block: dict[str, Any]) -> StageRow:
    """A stage's line, from its block of ``dataset.json`` and the log of its runs."""
    counts = block.get("counts") or {}
    seconds, made = _time_spent(stage_log(root, name))
    return StageRow(
        name,
        block.get("shards", 0),
        counts.get("success", 0) if counts else None,
        sum(counts.values()) - counts.get("success", 0),
        seconds,
        made / seconds if seconds and made else None,
        flatten(block.get("config") or {}),
        flatten({"versions": block.get("versions") or {}}),
    )


def _time_spent(path: str) -> tuple[float | None, float]:
    """Seconds and (approximate) samples of the runs that made something."""
    if not exists(path):
        return None, 0
    runs = [run for run in json_lines(path)[0] if run.get("made")]
    samples = sum(number(run.get("samples")) * number(run["made"]) / max(1, number(run.get("shards"))) for run in runs)
    seconds = sum(number(run.get("seconds")) for run in runs)
    return (seconds, samples) if runs and math.isfinite(seconds) and math.isfinite(samples) else (None, 0)


def funnel(counts: dict[str, dict[str, int]]) -> list[tuple[str, str, int, float]]:
    """(stage, what, samples, share of the list) from the list to the final shards and caches."""
    listed = sum(counts.get("ingest", {}).values())
    steps = [("ingest", "in the list", listed)] if listed else []
    for name, count in counts.items():
        kind = name.split("/")[0]
        if kind in LEAVES:
            steps.append((name, LEAVES[kind], count.get("success", 0)))
    most = max((samples for _, _, samples in steps), default=0) or 1
    return [(stage, what, samples, samples / (listed or most)) for stage, what, samples in steps]


def losses(stage: str, counts: dict[str, int]) -> Losses:
    """A stage's reasons by descending count, the rarest pooled."""
    reasons = sorted(((r, n) for r, n in counts.items() if r != "success"), key=lambda pair: (-pair[1], pair[0]))
    if len(reasons) > REASONS + 1:
        rest = reasons[REASONS:]
        reasons = [*reasons[:REASONS], (f"{len(rest)} other reasons", sum(n for _, n in rest))]
    return Losses(stage, sum(counts.values()), counts.get("success", 0), reasons)


def mismatches(counts: dict[str, dict[str, int]], applied: str = "") -> list[str]:
    """Stages that did not see exactly the samples that the stage before them left.

    ``applied`` is the selection (``select/NAME``) by which pack made its shards, if any.
    """
    found = []
    for name, count in counts.items():
        if name == applied:  # it is of the shards that pack made before
            continue
        stage = STAGES.get(name.split("/")[0])
        source = stage.reads if stage is not None else None
        if source in counts and sum(count.values()) != counts[source].get("success", 0):
            inputs = counted(sum(count.values()), "input", style=",")
            left = counted(counts[source].get("success", 0), "sample", style=",")
            found.append(f"{name} counted {inputs}, {source} left {left}")
    return found
