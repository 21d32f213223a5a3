"""timm: the image tower of a CLIP, or a classifier, as a folder that timm loads as ``local-dir:FOLDER``."""

import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from shards_spec.files import UserError, join, write_bytes
from shards_spec.models import LoadedModel, import_extensions
from training.data.eval_crop import PLAIN
from training.export.comparison import Encoders, encoders_of
from training.export.config import ExportConfig
from training.export.plain_vit import check_plain_vit
from training.export.to_open_clip import as_dtype
from training.models.classifier import Classifier, check_vocabulary, describe_classifier
from training.models.mobileclip import FUSED
from training.models.plain_vit import timm_clip_vit
from training.runs.model_folder import write_model

USAGE = """```python
import timm
{imports}
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

{output}
"""


class TimmExport(NamedTuple):
    """A timm model, with what it is rebuilt from besides its architecture's name."""

    trunk: Any
    options: dict[str, Any]
    data: dict[str, Any]
    """preprocessing: entries of timm's pretrained_cfg"""
    labels: dict[str, Any]


def write(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write config.json and model.safetensors, with the vocabulary of a classifier.

    Raises UserError when the tower is none of timm's, or the folder has another model.
    """
    tower = _classifier(student) if isinstance(student.model, Classifier) else _image_tower(student)
    if isinstance(student.model, Classifier) and not config.overwrite:
        check_vocabulary(str(folder), student.model)
    write_tower(folder, tower, config)
    if isinstance(student.model, Classifier):
        describe_classifier(str(folder), student)


def write_tower(folder: Path, tower: TimmExport, config: ExportConfig) -> None:
    """Write a timm model as timm's own export does."""
    import timm

    trunk = tower.trunk
    kept = {name: value for name, value in trunk.pretrained_cfg.items() if not name.startswith("test_")}
    trunk.pretrained_cfg = kept | tower.data
    with TemporaryDirectory() as local:
        weights = as_dtype(trunk.state_dict(), config.dtype)
        trunk.state_dict = lambda: weights  # what timm writes
        try:
            timm.models.save_for_hf(
                trunk, local, tower.labels, model_args=tower.options or None, safe_serialization=True
            )
        finally:
            del trunk.state_dict
        write_model(str(folder), "model.safetensors", Path(local, "model.safetensors").read_bytes(), config.overwrite)
        for path in sorted(Path(local).iterdir()):
            write_bytes(join(str(folder), path.name), path.read_bytes())


def _classifier(student: LoadedModel) -> TimmExport:
    """The model of a classifier, with the names of its classes."""
    model: Classifier = student.model
    synsets = model.vocabulary.rows if model.vocabulary else ()
    labels = {
        "label_names": model.class_names,
        "label_descriptions": {wnid: lemma for wnid, lemma, *_ in synsets},
    }
    options = dict(model.options)
    if getattr(model.trunk, "dynamic_img_size", False):
        options["dynamic_img_size"] = True
    crop = (student.crop or PLAIN)._asdict()  # the plain one is what `probe` and `finetune` are measured with
    return TimmExport(model.trunk, options, _preprocessing(student) | crop, labels)


def _preprocessing(student: LoadedModel) -> dict[str, Any]:
    side = student.image_size
    return {"mean": tuple(student.mean), "std": tuple(student.std), "input_size": (3, side, side)}


def _image_tower(student: LoadedModel) -> TimmExport:
    """The image tower of a CLIP; its classifier is the projection, so that it returns the image's features.

    Raises UserError for a tower that is none of timm's.
    """
    import open_clip

    visual = student.model.visual
    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    # the transform's resize goes to the whole side, then it crops nothing
    data = _preprocessing(student) | {
        "crop_pct": 1.0,
        "interpolation": preprocess.get("interpolation", "bicubic"),
        "crop_mode": {"shortest": "center", "squash": "squash", "longest": "border"}[
            preprocess.get("resize_mode", "shortest")
        ],
    }
    if isinstance(visual, TimmModel):
        trunk, options = _trunk(student)
    elif isinstance(visual, VisionTransformer):
        check_plain_vit(student.model, "timm")
        trunk, options = timm_clip_vit(visual)
    else:
        kind = type(visual).__name__
        raise UserError(f"--format timm: timm has no such image tower ({kind}); use --format onnx or open_clip")
    return TimmExport(trunk, options, data, {})


def _trunk(student: LoadedModel) -> tuple[Any, dict[str, Any]]:
    """The timm model in open_clip's wrapper, with the wrapper's projection as classifier, and its options."""
    visual: Any = student.model.visual
    if _architecture(student).endswith(FUSED):
        raise UserError(
            "--format timm with --reparameterize: timm reads no fused FastViT; export it as it is, then fuse the "
            "loaded model by timm.utils.reparameterize_model"
        )
    trunk = copy.deepcopy(visual.trunk)
    trunk.pretrained_cfg = {**trunk.pretrained_cfg, "architecture": _architecture(student)}
    head = dict(visual.head.named_children())
    unknown = [name for name in head if name not in ("drop", "proj")]
    if unknown:
        raise UserError(
            f"--format timm: the image tower ends in open_clip's {unknown[0]}, which timm does not have; use --format "
            "onnx or open_clip"
        )
    if "proj" in head:
        projection: Any = head["proj"]
        trunk.reset_classifier(projection.out_features)
        _set_linear(trunk.get_classifier(), projection.weight, projection.bias)
    return trunk, {}


@torch.no_grad()
def _set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer a projection's weights; without a bias it gets zeros."""
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def load(folder: Path, student: LoadedModel, config: ExportConfig) -> Encoders:
    """Return the encoder of the folder's model: a classifier's, or features of unit length of a CLIP's tower."""
    import timm

    import_extensions()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if isinstance(student.model, Classifier):
        ours = student.model
        return encoders_of(replace(student, model=Classifier(ours.name, model, ours.vocabulary, ours.names)))
    return Encoders(lambda pixels: nn.functional.normalize(model(pixels), dim=-1), None)


def usage(student: LoadedModel) -> str:
    """Return how to load the folder, for its card."""
    module = needed_module(student)
    imports = "" if module is None else f"import {module}  # of Clipmill: makes its architecture known\n"
    output = "It returns logits over the classes of config.json's `label_names`."
    if not isinstance(student.model, Classifier):
        output = (
            "It returns the features of images, not normalised, as `encode_image` of the CLIP does: the classifier is "
            "the projection. With `num_classes=0` it returns what the projection is of."
        )
    return USAGE.format(imports=imports, output=output)


def needed_module(student: LoadedModel) -> str | None:
    """Return the module of this package that makes a student's architecture known; None for timm's own."""
    from timm.models import model_entrypoint

    model = student.model
    if isinstance(model, Classifier):
        architecture = model.trunk.pretrained_cfg["architecture"]
    elif isinstance(model.visual, TimmModel):
        architecture = _architecture(student)
    else:  # CLIP's ViT, which timm has
        return None
    module = str(model_entrypoint(architecture).__module__)
    return None if module.startswith("timm.") else module


def _architecture(student: LoadedModel) -> str:
    """The timm name of a CLIP's image tower."""
    return str(student.config["vision_cfg"]["timm_model_name"]).partition(".")[0]
