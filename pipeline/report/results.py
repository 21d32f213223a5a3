"""What a run's folder ``eval`` says: a table per task, the main results, and what the student costs."""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from pipeline.report.text import number
from shards_spec.files import DataError, join, names, read_json

METRICS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
    "mean_average_precision": "mean average precision",
    "image_retrieval_recall": "text→image R",
    "text_retrieval_recall": "image→text R",
}
HEADLINE = ("acc1", "mean_average_precision", "image_retrieval_recall@1", "text_retrieval_recall@1")  # of all metrics
COST = "cost"  # the task of the file that `clipmill eval --cost` writes
ONNX_COST = "cost_onnx"  # the same of an ONNX export


class Evaluations(NamedTuple):
    """The folder ``eval`` of a run.

    ``tables`` has one per task: metric columns and a row per file; ``values`` each number by (dataset, task, metric);
    ``cost`` is what cost.json says, ``onnx_cost`` what cost_onnx.json says of an export; ``unread`` counts files that
    are none of these.
    """

    tables: list[dict[str, Any]]
    values: dict[tuple[str, str, str], float]
    cost: dict[str, Any]
    unread: int
    onnx_cost: dict[str, Any] = {}


def json_or_empty(path: str, problems: list[str]) -> dict[str, Any]:
    """The JSON object of a file; empty where the file is not there, or is broken, which ``problems`` then says."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except DataError as error:
        problems.append(str(error))
        return {}
    return value if isinstance(value, dict) else {}


def read_evaluations(folder: str, problems: list[str]) -> Evaluations:
    """Read a run's folder ``eval``; a file that is broken is named in ``problems``."""
    return _evaluations(_json_files(folder, problems))


def results_of_runs(folders: Sequence[str], problems: list[str]) -> dict[str, Evaluations]:
    """What `clipmill eval RUN … --output FOLDER` wrote, by the real path of the RUN; other models are left out.

    A folder that has none is named in ``problems``.
    """
    by_run = dict[str, list[tuple[str, dict[str, Any]]]]()
    for folder in folders:
        places = [folder, *(join(folder, name) for name in names(folder) if not name.endswith(".json"))]
        files = list(chain.from_iterable(_json_files(place, problems) for place in places))
        of_runs = [(str(result["pretrained"]), name, result) for name, result in files if result.get("recipe")]
        for run, name, result in of_runs:
            by_run.setdefault(os.path.realpath(run), []).append((name, result))
        if not of_runs:
            problems.append(f"{folder} has no results of runs: name the folder that `clipmill eval --output` was given")
    return {run: _evaluations(files) for run, files in by_run.items()}


def _json_files(folder: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Name and object of each JSON file in a folder; a broken one is named in ``problems``, and empty."""
    found = [name for name in names(folder) if name.endswith(".json")]
    return [(name, json_or_empty(join(folder, name), problems)) for name in found]


def _evaluations(files: Iterable[tuple[str, dict[str, Any]]]) -> Evaluations:
    tables: dict[str, dict[str, Any]] = {}
    values: dict[tuple[str, str, str], float] = {}
    costs, unread = dict[str, dict[str, Any]](), 0
    for name, result in files:
        metrics, task = result.get("metrics"), str(result.get("task", "other"))
        if task in (COST, ONNX_COST):
            costs[task] = result
            continue
        if not isinstance(metrics, dict):
            unread += 1
            continue
        dataset = str(result.get("dataset", "?"))
        values |= {(dataset, task, metric): number(value) for metric, value in metrics.items()}
        table = tables.setdefault(task, {"columns": {}, "rows": []})
        table["columns"] |= {metric: metric_name(metric) for metric in metrics if not isinstance(metrics[metric], dict)}
        texts = {metric: share_text(value) for metric, value in metrics.items()}
        table["rows"].append({"file": name, "dataset": dataset, "model": _model(result), "metrics": texts})
    listed = [{"task": task.replace("_", " "), **table} for task, table in tables.items()]
    return Evaluations(listed, values, costs.get(COST, {}), unread, costs.get(ONNX_COST, {}))


def _model(result: dict[str, Any]) -> str:
    """How a result names its model."""
    model = " ".join(str(result[part]) for part in ("model", "pretrained") if result.get(part))
    return model + (f", step {result['step']}" if "step" in result else "")


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
