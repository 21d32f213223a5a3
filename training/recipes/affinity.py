"""Affinity mimicking from a teacher cache (TinyCLIP, Wu et al., arXiv 2309.12314, section 3.1).

The student's softmax over image-text similarities follows the teacher's, rows and columns. Numbers are those of the
released LAION-400M scripts: lr 1e-4, weight decay 0.2, betas (0.9, 0.98), eps 1e-6, clip 5, warm-up 2000, scale 50
on both sides and frozen, no hard-label loss, 6 epochs of batch 32,768. Ours differ: teacher features come from the
cache, so the teacher costs nothing here; views are the cache's; weights are not inherited; CLIP-KD's feature loss
(arXiv 2307.12732) can be added. ViT-M-32 has the image tower of TinyCLIP-ViT-40M/32 (59.8 % ImageNet zero-shot with
inheritance on LAION-400M), its text tower is 12 layers deep instead of 6.

    clipmill train affinity --data ROOT --teacher NAME --out RUN
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TeacherCacheConfig, require
from training.data.teacher_cache import TeacherCache
from training.losses.contrastive import clip_loss
from training.losses.distillation import affinity_loss, feature_loss


@dataclass(frozen=True)
class AffinityConfig:
    """Distil a student from a teacher cache: affinity mimicking and features."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    views: OmitArgPrefixes[TeacherCacheConfig] = field(default_factory=TeacherCacheConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    affinity_weight: float = 1.0
    """weight of affinity mimicking"""
    feature_weight: float = 0.0
    """weight of feature distillation; needs a student with the teacher's embedding width"""
    contrastive_weight: float = 0.0
    """weight of the hard-label loss; 0 in all released TinyCLIP recipes"""
    fixed_logit_scale: float | None = 50.0
    """scale of student and teacher; None: the student learns its own, the teacher keeps its own"""

    def __post_init__(self) -> None:
        weights = ("affinity_weight", "feature_weight", "contrastive_weight")
        for name in weights:
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(any(getattr(self, name) for name in weights), "affinity_weight", 0.0, "above 0 when the others are 0")
        scale = self.fixed_logit_scale
        require(scale is None or scale > 0, "fixed_logit_scale", scale, "above 0 or None")


def config() -> AffinityConfig:
    """The paper's numbers (released scripts)."""
    return AffinityConfig(
        data=DataConfig(batch_size=32768, workers=8),
        student=ModelConfig(model="ViT-M-32"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.2, warmup=2000, clip_norm=5.0),
        run=RunConfig(out="runs/affinity", epochs=6),
    )


class AffinityTask(nn.Module):
    """The student; the teacher is in the batch. ``scale`` is both sides', or None; then the teacher has its own."""

    def __init__(self, student: Any, weights: dict[str, float], scale: float | None, teacher_scale: float) -> None:
        super().__init__()
        self.student = student
        self.weights, self.scale = weights, scale
        self.teacher_scale = scale or teacher_scale
        if scale is not None:
            with torch.no_grad():
                self.student.logit_scale.fill_(math.log(scale)).requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``image``, ``text`` (n, D), ``teacher_image``, ``teacher_text`` (n, D'), all normalised."""
        return {
            "image": self.student.encode_image(batch["images"], normalize=True),
            "text": self.student.encode_text(batch["tokens"], normalize=True),
            "teacher_image": F.normalize(batch["teacher_image"].float(), dim=-1),
            "teacher_text": F.normalize(batch["teacher_text"].float(), dim=-1),
        }

    def losses(self, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """``affinity``, ``feature``, ``contrastive``: those whose weight is not 0."""
        image, text = features["image"], features["text"]
        teacher_image, teacher_text = features["teacher_image"], features["teacher_text"]
        scale = self.student.logit_scale.exp() if self.scale is None else self.scale
        losses = {
            "affinity": lambda: affinity_loss(
                image, text, teacher_image, teacher_text, student_scale=scale, teacher_scale=self.teacher_scale
            ),
            "feature": lambda: feature_loss(image, text, teacher_image, teacher_text),
            "contrastive": lambda: clip_loss(image, text, scale),
        }
        return {name: weight * losses[name]() for name, weight in self.weights.items() if weight}

    def after_step(self) -> None:
        """A learned logit scale is at most 100."""
        if self.scale is None:
            with torch.no_grad():
                self.student.logit_scale.clamp_(0, math.log(100))


def build(config: AffinityConfig, student: LoadedModel, cache: TeacherCache | None) -> AffinityTask:
    """The task of a config. Raises UserError when features of different width are to be compared."""
    assert cache is not None
    width = student.config["embed_dim"]
    if config.feature_weight and width != cache.dim:
        raise UserError(
            f"--feature-weight {config.feature_weight}: the student's features have {width} numbers, those of teacher "
            f"{cache.name} have {cache.dim}; use a --model with embed_dim {cache.dim}, or --feature-weight 0"
        )
    weights = {
        "affinity": config.affinity_weight,
        "feature": config.feature_weight,
        "contrastive": config.contrastive_weight,
    }
    return AffinityTask(student.model, weights, config.fixed_logit_scale, cache.logit_scale)
