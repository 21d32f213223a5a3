"""`clipmill export`: load the student, write it in a format, load it back, compare, write the card."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from shards_spec.display import shown
from shards_spec.files import UserError
from shards_spec.models import LOCAL_DIR, TIMM, LoadedModel, weights_sha256
from training.export import to_onnx, to_open_clip, to_timm, to_transformers
from training.export.card import ExportedModel, ExportedWeights, result_lines, write_card
from training.export.comparison import (
    Comparison,
    Encoders,
    check_same,
    compare,
    encoders_of,
    measure_speed,
)
from training.export.config import ExportConfig, Format
from training.export.probe import Probe, noise, read_probe
from training.export.reparameterized import has_branches, reparameterized
from training.models.classifier import Classifier, load_timm_classifier
from training.models.tinyclip_convert import is_pruned
from training.models.tinyclip_pruning import masks_of, materialise
from training.runs.model_folder import check_no_run, remove_descriptions
from training.runs.student import load_run

log = logging.getLogger(__name__)
MIN_INT8_COSINE = 0.9  # below it, a warning: search and classification suffer


class FormatFunctions(NamedTuple):
    """What a format consists of."""

    write: Callable[[Path, LoadedModel, ExportConfig], None]
    load: Callable[[Path, LoadedModel, ExportConfig], Encoders]
    usage: Callable[[LoadedModel], str]
    needed_module: Callable[[LoadedModel], str | None]


FORMATS: dict[Format, FormatFunctions] = {
    "open_clip": FormatFunctions(to_open_clip.write, to_open_clip.load, to_open_clip.usage, to_open_clip.needed_module),
    "timm": FormatFunctions(to_timm.write, to_timm.load, to_timm.usage, to_timm.needed_module),
    "transformers": FormatFunctions(
        to_transformers.write, to_transformers.load, to_transformers.usage, to_transformers.needed_module
    ),
    "onnx": FormatFunctions(to_onnx.write, to_onnx.load, to_onnx.usage, to_onnx.needed_module),
}


def export(config: ExportConfig) -> None:
    """Write the folder, load it back, compare features, and write the card.

    Raises UserError when the run has no checkpoint, its weights none of the results that are named, its student does
    not fit the format, the folder is the student's own, a RUN or has another model, or the loaded copy computes
    something else; the last leaves no description, so that nothing loads the folder.
    """
    folder = Path(config.to).resolve()
    _check_folder(folder, config)
    student, step = _load(config)
    origin = config.run if step is None else f"step {step} of {config.run}"
    results = [] if step is None else result_lines(config, ExportedWeights(step, weights_sha256(student.model)))
    if is_pruned(student.model) and masks_of(student.model):
        log.info("%s still has masks: what is exported is the student cut to them", origin)
        materialise(student.model, student.config)
    kind: Format = config.format or ("timm" if isinstance(student.model, Classifier) else "open_clip")
    probe = noise(student) if config.check is None else read_probe(config.check, student, config.samples, "check")
    functions = FORMATS[kind]
    written = student
    if config.reparameterize or (kind == "onnx" and has_branches(student)):
        written = reparameterized(student)
    functions.write(folder, written, config)
    before = encoders_of(student)
    try:
        after = functions.load(folder, written, config)
        comparison = compare(before, after, probe)
        if config.int8 is None:
            check_same(comparison, folder, config.dtype)
    except BaseException:  # an interrupt too: a folder that was not compared must not count as an export
        remove_descriptions(str(folder))
        raise
    if config.int8 is not None and min(comparison.image_cosine, comparison.text_cosine or 1) < MIN_INT8_COSINE:
        log.warning("%s: 8 bits change the features much; see the table, and try the other kind of --int8", folder)
    write_card(folder, ExportedModel(written, step, kind, functions.usage(written), results, comparison), config)
    if config.check is not None or kind == "onnx":
        print_comparison(comparison, {"student": before, kind: after}, probe)
    difference = comparison.difference
    same = f"features differ by {difference:.2g} at most" if difference else "features are the same"
    module = functions.needed_module(written)
    needs = "" if module is None else f"; {kind} needs `import {module}` for this architecture"
    log.info("%s: %s as %s, %s%s", folder, origin, kind, same, needs)


def _check_folder(folder: Path, config: ExportConfig) -> None:
    """Raise UserError for a folder that nothing may be written to, before anything takes time."""
    source = Path(config.run.removeprefix(f"{TIMM}{LOCAL_DIR}"))
    if source.exists() and source.resolve() == folder:
        raise UserError(
            f"--to {config.to} is the folder of the model itself, whose only weights may be there: name another folder"
        )
    check_no_run(str(folder))


def _load(config: ExportConfig) -> tuple[LoadedModel, int | None]:
    """The student, and the step of a run's. Raises UserError."""
    if not config.run.startswith(TIMM):
        return load_run(config.run, config.raw, config.best, config.trust)
    for name in ("raw", "best", "results"):
        if getattr(config, name):
            raise UserError(f"--{name} would not be used: {config.run} is no RUN folder")
    return load_timm_classifier(config.run), None


def print_comparison(comparison: Comparison, models: dict[str, Encoders], probe: Probe) -> None:
    """Print speeds of both models, and what they differ by."""
    answer = "class" if any(encoders.is_classifier for encoders in models.values()) else "text"
    heads = ("model", f"own {answer} is best", "images/s", "texts/s")
    table = Table(*heads, title="one image or text at a time, in this run")
    shares = comparison.accuracy or (None, None)
    for (name, encoders), share in zip(models.items(), shares, strict=True):
        speed = measure_speed(encoders, probe)
        texts = "" if speed.texts is None else f"{speed.texts:.1f}"
        table.add_row(name, "" if share is None else f"{share:.1%}", f"{speed.images:.1f}", texts)
    Console().print(table)
    text = "" if comparison.text_cosine is None else f", of a text {comparison.text_cosine:.6f}"
    agreement = ""
    if comparison.agreement is not None and comparison.accuracy is not None:  # of noise it would mean nothing
        agreement = f", same best {answer} for {comparison.agreement:.1%} of the images"
    print(shown(f"smallest cosine of an image {comparison.image_cosine:.6f}{text}{agreement}"))
