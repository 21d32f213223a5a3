"""Classifiers as teachers of a student's classes: timm's, and those that a run trained."""

from dataclasses import dataclass
from typing import Any

import torch

from shards_spec.checkpoints import describe_mismatch, load_checkpoint
from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import NO_TRUST, TIMM, Trust, as_loaded, create_timm_model, import_extensions
from training.config import is_run
from training.models.classifier import Classifier
from training.models.teacher import FrozenTeacher
from training.runs.student import load_run

RANDOM = "random"


@dataclass(frozen=True)
class ClassTeacher:
    """A frozen classifier."""

    frozen: FrozenTeacher
    """its model gives logits (B, K) of normalised images"""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_class_teacher(
    name: str, weights: str | None, classes: list[str], seed: int, trust: Trust = NO_TRUST
) -> ClassTeacher:
    """Load a teacher of the classes of a dataset.

    Of a timm model only the number of classes can be compared: ImageNet's are in the order of their WordNet ids.

    Args:
        name: ``timm:NAME``, or a RUN folder of a classifier.
        weights: A checkpoint file of timm's model; "random" is untrained; None takes timm's own, or the run's.
        classes: Names of the student's classes.
        seed: Of random weights.
        trust: What a checkpoint file may do.

    Raises:
        UserError: There is no such model, its weights do not fit, or it knows other classes.
        DataError: A run's checkpoints are damaged.
    """
    if is_run(name):
        if weights is not None:
            raise UserError(f"--teacher-weights {weights!r} would not be used: RUN {name} brings its own weights")
        return _of_run(name, classes, trust)
    if not name.startswith(TIMM):
        raise UserError(f"--teacher {name!r}: give a RUN folder of a classifier, or {TIMM}NAME")
    import_extensions()
    torch.manual_seed(seed)
    if weights is None:
        model = create_timm_model(name, pretrained=True)
        if model.num_classes != len(classes):
            raise UserError(
                f"--teacher {name!r} has {counted(model.num_classes, 'class', 'classes')}, --data {len(classes)}: its "
                "labels are of another list. Take a RUN of `clipmill train finetune` on these images as the teacher"
            )
    else:
        model = create_timm_model(name, pretrained=False, num_classes=len(classes))
        if weights != RANDOM:
            _load_weights(model, weights, trust)
    loaded = as_loaded(model)
    frozen = FrozenTeacher(name, width=len(classes), model=loaded.model)
    return ClassTeacher(frozen, loaded.mean, loaded.std)


def _of_run(name: str, classes: list[str], trust: Trust) -> ClassTeacher:
    loaded, _ = load_run(name, trust=trust)
    model = loaded.model
    if not isinstance(model, Classifier) or not model.names:
        raise UserError(f"--teacher {name}: it is no classifier; `clipmill train finetune` makes one of it")
    if model.names != classes:
        differing = ", ".join(sorted({*model.names} ^ {*classes})[:5]) or "in another order"
        raise UserError(
            f"--teacher {name} knows other classes than --data ({differing}): its labels are of another list. Take a "
            "teacher that was trained on these images"
        )
    frozen = FrozenTeacher(name, width=len(classes), model=model.trunk)
    return ClassTeacher(frozen, tuple(loaded.mean), tuple(loaded.std))


def _load_weights(model: Any, file: str, trust: Trust) -> None:
    """Load a checkpoint file with its head. Raises UserError where it does not fit."""
    try:
        model.load_state_dict(load_checkpoint(file, trust.trust_checkpoint, model.state_dict().keys()))
    except RuntimeError as error:
        raise UserError(f"--teacher-weights {file} does not fit: {describe_mismatch(error)}") from error
