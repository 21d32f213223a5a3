"""Curves over a run's steps, samples or time: what was logged, what is smooth in it, and the ranges of their axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.axes import Axis, linear, logarithmic
from pipeline.report.charts import SIZE, Chart, Line, Plot, Rule, line_chart, parts_between

EXACT = ("lr", "logit_scale", "parameters")  # without noise, so that nothing is smoothed
LOG_SPAN = 100.0  # greatest over least value from which on an axis is logarithmic
MAY_BE_LOG = ("loss", "losses.", "grad_norm")  # columns whose axis may be, or how their names begin
TIMES = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"))  # units of wall time
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RunAxis:
    """What a curve is drawn over: a column of the metrics, in units of ``scale``; ``name`` is what the reader picks."""

    column: str = "step"
    name: str = "steps"
    label: str = "step"
    scale: float = 1.0

    def of(self, columns: Columns) -> np.ndarray:
        """The x of each line of the metrics."""
        return columns[self.column] / self.scale

    def rule(self, rule: Rule, columns: Columns) -> Rule:
        """A rule at a step, where that step is on this axis."""
        if rule.axis != "x" or self.column == "step":
            return rule
        return Rule("x", float(np.interp(rule.value, columns["step"], self.of(columns))), rule.text)


STEPS = RunAxis()


def run_axes(runs: Sequence[Columns]) -> list[RunAxis]:
    """Steps, samples and wall time, each if all of these runs have logged it in every line, and it rises."""
    logged = [columns for columns in runs if len(columns.get("step", ()))]
    ways = [STEPS]
    if logged and all(_rises(columns.get("samples_seen")) for columns in logged):
        ways.append(RunAxis("samples_seen", "samples", "samples seen"))
    if logged and all(_rises(columns.get("seconds")) for columns in logged):
        longest = max(float(columns["seconds"][-1]) for columns in logged)
        scale, unit = next((pair for pair in reversed(TIMES) if longest >= 2 * pair[0]), TIMES[0])
        ways.append(RunAxis("seconds", "time", unit, scale))
    return ways


def _rises(values: np.ndarray | None) -> bool:
    """Whether all values are finite and none is below the one before it, nor the last at 0."""
    if values is None or not len(values) or not np.isfinite(values).all():
        return False
    return bool((np.diff(values) >= 0).all()) and float(values[-1]) > 0


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over about a thirtieth of the curve; values that are not finite are left out."""
    finite = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(finite, values, 0.0)))
    counts = np.append(0, np.cumsum(finite))
    place = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 60), np.minimum(place, len(values) - 1 - place))
    start, end = place - half, place + half + 1
    number = counts[end] - counts[start]
    return np.where(number > 0, (sums[end] - sums[start]) / np.maximum(number, 1), np.nan)


def curve(
    columns: Columns,
    name: str,
    labels: tuple[str, str],
    *,
    size: tuple[int, int] = SIZE,
    rules: Sequence[Rule] = (),
    over: RunAxis = STEPS,
) -> Chart:
    """The raw values, and a smoothed line when there are many that scatter.

    ``labels`` are the title and the unit. At rules on the x axis, which name steps, the lines begin anew.
    """
    title, unit = labels
    x, values = over.of(columns), columns[name]
    finite = values[np.isfinite(values)]
    y_axis, note = value_axis(unit, finite, may_be_log=name.startswith(MAY_BE_LOG))
    rules = [over.rule(rule, columns) for rule in rules]
    breaks = [rule.value for rule in rules if rule.axis == "x"]
    lines = [Line(x, values, breaks=breaks)]
    if is_smoothed(name, values):
        means = [smooth(values[part]) for part in parts_between(x, breaks)]
        lines = [
            Line(x, values, faint=True, breaks=breaks),
            Line(x, np.concatenate(means), breaks=breaks),
        ]
    if missing := len(values) - len(finite):
        note = f"{missing:,} of {len(values):,} values are not finite. {note}"
    return line_chart(title, Plot(run_axis(x, over, size), y_axis, size), lines, rules, note.strip())


def is_smoothed(name: str, values: np.ndarray) -> bool:
    """Whether a curve has so many values that scatter that their running mean is drawn."""
    return len(values) > 40 and name not in EXACT


def several(
    columns: Columns,
    names: Mapping[str, str],
    labels: tuple[str, str],
    rules: Sequence[Rule] = (),
    over: RunAxis = STEPS,
) -> Chart:
    """Columns without noise in one frame, with a legend: column to name."""
    x = over.of(columns)
    lines = [Line(x, columns[column], color=i, name=names[column]) for i, column in enumerate(names)]
    values = np.concatenate([columns[column] for column in names])
    y_axis, note = value_axis(labels[1], values[np.isfinite(values)])
    rules = [over.rule(rule, columns) for rule in rules]
    return line_chart(labels[0], Plot(run_axis(x, over, SIZE), y_axis), lines, rules, note)


def run_axis(x: np.ndarray, over: RunAxis, size: tuple[int, int]) -> Axis:
    """The x axis; it begins at 0 unless the first value is far from there."""
    first = 0.0 if x[0] < 0.1 * x[-1] else float(x[0])
    return linear(over.label, first, float(x[-1]), size[0] // 70)


def value_axis(unit: str, finite: np.ndarray, *, may_be_log: bool = False) -> tuple[Axis, str]:
    """The y axis of finite values and a note; logarithmic where they span decades, if they may be."""
    if may_be_log and len(finite) and finite.min() > 0 and finite.max() >= LOG_SPAN * finite.min():
        return logarithmic(unit, float(finite.min()) / 1.1, float(finite.max()) * 1.1), ""
    low, high, note = _range(finite)
    return linear(unit, low, high, 4), note


def _range(finite: np.ndarray) -> tuple[float, float, str]:
    """Low and high of a y axis; a few spikes may leave it, the note says so."""
    if not len(finite):
        return 0.0, 1.0, ""
    low, high = float(finite.min()), float(finite.max())
    inner_low, inner_high = (float(v) for v in np.percentile(finite, (0.5, 99.5)))
    reach = max(inner_high - inner_low, 1e-12)
    if len(finite) < 100 or (inner_low - low < reach / 2 and high - inner_high < reach / 2):
        pad = (high - low) * 0.04
        return low - pad, high + pad, ""
    low, high = max(low, inner_low - 0.1 * reach), min(high, inner_high + 0.1 * reach)
    outside = int(((finite < low) | (finite > high)).sum())
    return low, high, f"{outside} {'value lies' if outside == 1 else 'values lie'} outside the range shown."
