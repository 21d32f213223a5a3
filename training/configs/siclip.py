"""Options and numbers of the recipe siclip (`training.recipes.siclip`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.unused_options import Unused
from training.config import (
    DataConfig,
    EnsembleConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherCacheConfig,
    ViewConfig,
)
from training.configs.teaching import ClipKdConfig, unused_of_source, unused_of_teachers

WEIGHTS = ("clip_weight", "fd_weight", "crd_weight", "icl_weight", "pm_weight")


@dataclass(frozen=True)
class SiclipConfig:
    """Train SiCLIP: inherited, distilled from MobileCLIP-S0, with pair matching."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    drawn_views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    cached_views: OmitArgPrefixes[TeacherCacheConfig] = field(default_factory=TeacherCacheConfig)
    ensemble: OmitArgPrefixes[EnsembleConfig] = field(default_factory=EnsembleConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    clip_kd: OmitArgPrefixes[ClipKdConfig] = field(default_factory=ClipKdConfig)
    base: str = "MobileCLIP-S0"
    """open_clip name or local-dir:PATH of the model to inherit from, which is the live teacher, too"""
    base_weights: str = ""
    """its weights: Apple's mobileclip_s0.pt, another checkpoint file or tag, or a RUN folder; random: untrained"""
    inherit: bool = True
    """take the base's weights and freeze what is no SAS-P block"""
    inherit_ffn: bool = True
    """take the FFNs of the base's attention blocks, too; they are trained"""
    inherit_keys: bool = False
    """start each group's Wk from the base's first block of the group"""
    exact_norm: bool = False
    """start the image blocks' BatchNorms as the identity, which keeps the base's feature scale for the frozen tail"""
    train_tail: bool = False
    """train the inherited layers after the SAS-P blocks, too"""
    teacher_from: Literal["live", "cache"] = "live"
    """live: the base teaches, on views drawn now; cache: a teacher cache's features and views"""
    clip_weight: float = 1.0
    """weight of the contrastive loss"""
    fd_weight: float = 4000.0
    """weight of feature distillation"""
    crd_weight: float = 1.0
    """weight of contrastive relational distillation"""
    icl_weight: float = 1.0
    """weight of interactive contrastive learning"""
    icl_raw_scale: bool = False
    """ICL's scale is its parameter and not the exponential of it, as in CLIP-KD's code"""
    pm_weight: float = 0.1
    """weight of pair matching"""
    pm_logits: Literal[1, 2] = 2
    """outputs of its head"""
    pm_raw: bool = False
    """its head sees features as they are, not of unit length"""
    pm_similarity: Literal["student", "teacher"] = "student"
    """whose similarities its negatives are drawn by"""

    @property
    def views(self) -> ViewConfig | TeacherCacheConfig:
        """Where views, and with a cache the teacher's features, come from."""
        return self.drawn_views if self.teacher_from == "live" else self.cached_views

    @property
    def taught(self) -> bool:
        """Whether any term needs a teacher."""
        by_teacher = self.pm_weight and self.pm_similarity == "teacher"
        return bool(self.compares or self.crd_weight or by_teacher or self.clip_kd.is_used)

    @property
    def compares(self) -> bool:
        """Whether FD or ICL put a student's feature beside a teacher's."""
        return bool(self.fd_weight or self.icl_weight)

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        is_any = any(getattr(self, name) for name in WEIGHTS) or self.clip_kd.is_used
        require(is_any, "clip_weight", 0.0, "above 0 when the others are 0")
        if self.train_tail and not self.inherit:
            raise UserError("--train-tail means nothing with --no-inherit, where all is trained: leave one of them out")

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect beside --teacher-from and the weights of the losses."""
        is_live = self.teacher_from == "live"
        yield from unused_of_source(self.teacher_from, self.drawn_views)
        yield from self.run.unused_without_eval_data()
        if not self.taught:
            yield Unused(("ensemble",), "without a loss of a teacher")
        weights = {"crd_weight": self.crd_weight}
        if self.pm_similarity == "teacher":
            weights["pm_weight"] = self.pm_weight
        weights["gd_weight"] = self.clip_kd.gd_weight
        yield from unused_of_teachers(1 if is_live else len(self.cached_views.names), weights)
        if not self.icl_weight:
            yield Unused(("icl_raw_scale",), "with --icl-weight 0")
        if not self.pm_weight:
            yield Unused(("pm_logits", "pm_raw", "pm_similarity"), "with --pm-weight 0")
        if not self.inherit:
            yield Unused(("inherit_ffn", "inherit_keys", "exact_norm"), "with --no-inherit")


def config() -> SiclipConfig:
    """Return the paper's numbers."""
    return SiclipConfig(
        data=DataConfig(batch_size=1536, workers=8),
        drawn_views=ViewConfig(scale=(0.08, 1.0), ops=2, magnitude=9),
        student=ModelConfig(model="SiCLIP-S0"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, warmup=10000),
        run=RunConfig(out="runs/siclip", epochs=32),
    )
