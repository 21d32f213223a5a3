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
    data: DataConfig, views: ViewConfig | TeacherCacheConfig, model: ModelConfig, seed: int
) -> tuple[LoadedModel, Samples]:
    """Return the student and the pairs it reads. Raises UserError and DataError when they are not there."""
    check_data(data)  # before a large model is built
    torch.manual_seed(seed)
    student = load_student(model, seed)
    if student.tokenizer is None:
        raise UserError(f"--model {model.model!r} has no text tower, which training on pairs needs")
    return student, open_samples(data, views, student, seed)


@torch.no_grad()
def clamp_logit_scale(student: Any) -> None:
    """Keep a student's logit scale between 1 and 100."""
    student.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
