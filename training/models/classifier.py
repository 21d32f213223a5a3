"""An image classifier as a student: timm's vision transformers and convolutional networks with a head over classes.

A run or export folder describes it in ``classifier.json``, with the vocabulary that its classes belong to in
``vocabulary.tsv``. The vocabulary's hash is a buffer of the model, hence in every checkpoint.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards_spec.files import UserError, exists, join, read_json, write_json
from shards_spec.library_errors import short
from shards_spec.messages import counted
from shards_spec.models import (
    LOCAL_DIR,
    NO_TRUST,
    TIMM,
    LoadedModel,
    Trust,
    as_loaded,
    create_timm_model,
    load_backbone,
)
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.data.eval_crop import crop_of

DESCRIPTION = "classifier.json"
VOCABULARY = "vocabulary.tsv"
FOLDER = f"{TIMM}{LOCAL_DIR}"
OWN_OPTIONS = ("num_classes", "dynamic_img_size")
HASH_BYTES = 32
RGB = 3  # channels
TOLERANCE = 1e-5  # largest difference of a logit of an exported model, float32 on the same CPU


class Classifier(nn.Module):
    """A timm model with a linear head over classes.

    Args:
        name: ``timm:NAME`` of the model.
        trunk: The model, with its head.
        vocabulary: The vocabulary whose ranks are the classes, or None.
        names: Names of the classes without a vocabulary.
        options: Those that the trunk was built with, besides its name.
    """

    def __init__(
        self,
        name: str,
        trunk: Any,
        vocabulary: Vocabulary | None,
        names: list[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.options = dict(options or {})
        self.trunk = trunk
        self.vocabulary = vocabulary
        self.names = names or []
        sha256 = bytes.fromhex(vocabulary.sha256) if vocabulary else bytes(HASH_BYTES)
        self.register_buffer("vocabulary_sha256", torch.tensor(list(sha256), dtype=torch.uint8))
        self.vocabulary_sha256: Tensor

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        """The linear layers over the classes: one, or those of the class token and of a distillation token."""
        return class_heads(self.trunk)

    @property
    def head(self) -> nn.Linear:
        """The linear layer over the classes, of the class token where there are two."""
        return self.heads[0]

    @property
    def classes(self) -> int:
        """The number of logits."""
        return self.head.out_features

    @property
    def has_classes(self) -> bool:
        """Whether logits mean anything: not those of a student that was trained without labels, over one class."""
        return bool(self.names) or self.vocabulary is not None or self.classes > 1

    @property
    def class_names(self) -> list[str]:
        """WordNet ids of a vocabulary, else the names of the classes."""
        return [wnid for wnid, *_ in self.vocabulary.rows] if self.vocabulary else self.names

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of normalised images (B, 3, S, S)."""
        logits: Tensor = self.trunk(images)
        return logits

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return the features (B, D) that the head sees, of normalised images (B, 3, S, S)."""
        features: Tensor = self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input, and compute the block again for its gradient."""
        self.trunk.set_grad_checkpointing(enable)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the weights. Raises UserError when they belong to another vocabulary."""
        theirs = state_dict.get(f"{prefix}vocabulary_sha256")
        if theirs is not None and not torch.equal(theirs.cpu(), self.vocabulary_sha256.cpu()):
            raise UserError(
                f"these weights' classes are of {_vocabulary_name(theirs)}, this model's of "
                f"{_vocabulary_name(self.vocabulary_sha256)}{_first_synsets(self.vocabulary)}: take the vocabulary "
                "they were trained with, or another --out"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _vocabulary_name(sha256: Tensor) -> str:
    """The beginning of a hash, for messages."""
    text = bytes(sha256.cpu().tolist()).hex()
    return f"vocabulary {text[:12]}" if text.strip("0") else "no vocabulary"


def _first_synsets(vocabulary: Vocabulary | None) -> str:
    """Size and first synsets of a vocabulary, for messages."""
    if vocabulary is None:
        return ""
    first = ", ".join(lemma for _, lemma, *_ in vocabulary.rows[:3])
    return f" ({len(vocabulary)} synsets: {first} ...)"


def _timm() -> Any:
    """timm, with our own models registered. Imported where it is used, since that takes a second."""
    import timm

    import training.models.catlip
    import training.models.clip_image_tower
    import training.models.minivit
    import training.models.tinymim_star  # noqa: F401  all register them

    return timm


def new_classifier(
    model: str,
    classes: int,
    *,
    vocabulary: Vocabulary | None = None,
    pretrained: str | None = None,
    seed: int = 0,
    trust: Trust = NO_TRUST,
    options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Build a timm model with a new head.

    Args:
        model: ``timm:NAME``.
        classes: Number of classes.
        vocabulary: The vocabulary whose ranks are the classes.
        pretrained: Checkpoint file for all but the head, or "timm" for timm's own weights; None is random weights.
        seed: What random weights depend on.
        trust: What a checkpoint file may do.
        options: Options of the architecture, say ``groups`` of MiniViT's.

    Raises:
        UserError: The name is unknown or of a network that does not serve, or its weights are missing.
    """
    if not model.startswith(TIMM):
        raise UserError(f"--model {model!r}: a classifier is named {TIMM}NAME, say {TIMM}catlip_vit_base_patch16_224")
    timm = _timm()
    options = {**stored_options(model), **(options or {})}
    timms_weights = pretrained == "timm"
    try:
        torch.manual_seed(seed)
        trunk = create_timm_model(model, timms_weights, num_classes=0, dynamic_img_size=True, **options)
        is_vit = True
    except TypeError:  # only vision transformers have the option
        torch.manual_seed(seed)
        trunk = create_timm_model(model, timms_weights, num_classes=0, **options)
        is_vit = False
    if pretrained is not None and not timms_weights:
        load_backbone(trunk, pretrained, trust.trust_checkpoint)
    trunk.reset_classifier(classes)
    heads = class_heads(trunk)
    if not heads:
        raise UserError(f"--model {model!r}: its classifier is no linear layer; take another network")
    for head in heads:
        init_head(head)
    data = timm.data.resolve_model_data_config(trunk)
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    if ":" in model.removeprefix(TIMM):  # a folder or the Hub: runs and exports must work without it
        model = f"{TIMM}{trunk.pretrained_cfg['architecture']}"
    student = Classifier(model, trunk.eval(), vocabulary, options=options)
    if not is_vit:
        _check_sides(student, data["input_size"][-1])
    return LoadedModel(student.eval(), None, config, data["input_size"][-1], data["mean"], data["std"])


def load_timm_classifier(model: str) -> LoadedModel:
    """Return a timm model with its own weights, head and preprocessing, the crop too.

    Names of classes, or their vocabulary, are those that lie in the folder. A model without a head gets one over one
    class, as a student has that was trained without labels.

    Args:
        model: ``timm:local-dir:FOLDER``, or ``timm:NAME``.

    Raises:
        UserError: There is no such model, its weights are missing, its head is no linear layer, it takes other images
            than square RGB ones, or the vocabulary in its folder is another model's.
    """
    _timm()
    trunk = create_timm_model(model, pretrained=True)
    _check_images(model, trunk)
    if not trunk.num_classes:
        trunk.reset_classifier(1)
    if not class_heads(trunk):
        raise UserError(f"{model!r}: its classifier is no linear layer; take another network")
    folder = model.removeprefix(FOLDER)
    vocabulary = None
    names = list[str]()
    if model.startswith(FOLDER):
        stored = join(folder, VOCABULARY)
        vocabulary = read_vocabulary(stored) if exists(stored) else None
        named = read_json(join(folder, "config.json")).get("label_names")
        names = named if isinstance(named, list) and vocabulary is None else []
        _check_count(stored, vocabulary, class_heads(trunk)[0].out_features)
    name = f"{TIMM}{trunk.pretrained_cfg['architecture']}"
    loaded = as_loaded(trunk)
    classifier = Classifier(name, trunk, vocabulary, names, stored_options(model)).eval()
    return replace(loaded, model=classifier, crop=crop_of(loaded.config))


def _check_count(stored: str, vocabulary: Vocabulary | None, classes: int) -> None:
    """Raise UserError for the vocabulary of another model, whose names its classes would get."""
    if vocabulary is not None and len(vocabulary) != classes:
        raise UserError(
            f"{stored} has {counted(len(vocabulary), 'synset')}, and the model beside it "
            f"{counted(classes, 'class', 'classes')}: it is another model's; delete it, or copy the folder again"
        )


@torch.no_grad()
def _check_images(model: str, trunk: Any) -> None:
    """Raise UserError for a timm model that does not take square RGB images, as all images here are prepared."""
    channels, height, width = as_loaded(trunk).config["input_size"]
    reason = ""
    if channels != RGB or height != width:
        reason = f"its input is {channels} x {height} x {width}"
    else:
        try:
            trunk(torch.zeros(1, RGB, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:  # say, built with another in_chans or img_size
            reason = short(error)
    if reason:
        raise UserError(f"{model!r} does not take square RGB images ({reason}); take another network")


def class_heads(trunk: Any) -> tuple[nn.Linear, ...]:
    """Return a timm model's linear layers over the classes: one, two of a distilled one, none of other classifiers."""
    found = trunk.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return heads if all(isinstance(head, nn.Linear) for head in heads) else ()


def stored_options(model: str) -> dict[str, Any]:
    """Return the options of the architecture that a folder's config.json keeps, for ``timm:local-dir:FOLDER``.

    A run keeps them with the architecture's name, since it must be rebuilt without the folder. Left out is what every
    classifier has of its own: the number of classes, and that images of other sizes are taken.
    """
    path = join(model.removeprefix(FOLDER), "config.json")
    if not model.startswith(FOLDER) or not exists(path):
        return {}
    options = read_json(path).get("model_args") or {}
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


@torch.no_grad()
def _check_sides(model: Classifier, side: int) -> None:
    """Raise UserError for a network that takes images of one side only, or whose head sees something else."""
    try:
        for tried in (side, side + 32):
            images = torch.zeros(1, 3, tried, tried)
            if not torch.allclose(model.head(model.encode_image(images)), model(images), atol=1e-4):
                raise RuntimeError("its head does not stand behind its pooled features")
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--model {model.name!r} does not serve as a classifier ({short(error)}): take one of timm's vision "
            "transformers or convolutional networks"
        ) from error


@torch.no_grad()
def init_head(head: nn.Linear, std: float = 0.02) -> None:
    """Draw the weights of a head, of standard deviation ``std``; its biases are 0."""
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)


def check_vocabulary(folder: str, model: Classifier) -> None:
    """Raise UserError when a folder has another vocabulary than a classifier's."""
    stored = join(folder, VOCABULARY)
    if not exists(stored):
        return
    theirs = read_vocabulary(stored)
    if model.vocabulary is None or theirs.sha256 != model.vocabulary.sha256:
        raise UserError(
            f"{stored} is vocabulary {theirs.sha256[:12]}{_first_synsets(theirs)}, asked for is "
            f"{_vocabulary_name(model.vocabulary_sha256)}{_first_synsets(model.vocabulary)}: take the same again, "
            "or another folder"
        )


def describe_classifier(folder: str, student: LoadedModel) -> None:
    """Write the files from which `load_classifier` rebuilds the student.

    Raises UserError when the folder has another vocabulary, before these are written.
    """
    model: Classifier = student.model
    check_vocabulary(folder, model)
    description = {
        "model": model.name,
        "classes": model.classes,
        "names": model.names,
        "image_size": student.image_size,
        "mean": list(student.mean),
        "std": list(student.std),
    }
    if model.options:
        description["options"] = model.options
    write_json(join(folder, DESCRIPTION), description)
    if model.vocabulary is not None:
        model.vocabulary.write(join(folder, VOCABULARY))


def is_classifier(folder: str) -> bool:
    """Whether a folder holds a classifier's description."""
    return exists(join(folder, DESCRIPTION))


def load_classifier(folder: str) -> LoadedModel:
    """Return the student that a folder describes, with random weights. Raises UserError and DataError."""
    path = join(folder, DESCRIPTION)
    if not exists(path):
        raise UserError(f"{path} is not there: {folder} is no RUN of a classifier")
    description = read_json(path)
    stored = str(Path(folder) / VOCABULARY)
    vocabulary = read_vocabulary(stored) if exists(stored) else None
    student = new_classifier(
        description["model"], description["classes"], vocabulary=vocabulary, options=description.get("options")
    )
    student.model.names = description["names"]
    return replace(
        student,
        image_size=description["image_size"],
        mean=tuple(description["mean"]),
        std=tuple(description["std"]),
    )
