"""What a run's folder ``eval`` says: a table per task, the main results, and what the student costs."""

import math
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


class Evaluations(NamedTuple):
    """The folder ``eval`` of a run.

    ``tables`` has one per task: metric columns and a row per file; ``values`` each number by (dataset, task, metric);
    ``cost`` is what the newest cost.json says; ``unread`` counts files that are none of these.
    """

    tables: list[dict[str, Any]]
    values: dict[tuple[str, str, str], float]
    cost: dict[str, Any]
    unread: int


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
    tables: dict[str, dict[str, Any]] = {}
    values: dict[tuple[str, str, str], float] = {}
    cost, unread = dict[str, Any](), 0
    for name in names(folder):
        if not name.endswith(".json"):
            continue
        result = json_or_empty(join(folder, name), problems)
        metrics, task = result.get("metrics"), str(result.get("task", "other"))
        if task == COST:
            cost = result
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
    return Evaluations(listed, values, cost, unread)


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
