"""Tables over many sets and models: main metrics, robustness on ImageNet's variants, DataComp's average.

All of them are over the sets that were measured, and say which. Robustness is the zero-shot acc1 on ImageNet, its mean
on the variants, and the gap between both (CLIP, arXiv 2103.00020, section 3.3). -A and -R have 200 of the 1,000
classes, which makes them easier than all 1,000 would be: the gap on the same classes takes ImageNet's images of these
classes, told apart among them alone. Taori's effective robustness (arXiv 2007.00644) is another number: it needs a line
fitted to many models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shards_spec.display import shown
from shards_spec.messages import counted
from training.evaluation.datacomp import ACC1, RECALL, TASKS, DataCompTask, find_task

Result = dict[str, Any]
ZEROSHOT = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
IMAGENET = "imagenet1k"
VARIANTS = ("imagenetv2", "imagenet-r", "imagenet-a", "imagenet_sketch", "objectnet")
ALL_CLASSES = ("imagenetv2", "imagenet_sketch")  # variants that have all 1,000


@dataclass(frozen=True)
class MeasuredModel:
    """A model's name in tables, and its results."""

    name: str
    results: list[Result]


def main_metric(result: Result) -> tuple[str, float]:
    """Return name and value of the one metric that stands for a result: DataComp's for its sets, else acc1 or R@1."""
    metrics = result["metrics"]
    if "image_retrieval_recall@1" in metrics:
        return RECALL, (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2
    task = _task(result) if result["task"] == ZEROSHOT else None
    metric = task.metric if task is not None and task.metric in metrics else ACC1
    return metric, metrics[metric]


def _task(result: Result) -> DataCompTask | None:
    """DataComp's task of a result, by its set's name and number of classes."""
    return find_task(result["dataset"], result.get("classes", 0))


def summarise(models: Sequence[MeasuredModel]) -> dict[str, Any]:
    """Return per model its main metrics by set, and robustness and DataComp's average where their sets are there."""
    return {"models": [_summary(model) for model in models]}


def _summary(model: MeasuredModel) -> dict[str, Any]:
    results = [result for result in model.results if "metrics" in result]
    sets = []
    for result in results:
        metric, value = main_metric(result)
        sets.append({"dataset": result["dataset"], "task": result["task"], "metric": metric, "value": value})
    summary: dict[str, Any] = {"model": model.name, "sets": sets}
    if (table := robustness(results)) is not None:
        summary["robustness"] = table
    if (average := datacomp_average(results)) is not None:
        summary["datacomp"] = average
    return summary


def robustness(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return acc1 on ImageNet and its variants, their average and the gaps; None without ImageNet or any variant."""
    by_key = {}
    for result in results:
        task = _task(result)
        if task is not None and result["task"] == ZEROSHOT:
            by_key[task.key] = result
    accuracies = {key: by_key[key]["metrics"][ACC1] for key in VARIANTS if key in by_key}
    if IMAGENET not in by_key or not accuracies:
        return None
    base = by_key[IMAGENET]["metrics"][ACC1]
    average = sum(accuracies.values()) / len(accuracies)
    table = {"imagenet": base, "variants": accuracies, "average": average, "gap": base - average}
    on_classes = dict.fromkeys(ALL_CLASSES, base) | by_key[IMAGENET].get("acc1_on_classes_of", {})
    gaps = {key: on_classes[key] - value for key, value in accuracies.items() if key in on_classes}
    if gaps:
        table["gaps_on_same_classes"] = gaps
        table["gap_on_same_classes"] = sum(gaps.values()) / len(gaps)
    return table


def datacomp_average(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the main metrics of DataComp's tasks that were measured, their mean, and which are missing; None for none.

    ``unmeasured`` are sets that were there and whose main metric is none of ours.
    """
    values = {}
    unmeasured = []
    for result in results:
        task = _task(result)
        if task is None or result["task"] not in (ZEROSHOT, RETRIEVAL):
            continue
        metric, value = main_metric(result)
        if metric == task.metric:
            values[task.name] = value
        else:
            unmeasured.append(task.name)
    if not values:
        return None
    return {
        "average": sum(values.values()) / len(values),
        "tasks": len(values),
        "of": len(TASKS),
        "values": values,
        "missing": [task.name for task in TASKS if task.name not in values],
        "unmeasured": unmeasured,
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print the tables, per cent."""
    models = summary["models"]
    console = Console()
    rows = dict[tuple[str, str, str], dict[str, float]]()  # (set, task, metric) -> value by model
    for model in models:
        for one in model["sets"]:
            rows.setdefault((one["dataset"], one["task"], one["metric"]), {})[model["model"]] = one["value"]
    names = [model["model"] for model in models]
    cells = [
        [dataset, f"{task} {metric}".replace("_", " "), *(_percent(values.get(name)) for name in names)]
        for (dataset, task, metric), values in rows.items()
    ]
    console.print(_table("", ["per cent", "", *names], cells))
    _print_robustness(console, models)
    for model in models:
        if (average := model.get("datacomp")) is not None:
            measured = ", ".join(average["values"])
            print(
                shown(
                    f"{model['model']}: DataComp {_percent(average['average'])} %, the mean of "
                    f"{counted(average['tasks'], 'task')} of {average['of']} ({measured})"
                )
            )


def _print_robustness(console: Console, models: list[dict[str, Any]]) -> None:
    tables = {model["model"]: model["robustness"] for model in models if "robustness" in model}
    if not tables:
        return
    variants = [key for key in VARIANTS if any(key in table["variants"] for table in tables.values())]
    rows = []
    for name, table in tables.items():
        accuracies = [table["variants"].get(key) for key in variants]
        numbers = [table["imagenet"], *accuracies, table["average"], table["gap"], table.get("gap_on_same_classes")]
        rows.append([name, *map(_percent, numbers)])
    heads = ["acc1, per cent", "ImageNet", *variants, "their average", "gap", "gap on the same classes"]
    console.print(_table("robustness", heads, rows))


def _table(title: str, heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=Text(title) if title else None)
    for head in heads:
        table.add_column(Text(shown(head)))
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
