"""The charts of a run, over steps, samples or time: no line that is constant, none twice."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.report.axes import short
from pipeline.report.charts import SIZE, Chart, Rule
from pipeline.report.curves import STEPS, Columns, RunAxis, curve, run_axes
from pipeline.report.results import metric_name
from pipeline.report.student import mask_curves

WIDE = (1040, 300)  # size of the loss curve on a wide screen
CURVES = {
    "lr": ("Learning rate", "per step"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "logit_scale": ("Logit scale", "1 / temperature"),
    "samples_per_s": ("Throughput", "samples/s"),
    "memory_mib": ("Memory of the device", "MiB"),
}


class Series(NamedTuple):
    """A column that may become a chart: its title and unit, and those lines of the metrics that have it."""

    column: str
    title: str
    unit: str
    columns: Columns

    @property
    def finite(self) -> np.ndarray:
        """Its finite values."""
        values = self.columns[self.column]
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class ChartView:
    """The charts over one of steps, samples and time: the total loss wide and narrow, and the others."""

    over: RunAxis
    loss: list[Chart]
    charts: list[Chart]


@dataclass(frozen=True)
class RunCharts:
    """The views of a run, and what its constants are, in words."""

    views: list[ChartView]
    constants: str


def run_charts(columns: Columns, rules: Sequence[Rule] = (), *, measured_only: bool = False) -> RunCharts:
    """Draw all that a run has logged; of a training in stages (``measured_only``) only the loss and what was measured.

    A column that never changes is named among the constants, and one that equals another in that one's title.
    """
    if not len(columns.get("step", ())):
        return RunCharts([], "")
    series, constants = list[Series](), list[str]()
    loss = Series("loss", "Total loss", "loss", columns) if "loss" in columns else None
    for one in ([loss] if loss else []) + list(_series(columns, measured_only)):
        twin = next((n for n, other in enumerate(series) if _is_same(one, other)), None)
        if twin is not None:
            series[twin] = series[twin]._replace(title=f"{series[twin].title} = {one.title}")
        elif one.column != "loss" and len(one.finite) > 1 and one.finite.min() == one.finite.max():
            constants.append(f"{one.title} {short(float(one.finite[0]), 4)}")
        else:
            series.append(one)
    views = []
    for over in run_axes([columns]):
        wide = [_draw(series[0], rules, over, size) for size in (WIDE, SIZE)] if loss else []
        rest = [_draw(one, rules if measured_only else (), over) for one in series[len(wide) // 2 :]]
        views.append(ChartView(over, wide, mask_curves(columns, rules, over) + rest))
    return RunCharts(views, "; ".join(constants))


def _draw(series: Series, rules: Sequence[Rule], over: RunAxis = STEPS, size: tuple[int, int] = SIZE) -> Chart:
    labels = (series.title, series.unit)
    return curve(series.columns, series.column, labels, size=size, rules=rules, over=over)


def _series(columns: Columns, measured_only: bool) -> Iterator[Series]:
    """The parts of the loss, the usual columns, and what was measured, over the lines that have each."""
    if not measured_only:
        for name in columns:
            if name.startswith("losses."):
                yield _loss_part(columns, name)
        for name, (title, unit) in CURVES.items():
            if name in columns:
                yield Series(name, title, unit, columns)
    for name, values in columns.items():
        has_it = np.isfinite(values)
        if name.startswith("eval.") and has_it.any():
            yield Series(name, metric_name(name.removeprefix("eval.")), "share", _lines(columns, has_it))


def _loss_part(columns: Columns, name: str) -> Series:
    """One of the losses, over the steps that had it: some end when a student has taken its final shape."""
    values = columns[name]
    has_it = np.isfinite(values) | ~np.isfinite(columns.get("loss", np.full(len(values), math.nan)))
    return Series(name, name.removeprefix("losses."), "loss", _lines(columns, has_it) if has_it.any() else columns)


def _lines(columns: Columns, chosen: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[chosen] for name, values in columns.items()}


def _is_same(one: Series, other: Series) -> bool:
    """Whether two series of one unit have the same values at the same steps: the eye could not tell their charts."""
    if one.unit != other.unit or len(one.columns["step"]) != len(other.columns["step"]):
        return False
    values, others = one.columns[one.column], other.columns[other.column]
    is_same_step = np.array_equal(one.columns["step"], other.columns["step"])
    return is_same_step and np.allclose(values, others, rtol=1e-6, atol=0, equal_nan=True)
