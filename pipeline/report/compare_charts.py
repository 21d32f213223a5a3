"""Charts of several runs in one frame: curves over steps, samples or time, and results against what they cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.report.axes import Axis, linear, logarithmic
from pipeline.report.charts import SIZE, Chart, Dot, Line, Plot, overlay_chart, scatter_chart
from pipeline.report.curves import Columns, RunAxis, is_smoothed, run_axes, smooth, value_axis
from pipeline.report.results import HEADLINE, metric_name
from pipeline.report.run import RunFiles, parameter_counts, results
from pipeline.report.run_charts import CURVES, ChartView
from pipeline.report.text import number

SCATTERED = 3  # results at most that are drawn against the cost
LOG_RATIO = 3.0  # greatest over least cost from which on its axis is logarithmic
ResultKey = tuple[str, str, str]  # dataset, task, metric


class ComparedRun(NamedTuple):
    """One of the runs: its number on the page from 1, its name there, its files, and its metrics over all stages."""

    number: int
    name: str
    path: str
    run: RunFiles
    columns: Columns

    @property
    def label(self) -> str:
        """Number and name, as a legend has them."""
        return f"{self.number} {self.name}"

    @property
    def color(self) -> int:
        """Of its lines and dots."""
        return self.number - 1


def curve_views(runs: Sequence[ComparedRun]) -> list[ChartView]:
    """What was measured and the losses of all runs, over steps, samples and time."""
    logged = [one for one in runs if len(one.columns.get("step", ()))]
    if not logged:
        return []
    views = []
    for over in run_axes([one.columns for one in logged]):
        charts = [_overlay(logged, name, labels, over) for name, labels in _columns(logged).items()]
        views.append(ChartView(over, [], [chart for chart in charts if chart is not None]))
    return views


def _columns(runs: Sequence[ComparedRun]) -> dict[str, tuple[str, str]]:
    """Columns that are drawn, with title and unit: measurements, the loss, its parts that two runs have, and others."""
    counts: dict[str, int] = {}
    for one in runs:
        for name, values in one.columns.items():
            counts[name] = counts.get(name, 0) + bool(np.isfinite(values).any())
    measured = {name: (metric_name(name.removeprefix("eval.")), "share") for name in counts if name.startswith("eval.")}
    parts = {name: (name.removeprefix("losses."), "loss") for name in counts if name.startswith("losses.")}
    shared = {name: labels for name, labels in parts.items() if counts[name] > 1}
    others = {name: labels for name, labels in CURVES.items() if name in counts}
    return {**measured, "loss": ("Total loss", "loss"), **shared, **others}


def _overlay(runs: Sequence[ComparedRun], name: str, labels: tuple[str, str], over: RunAxis) -> Chart | None:
    """One column of all runs that have it; None where it is the same constant in all of them, or in none."""
    lines = []
    for one in runs:
        values = one.columns.get(name, np.array([]))
        finite = np.isfinite(values)
        if finite.any():
            x, y = over.of(one.columns)[finite], values[finite]
            y = smooth(y) if is_smoothed(name, y) and not name.startswith("eval.") else y
            lines.append(Line(x, y, color=one.color, name=one.label))
    every = np.concatenate([line.y for line in lines]) if lines else np.array([])
    if not len(every) or (len(every) > 1 and every.min() == every.max()):
        return None
    y_axis, note = value_axis(labels[1], every, may_be_log=name.startswith(("loss", "grad_norm")))
    first, last = (pick(float(line.x[at]) for line in lines) for pick, at in ((min, 0), (max, -1)))
    x_axis = linear(over.label, 0.0 if first < 0.1 * last else first, last, SIZE[0] // 70)
    return overlay_chart(labels[0], Plot(x_axis, y_axis), lines, note)


def scatter_charts(runs: Sequence[ComparedRun], values: Mapping[str, Mapping[ResultKey, float]]) -> list[Chart]:
    """The main results against parameters, data and latency, where two runs at least have both (SiCLIP's figure 1)."""
    charts = []
    for key in _main_results(values):
        dataset, _, metric = key
        for against, label, cost in COSTS:
            found = [(one, cost(one)) for one in runs]
            dots = [
                Dot(at, 100 * values[one.path][key], one.label, one.number, one.color)
                for one, at in found
                if math.isfinite(at) and math.isfinite(values[one.path].get(key, math.nan))
            ]
            if len({dot.x for dot in dots}) > 1:
                title = f"{metric_name(metric)}, {dataset}, against {against}"
                charts.append(scatter_chart(title, _scatter_plot(dots, label), dots))
    return charts


def _main_results(values: Mapping[str, Mapping[ResultKey, float]]) -> list[ResultKey]:
    """The main results that most runs have, two at least."""
    counts: dict[ResultKey, int] = {}
    for own in values.values():
        for key, value in own.items():
            if key[2] in HEADLINE and math.isfinite(value):
                counts[key] = counts.get(key, 0) + 1
    shared = [key for key, count in counts.items() if count > 1]
    return sorted(shared, key=lambda key: -counts[key])[:SCATTERED]


def _scatter_plot(dots: Sequence[Dot], label: str) -> Plot:
    """Axes with room around the dots."""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    if min(xs) > 0 and max(xs) >= LOG_RATIO * min(xs):
        x_axis = logarithmic(label, min(xs) / 1.25, max(xs) * 1.25)
    else:
        x_axis = _padded(label, xs)
    return Plot(x_axis, _padded("per cent", ys))


def _padded(label: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    pad = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    return linear(label, low - pad, high + pad, 4)


def _parameters(one: ComparedRun) -> float:
    return parameter_counts(one.run).get("total", math.nan)


def _samples(one: ComparedRun) -> float:
    seen = one.columns.get("samples_seen", np.array([]))
    return float(seen[-1]) if len(seen) else math.nan


def latency(one: ComparedRun) -> float:
    """Milliseconds for one image on the CPU that `clipmill eval --cost` was run on; NaN where it was not."""
    return _latency(one.run.evaluations.cost)


def onnx_latency(one: ComparedRun) -> float:
    """The same of the run's ONNX export."""
    return _latency(one.run.evaluations.onnx_cost)


def _latency(cost: Mapping[str, Any]) -> float:
    speeds = cost.get("speed")
    for speed in speeds if isinstance(speeds, list) else []:
        if isinstance(speed, dict) and speed.get("device") == "cpu" and isinstance(speed.get("images_per_s"), dict):
            rate = number(speed["images_per_s"].get("1"))
            return 1000 / rate if rate > 0 else math.nan
    return math.nan


COSTS: tuple[tuple[str, str, Callable[[ComparedRun], float]], ...] = (
    ("parameters", "parameters", _parameters),
    ("data", "samples seen", _samples),
    ("latency", "ms per image, CPU", latency),
    ("latency as ONNX", "ms per image, ONNX", onnx_latency),
)


def all_results(runs: Sequence[ComparedRun]) -> dict[str, dict[ResultKey, float]]:
    """Every number that was measured, by run."""
    return {one.path: results(one.run) for one in runs}
