"""An image classifier as a student: timm's vision transformers and convolutional networks with a head over classes.

Its description in a run or export folder is ``classifier.json``, with the vocabulary that its classes belong to in
``vocabulary.tsv``; the vocabulary's hash is a buffer, hence in every checkpoint.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards_spec.files import UserError, exists, join, read_json, write_bytes, write_json
from shards_spec.library_errors import short
from shards_spec.models import NO_TRUST, TIMM, LoadedModel, Trust, create_timm_model, load_backbone
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.data.labelled_rows import CROP
from training.runs.model_folder import write_model

DESCRIPTION, VOCABULARY = "classifier.json", "vocabulary.tsv"
HASH_BYTES = 32
TOLERANCE = 1e-5  # largest difference of a logit, fp32 on the same CPU


class Classifier(nn.Module):
    """``trunk`` is timm's model ``name`` with its head; its classes are a vocabulary's, or have ``names``."""

    def __init__(self, name: str, trunk: Any, vocabulary: Vocabulary | None, names: list[str] | None = None) -> None:
        super().__init__()
        self.name, self.trunk, self.vocabulary, self.names = name, trunk, vocabulary, names or []
        own = bytes.fromhex(vocabulary.sha256) if vocabulary else bytes(HASH_BYTES)
        self.register_buffer("vocabulary_sha256", torch.tensor(list(own), dtype=torch.uint8))
        self.vocabulary_sha256: Tensor

    @property
    def head(self) -> nn.Linear:
        """The linear layer over the classes."""
        head: nn.Linear = self.trunk.get_classifier()
        return head

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, K) logits."""
        logits: Tensor = self.trunk(images)
        return logits

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, S, S) -> (B, D), what the head sees."""
        features: Tensor = self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass."""
        self.trunk.set_grad_checkpointing(enable)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Raises UserError when the weights are of another vocabulary."""
        theirs = state_dict.get(f"{prefix}vocabulary_sha256")
        if theirs is not None and not torch.equal(theirs.cpu(), self.vocabulary_sha256.cpu()):
            raise UserError(
                f"these weights' classes are of {_said(theirs)}, this model's of {_said(self.vocabulary_sha256)}"
                f"{_about(self.vocabulary)}: take the vocabulary they were trained with, or another --out"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _said(sha256: Tensor) -> str:
    text = bytes(sha256.cpu().tolist()).hex()
    return f"vocabulary {text[:12]}" if text.strip("0") else "no vocabulary"


def _about(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return ""
    first = ", ".join(lemma for _, lemma, *_ in vocabulary.rows[:3])
    return f" ({len(vocabulary)} synsets: {first} ...)"


def _timm() -> Any:
    """timm, which knows our own models, too; imported where it is used, since that takes a second."""
    import timm

    import training.models.catlip  # noqa: F401  registers them

    return timm


def new_classifier(
    model: str,
    classes: int,
    vocabulary: Vocabulary | None = None,
    pretrained: str | None = None,
    seed: int = 0,
    trust: Trust = NO_TRUST,
) -> LoadedModel:
    """``timm:NAME`` with a new head over ``classes`` classes.

    Weights depend on ``seed`` alone; ``pretrained`` is a checkpoint file for all but the head, or "timm" for timm's
    own. Raises UserError when the name is unknown or of a network that does not serve, or its weights are not there.
    """
    if not model.startswith(TIMM):
        raise UserError(f"--model {model!r}: a classifier is named {TIMM}NAME, say {TIMM}catlip_vit_base_patch16_224")
    timm, own = _timm(), pretrained == "timm"
    try:
        torch.manual_seed(seed)
        trunk = create_timm_model(model, own, num_classes=0, dynamic_img_size=True)
        any_side = True
    except TypeError:  # no ViT
        torch.manual_seed(seed)
        trunk = create_timm_model(model, own, num_classes=0)
        any_side = False
    if pretrained is not None and not own:
        load_backbone(trunk, pretrained, trust.trust_checkpoint)
    trunk.reset_classifier(classes)
    head = trunk.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f"--model {model!r}: its classifier is no single linear layer; take another network")
    new_rows(head)
    data = timm.data.resolve_model_data_config(trunk)
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    if ":" in model.removeprefix(TIMM):  # a folder or the Hub: runs and exports are to live without it
        model = f"{TIMM}{trunk.pretrained_cfg['architecture']}"
    student = Classifier(model, trunk.eval(), vocabulary)
    if not any_side:
        _check_sides(student, data["input_size"][-1])
    return LoadedModel(student.eval(), None, config, data["input_size"][-1], data["mean"], data["std"])


@torch.no_grad()
def _check_sides(model: Classifier, side: int) -> None:
    """Raise UserError for a network that takes images of one side only, or whose head sees something else."""
    try:
        for asked in (side, side + 32):
            images = torch.zeros(1, 3, asked, asked)
            if not torch.allclose(model.head(model.encode_image(images)), model(images), atol=1e-4):
                raise RuntimeError("its head does not stand behind its pooled features")
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--model {model.name!r} does not serve as a classifier ({short(error)}): take one of timm's vision "
            "transformers or convolutional networks"
        ) from error


@torch.no_grad()
def new_rows(head: nn.Linear) -> None:
    """Random rows of a head, standard deviation 0.02, and biases of 0."""
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)


def describe_classifier(folder: str, student: LoadedModel) -> None:
    """Write what `load_classifier` rebuilds the student from.

    Raises UserError when the folder has another vocabulary, before anything is written.
    """
    model: Classifier = student.model
    stored = join(folder, VOCABULARY)
    if exists(stored) and (theirs := read_vocabulary(stored)).sha256 != (model.vocabulary and model.vocabulary.sha256):
        raise UserError(
            f"{stored} is vocabulary {theirs.sha256[:12]}{_about(theirs)}, asked for is "
            f"{_said(model.vocabulary_sha256)}{_about(model.vocabulary)}: take the same again, or another folder"
        )
    about = {"model": model.name, "classes": model.head.out_features, "names": model.names}
    about |= {"image_size": student.image_size, "mean": list(student.mean), "std": list(student.std)}
    write_json(join(folder, DESCRIPTION), about)
    if model.vocabulary is not None:
        model.vocabulary.write(stored)


def is_classifier(folder: str) -> bool:
    """Whether a folder holds a classifier's description."""
    return exists(join(folder, DESCRIPTION))


def load_classifier(folder: str) -> LoadedModel:
    """The student of a folder, with random weights. Raises UserError and DataError."""
    path = join(folder, DESCRIPTION)
    if not exists(path):
        raise UserError(f"{path} is not there: {folder} is no RUN of a classifier")
    said = read_json(path)
    stored = str(Path(folder) / VOCABULARY)
    student = new_classifier(said["model"], said["classes"], read_vocabulary(stored) if exists(stored) else None)
    student.model.names = said["names"]
    return replace(student, image_size=said["image_size"], mean=tuple(said["mean"]), std=tuple(said["std"]))


def export_classifier(folder: str, student: LoadedModel, overwrite: bool = False) -> None:
    """Write a folder that timm loads as ``local-dir:FOLDER``, with the vocabulary, wherever it is moved to.

    timm alone does for its own architectures; CatLIP's ViTs (``catlip_vit_...``) have another stem and need this
    package (``import training.models.catlip``).

    Raises UserError when the folder has another model (unless ``overwrite``), or the loaded copy computes something
    else.
    """
    timm, model = _timm(), student.model
    rows = model.vocabulary.rows if model.vocabulary else ()
    names = [row[0] for row in rows] or model.names
    about = {"label_names": names, "label_descriptions": {wnid: lemma for wnid, lemma, *_ in rows}}
    side = student.image_size
    seen: dict[str, Any] = {"mean": tuple(student.mean), "std": tuple(student.std), "input_size": (3, side, side)}
    seen |= {"crop_pct": CROP, "interpolation": "bilinear"}  # what `probe` and `finetune` measure by
    kept = {name: value for name, value in model.trunk.pretrained_cfg.items() if not name.startswith("test_")}
    model.trunk.pretrained_cfg = kept | seen
    options = {"dynamic_img_size": True} if getattr(model.trunk, "dynamic_img_size", False) else None
    with TemporaryDirectory() as near:
        timm.models.save_for_hf(model.trunk, near, about, model_args=options, safe_serialization=True)
        write_model(folder, "model.safetensors", Path(near, "model.safetensors").read_bytes(), overwrite)
        for path in sorted(Path(near).iterdir()):
            write_bytes(join(folder, path.name), path.read_bytes())
    describe_classifier(folder, student)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(4, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((again(images) - model.eval()(images)).abs().max())
    if difference > TOLERANCE:
        raise UserError(f"{folder}: loaded back, its logits differ by {difference:.2g}; do not use it")
