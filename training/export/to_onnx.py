"""ONNX: the towers of a CLIP, or an image tower alone, as graphs with a free batch size, checked in onnxruntime."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from shards_spec.files import UserError, write_json
from shards_spec.library_errors import short
from shards_spec.models import LoadedModel
from training.data.eval_crop import PLAIN
from training.export.comparison import Encoders, encoders_of
from training.export.config import ExportConfig
from training.export.onnx_int8 import quantize
from training.export.onnx_model import (
    DESCRIPTION,
    FEATURES,
    IMAGE_FILE,
    INSTALL,
    LOGITS,
    PIXELS,
    TEXT_FILE,
    TOKENS,
    load_onnx,
    onnxruntime,
)
from training.export.probe import Probe, noise, read_probe
from training.models.classifier import Classifier, check_vocabulary, describe_classifier
from training.runs.model_folder import write_models, write_open_clip_config

USAGE = """Where Clipmill is installed:

```python
from PIL import Image
from training.export.onnx_model import load_onnx

model = load_onnx("FOLDER").model
images = model.embed_images([Image.open("cat.jpg")])
texts = model.embed_texts(["a photo of a cat", "a photo of a dog"])
print(images @ texts.T)
```

Elsewhere, onnxruntime takes `image.onnx` and `text.onnx`; `onnx_config.json` names inputs, outputs, the preprocessing
and the scale of logits. Features are of unit length; the batch size is free.
"""
CLASSIFIER_USAGE = """Where Clipmill is installed, `clipmill eval FOLDER` measures it, and in Python:

```python
from training.export.onnx_model import load_onnx

loaded = load_onnx("FOLDER")  # loaded.normalise takes RGB pixels from 0 to 1
{outputs} = loaded.model{method}(loaded.normalise(pixels))
```

Elsewhere, onnxruntime takes `image.onnx`; `onnx_config.json` names input, outputs and the preprocessing. {meaning} The
batch size is free.
"""
MIN_OPSET = 18  # the first that torch's exporter translates to
LARGEST_WEIGHT = 2**31  # bytes; larger ones are no file of ONNX's
EXAMPLES = 3  # batch of the example: neither 1, which would stay 1, nor a size of the models


class UnitFeatures(nn.Module):
    """One tower of a CLIP with a graph's inputs and outputs.

    Args:
        model: open_clip's.
        method: Which tower.
        half: Whether the tower computes in float16; inputs and outputs stay float32.
    """

    def __init__(self, model: nn.Module, method: Literal["encode_image", "encode_text"], half: bool) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.half_inputs = half and method == "encode_image"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features (B, E) float32 of unit length, of pixels (B, 3, S, S) or tokens (B, T)."""
        encode = getattr(self.model, self.method)
        features: Tensor = encode(inputs.half() if self.half_inputs else inputs).float()
        return nn.functional.normalize(features, dim=-1)


class ImageOutputs(nn.Module):
    """A classifier with the outputs of its graph.

    Args:
        model: The classifier.
        half: Whether it computes in float16; inputs and outputs stay float32.
    """

    def __init__(self, model: Classifier, half: bool) -> None:
        super().__init__()
        self.trunk = model.trunk
        self.has_classes = model.has_classes
        self.half_inputs = half

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, K), where there are classes, and features (B, D), both float32, of pixels (B, 3, S, S)."""
        hidden = self.trunk.forward_features(pixels.half() if self.half_inputs else pixels)
        features: Tensor = self.trunk.forward_head(hidden, pre_logits=True).float()
        if not self.has_classes:
            return (features,)
        logits: Tensor = self.trunk.forward_head(hidden).float()
        return logits, features


class Graph(NamedTuple):
    """A graph to write."""

    tower: nn.Module
    input_name: str
    outputs: tuple[str, ...]
    inputs: Callable[[Probe], Tensor]
    """what goes in, of a probe"""


def write(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write the graphs, what they take and give (onnx_config.json), and how inputs are made.

    Of a CLIP these are image.onnx, text.onnx, tokenizer and preprocessing; of an image tower alone image.onnx, and what
    its classes are (classifier.json, vocabulary.tsv).

    Raises UserError when a package is missing, torch cannot translate the student, onnxruntime does not read the opset,
    or the folder has another model.
    """
    _check_packages(config)
    if isinstance(student.model, Classifier) and not config.overwrite:
        check_vocabulary(str(folder), student.model)
    probe = noise(student)
    graphs = _graphs(student, half=config.dtype == "fp16")
    with TemporaryDirectory() as local:
        opset = 0
        for name, graph in graphs.items():
            inputs = graph.inputs(probe)[:EXAMPLES]
            path = Path(local, name)
            opset = export_graph(
                graph.tower.eval(), inputs, graph.input_name, path, opset=config.opset, outputs=graph.outputs
            )
            if config.opset is not None:
                _check_readable(path, config.opset)
        if config.int8 is not None:
            calibration = probe
            if config.calibrate is not None:
                calibration = read_probe(config.calibrate, student, config.samples, "calibrate")
            for name, graph in graphs.items():
                quantize(Path(local, name), config.int8, graph.input_name, graph.inputs(calibration))
        weights = {name: Path(local, name).read_bytes() for name in graphs}
    write_models(str(folder), weights, config.overwrite)
    description: dict[str, Any] = {"dtype": f"int8 {config.int8}" if config.int8 else config.dtype, "opset": opset}
    if isinstance(student.model, Classifier):
        describe_classifier(str(folder), student)
        description |= _describe_image_tower(student)
    else:
        write_open_clip_config(str(folder), student, f"local-dir:{config.run}")
        description |= _describe_clip(student)
    write_json(str(folder / DESCRIPTION), description)


def _graphs(student: LoadedModel, half: bool) -> dict[str, Graph]:
    """The graphs of a student by the names of their files."""

    def pixels(probe: Probe) -> Tensor:
        return probe.pixels

    def tokens(probe: Probe) -> Tensor:
        made: Tensor = student.tokenizer(probe.texts)
        return made

    model: Any = student.model
    if isinstance(model, Classifier):
        merged: Any = reparameterize_model(model)  # a copy
        outputs = (LOGITS, FEATURES) if model.has_classes else (FEATURES,)
        return {IMAGE_FILE: Graph(ImageOutputs(merged.half() if half else merged, half), PIXELS, outputs, pixels)}
    if half:
        model = copy.deepcopy(model).half()
    return {
        IMAGE_FILE: Graph(UnitFeatures(model, "encode_image", half), PIXELS, (FEATURES,), pixels),
        TEXT_FILE: Graph(UnitFeatures(model, "encode_text", half), TOKENS, (FEATURES,), tokens),
    }


def _check_packages(config: ExportConfig) -> None:
    """Raise UserError for a package that is missing or too old, before anything takes time."""
    onnxruntime()
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--format onnx: a package is missing ({short(error)}); {INSTALL}") from error
    newest = onnx.defs.onnx_opset_version()
    if config.opset is not None and not MIN_OPSET <= config.opset <= newest:
        raise UserError(f"--opset {config.opset}: must be {MIN_OPSET} to {newest}, the newest that this onnx knows")


def _check_readable(path: Path, opset: int) -> None:
    """Raise UserError for a graph of operators that onnxruntime does not read, before it replaces anything."""
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is not run
    options.log_severity_level = 3
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class of its own for each of its codes
        raise UserError(
            f"--opset {opset}: onnxruntime {runtime.__version__} does not read it ({short(error)}); give a lower "
            "--opset"
        ) from error


def export_graph(
    tower: nn.Module,
    inputs: Tensor,
    input_name: str,
    path: Path,
    *,
    opset: int | None = None,
    outputs: Sequence[str] = (FEATURES,),
) -> int:
    """Write a tower as one file; return the version of its operators.

    Shared weights are in it once, and nothing tells where it was made.

    Args:
        tower: In eval mode, from inputs to features (B, E), or to several outputs.
        inputs: An example, with a batch size that the graph leaves free.
        input_name: The name of the input.
        path: The file.
        opset: Version of the operators; None is torch's.
        outputs: The names of the outputs.

    Raises:
        UserError: torch cannot translate the tower.
    """
    batch = torch.export.Dim("batch")
    advice = f"use --format {'timm' if isinstance(tower, ImageOutputs) else 'open_clip'}"
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                tower,
                (inputs,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[input_name],
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # of torch.export, of the translation, of the optimiser: each has its own classes
        reason = f"torch {torch.__version__} cannot translate the student ({short(error)})"
        raise UserError(f"--format onnx: {reason}; {advice}") from error
    if isinstance(program.model.graph.inputs[0].shape[0], int):
        raise UserError(
            f"--format onnx: torch fixes the batch size to the example's {len(inputs)}, since code of the model "
            f"reads it as a number; {advice}"
        )
    _strip(program.model)
    program.save(str(path))
    return int(program.model.opset_imports[""])


def _strip(model: Any) -> None:
    """Remove what names files of this machine, and keep each weight once: the exporter transposes shared ones apart."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass

    ClearMetadataAndDocStringPass()(model)
    DeduplicateInitializersPass(size_limit=LARGEST_WEIGHT)(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporter prints and logs nothing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _describe_clip(student: LoadedModel) -> dict[str, Any]:
    """What onnx_config.json says of a CLIP."""
    import open_clip

    bias = getattr(student.model, "logit_bias", None)
    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    return {
        "embed_dim": student.config["embed_dim"],
        "logit_scale": float(student.model.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "image": {"file": IMAGE_FILE, "input": PIXELS, "output": FEATURES, "preprocess": preprocess},
        "text": {
            "file": TEXT_FILE,
            "input": TOKENS,
            "output": FEATURES,
            "context_length": student.tokenizer.context_length,
        },
    }


def _describe_image_tower(student: LoadedModel) -> dict[str, Any]:
    """What onnx_config.json says of an image tower alone."""
    model: Classifier = student.model
    return {
        "embed_dim": model.head.in_features,
        "classes": model.class_names or None,
        "image": {
            "file": IMAGE_FILE,
            "input": PIXELS,
            "output": LOGITS if model.has_classes else FEATURES,
            "features": FEATURES,
            "preprocess": {
                "size": student.image_size,
                **(student.crop or PLAIN)._asdict(),
                "mean": list(student.mean),
                "std": list(student.std),
            },
        },
    }


def load(folder: Path, student: LoadedModel, config: ExportConfig) -> Encoders:
    """Return the encoders of the folder in onnxruntime, with as many threads as torch has."""
    return encoders_of(load_onnx(str(folder), torch.get_num_threads()))


def usage(student: LoadedModel) -> str:
    """Return how to load the folder, for its card."""
    model = student.model
    if not isinstance(model, Classifier):
        return USAGE
    features = "`features` are what a classifier is learned from, not of unit length."
    if not model.has_classes:
        return CLASSIFIER_USAGE.format(outputs="features", method=".encode_image", meaning=features)
    logits = f"`logits` are {'over the `classes` that it names' if model.class_names else 'what its head gives'}; "
    return CLASSIFIER_USAGE.format(outputs="logits", method="", meaning=logits + features)


def needed_module(student: LoadedModel) -> str | None:
    """Return None: a graph needs no module of this package."""
    return None
