"""Curves over a run's steps: what was logged, what is smooth in it, and ranges that a few spikes do not stretch."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.report.axes import Axis, linear
from pipeline.report.charts import SIZE, Chart, Line, Plot, Rule, line_chart, parts_between

EXACT = ("lr", "logit_scale", "parameters")  # without noise, so that nothing is smoothed
Columns = Mapping[str, np.ndarray]


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
) -> Chart:
    """The raw values, and a smoothed line when there are many that scatter, over the steps.

    ``labels`` are the title and the unit. At rules on the x axis the lines begin anew.
    """
    title, unit = labels
    steps, values = columns["step"], columns[name]
    finite = values[np.isfinite(values)]
    low, high, note = _range(finite)
    breaks = [rule.value for rule in rules if rule.axis == "x"]
    lines = [Line(steps, values, breaks=breaks)]
    if len(values) > 40 and name not in EXACT:
        means = [smooth(values[part]) for part in parts_between(steps, breaks)]
        lines = [
            Line(steps, values, faint=True, breaks=breaks),
            Line(steps, np.concatenate(means), breaks=breaks),
        ]
    if missing := len(values) - len(finite):
        note = f"{missing:,} of {len(values):,} values are not finite. {note}"
    plot = Plot(step_axis(steps, size), linear(unit, low, high, 4), size)
    return line_chart(title, plot, lines, rules, note.strip())


def several(columns: Columns, names: Mapping[str, str], labels: tuple[str, str], rules: Sequence[Rule] = ()) -> Chart:
    """Columns without noise in one frame, with a legend: column to name."""
    steps = columns["step"]
    lines = [Line(steps, columns[column], color=i, name=names[column]) for i, column in enumerate(names)]
    values = np.concatenate([columns[column] for column in names])
    low, high, note = _range(values[np.isfinite(values)])
    plot = Plot(step_axis(steps, SIZE), linear(labels[1], low, high, 4))
    return line_chart(labels[0], plot, lines, rules, note)


def step_axis(steps: np.ndarray, size: tuple[int, int]) -> Axis:
    """The x axis; it begins at 0 unless the first step is far from there."""
    first = 0.0 if steps[0] < 0.1 * steps[-1] else float(steps[0])
    return linear("step", first, float(steps[-1]), size[0] // 70)


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
