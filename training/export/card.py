"""README.md of an exported folder: where the model comes from, what it scores, how it is loaded."""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from shards_spec.files import DataError, UserError, is_url, join, names, read_json, write_bytes
from shards_spec.manifest import read_dataset
from shards_spec.messages import counted
from shards_spec.models import LoadedModel
from training.config import teacher_names
from training.export.comparison import Comparison
from training.export.config import ExportConfig, Format
from training.models.classifier import Classifier
from training.models.tinyclip_convert import is_pruned
from training.models.tinyclip_table import markdown
from training.runs.run_folder import RunFolder

log = logging.getLogger(__name__)
LIBRARIES = {
    "open_clip": ("open_clip_torch", "safetensors"),
    "timm": ("timm", "safetensors"),
    "transformers": ("transformers", "safetensors"),
    "onnx": ("onnx", "onnxruntime"),
}
SETTINGS = ("batch_size", "steps", "epochs", "lr", "schedule", "precision", "seed")  # of a run's config
ResultRow = tuple[str, str, float]  # dataset, metric, value
PRUNED = """
Its layers have their own numbers of heads and neurons (TinyCLIP, arXiv 2309.12314). D is the width, H the heads and F
the neurons of the MLP.

{table}
"""


@dataclass(frozen=True)
class ExportedModel:
    """What is exported, and how it compares.

    Attributes:
        student: As it is in the folder.
        step: Of the checkpoint; None of a timm model.
        format: Of the folder.
        usage: How to load it, in Markdown.
        results: What it scored, in Markdown; nothing of a timm model.
        comparison: With the student of the run.
    """

    student: LoadedModel
    step: int | None
    format: Format
    usage: str
    results: list[str]
    comparison: Comparison


def write_card(folder: Path, exported: ExportedModel, config: ExportConfig) -> None:
    """Write README.md, unless there is one that may not be replaced."""
    path = folder / "README.md"
    text = card(folder.name, exported, config)
    if not path.exists() or config.overwrite:
        write_bytes(str(path), text.encode())
    elif path.read_text() != text:
        log.warning("%s is kept as it is; --overwrite writes the new student's", path)


def card(name: str, exported: ExportedModel, config: ExportConfig) -> str:
    """Return the text of README.md."""
    student = exported.student
    is_classifier = isinstance(student.model, Classifier) and bool(student.model.class_names)
    is_image_only = isinstance(student.model, Classifier) or exported.format == "timm"
    run_name = Path(config.run).resolve().name
    origin = f"the timm model {run_name}" if exported.step is None else f"step {exported.step} of the run {run_name}"
    parts = [
        "---",
        f"license: {config.license}",
        f"library_name: {exported.format}",
        f"pipeline_tag: {_task(is_classifier, is_image_only)}",
        "tags: [clipmill]" if isinstance(student.model, Classifier) else "tags: [clip, clipmill]",
        "---",
        f"# {name}",
        "",
        f"{_kind(student, is_image_only)}, made by `clipmill export` from {origin}.",
    ]
    if is_pruned(student.model):
        parts.append(PRUNED.format(table=markdown(student.model)).rstrip())
    parts += ["", "## Use", "", exported.usage.strip(), "", "## Model", "", *_model_lines(exported, config)]
    if exported.step is not None:
        parts += ["", "## Training", "", *_training_lines(config.run, exported.step)]
        parts += ["", "## Results", "", *exported.results]
    parts += ["", "## Checked", "", *_comparison_lines(exported, config)]
    parts += ["", "## License", "", f"{config.license}"]
    return "\n".join(parts) + "\n"


def _kind(student: LoadedModel, is_image_only: bool) -> str:
    if isinstance(student.model, Classifier):
        return "An image classifier" if student.model.class_names else "An image tower"
    return "The image tower of a CLIP" if is_image_only else "A CLIP"


def _task(is_classifier: bool, is_image_only: bool) -> str:
    """The Hub's name of what the model is for."""
    if is_classifier:
        return "image-classification"
    return "image-feature-extraction" if is_image_only else "zero-shot-image-classification"


def _model_lines(exported: ExportedModel, config: ExportConfig) -> list[str]:
    """Sizes, preprocessing, precision and versions."""
    student = exported.student
    parameters = sum(parameter.numel() for parameter in student.model.parameters())
    precision = f"int8, {config.int8}" if config.int8 else config.dtype
    versions = ", ".join(f"{library} {_version(library)}" for library in ("torch", *LIBRARIES[exported.format]))
    lines = [
        f"- parameters of the student: {parameters:,}",
        f"- images: {student.image_size} pixels, mean {_numbers(student.mean)}, std {_numbers(student.std)}",
        f"- weights: {precision}{', branches fused' if config.reparameterize else ''}",
        f"- written with: {versions}",
    ]
    if student.tokenizer is not None and exported.format != "timm":
        lines.insert(2, f"- texts: {student.tokenizer.context_length} tokens")
    return lines


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _training_lines(path: str, step: int) -> list[str]:
    """Recipe, settings, data and its counts, versions."""
    run = RunFolder(path).config()
    settings = [f"{name} {run[name]}" for name in SETTINGS if run.get(name) is not None]
    lines = [f"- recipe: `clipmill train {run['recipe']}`, {', '.join(settings)}"]
    if run.get("model"):
        lines.append(f"- architecture: {_base_name(str(run['model']))}")
    lines += _teacher_lines(run)
    data = str(run.get("data") or "")
    if data:
        lines.append(f"- data: {_base_name(data)}{_counts(data)}")
    seen = [line["samples_seen"] for line in _metrics(path) if line.get("step") == step and "samples_seen" in line]
    lines += [f"- samples seen: {number:,}" for number in seen[-1:]]
    with suppress(OSError, DataError, UserError):
        made_with = read_json(str(Path(path, "environment.json")))["versions"]
        lines.append(f"- trained with: {', '.join(f'{name} {number}' for name, number in made_with.items())}")
    return lines


def _teacher_lines(run: dict[str, Any]) -> list[str]:
    """The teachers: several caches, or the weights that teach or are inherited from, or the one cache."""
    teachers = teacher_names(run.get("teacher"))
    if run.get("teacher_weights") and (len(teachers) < 2 or run.get("teacher_from") == "live"):
        teachers = (run["teacher_weights"], *run.get("more_teachers", ()))
    if not teachers:
        return []
    word = "teachers" if len(teachers) > 1 else "teacher"
    return [f"- {word}: {', '.join(_base_name(str(name)) for name in teachers)}"]


def _base_name(named: str) -> str:
    """The name of a model or a dataset without the folders it lies in."""
    prefix, _, rest = named.rpartition(":")
    if is_url(named):
        return named.rstrip("/").rsplit("/", 1)[-1]
    is_path = "/" in rest and prefix in ("", "local-dir")
    return Path(rest).name if is_path else named


def _counts(root: str) -> str:
    """The samples of a dataset by its records, in brackets; nothing where it is not there any more."""
    with suppress(OSError, DataError, UserError):
        stages = read_dataset(root)["stages"]
        counts = {name: stages[name].get("counts", {}) for name in ("ingest", "dedup", "pack") if name in stages}
        named = [f"{name} {counted(found.get('success', 0), 'sample', style=',')}" for name, found in counts.items()]
        return f" ({', '.join(named)})" if named else ""
    return ""


@dataclass(frozen=True)
class ExportedWeights:
    """What is exported, as results of evaluations know it.

    Attributes:
        step: Of its checkpoint.
        sha256: Of the run's student, see `weights_sha256`, before anything is fused or cut.
    """

    step: int
    sha256: str


def result_lines(config: ExportConfig, weights: ExportedWeights) -> list[str]:
    """Return what these weights scored, by the run itself and by `clipmill eval`, in Markdown.

    Raises UserError for a folder of ``--results`` that has nothing of them.
    """
    rows = list[ResultRow]()
    if not (config.raw and RunFolder(config.run).config().get("ema_decay")):  # a run measures its average
        for line in _metrics(config.run):
            if line.get("step") == weights.step:
                rows += [("eval_data", name, value) for name, value in line.get("eval", {}).items()]
    rows += _read_results(join(config.run, "eval"), weights)
    for folder in config.results:
        places = [folder, *(join(folder, name) for name in names(folder) if not name.endswith(".json"))]
        own = list(chain.from_iterable(_read_results(place, weights, config.run) for place in places))
        if not own:
            raise UserError(
                f"--results {folder}: no result of these weights (step {weights.step} of {config.run}) in it; name the "
                "folder that `clipmill eval --output` was given, with --raw or --best as here"
            )
        rows += own
    if not rows:
        return [
            "These weights were not evaluated; `clipmill eval RUN --data EVAL` before the export puts results here, "
            "and --results FOLDER those of `eval --output FOLDER`."
        ]
    return [f"- {dataset}, {metric}: {value:.4f}" for dataset, metric, value in dict.fromkeys(rows)]


def _read_results(folder: str, weights: ExportedWeights, run: str | None = None) -> list[ResultRow]:
    """Dataset, metric and value of the results of these weights in a folder.

    Results know the hash of their weights, wherever the run lies; those of earlier versions, only step and run.
    """
    rows = list[ResultRow]()
    for name in names(folder):
        with suppress(OSError, DataError, UserError, KeyError, TypeError, AttributeError):
            found = read_json(join(folder, name)) if name.endswith(".json") else {}
            if sha256 := found.get("measured_with", {}).get("weights_sha256"):
                is_own = sha256 == weights.sha256
            else:
                is_runs = run is None or os.path.realpath(found["pretrained"]) == os.path.realpath(run)
                is_own = is_runs and found["step"] == weights.step
            if is_own:
                rows += [(found["dataset"], metric, value) for metric, value in found["metrics"].items()]
    return rows


def _metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = list[dict[str, Any]]()
    with suppress(OSError, ValueError):
        for line in Path(path, "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    return lines


def _comparison_lines(exported: ExportedModel, config: ExportConfig) -> list[str]:
    """How the export, loaded back, compares with the student."""
    comparison = exported.comparison
    answer = "class" if isinstance(exported.student.model, Classifier) else "text"
    probe = "noise" if config.check is None else f"samples of {_base_name(config.check)}"
    lines = [f"Loaded back and compared with the student on {probe}:", ""]
    lines.append(f"- smallest cosine of an image's features: {comparison.image_cosine:.4f}")
    if comparison.text_cosine is not None:
        lines.append(f"- smallest cosine of a text's features: {comparison.text_cosine:.4f}")
    if comparison.agreement is not None and comparison.accuracy is not None:
        before, after = comparison.accuracy
        lines.append(f"- same best {answer}: {comparison.agreement:.1%}")
        lines.append(f"- own {answer} is the best: {before:.1%} before, {after:.1%} after")
    return lines
