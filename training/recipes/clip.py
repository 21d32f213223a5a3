"""Plain CLIP (Radford et al., arXiv 2103.00020): the baseline that every student is measured against.

Learning rate 1e-3 and weight decay 0.1 are those of open_clip's README example on CC3M; 32 epochs, betas and eps of
CLIP's table 19 (ViT); random crops of (0.9, 1.0) and a learned logit scale clamped to 100 as in open_clip. Batch 1024
and warm-up 2000 are ours, for sets of CC12M's size. Cost: 32 epochs of 10 million pairs are 320 million samples seen.

    clipmill train clip --data ROOT --out RUN
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes

from shards_spec.models import LoadedModel
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from training.data.teacher_cache import TeacherCache
from training.losses.contrastive import clip_loss


@dataclass(frozen=True)
class ClipConfig:
    """Train a CLIP model with the contrastive loss."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)


def config() -> ClipConfig:
    """The recipe's own numbers."""
    return ClipConfig(
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup=2000),
        run=RunConfig(out="runs/clip", epochs=32),
    )


class ClipTask(nn.Module):
    """Student and its learned logit scale."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``image`` and ``text`` features (n, D), normalised."""
        return {
            "image": self.student.encode_image(batch["images"], normalize=True),
            "text": self.student.encode_text(batch["tokens"], normalize=True),
        }

    def losses(self, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """``contrastive``."""
        return {"contrastive": clip_loss(features["image"], features["text"], self.student.logit_scale.exp())}

    def after_step(self) -> None:
        """Logit scale at most 100 (CLIP, section 2.5)."""
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, math.log(100))


def build(config: ClipConfig, student: LoadedModel, cache: TeacherCache | None) -> ClipTask:
    """The task of a config."""
    return ClipTask(student.model)
