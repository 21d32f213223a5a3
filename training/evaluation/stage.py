"""`clipmill eval`: measure a model on evaluation datasets, print a table, write the results."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shards_spec.display import shown
from shards_spec.files import DataError, UserError, exists, is_url, join, read_json, sha256_json, write_json
from shards_spec.messages import counted
from shards_spec.models import CONFIG_FILE, HUB, LOCAL_DIR, TIMM, LoadedModel, load_model, pick_device, weights_sha256
from training.data.labelled_images import find_split
from training.evaluation.config import EvalConfig
from training.evaluation.cost import COST_FILE, ONNX_COST_FILE, measure_cost, measure_onnx_cost, print_cost
from training.evaluation.feature_cache import FeatureCache, data_hash
from training.evaluation.protocols import LEARNING, TASKS, chosen_task, measure_task, train_split
from training.evaluation.summary import MeasuredModel, print_summary, summarise
from training.evaluation.zero_shot import EvalSet, preprocessing
from training.export.onnx_model import OnnxClassifier, OnnxModel, is_onnx, load_onnx
from training.runs.run_folder import RunFolder
from training.runs.student import load_run


def evaluate(config: EvalConfig) -> list[dict[str, Any]]:
    """Measure each model on each EVAL root, and its cost if asked; print tables, write JSON, return what was written.

    A result that was written with the same weights, set and options is read, not measured again.

    Raises:
        UserError: Model or dataset is missing, or the options do not fit them.
        DataError: A file of a dataset is damaged.
    """
    device = pick_device(config.device)
    sets = list(zip(config.data, distinct_names(config.data, "data"), strict=True))
    for model in config.model:  # all that can be told before the first of them is loaded
        check_model(config, model)
    for root in config.data:
        find_split(root)
    results = []
    measured = []
    for name, model in zip(distinct_names(config.model, "model"), config.model, strict=True):
        own = _evaluate_model(config, model, _output(config, model, name), sets, device)
        results += own
        measured.append(MeasuredModel(name, own))
    if config.data and len(config.model) * len(config.data) > 1:
        summary = summarise(measured)
        print_summary(summary)
        if config.output:
            path = join(config.output, "summary.json")
            write_json(path, summary)
            print(shown(path))
    return results


def _output(config: EvalConfig, model: str, name: str) -> str | None:
    """The folder of a model's results; None for one without a folder."""
    if config.output:
        return join(config.output, name) if len(config.model) > 1 else config.output
    return join(model, "eval") if is_finished_run(model) else None


def _evaluate_model(
    config: EvalConfig, model: str, folder: str | None, sets: list[tuple[str, str]], device: str
) -> list[dict[str, Any]]:
    loaded, description = load_measured(config, model)
    results = []
    if config.cost:
        results.append(_cost(config, loaded, description, folder, device))
    loaded.model.to(device).eval()
    weights = weights_sha256(loaded.model) if folder and sets else ""
    settings = {"precision": config.precision, "preprocess": sha256_json(preprocessing(loaded))[:16]}
    cache = FeatureCache(folder if config.features else None, sha256_json([weights, settings]))
    for root, dataset in sets:
        task = chosen_task(config, loaded, root)
        path = join(folder, f"{dataset}_{task}.json") if folder else None
        measured_with = _measured_with(config, root, task, weights, settings) if folder else None
        result = _former(path, measured_with) if path and measured_with and not config.overwrite else None
        is_former = result is not None
        if result is None:
            measurement = measure_task(config, loaded, EvalSet(root, dataset, cache), task, device)
            result = {
                "dataset": dataset,
                "model": description["model"],
                "pretrained": description["pretrained"],
                "task": TASKS[task],
                "metrics": measurement.metrics,
                "language": "en",
                "samples": measurement.samples,
                "skipped": measurement.skipped,
                **measurement.details,
                **{key: description[key] for key in ("recipe", "step") if key in description},
            }
            if path:
                result["measured_with"] = measured_with
                write_json(path, result)
        print_result(result, path, is_former=is_former)
        results.append(result)
    return results


def _measured_with(config: EvalConfig, root: str, task: str, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on, besides the model's name."""
    data = [data_hash(root, find_split(root))]
    if task in LEARNING:
        data.append(data_hash(root, train_split(root, task)))
    if task == "knn":
        settings = settings | {"neighbours": config.neighbours}
    return {"weights_sha256": weights, "data_sha256": sha256_json(data), **settings}


def _former(path: str, measured_with: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file when it is of the same weights, set and options."""
    if not exists(path):
        return None
    result = read_json(path, fix="delete it")
    is_same = isinstance(result, dict) and result.get("measured_with") == measured_with
    return result if is_same else None


def _cost(
    config: EvalConfig, loaded: LoadedModel, description: dict[str, Any], folder: str | None, device: str
) -> dict[str, Any]:
    """Measure what the model costs on a CPU, and on the device where that is another; print it, write cost.json.

    An ONNX export runs on the CPU alone, and has a file of its own.
    """
    if isinstance(loaded.model, OnnxModel | OnnxClassifier):
        cost, name = measure_onnx_cost(loaded.model, in_a_row=config.cost_images), ONNX_COST_FILE
    else:
        devices = list(dict.fromkeys(("cpu", device)))
        cost = measure_cost(loaded, devices, in_a_row=config.cost_images, bf16=config.precision == "bf16")
        name = COST_FILE
    result = {"task": Path(name).stem, **description, **cost}
    path = join(folder, name) if folder else None
    if path:
        write_json(path, result)
    print_cost(result, path)
    return result


def distinct_names(paths_given: Sequence[str], option: str) -> list[str]:
    """Return a name per path: its last part, preceded by as many parents as tell different paths apart.

    Raises UserError when two different paths have one name all the same.
    """
    paths = [path.rstrip("/") if is_url(path) else os.path.abspath(path) for path in paths_given]
    parts = [[part.rstrip(":") for part in path.split("/") if part] for path in paths]
    depths = [1] * len(paths)
    while True:
        names = ["-".join(of_path[-depth:]) for of_path, depth in zip(parts, depths, strict=True)]
        ambiguous = {n for n, path in enumerate(paths) if _is_ambiguous(names[n], path, names, paths)}
        if not ambiguous:
            return names
        deeper = [min(depth + (n in ambiguous), len(parts[n])) for n, depth in enumerate(depths)]
        if deeper == depths:
            raise UserError(
                f"--{option} {' '.join(paths_given)}: results of different ones would have one name; measure one by one"
            )
        depths = deeper


def _is_ambiguous(name: str, path: str, names: list[str], paths: list[str]) -> bool:
    """Whether another path has the same name."""
    return any(name == other and path != other_path for other, other_path in zip(names, paths, strict=True))


def is_finished_run(model: str) -> bool:
    """Whether a name is a RUN folder that has checkpoints."""
    folder = Path(model)
    return (folder / "checkpoints").is_dir() and (folder / "config.json").exists()


def load_measured(config: EvalConfig, model: str) -> tuple[LoadedModel, dict[str, Any]]:
    """Load a model to measure; return it and how results name it.

    The description has ``model`` and ``pretrained``, for a RUN also ``recipe`` and ``step``. Raises UserError.
    """
    check_model(config, model)
    if is_finished_run(model):
        loaded, step = load_run(model, config.raw, config.best, config.trust)
        run = RunFolder(model).config()
        return loaded, {"model": run["model"], "pretrained": model, "recipe": run["recipe"], "step": step}
    if is_onnx(model):
        return load_onnx(model), {"model": model, "pretrained": None}
    name, pretrained = (f"{LOCAL_DIR}{model}", None) if Path(model).is_dir() else _split_tag(config, model)
    return load_model(name, pretrained, trust=config.trust), {"model": name, "pretrained": pretrained}


def check_model(config: EvalConfig, model: str) -> None:
    """Raise UserError for a folder that is no model, and for options that would not be used with it."""
    folder = Path(model)
    if config.pretrained is not None and folder.is_dir():
        raise UserError(f"--pretrained {config.pretrained!r} would not be used: {model} brings its own weights")
    if is_finished_run(model):
        return
    if folder.is_dir() and "recipe" in _config_of(folder):
        raise UserError(f"{model}: the run has no checkpoint yet")
    if config.raw or config.best:
        raise UserError(f"--{'raw' if config.raw else 'best'} would not be used: {model} is no RUN folder")
    if is_onnx(model):
        _check_onnx_options(config, model)
        return
    if model.startswith(TIMM) or (folder.is_dir() and "architecture" in _config_of(folder)):
        named = model if model.startswith(TIMM) else f"{TIMM}{LOCAL_DIR}{model}"
        raise UserError(
            f"{model} is a timm model, which is measured as ONNX: `clipmill export {named} --to FOLDER --format onnx`, "
            "then `clipmill eval FOLDER`"
        )
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        hint = RunFolder(model).stages_hint()
        raise UserError(f"{model} is neither a RUN folder (checkpoints/) nor a model ({CONFIG_FILE}){hint}")


def _check_onnx_options(config: EvalConfig, model: str) -> None:
    """Raise UserError for options that an ONNX export makes no use of."""
    if config.precision != "fp32":
        raise UserError(
            f"--precision {config.precision} would not be used: {model} is an ONNX export, which is used as it is"
        )
    if config.device not in ("auto", "cpu"):
        raise UserError(f"--device {config.device!r}: {model} is an ONNX export, which runs on the CPU here")


def _config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty where there is none, or it is no object."""
    path = folder / "config.json"
    try:
        found = read_json(str(path)) if path.exists() else {}
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}


def _split_tag(config: EvalConfig, model: str) -> tuple[str, str | None]:
    """The name and the weights of ``NAME:TAG_OR_FILE``, or of a name and --pretrained. Raises UserError."""
    if model.startswith((LOCAL_DIR, HUB)):
        return model, config.pretrained
    name, _, weights = model.partition(":")
    if config.pretrained is None:
        return name, weights or None
    if weights or len(config.model) > 1:
        raise UserError(f"--pretrained {config.pretrained!r}: it is for one model by its name; say NAME:TAG for each")
    return name, config.pretrained


def print_result(result: dict[str, Any], path: str | None, *, is_former: bool = False) -> None:
    """Print a result as a table, and the path of its file; say whether it was measured before."""
    title = shown(f"{result['dataset']} · {result['task']} · {counted(result['samples'], 'image')}")
    if is_former:
        title += " · measured before"
    table = Table("metric", "value", title=Text(title))  # Text: brackets in a name are not markup
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if result["skipped"]:
        table.add_row("images left out", str(result["skipped"]))
    Console().print(table)
    if path:
        print(shown(path))  # not by rich, which would wrap it at the terminal's width
