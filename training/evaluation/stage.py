"""`clipmill eval`: measure a model on evaluation datasets, print a table, write the results."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shards_spec.display import shown
from shards_spec.files import UserError, is_url, join, write_json
from shards_spec.messages import counted
from shards_spec.models import CONFIG_FILE, LOCAL_DIR, LoadedModel, load_model, pick_device
from training.evaluation.classification import measure_classifier
from training.evaluation.config import EvalConfig
from training.evaluation.cost import COST_FILE, measure_cost, print_cost
from training.evaluation.zero_shot import Encoder, measure
from training.models.classifier import Classifier
from training.runs.run_folder import RunFolder
from training.runs.student import load_run

# task, as the result's file is named by it -> task, as CLIP_benchmark names it in the file
TASKS: dict[str, str] = {
    "classification": "classification",
    "zeroshot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
}


@dataclass(frozen=True)
class Measurement:
    """A task's metrics, the number of images measured, and of images that had to be left out."""

    task: str
    metrics: dict[str, float]
    samples: int
    skipped: int


def evaluate(config: EvalConfig) -> list[dict[str, Any]]:
    """Measure on each EVAL root, and the model's cost if asked; print tables, write JSON, return what was written.

    Raises:
        UserError: Model or dataset is missing, or the options do not fit them.
        DataError: A file of a dataset is damaged.
    """
    device = pick_device(config.device)
    loaded, description = load_measured(config)
    results = [_cost(config, loaded, description, device)] if config.cost else []
    loaded.model.to(device).eval()
    for root, dataset in zip(config.data, dataset_names(config.data), strict=True):
        measurement = _measure(config, loaded, root, device)
        result: dict[str, Any] = {
            "dataset": dataset,
            "model": description["model"],
            "pretrained": description["pretrained"],
            "task": TASKS[measurement.task],
            "metrics": measurement.metrics,
            "language": "en",
            "samples": measurement.samples,
            "skipped": measurement.skipped,
        }
        if "step" in description:
            result |= {"recipe": description["recipe"], "step": description["step"]}
        print_result(result, _write(config, description, f"{dataset}_{measurement.task}.json", result))
        results.append(result)
    return results


def _cost(config: EvalConfig, loaded: LoadedModel, description: dict[str, Any], device: str) -> dict[str, Any]:
    """Measure what the model costs on a CPU, and on the device where that is another; print it, write cost.json."""
    devices = list(dict.fromkeys(("cpu", device)))
    cost = measure_cost(loaded, devices, in_a_row=config.cost_images, bf16=config.precision == "bf16")
    result = {"task": "cost", **description, **cost}
    print_cost(result, _write(config, description, COST_FILE, result))
    return result


def _write(config: EvalConfig, description: dict[str, Any], name: str, result: dict[str, Any]) -> str | None:
    """Write a result to --output, or to the RUN's folder eval; return its path, None for a model without a folder."""
    folder = config.output or (join(config.model, "eval") if "step" in description else None)
    path = join(folder, name) if folder else None
    if path:
        write_json(path, result)
    return path


def _measure(config: EvalConfig, loaded: LoadedModel, root: str, device: str) -> Measurement:
    bf16 = config.precision == "bf16"
    if isinstance(loaded.model, Classifier):
        metrics, samples = measure_classifier(loaded, root, device, bf16)
        return Measurement("classification", metrics, samples, skipped=0)
    encoder = Encoder(loaded, config.batch_size, device, bf16)
    task, metrics, samples = measure(encoder, root, config.task)
    return Measurement(task, metrics, samples, encoder.skipped)


def dataset_names(roots: Sequence[str]) -> list[str]:
    """Return a name per EVAL root: its last part, preceded by as many parents as tell different roots apart.

    Raises UserError when two different roots have one name all the same.
    """
    paths = [root.rstrip("/") if is_url(root) else os.path.abspath(root) for root in roots]
    parts = [[part.rstrip(":") for part in path.split("/") if part] for path in paths]
    depths = [1] * len(roots)
    while True:
        names = ["-".join(of_root[-depth:]) for of_root, depth in zip(parts, depths, strict=True)]
        ambiguous = {n for n, path in enumerate(paths) if _is_ambiguous(names[n], path, names, paths)}
        if not ambiguous:
            return names
        deeper = [min(depth + (n in ambiguous), len(parts[n])) for n, depth in enumerate(depths)]
        if deeper == depths:
            raise UserError(
                f"--data {' '.join(roots)}: results of different roots would have one name; measure one by one"
            )
        depths = deeper


def _is_ambiguous(name: str, path: str, names: list[str], paths: list[str]) -> bool:
    """Whether another path has the same name."""
    return any(name == other and path != other_path for other, other_path in zip(names, paths, strict=True))


def load_measured(config: EvalConfig) -> tuple[LoadedModel, dict[str, Any]]:
    """Load the model to measure; return it and how results name it.

    The description has ``model`` and ``pretrained``, for a RUN also ``recipe`` and ``step``. Raises UserError.
    """
    folder = Path(config.model)
    is_run = (folder / "checkpoints").is_dir() and (folder / "config.json").exists()
    if config.pretrained is not None and folder.is_dir():
        raise UserError(f"--pretrained {config.pretrained!r} would not be used: {config.model} brings its own weights")
    if is_run:
        loaded, step = load_run(config.model, config.raw, config.best, config.trust)
        run = RunFolder(config.model).config()
        return loaded, {"model": run["model"], "pretrained": config.model, "recipe": run["recipe"], "step": step}
    if config.raw or config.best:
        raise UserError(f"--{'raw' if config.raw else 'best'} would not be used: {config.model} is no RUN folder")
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        hint = RunFolder(config.model).stages_hint()
        raise UserError(f"{config.model} is neither a RUN folder (checkpoints/) nor a model ({CONFIG_FILE}){hint}")
    name = f"{LOCAL_DIR}{config.model}" if folder.is_dir() else config.model
    return load_model(name, config.pretrained, trust=config.trust), {"model": name, "pretrained": config.pretrained}


def print_result(result: dict[str, Any], path: str | None) -> None:
    """Print a result as a table, and the path of its file."""
    title = shown(f"{result['dataset']} · {result['task']} · {counted(result['samples'], 'image')}")
    table = Table("metric", "value", title=Text(title))  # Text: brackets in a name are not markup
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if result["skipped"]:
        table.add_row("images left out", str(result["skipped"]))
    Console().print(table)
    if path:
        print(shown(path))  # not by rich, which would wrap it at the terminal's width
