"""Affinity mimicking from a teacher cache (TinyCLIP, Wu et al., arXiv 2309.12314, section 3.1).

The student's softmax over image-text similarities follows the teacher's, rows and columns. Numbers are those of the
released LAION-400M scripts: lr 1e-4, weight decay 0.2, betas (0.9, 0.98), eps 1e-6, clip 5, warm-up 2000, scale 50
on both sides and frozen, no hard-label loss, 6 epochs of batch 32,768. Ours differ: teacher features come from the
cache, so the teacher costs nothing here; views are the cache's; weights are not inherited; CLIP-KD's feature loss
(arXiv 2307.12732) can be added. ViT-M-32 has the image tower of TinyCLIP-ViT-40M/32 (59.8 % ImageNet zero-shot with
inheritance on LAION-400M), its text tower is 12 layers deep instead of 6.

    clipmill train tinyclip --data ROOT --teacher NAME --out RUN
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TeacherCacheConfig
from training.losses.contrastive import clip_loss
from training.losses.distillation import affinity_loss, feature_loss
from training.models.teacher import FrozenTeacher
from training.recipes.pairs import clamp_logit_scale, open_pairs
from training.task import Batch, Features, Losses, Prepared, Task


@dataclass(frozen=True)
class TinyclipConfig:
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


def config() -> TinyclipConfig:
    """Return the paper's numbers (released scripts)."""
    return TinyclipConfig(
        data=DataConfig(batch_size=32768, workers=8),
        student=ModelConfig(model="ViT-M-32"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.2, warmup=2000, clip_norm=5.0),
        run=RunConfig(out="runs/tinyclip", epochs=6),
    )


class TinyclipTask(Task):
    """A student that follows a teacher's similarities.

    Args:
        student: The student.
        weights: Weights of ``affinity``, ``feature`` and ``contrastive``; a term of weight 0 is not computed.
        scale: The logit scale of both sides; None: the student learns its own and the teacher keeps its own.
        teacher: The teacher.
    """

    def __init__(self, student: Any, weights: dict[str, float], scale: float | None, teacher: FrozenTeacher) -> None:
        super().__init__(student, ("images", "tokens", *teacher.item_fields))
        self.weights = weights
        self.scale = scale
        self.teacher = teacher
        self.teacher_scale = scale or teacher.logit_scale
        if scale is not None:
            with torch.no_grad():
                self.student.logit_scale.fill_(math.log(scale)).requires_grad_(False)

    def forward(self, batch: Batch) -> Features:
        """Return ``image``, ``text`` (n, D), ``teacher_image``, ``teacher_text`` (n, D'), all normalised."""
        taught = self.teacher.features(batch)
        return {
            "image": self.student.encode_image(batch["images"], normalize=True),
            "text": self.student.encode_text(batch["tokens"], normalize=True),
            **{name: F.normalize(value.float(), dim=-1) for name, value in taught.items()},
        }

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``affinity``, ``feature``, ``contrastive``: those whose weight is not 0."""
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

    def after_step(self, step: int) -> None:
        """Keep a learned logit scale at 100 at most."""
        if self.scale is None:
            clamp_logit_scale(self.student)


def prepare(config: TinyclipConfig) -> Prepared:
    """Return student, samples and task.

    Raises UserError and DataError, among others when features of different width are to be compared.
    """
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    assert samples.cache is not None  # its views are a cache's
    teacher = FrozenTeacher.cached(samples.cache)
    width = student.config["embed_dim"]
    if config.feature_weight and width != teacher.width:
        raise UserError(
            f"--feature-weight {config.feature_weight}: the student's features have {width} numbers, those of teacher "
            f"{teacher.name} have {teacher.width}; use a --model with embed_dim {teacher.width}, or --feature-weight 0"
        )
    weights = {
        "affinity": config.affinity_weight,
        "feature": config.feature_weight,
        "contrastive": config.contrastive_weight,
    }
    return Prepared(student, samples, TinyclipTask(student.model, weights, config.fixed_logit_scale, teacher))
