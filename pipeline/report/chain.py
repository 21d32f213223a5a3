"""The page of a training in stages: a folder with a run for each, stage-1, stage-2, and so on."""

import math
import re
from itertools import chain
from typing import Any

import numpy as np

from pipeline.report.axes import short, total
from pipeline.report.charts import Rule
from pipeline.report.results import HEADLINE, metric_name, share_text
from pipeline.report.run import RunFiles, read_run, run_page
from pipeline.report.run_charts import run_charts
from shards_spec.files import exists, join, names

STAGE = re.compile(r"stage-(\d+)")
NUMBERS = {
    "target": "Sparsity asked for",
    "sparsity": "Sparsity",
    "parameters": "Parameters",
    "macs": "MACs",
    "steps": "Steps",
    "loss": "Last loss",
}
UNKNOWN = "–"
PROGRESS = ("step", "samples_seen", "seconds")  # columns that go on from stage to stage


def stage_folders(root: str) -> list[str]:
    """Paths of the stages' runs in their order; those that have not begun are not there."""
    found = {int(match[1]): match[0] for name in names(root) if (match := STAGE.fullmatch(name))}
    folders = [join(root, found[stage]) for stage in sorted(found)]
    return [folder for folder in folders if has_begun(folder)]


def has_begun(folder: str) -> bool:
    """Whether a folder is a run's, with steps or before the first."""
    return exists(join(folder, "config.json")) or exists(join(folder, "metrics.jsonl"))


def chain_page(root: str, folders: list[str]) -> dict[str, Any]:
    """The variables of the template: the stages beneath each other, and what joins them."""
    runs = [read_run(folder) for folder in folders]
    pages = [run_page(run) for run in runs]
    columns, rules = joined(runs)
    charts = run_charts(columns, rules, measured_only=True)
    summaries = [_summary(run, page) for run, page in zip(runs, pages, strict=True)]
    return {
        "name": root.rstrip("/").rsplit("/", 1)[-1],
        "recipe": runs[0].config.get("recipe"),
        "stages": list(zip(summaries, pages, strict=True)),
        "numbers": {name: label for name, label in NUMBERS.items() if any(own[name] != UNKNOWN for own in summaries)},
        "metrics": list(dict.fromkeys(chain.from_iterable(summary["metrics"] for summary in summaries))),
        "views": charts.views,
        "constants": charts.constants,
        "problems": list(chain.from_iterable(page["problems"] for page in pages)),
    }


def joined(runs: list[RunFiles]) -> tuple[dict[str, np.ndarray], list[Rule]]:
    """The metrics of all runs as of one, and the starts of the later stages.

    Steps, samples and seconds go on from stage to stage.
    """
    logged = [run for run in runs if "step" in run.columns]
    every = dict.fromkeys(chain.from_iterable(run.columns for run in logged))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in every}
    rules = list[Rule]()
    offsets = {name: 0.0 for name in PROGRESS if name in every}
    for run in logged:
        if offsets["step"]:
            rules.append(Rule("x", offsets["step"], run.name.replace("-", " ")))
        for name, values in parts.items():
            own = run.columns.get(name, np.full(len(run.columns["step"]), math.nan))
            values.append(own + offsets.get(name, 0.0))
        offsets = {name: float(parts[name][-1][-1]) for name in offsets}
    return {name: np.concatenate(values) for name, values in parts.items()}, rules


def _summary(run: RunFiles, page: dict[str, Any]) -> dict[str, Any]:
    """A stage's row in the table of stages; a dash where the run does not say it."""
    config = run.config
    last = {name: float(values[-1]) for name, values in run.columns.items()}
    is_auto = config.get("inherit") == "auto"
    student = page["student"]
    return {
        "id": run.name,
        "title": run.name.replace("-", " ").capitalize(),
        "student": "by masks" if is_auto else str(config.get("model", UNKNOWN)),
        "target": share_text(config.get("sparsity")) if is_auto else UNKNOWN,
        "sparsity": share_text(last.get("sparsity")),
        "parameters": short(last["parameters"]) if math.isfinite(last.get("parameters", math.nan)) else UNKNOWN,
        "macs": short(student["table"]["macs"]) if student and not student["with_masks"] else UNKNOWN,
        "steps": total(round(last["step"])) if last else UNKNOWN,
        "loss": f"{last['loss']:.4g}" if "loss" in last else UNKNOWN,
        "metrics": _accuracies(run.columns, page),
    }


def _accuracies(columns: dict[str, np.ndarray], page: dict[str, Any]) -> dict[str, str]:
    """The main metrics: those measured last in the run, and those of its folder eval, by dataset."""
    found = {}
    for metric in HEADLINE:
        values = columns.get(f"eval.{metric}", np.array([]))
        values = values[np.isfinite(values)]
        if len(values):
            found[metric_name(metric)] = share_text(float(values[-1]))
    for table in page["evaluations"]:
        for row in table["rows"]:
            found |= {
                f"{row['dataset']} {metric_name(metric)}": row["metrics"][metric]
                for metric in HEADLINE
                if metric in row["metrics"]
            }
    return found
