"""The run page: recipe, curves, evaluation, environment and checkpoints of one training run."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pipeline.report.axes import short, total
from pipeline.report.charts import SIZE, Chart, Rule
from pipeline.report.curves import Columns, curve
from pipeline.report.layers import layer_charts
from pipeline.report.student import cut_rules, mask_curves, student_part
from pipeline.report.text import flatten, json_lines, number
from shards_spec.files import DataError, exists, join, names, open_read, read_json
from shards_spec.student_table import STUDENT_TABLE

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")
WIDE = (1040, 300)  # size of the loss curve on a wide screen
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


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder says; empty where a file is not there, or is broken, which ``problems`` then says."""

    path: str
    config: dict[str, Any]
    columns: dict[str, np.ndarray]
    table: dict[str, Any]
    described: dict[str, Any]
    problems: list[str]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


def read_run(path: str) -> RunFiles:
    """Read a run's config, metrics and what it says of its student."""
    problems = list[str]()
    metrics = join(path, "metrics.jsonl")
    return RunFiles(
        path=path,
        config=_json_or_empty(join(path, "config.json"), problems),
        columns=read_metrics(metrics, problems) if exists(metrics) else {},
        table=_json_or_empty(join(path, STUDENT_TABLE), problems),
        described=_json_or_empty(join(path, "open_clip_config.json"), problems),
        problems=problems,
    )


def run_page(run: RunFiles) -> dict[str, Any]:
    """The variables of the template for a run."""
    columns, problems = run.columns, list(run.problems)
    evaluations, unread = _evaluations(join(run.path, "eval"), problems)
    rules = cut_rules(run.table)
    return {
        "name": run.name,
        "recipe": run.config.get("recipe"),
        "headline": _tiles(columns),
        "loss": loss_charts(columns, rules),
        "losses": [_loss_part(columns, name) for name in columns if name.startswith("losses.")],
        "curves": mask_curves(columns, rules)
        + [curve(columns, name, CURVES[name]) for name in CURVES if name in columns]
        + layer_charts(columns)
        + measured(columns),
        "student": student_part(run.table, run.described, _start_description(run)),
        "evaluations": evaluations,
        "unread": unread,
        "config": flatten(run.config),
        "environment": flatten(_json_or_empty(join(run.path, "environment.json"), problems)),
        "checkpoints": _checkpoints(run.path),
        "problems": problems,
    }


def _start_description(run: RunFiles) -> dict[str, Any]:
    """The open_clip_config.json of the model whose weights a run began with; empty where it is not a folder at hand.

    That of a stage before may have moved with the run, and lies beside it then.
    """
    former, named = (str(run.config.get(name) or "") for name in ("from_run", "teacher_weights"))
    folders = [former or named.removeprefix("local-dir:")]
    folders = [folder for folder in folders if os.path.isdir(folder)]
    parent, name = run.path.rstrip("/").rpartition("/")[0] or ".", former.rstrip("/").rsplit("/", 1)[-1]
    if name in names(parent):
        folders.append(join(parent, name))
    for folder in folders:
        if described := _json_or_empty(join(folder, "open_clip_config.json"), []):
            return described
    return {}


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


def loss_charts(columns: Columns, rules: Sequence[Rule] = ()) -> list[Chart]:
    """The total loss, drawn for a wide and for a narrow screen."""
    if "loss" not in columns:
        return []
    return [curve(columns, "loss", ("Total loss", "loss"), size=size, rules=rules) for size in (WIDE, SIZE)]


def _loss_part(columns: Columns, name: str) -> Chart:
    """One of the losses, over the steps that had it: some end when a student has taken its final shape."""
    values = columns[name]
    has_it = np.isfinite(values) | ~np.isfinite(columns.get("loss", np.full(len(values), np.nan)))
    points = {column: columns[column][has_it] for column in ("step", name)} if has_it.any() else columns
    return curve(points, name, (name.removeprefix("losses."), "loss"))


def measured(columns: Columns, rules: Sequence[Rule] = ()) -> list[Chart]:
    """What was measured while training, over the steps at which it was."""
    charts = []
    for name in columns:
        finite = np.isfinite(columns[name])
        if name.startswith("eval.") and finite.any():
            points = {column: columns[column][finite] for column in ("step", name)}
            charts.append(curve(points, name, (metric_name(name.removeprefix("eval.")), "share"), rules=rules))
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
    if math.isfinite(last.get("parameters", math.nan)):
        tiles.append((short(last["parameters"]), "parameters left"))
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
        table["rows"].append(row | {"metrics": {metric: share_text(value) for metric, value in metrics.items()}})
    return [{"task": task.replace("_", " "), **table} for task, table in tables.items()], unread


def metric_name(metric: str) -> str:
    """``image_retrieval_recall@5`` → ``text→image R@5``: what is found follows what is asked."""
    stem, at, k = metric.partition("@")
    return METRICS.get(stem, stem.replace("_", " ")) + at + k


def share_text(value: Any) -> str:
    """A share in per cent; another number as it is, and a dash for none."""
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
