"""The run page: recipe, curves, evaluation, environment and checkpoints of one training run."""

import math
from itertools import chain
from typing import Any

import numpy as np

from pipeline.report.axes import linear, short, total
from pipeline.report.charts import SIZE, Chart, Line, Plot, line_chart
from pipeline.report.text import flatten, json_lines, number
from shards_spec.files import DataError, join, names, open_read, read_json

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")
WIDE = (1040, 300)  # size of the loss curve on a wide screen
EXACT = ("lr", "logit_scale")  # without noise, so that nothing is smoothed
CURVES = {
    "lr": ("Learning rate", "per step"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "logit_scale": ("Logit scale", "1 / temperature"),
    "samples_per_s": ("Throughput", "samples/s"),
}
METRICS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
    "mean_average_precision": "mean average precision",
    "image_retrieval_recall": "text→image R",
    "text_retrieval_recall": "image→text R",
}


def run_page(run: str) -> dict[str, Any]:
    """The variables of the template for a run."""
    problems = list[str]()
    config = _json_or_empty(join(run, "config.json"), problems)
    columns = read_metrics(join(run, "metrics.jsonl"), problems)
    evaluations, unread = _evaluations(join(run, "eval"), problems)
    return {
        "name": run.rstrip("/").rsplit("/", 1)[-1],
        "recipe": config.get("recipe"),
        "headline": _tiles(columns),
        "loss": _loss_charts(columns),
        "losses": [_curve(columns, n, n.removeprefix("losses."), "loss") for n in columns if n.startswith("losses.")],
        "curves": [_curve(columns, name, *CURVES[name]) for name in CURVES if name in columns] + _measured(columns),
        "evaluations": evaluations,
        "unread": unread,
        "config": flatten(config),
        "environment": flatten(_json_or_empty(join(run, "environment.json"), problems)),
        "checkpoints": _checkpoints(run),
        "problems": problems,
    }


def _json_or_empty(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except DataError as error:
        problems.append(str(error))
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: str, problems: list[str]) -> dict[str, np.ndarray]:
    """One array per metric, NaN where a line has none; nested ones are called ``losses.NAME`` and ``eval.NAME``.

    A run that resumed from a checkpoint wrote some steps twice: the later line counts.
    """
    rows, broken = json_lines(path)
    lines = len(rows) + broken
    kept = list[dict[str, Any]]()
    for row in rows:
        row["step"] = number(row.get("step"))
        if not math.isfinite(row["step"]):
            broken += 1
            continue
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        nested = [_named(group, row.pop(group, None)) for group in ("losses", "eval")]
        kept.append(row | nested[0] | nested[1])
    if broken:
        problems.append(f"{path}: {broken} of {lines} lines are no metrics and were left out")
    columns = dict.fromkeys(chain.from_iterable(kept))
    return {name: np.array([number(row.get(name)) for row in kept]) for name in columns}


def _named(group: str, values: Any) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()} if isinstance(values, dict) else {}


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


def _curve(columns: dict[str, np.ndarray], name: str, title: str, unit: str, size: tuple[int, int] = SIZE) -> Chart:
    """The raw values, and a smoothed line when there are many that scatter, over the steps."""
    steps, values = columns["step"], columns[name]
    finite = values[np.isfinite(values)]
    low, high, note = _range(finite)
    first = 0.0 if steps[0] < 0.1 * steps[-1] else float(steps[0])
    x = linear("step", first, float(steps[-1]), size[0] // 70)
    lines = (
        [Line(steps, values, faint=True), Line(steps, smooth(values))]
        if len(values) > 40 and name not in EXACT
        else [Line(steps, values)]
    )
    if missing := len(values) - len(finite):
        note = f"{missing:,} of {len(values):,} values are not finite. {note}"
    return line_chart(title, Plot(x, linear(unit, low, high, 4), size), lines, note=note.strip())


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


def _loss_charts(columns: dict[str, np.ndarray]) -> list[Chart]:
    """The total loss, drawn for a wide and for a narrow screen."""
    if "loss" not in columns:
        return []
    return [_curve(columns, "loss", "Total loss", "loss", size) for size in (WIDE, SIZE)]


def _measured(columns: dict[str, np.ndarray]) -> list[Chart]:
    """What was measured while training, over the steps at which it was."""
    charts = []
    for name in columns:
        if name.startswith("eval."):
            finite = np.isfinite(columns[name])
            points = {"step": columns["step"][finite], name: columns[name][finite]}
            charts.append(_curve(points, name, metric_name(name.removeprefix("eval.")), "share"))
    return charts


def _tiles(columns: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """(value, what) of the last line logged, and the median throughput."""
    if not columns:
        return []
    last = {name: values[-1] for name, values in columns.items()}
    tiles = [(f"{last['step']:,.0f}", "steps")]
    if math.isfinite(last.get("epoch", math.nan)):
        tiles.append((short(last["epoch"]), "epochs"))
    if math.isfinite(last.get("samples_seen", math.nan)):
        tiles.append((total(round(last["samples_seen"])), "samples seen"))
    if "loss" in columns:
        tiles.append((f"{last['loss']:.4g}", "last loss"))
    rates = columns.get("samples_per_s", np.array([]))
    rates = rates[np.isfinite(rates)]
    if len(rates):
        tiles.append((f"{np.median(rates):,.0f}", "samples/s, median"))
    if math.isfinite(last.get("seconds", math.nan)):
        tiles.append((duration(last["seconds"]), "of training"))
    return tiles


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{short(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _evaluations(folder: str, problems: list[str]) -> tuple[list[dict[str, Any]], int]:
    """One table per task: metric columns and a row per file; and the number of files that are none."""
    tables: dict[str, dict[str, Any]] = {}
    unread = 0
    for name in names(folder):
        if not name.endswith(".json"):
            continue
        result = _json_or_empty(join(folder, name), problems)
        metrics = result.get("metrics")
        if not isinstance(metrics, dict):
            unread += 1
            continue
        table = tables.setdefault(str(result.get("task", "other")), {"columns": {}, "rows": []})
        table["columns"] |= {metric: metric_name(metric) for metric in metrics if not isinstance(metrics[metric], dict)}
        model = " ".join(str(result[part]) for part in ("model", "pretrained") if result.get(part))
        model += f", step {result['step']}" if "step" in result else ""
        row = {"file": name, "dataset": result.get("dataset", "?"), "model": model}
        table["rows"].append(row | {"metrics": {metric: _percent(value) for metric, value in metrics.items()}})
    return [{"task": task.replace("_", " "), **table} for task, table in tables.items()], unread


def metric_name(metric: str) -> str:
    """``image_retrieval_recall@5`` → ``text→image R@5``: what is found follows what is asked."""
    stem, at, k = metric.partition("@")
    return METRICS.get(stem, stem.replace("_", " ")) + at + k


def _percent(value: Any) -> str:
    found = number(value)
    if not math.isfinite(found):
        return "–"
    return f"{100 * found:.1f} %" if 0 <= found <= 1 else f"{found:.4g}"


def _checkpoints(run: str) -> list[tuple[str, int]]:
    """(path below the run, bytes), as they lie in the run and in its folder ``checkpoints``."""
    found = []
    for folder in ("", "checkpoints"):
        for name in names(join(run, folder) if folder else run):
            if name.endswith(CHECKPOINTS):
                path = f"{folder}/{name}" if folder else name
                with open_read(join(run, path)) as file:
                    found.append((path, file.seek(0, 2)))
    return found
