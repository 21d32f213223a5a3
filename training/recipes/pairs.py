"""What recipes of image-text pairs have in common."""

import math
from typing import Any

import torch

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.config import DataConfig, ModelConfig, TeacherCacheConfig, ViewConfig
from training.data.samples import Samples, check_data, open_samples
from training.runs.student import load_student

MAX_LOGIT_SCALE = math.log(100)  # CLIP, section 2.5


def open_pairs(
    data: DataConfig,
    views: ViewConfig | TeacherCacheConfig,
    model: ModelConfig,
    seed: int,
    *,
    random_weights: bool = True,
) -> tuple[LoadedModel, Samples]:
    """Return the student and the pairs it reads. Raises UserError and DataError when they are not there.

    Args:
        data: What is read.
        views: Where views come from.
        model: The student.
        seed: Of random weights, order, captions and views.
        random_weights: Without any weights they are random; otherwise that is a UserError.
    """
    check_data(data)  # before a large model is built
    torch.manual_seed(seed)
    student = load_student(model, seed, random_weights=random_weights)
    if student.tokenizer is None:
        raise UserError(f"--model {model.model!r} has no text tower, which training on pairs needs")
    return student, open_samples(data, views, student, seed)


def check_same_inputs(option: str, other: LoadedModel, student: LoadedModel) -> None:
    """Raise UserError where a model that sees the student's images and texts wants others.

    Args:
        option: What names the model, for the message.
        other: The model.
        student: The student.
    """
    for field_name in ("image_size", "mean", "std"):
        ours, theirs = getattr(student, field_name), getattr(other, field_name)
        if ours != theirs:
            raise UserError(f"{option} takes images of {field_name} {theirs}, the student of {ours}")
    ours, theirs = (
        [model.config["text_cfg"].get(key) for key in ("context_length", "vocab_size")] for model in (student, other)
    )
    if ours != theirs:
        raise UserError(f"{option} has {theirs} for context_length and vocab_size, the student {ours}")


@torch.no_grad()
def clamp_logit_scale(student: Any) -> None:
    """Keep a student's logit scale between 1 and 100."""
    student.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
