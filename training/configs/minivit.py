"""Options and numbers of the recipe minivit (`training.recipes.minivit`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.unused_options import Unused, asking
from training.choices import HeadMaps, HiddenMode, Local
from training.config import (
    LabelledImageConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SoftLabelConfig,
    ViewConfig,
)

NO_TEACHER = "none"
VIEWS = ViewConfig(scale=(0.08, 1.0), flip=0.5, ops=2, op_set="timm-inc", magnitude=9, magnitude_std=0.5, op_prob=0.5)


@dataclass(frozen=True)
class TiedConfig:
    """How the student's blocks are tied, and what they begin with."""

    groups: tuple[int, ...] = ()
    """groups of blocks: one number for a Mini-DeiT (several are their sizes), one per stage for a Mini-Swin; none: the
    model's own"""
    head_maps: HeadMaps | None = None
    """maps across heads: random (release), identity, none; None: identity where weights are inherited, else random"""
    local: Local | None = None
    """Mini-Swin's convolution: stream (release), residual (the identity at the start), none; None: the model's own"""
    drop_path: float | None = None
    """drop path of the last block, growing towards it; None: the model's own"""
    inherit: Literal["none", "first", "last", "mean"] = "none"
    """weights of a group from the teacher's layers, which has the same shape then; none: random (release)"""

    def __post_init__(self) -> None:
        require(all(count >= 1 for count in self.groups), "groups", self.groups, "1 or more each")
        value = self.drop_path
        require(value is None or 0 <= value < 1, "drop_path", value, "in [0, 1), or None")

    def options(self, model: str) -> dict[str, Any]:
        """Return the options of timm's model that differ from its own."""
        maps = self.head_maps or ("identity" if self.inherit != "none" else None)
        single = len(self.groups) == 1 and "swin" not in model
        groups: Any = self.groups[0] if single else list(self.groups)
        given = {"groups": groups or None, "head_maps": maps, "local": self.local, "drop_path_rate": self.drop_path}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class DistillationConfig:
    """What the teacher teaches."""

    teacher: str = "timm:swin_base_patch4_window7_224"
    """timm:NAME, RUN folder of a classifier of the same classes, or none: the true labels alone (--label-weight 1)"""
    teacher_weights: str | None = None
    """checkpoint file of timm's model, or random; None: timm's own, or the RUN's"""
    prediction: Literal["cross-entropy", "deit"] = "cross-entropy"
    """loss of the labels: cross-entropy with the teacher's, or DeiT's KL over the number of classes"""
    temperature: float = 1.0
    """divides the logits of both models"""
    attention_weight: float = 1.0
    """beta, of the relations of queries, keys and values; 0 leaves them out"""
    hidden_weight: float = 0.1
    """gamma, of the relations of hidden states; 0 leaves them out"""
    hidden_mode: HiddenMode = "release"
    """relations of hidden states: cosines of all tokens (release), or softmaxes (paper)"""
    relation_heads: int = 1
    """heads of the attention relations, which divide both widths"""
    student_blocks: tuple[int, ...] = ()
    """blocks that learn, from 0; none: spaced evenly in each stage"""
    teacher_blocks: tuple[int, ...] = ()
    """blocks that teach, as many, from 0"""
    label_weight: float = 0.0
    """of the cross-entropy with the true labels, which the paper leaves out"""
    smoothing: float = 0.1
    """label smoothing of those"""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for name in ("attention_weight", "hidden_weight", "label_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.relation_heads >= 1, "relation_heads", self.relation_heads, "1 or more")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        if self.teacher == NO_TEACHER and not self.label_weight:
            raise UserError(f"--teacher {NO_TEACHER}: without a teacher there are the true labels: --label-weight 1")
        counts = len(self.student_blocks), len(self.teacher_blocks)
        if counts[0] != counts[1]:
            raise UserError(f"--student-blocks {counts[0]} and --teacher-blocks {counts[1]}: give as many of both")

    def unused(self) -> Iterator[Unused]:
        """Yield the options of losses that there are not."""
        if self.teacher == NO_TEACHER:
            names = ("teacher_weights", "attention_weight", "hidden_weight")
            yield Unused(asking(self, names), f"with --teacher {NO_TEACHER}")
        if not (self.reads_blocks and self.attention_weight):
            yield Unused(("relation_heads",), "without the loss of --attention-weight")
        if not (self.reads_blocks and self.hidden_weight):
            yield Unused(("hidden_mode",), "without the loss of --hidden-weight")
        if not self.reads_blocks:
            yield Unused(("student_blocks", "teacher_blocks"), "without a loss of blocks")
        if not self.label_weight:
            yield Unused(asking(self, ("smoothing",)), "with --label-weight 0")

    @property
    def reads_blocks(self) -> bool:
        """Whether something other than the labels is taught."""
        return self.teacher != NO_TEACHER and (self.attention_weight > 0 or self.hidden_weight > 0)


@dataclass(frozen=True)
class MinivitConfig:
    """Train a model with tied blocks on labelled images, taught by a classifier."""

    data: OmitArgPrefixes[LabelledImageConfig] = field(default_factory=LabelledImageConfig)
    soft: OmitArgPrefixes[SoftLabelConfig] = field(default_factory=SoftLabelConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    mix: OmitArgPrefixes[MixConfig] = field(default_factory=MixConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    tied: OmitArgPrefixes[TiedConfig] = field(default_factory=TiedConfig)
    distillation: OmitArgPrefixes[DistillationConfig] = field(default_factory=DistillationConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    repeats: int = 1
    """views of an image that a batch has (repeated augmentation); Mini-DeiT has 3"""
    log_analysis: int | None = None
    """steps between lines of metrics.jsonl with each block's gradient norm and its CKA with the teacher's block"""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        every, log_every = self.log_analysis, self.run.log_every
        is_logged = every is None or (every >= 1 and every % log_every == 0)
        require(is_logged, "log_analysis", every, f"a multiple of --log-every {log_every}, or None")

    def unused(self) -> Iterator[Unused]:
        """Yield the options of teachers that there are not."""
        soft_labels = self.soft.soft_labels
        if soft_labels is not None:
            yield Unused(("teacher", "teacher_weights"), f"beside --soft-labels {soft_labels}: leave one out")
        elif self.distillation.teacher == NO_TEACHER:
            yield Unused(("prediction", "temperature"), f"with --teacher {NO_TEACHER}")


def config() -> MinivitConfig:
    """Return the released code's numbers of Mini-Swin, for ImageNet-1k."""
    return MinivitConfig(
        data=LabelledImageConfig(batch_size=1024, workers=8),
        views=VIEWS,
        mix=MixConfig(mixup=0.8, cutmix=1.0, erasing=0.25),
        student=ModelConfig(model="timm:mini_swin_tiny_patch4_window7_224"),
        optim=OptimConfig(
            lr=1e-3,
            final_lr=1e-5,
            weight_decay=0.05,
            beta2=0.999,
            eps=1e-8,
            warmup=25_020,
            warmup_lr=1e-6,
            clip_norm=5.0,
        ),
        run=RunConfig(out="runs/minivit", epochs=300),
    )
