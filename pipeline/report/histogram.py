"""Histograms of counted values: round bins, long tails pooled in the outer bars, one or two series."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pipeline.report.axes import Axis, linear, nice_step, percent, short
from pipeline.report.charts import Chart, Plot

BINS = 26


@dataclass(frozen=True)
class Bins:
    """Equal bins of one or more series; ``pooled`` says how many values the outer bins took in from beyond them."""

    low: float
    step: float
    heights: list[list[int]]
    pooled: int = 0
    extremes: tuple[float, float] = (0.0, 0.0)


def bin_counts(series: Sequence[Mapping[int, int]], unit: float = 1.0) -> Bins:
    """Gather counts of whole numbers (times ``unit``) into about BINS equal bins.

    Long thin tails (0.25 % on each side, when they would take a quarter of the width or more) go to the outer bins.
    """
    merged: dict[int, int] = {}
    for counts in series:
        for value, number in counts.items():
            merged[value] = merged.get(value, 0) + number
    values = sorted(merged)
    low, high = _core(values, [merged[v] for v in values])
    width = max(1, round(nice_step((high - low + 1) / BINS)))
    start = math.floor(low / width) * width
    number_of_bins = (high - start) // width + 1
    if number_of_bins == 1:  # one bar alone stands in the middle
        start, number_of_bins = start - 2 * width, 5
    heights = [[0] * number_of_bins for _ in series]
    for row, counts in zip(heights, series, strict=True):
        for value, number in counts.items():
            row[min(max((value - start) // width, 0), number_of_bins - 1)] += number
    end = start + number_of_bins * width
    pooled = sum(n for v, n in merged.items() if not start <= v < end)
    return Bins(start * unit, width * unit, heights, pooled, (values[0] * unit, values[-1] * unit))


def _core(values: list[int], numbers: list[int]) -> tuple[int, int]:
    running = np.cumsum(numbers)
    low = values[int(np.searchsorted(running, 0.0025 * running[-1], side="right"))]
    high = values[int(np.searchsorted(running, 0.9975 * running[-1]))]
    reach = max(1, high - low) / 4
    return (low if values[0] < low - reach else values[0]), (high if values[-1] > high + reach else values[-1])


@dataclass(frozen=True)
class Scale:
    """What the counted whole numbers mean: times ``unit``, and powers of ``base`` if they are logarithms.

    ``marks`` replaces the marks of the axis: value on the axis to text.
    """

    label: str
    unit: float = 1.0
    base: float | None = None
    marks: Mapping[float, str] | None = None

    def text(self, value: float) -> str:
        """A value of the axis as the reader knows it."""
        return short(self.base**value) if self.base else short(value, 4)

    def span(self, start: float, step: float) -> str:
        """The values of a bin in words."""
        whole = self.unit == 1 and not self.base
        if whole and step == 1:
            return self.text(start)
        return f"{self.text(start)} to {self.text(start + step - whole)}"

    def axis(self, bins: Bins) -> Axis:
        """The x axis; bins of one whole number have their mark under the middle."""
        high = bins.low + bins.step * len(bins.heights[0])
        if self.marks is not None:
            return Axis(self.label, bins.low, high, tuple(m for m in self.marks.items() if bins.low <= m[0] <= high))
        middle = 0.5 if bins.step == 1 and self.unit == 1 else 0.0
        marks = linear(self.label, bins.low, high, 6).marks
        kept = tuple((v + middle, text) for v, text in marks if v + middle <= high and (not middle or v == round(v)))
        return Axis(self.label, bins.low, high, kept)


def histogram(title: str, scale: Scale, series: Mapping[str, Mapping[int, int]]) -> Chart | None:
    """Bars of counts; two series stand side by side as shares of each. None without values."""
    series = {name: counts for name, counts in series.items() if counts}
    if not series:
        return None
    bins = bin_counts(list(series.values()), scale.unit)
    totals, shares = [sum(row) for row in bins.heights], len(series) > 1
    tallest = max(max(row) / (total / 100 if shares else 1) for row, total in zip(bins.heights, totals, strict=True))
    plot = Plot(scale.axis(bins), linear("share, %" if shares else "count", 0, tallest * 1.04, 4))
    names = list(series) if shares else [""]
    body = Markup("").join(_bars(plot, bins, scale, which, names) for which in range(len(series)))
    summary = f"{title}: {', '.join(f'{total:,} {name}' for name, total in zip(series, totals, strict=True))}"
    return Chart(title, plot.draw(body, summary), _pooled(bins, scale), tuple(series) if shares else ())


def _pooled(bins: Bins, scale: Scale) -> str:
    if not bins.pooled:
        return ""
    least, most = map(scale.text, bins.extremes)
    return f"The outer bars hold {bins.pooled:,} values from beyond them too; all lie between {least} and {most}."


def _bars(plot: Plot, bins: Bins, scale: Scale, which: int, names: list[str]) -> Markup:
    row = bins.heights[which]
    each, total = plot.wide / len(row), sum(row)
    gap = min(1.5, each * 0.15)
    wide, parts = (each - gap) / len(names), list[Markup]()
    for i, number in enumerate(row):
        if number:
            tall = max(1.0, plot.tall - plot.y_at(100 * number / total if len(names) > 1 else number))
            text = f"{scale.span(bins.low + i * bins.step, bins.step)}: {number:,} ({percent(number, total)})"
            bar = Markup(
                '<rect class="c{}" x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.1f}"><title>{}</title></rect>'
            )
            left = i * each + which * wide + gap / 2
            parts.append(bar.format(which, left, plot.tall - tall, wide, tall, f"{names[which]} {text}".strip()))
    return Markup("").join(parts)
