"""Methods side by side: runs that differ only by their seed are one row, with the mean and the range of each number."""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from pipeline.report.axes import short
from pipeline.report.compare_charts import ComparedRun, ResultKey
from pipeline.report.results import HEADLINE, metric_name
from pipeline.report.run import duration, parameter_counts, results
from pipeline.report.text import number
from shards_spec.files import UserError
from shards_spec.suggest import did_you_mean

UNKNOWN = "–"
MEASURES_ANOTHER = ("probe", "finetune")  # recipes whose run says how good another run's tower is
CLASSIFIERS = (*MEASURES_ANOTHER, "minivit")  # recipes whose accuracy while training is that of labels
TOLD = {  # tasks that the name of a column says
    "classification": "trained on its labels",
    "linear_probe": "linear probe",
    "knn_classification": "nearest neighbours",
    "zeroshot_retrieval_first_caption": "first captions",
}


TRAINED = f" ({TOLD['classification']})"


class Method(NamedTuple):
    """Runs of one name that differ by their seed, and those that probe or fine-tune them."""

    name: str
    runs: list[ComparedRun]
    tuned: list[ComparedRun]


class MethodTable(NamedTuple):
    """Heads of the columns, and a row of texts for each method, whose first is its name."""

    heads: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def method_of(one: ComparedRun) -> str:
    """The name of a run without the seed that it ends with: ``rows/manual-2`` of seed 2 is ``rows/manual``."""
    seed = one.run.config.get("seed")
    name = one.name.removesuffix(f"-{seed}") if isinstance(seed, int) else one.name
    return name or one.name


def group_methods(runs: Sequence[ComparedRun]) -> list[Method]:
    """The methods in the order of their first runs; a run that probes or fine-tunes another one is no method itself."""
    by_path = {os.path.realpath(one.path): one for one in runs}
    by_path |= {os.path.realpath(one.run.path): one for one in runs}  # a training in stages: its last stage
    measured = {id(one): by_path.get(_measured_run(one)) for one in runs}
    methods = dict[tuple[str, Any], Method]()
    for one in runs:
        if measured[id(one)] is None:
            key = (method_of(one), one.run.config.get("recipe"))
            methods.setdefault(key, Method(key[0], [], [])).runs.append(one)
    owners = dict[int, Method]()
    for method in methods.values():
        owners |= {id(one): method for one in method.runs}
    for one in runs:
        if (student := measured[id(one)]) is not None and id(student) in owners:
            owners[id(student)].tuned.append(one)
    return list(methods.values())


def _measured_run(one: ComparedRun) -> str:
    """The folder of the run whose tower this run probes or fine-tunes; empty for another run."""
    model = one.run.config.get("model")
    is_measure = one.run.config.get("recipe") in MEASURES_ANOTHER and isinstance(model, str) and model
    return os.path.realpath(str(model)) if is_measure else ""


def method_table(runs: Sequence[ComparedRun], baseline: str = "") -> MethodTable | None:
    """The table of methods; None where each run is a method of its own and there is no baseline.

    Args:
        runs: All runs.
        baseline: The method, or one of its runs, whose accuracy at the end the others' samples are counted to.

    Raises:
        UserError: There is no such baseline.
    """
    methods = group_methods(runs)
    base = _named(methods, baseline) if baseline else None
    if base is None and all(len(method.runs) == 1 and not method.tuned for method in methods):
        return None
    columns = {"seeds": [str(len(method.runs)) for method in methods]}
    columns |= _cost_columns(methods)
    columns["training"] = [_mean_duration(method.runs) for method in methods]
    if base is not None:
        columns[f"samples to {base.name}'s end"] = [samples_to_reach(method, base) for method in methods]
    columns |= _result_columns(methods)
    kept = {head: cells for head, cells in columns.items() if any(cell != UNKNOWN for cell in cells)}
    rows = [[method.name, *(cells[index] for cells in kept.values())] for index, method in enumerate(methods)]
    return MethodTable(["method", *kept], rows)


def mean_runs(methods: Sequence[Method]) -> tuple[list[ComparedRun], dict[str, dict[ResultKey, float]]]:
    """A run for each method, by its name, and the mean of its runs' results by the path of that run.

    It is the first whose cost was measured, where one was.
    """
    ones = list[ComparedRun]()
    values = dict[str, dict[ResultKey, float]]()
    for number_on_page, method in enumerate(methods, 1):
        measured = [one for one in method.runs if one.run.evaluations.cost or one.run.evaluations.onnx_cost]
        one = (measured or method.runs)[0]._replace(name=method.name, number=number_on_page)
        found = [results(run.run) for run in method.runs]
        keys = dict.fromkeys(chain.from_iterable(found))
        ones.append(one)
        values[one.path] = {key: mean(own[key] for own in found if key in own) for key in keys}
    return ones, values


def _named(methods: Sequence[Method], name: str) -> Method:
    """A method by its name, or by the path or name of one of its runs. Raises UserError."""
    for method in methods:
        paths = {os.path.realpath(one.path) for one in method.runs}
        if name == method.name or name in {one.name for one in method.runs} or os.path.realpath(name) in paths:
            return method
    raise UserError(f"--baseline {name!r}: {did_you_mean(name, [method.name for method in methods])}")


def spread(values: Sequence[float]) -> str:
    """Shares in per cent: the mean and, of several, the lowest and highest; a dash for none."""
    finite = [100 * value for value in values if math.isfinite(value)]
    if not finite:
        return UNKNOWN
    text = f"{mean(finite):.1f}"
    return f"{text} ({min(finite):.1f}–{max(finite):.1f})" if len(finite) > 1 else text


def _cost_columns(methods: Sequence[Method]) -> dict[str, list[str]]:
    """Parameters, multiplications and speeds, each of the first run of a method that says it."""
    found = [_method_costs(method) for method in methods]
    heads = dict.fromkeys(chain.from_iterable(found))
    return {head: [short(costs[head], 4) if head in costs else UNKNOWN for costs in found] for head in heads}


def _method_costs(method: Method) -> dict[str, float]:
    costs = dict[str, float]()
    for one in method.runs:
        costs = _run_costs(one) | costs
    return costs


def _run_costs(one: ComparedRun) -> dict[str, float]:
    """What the student of a run costs, by the heads of columns; nothing that is not known."""
    measured = one.run.evaluations
    macs = measured.cost.get("macs")
    costs = {"parameters": parameter_counts(one.run).get("total", math.nan)}
    if isinstance(macs, dict):
        costs |= {f"MACs, {tower}": number(count) for tower, count in macs.items()}
    costs |= _rates(measured.cost) | _rates(measured.onnx_cost)
    return {head: value for head, value in costs.items() if math.isfinite(value)}


def _rates(cost: dict[str, Any]) -> dict[str, float]:
    """Images per second by device and batch."""
    speeds, rates = cost.get("speed"), dict[str, float]()
    for speed in speeds if isinstance(speeds, list) else []:
        by_batch = speed.get("images_per_s") if isinstance(speed, dict) else None
        if isinstance(by_batch, dict):
            device = f"ONNX {cost.get('precision')}" if cost.get("runtime") else speed.get("device")
            rates |= {f"images/s, batch {batch}, {device}": number(rate) for batch, rate in by_batch.items()}
    return rates


def _mean_duration(runs: Sequence[ComparedRun]) -> str:
    """The mean time that the runs took."""
    seconds = [float(one.columns["seconds"][-1]) for one in runs if len(one.columns.get("seconds", ()))]
    finite = [value for value in seconds if math.isfinite(value)]
    return duration(mean(finite)) if finite else UNKNOWN


def _result_columns(methods: Sequence[Method]) -> dict[str, list[str]]:
    """The main results of the methods' runs, then those of the runs that probe or fine-tune them."""
    columns = dict[str, list[str]]()
    for head, key in _heads(chain.from_iterable(method.runs for method in methods)).items():
        columns[head] = [spread([_result(one, key) for one in method.runs]) for method in methods]
    for recipe in MEASURES_ANOTHER:
        tuned = [[one for one in method.tuned if one.run.config.get("recipe") == recipe] for method in methods]
        for head, key in _heads(chain.from_iterable(tuned)).items():
            columns[f"{recipe}: {head.removesuffix(TRAINED)}"] = [
                spread([_result(one, key) for one in own]) for own in tuned
            ]
    return columns


def _heads(runs: Iterable[ComparedRun]) -> dict[str, ResultKey]:
    """The main results that some of the runs have, by their names."""
    keys = dict.fromkeys(chain.from_iterable(results(one.run) for one in runs))
    named = dict[str, ResultKey]()
    for dataset, task, metric in keys:
        if metric in HEADLINE:
            kind = f" ({TOLD[task]})" if task in TOLD else ""
            named[f"{metric_name(metric)}, {dataset}{kind}"] = (dataset, task, metric)
    return named


def _result(one: ComparedRun, key: ResultKey) -> float:
    return results(one.run).get(key, math.nan)


def samples_to_reach(method: Method, base: Method) -> str:
    """Samples after which a method's runs were first as good as the baseline's of their seed at its end.

    The mean and the range of the runs that got there, and how many did where not all. Accuracy is what was measured
    while training; a baseline without that seed counts by its mean.
    """
    seen = []
    for one in method.runs:
        own = _curve(one)
        goal = _goal(base, one.run.config.get("seed"), own.metric) if own is not None else math.nan
        if own is not None and math.isfinite(goal):
            reached = own.samples[own.values >= goal]
            seen.append(float(reached[0]) if len(reached) else math.nan)
    found = [value for value in seen if math.isfinite(value)]
    if not found:
        return "not reached" if seen else UNKNOWN
    text = short(mean(found), 4)
    text += f" ({short(min(found), 4)}–{short(max(found), 4)})" if len(found) > 1 else ""
    return text if len(found) == len(seen) else f"{text}, {len(found)} of {len(seen)}"


def _goal(base: Method, seed: Any, metric: str) -> float:
    """What the baseline's run of a seed measured last, the mean of all where there is none; NaN for another metric."""
    ends = dict[Any, float]()
    for one in base.runs:
        curve = _curve(one)
        if curve is not None and curve.metric == metric:
            ends[one.run.config.get("seed")] = float(curve.values[-1])
    return ends.get(seed, mean(ends.values()) if ends else math.nan)


class _Curve(NamedTuple):
    """What a run measured while it was trained, and after how many samples."""

    metric: str
    samples: np.ndarray
    values: np.ndarray


def _curve(one: ComparedRun) -> _Curve | None:
    """The first main result that a run measured while training; None where it measured none.

    Of a training in stages it is the last one's, and of a student with masks what was measured after the cut: before it
    the student is larger than what is compared.
    """
    samples = one.columns.get("samples_seen", np.array([]))
    counts = np.arange(len(samples)) >= len(samples) - len(one.run.columns.get("samples_seen", ()))
    if "sparsity_target" in one.columns:
        counts &= ~np.isfinite(one.columns["sparsity_target"])
    for metric in HEADLINE:
        values = one.columns.get(f"eval.{metric}", np.array([]))
        counted = np.isfinite(values) & counts if len(values) else np.array([], bool)
        if counted.any():
            kind = "of labels" if one.run.config.get("recipe") in CLASSIFIERS else "zero-shot"
            return _Curve(f"{metric} {kind}", samples[counted], values[counted])
    return None
