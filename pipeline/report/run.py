"""The run page: results, set-up, curves, evaluation, environment and checkpoints of one training run."""

import math
import os
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pipeline.report.axes import short, total
from pipeline.report.layers import layer_charts
from pipeline.report.results import HEADLINE, Evaluations, json_or_empty, metric_name, read_evaluations, share_text
from pipeline.report.run_charts import run_charts
from pipeline.report.student import cut_rules, student_part
from pipeline.report.text import flatten, json_lines, number
from shards_spec.files import exists, join, names, open_read
from shards_spec.messages import counted
from shards_spec.student_table import STUDENT_TABLE

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")
PROCESSORS = ("cpu", "x86_64", "aarch64", "arm", "i386")  # how environment.json names one; other names are of GPUs
RESULT_TILES = 4  # at most
WHILE_TRAINING = "while training"  # what was measured on by a run whose config does not say it


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder says; empty where a file is not there, or is broken, which ``problems`` then says."""

    path: str
    config: dict[str, Any]
    environment: dict[str, Any]
    columns: dict[str, np.ndarray]
    table: dict[str, Any]
    described: dict[str, Any]
    evaluations: Evaluations
    problems: list[str]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def last(self) -> dict[str, float]:
        """The last line of the metrics; NaN for what it lacks."""
        return {name: float(values[-1]) for name, values in self.columns.items()}


def read_run(path: str) -> RunFiles:
    """Read a run's config, environment, metrics, evaluations and what it says of its student."""
    problems = list[str]()
    metrics = join(path, "metrics.jsonl")
    return RunFiles(
        path=path,
        config=json_or_empty(join(path, "config.json"), problems),
        environment=json_or_empty(join(path, "environment.json"), problems),
        columns=read_metrics(metrics, problems) if exists(metrics) else {},
        table=json_or_empty(join(path, STUDENT_TABLE), problems),
        described=json_or_empty(join(path, "open_clip_config.json"), problems),
        evaluations=read_evaluations(join(path, "eval"), problems),
        problems=problems,
    )


def run_page(run: RunFiles) -> dict[str, Any]:
    """The variables of the template for a run."""
    charts = run_charts(run.columns, cut_rules(run.table))
    return {
        "name": run.name,
        "recipe": run.config.get("recipe"),
        "headline": _result_tiles(run) + _tiles(run),
        "facts": facts(run),
        "views": charts.views,
        "constants": charts.constants,
        "layers": layer_charts(run.columns),
        "student": student_part(run.table, run.described, _start_description(run)),
        "evaluations": run.evaluations.tables,
        "cost": cost_rows(run.evaluations.cost) + cost_rows(run.evaluations.onnx_cost),
        "unread": run.evaluations.unread,
        "config": flatten(run.config),
        "environment": flatten(run.environment),
        "checkpoints": _checkpoints(run.path),
        "problems": run.problems,
    }


def results(run: RunFiles) -> dict[tuple[str, str, str], float]:
    """Every number that was measured, by (dataset, task, metric): those of folder eval, else the last while training.

    What is measured while training is named as `clipmill eval` would name it.
    """
    found = dict[tuple[str, str, str], float]()
    is_zeroshot = bool(run.config.get("eval_data"))
    measured_on = str(run.config.get("eval_data") or run.config.get("data") or "")
    dataset = measured_on.rstrip("/").rsplit("/", 1)[-1] or WHILE_TRAINING
    for name, values in run.columns.items():
        finite = values[np.isfinite(values)]
        if name.startswith("eval.") and len(finite):
            metric = name.removeprefix("eval.")
            task = "zeroshot_classification" if is_zeroshot else "classification"
            task = "zeroshot_retrieval" if "retrieval" in metric else task
            found[dataset, task, metric] = float(finite[-1])
    return run.evaluations.values | {key: value for key, value in found.items() if key not in run.evaluations.values}


def _result_tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The main results."""
    measured = results(run)
    main = {key: value for key, value in measured.items() if key[2] in HEADLINE and math.isfinite(value)}
    shown = list(main.items())[:RESULT_TILES]
    return [(share_text(value), f"{metric_name(metric)}, {dataset}") for (dataset, _, metric), value in shown]


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What was trained on what: (name, text) for the top of the page; what the run does not say is left out."""
    config, environment = run.config, run.environment
    batch = config.get("batch_size")
    device = str(environment.get("device") or "")
    named = {
        "Model": str(config.get("model") or ""),
        "Data": str(config.get("data") or ""),
        "Batch": f"{batch:,}" if isinstance(batch, int) else "",
        "Device": _processor(device, environment.get("threads") if device in PROCESSORS else None),
        "Precision": str(config.get("precision") or ""),
        "Parameters": parameters_text(run),
        "State": state(run),
    }
    return [(name, text) for name, text in named.items() if text]


def _processor(name: str, threads: Any) -> str:
    """A device and, where it is known to have some, its threads."""
    return f"{name}, {counted(threads, 'thread')}" if name and isinstance(threads, int) else name


def parameter_counts(run: RunFiles) -> dict[str, float]:
    """Parameters of the student by part, ``total`` at least; empty where nothing says them."""
    for counts in (run.environment.get("parameters"), run.evaluations.cost.get("parameters")):
        if isinstance(counts, dict) and math.isfinite(number(counts.get("total"))):
            return {str(part): number(count) for part, count in counts.items() if math.isfinite(number(count))}
    for total_count in (run.last.get("parameters"), number(run.table.get("parameters"))):
        if total_count is not None and math.isfinite(total_count):
            return {"total": total_count}
    return {}


def parameters_text(run: RunFiles) -> str:
    """``48.6M: image 9.83M, text 13.5M, token embeddings 25.3M``; empty where nothing says them."""
    counts = parameter_counts(run)
    if not counts:
        return ""
    named = {"image": "image", "text": "text", "embedding": "token embeddings"}
    parts = [f"{label} {short(counts[part])}" for part, label in named.items() if counts.get(part)]
    return short(counts["total"]) + (f": {', '.join(parts)}" if len(parts) > 1 else "")


def state(run: RunFiles) -> str:
    """How far a run is; empty where its config does not say how far it should come."""
    step, epoch = run.last.get("step", 0.0), run.last.get("epoch", 0.0)
    steps, epochs = (number(run.config.get(name)) for name in ("steps", "epochs"))
    if math.isfinite(steps):
        return "finished" if step >= steps else f"unfinished, step {step:,.0f} of {steps:,.0f}"
    if not math.isfinite(epochs):
        return ""
    batches = run.config.get("batch_size"), run.last.get("samples_seen", 0.0)
    missing = epochs - epoch
    if isinstance(batches[0], int) and epoch > 0 and missing * batches[1] / epoch < batches[0]:
        return "finished"  # a batch that is not whole is left out at the end
    return f"unfinished, {short(epoch)} of {short(epochs)} epochs"


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """What `clipmill eval --cost` measured, as rows of a table; none for another file."""
    macs, speeds = cost.get("macs"), cost.get("speed")
    runtime = f"ONNX {cost.get('precision')}, " if cost.get("runtime") else ""
    rows = []
    if isinstance(macs, dict):
        rows += [(f"MACs, one {tower}", short(number(count), 4)) for tower, count in macs.items()]
    if math.isfinite(number(cost.get("weights_bytes"))):
        kind = f", {runtime.removesuffix(', ')}" if runtime else ""
        rows.append((f"Weights{kind}", f"{short(number(cost['weights_bytes']))}B"))
    for speed in speeds if isinstance(speeds, list) else []:
        if isinstance(speed, dict):
            rows += _speed_rows(speed, runtime)
    return rows


def _speed_rows(speed: dict[str, Any], runtime: str) -> list[tuple[str, str]]:
    """Rows of one device; ``runtime`` stands before its name where it is not torch."""
    rows = []
    name, threads = str(speed.get("name", "?")), speed.get("threads") if speed.get("device") == "cpu" else None
    device = runtime + _processor(name, threads)
    for kind, label in (("images_per_s", "images/s"), ("texts_per_s", "texts/s"), ("peak_mib", "peak memory, MiB")):
        by_batch = speed.get(kind)
        for batch, value in by_batch.items() if isinstance(by_batch, dict) else ():
            rows.append((f"{label}, batch {batch}, {device}", short(number(value), 4)))
    images, rates = number(speed.get("in_a_row")), speed.get("images_per_s")
    rate = number(rates.get("1")) if isinstance(rates, dict) else math.nan
    if images > 0 and rate > 0:
        rows.append((f"{images:,.0f} images one by one, {device}", duration(images / rate)))
    return rows


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
        if described := json_or_empty(join(folder, "open_clip_config.json"), []):
            return described
    return {}


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


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    """(value, what) of the last line logged, and the median throughput."""
    if not run.columns:
        return []
    last, columns = run.last, run.columns
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
