"""ONNX: the towers of a CLIP as two graphs with a free batch size, checked in onnxruntime."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards_spec.files import UserError, write_json
from shards_spec.library_errors import short
from shards_spec.models import LoadedModel
from training.export.comparison import Encoders, encoders_of
from training.export.config import ExportConfig
from training.export.onnx_int8 import quantize
from training.export.onnx_model import (
    DESCRIPTION,
    FEATURES,
    IMAGE_FILE,
    INSTALL,
    PIXELS,
    TEXT_FILE,
    TOKENS,
    load_onnx,
    onnxruntime,
)
from training.export.probe import noise, read_probe
from training.models.classifier import Classifier
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


def write(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write image.onnx, text.onnx, what they take and give (onnx_config.json), tokenizer and preprocessing.

    Raises UserError when a package is missing, the student has no towers, or the folder has another model.
    """
    _check(student, config)
    probe = noise(student)
    half = config.dtype == "fp16"
    model = copy.deepcopy(student.model).half() if half else student.model
    with TemporaryDirectory() as local:
        graphs = {
            IMAGE_FILE: (UnitFeatures(model, "encode_image", half), probe.pixels[:EXAMPLES], PIXELS),
            TEXT_FILE: (UnitFeatures(model, "encode_text", half), student.tokenizer(probe.texts[:EXAMPLES]), TOKENS),
        }
        opset = 0
        for name, (tower, inputs, input_name) in graphs.items():
            opset = export_graph(tower.eval(), inputs, input_name, Path(local, name), config.opset)
        if config.int8 is not None:
            calibration = probe
            if config.calibrate is not None:
                calibration = read_probe(config.calibrate, student, config.samples, "calibrate")
            inputs_of = {IMAGE_FILE: calibration.pixels, TEXT_FILE: student.tokenizer(calibration.texts)}
            for name, (_, _, input_name) in graphs.items():
                quantize(Path(local, name), config.int8, input_name, inputs_of[name])
        weights = {name: Path(local, name).read_bytes() for name in graphs}
    write_models(str(folder), weights, config.overwrite)
    write_open_clip_config(str(folder), student, f"local-dir:{config.run}")
    write_json(str(folder / DESCRIPTION), _describe(student, config, opset))


def _check(student: LoadedModel, config: ExportConfig) -> None:
    """Raise UserError for what cannot be exported, before anything takes time."""
    if isinstance(student.model, Classifier):
        raise UserError(f"--format onnx: {config.run} is an image classifier without a text tower; use --format timm")
    onnxruntime()
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--format onnx: a package is missing ({short(error)}); {INSTALL}") from error
    newest = onnx.defs.onnx_opset_version()
    if config.opset is not None and not MIN_OPSET <= config.opset <= newest:
        raise UserError(f"--opset {config.opset}: must be {MIN_OPSET} to {newest}, the newest that this onnx knows")


def export_graph(tower: nn.Module, inputs: Tensor, input_name: str, path: Path, opset: int | None = None) -> int:
    """Write a tower as one file; return the version of its operators.

    Shared weights are in it once, and nothing tells where it was made.

    Args:
        tower: In eval mode, from inputs to features (B, E).
        inputs: An example, with a batch size that the graph leaves free.
        input_name: The name of the input.
        path: The file.
        opset: Version of the operators; None is torch's.

    Raises:
        UserError: torch cannot translate the tower.
    """
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                tower,
                (inputs,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[input_name],
                output_names=[FEATURES],
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # of torch.export, of the translation, of the optimiser: each has its own classes
        reason = f"torch {torch.__version__} cannot translate the student ({short(error)})"
        raise UserError(f"--format onnx: {reason}; use --format open_clip") from error
    if isinstance(program.model.graph.inputs[0].shape[0], int):
        raise UserError(
            f"--format onnx: torch fixes the batch size to the example's {len(inputs)}, since code of the model "
            "reads it as a number; use --format open_clip"
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


def _describe(student: LoadedModel, config: ExportConfig, opset: int) -> dict[str, Any]:
    """The content of onnx_config.json."""
    import open_clip

    bias = getattr(student.model, "logit_bias", None)
    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    return {
        "dtype": f"int8 {config.int8}" if config.int8 else config.dtype,
        "opset": opset,
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


def load(folder: Path, student: LoadedModel, config: ExportConfig) -> Encoders:
    """Return the encoders of the folder in onnxruntime, with as many threads as torch has."""
    return encoders_of(load_onnx(str(folder), torch.get_num_threads()))


def usage(student: LoadedModel) -> str:
    """Return how to load the folder, for its card."""
    return USAGE


def needed_module(student: LoadedModel) -> str | None:
    """Return None: a graph needs no module of this package."""
    return None
