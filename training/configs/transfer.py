"""Options of the recipes probe and finetune (`training.recipes.transfer`), which differ in their numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.unused_options import Unused, field_values
from training.config import (
    LabelledImageConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SideConfig,
    SoftLabelConfig,
    ViewConfig,
)

VIEWS = ViewConfig(scale=(0.08, 1.0), flip=0.5)  # of both recipes


@dataclass(frozen=True)
class TuningConfig:
    """What fine-tuning does to a vision transformer besides training it."""

    layer_decay: float = 1.0
    """factor of the learning rate from each block to the one before; the head has the whole rate. MAE: 0.65 to 0.75"""
    drop_path: float | None = None
    """drop path of the last block, growing linearly from 0 at the first; 0: none; None: the model's own"""
    image_size: int | None = None
    """pixels a side that the model takes from now on; positions and windows are resized; None: its own"""
    pooling: Literal["own", "mean"] = "own"
    """mean: the head sees the mean of the patches behind a new norm, not what the model's own head would"""
    keep_head: bool = False
    """begin with the head of --model, a RUN of the same classes; off: the head is drawn anew"""
    head_std: float = 0.02
    """standard deviation of the head's weights at the start. MAE and TinyMIM: 2e-5"""

    def __post_init__(self) -> None:
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        value = self.drop_path
        require(value is None or 0 <= value < 1, "drop_path", value, "in [0, 1), or None")
        require(self.image_size is None or self.image_size >= 1, "image_size", self.image_size, "1 or more, or None")
        require(self.head_std > 0, "head_std", self.head_std, "above 0")


@dataclass(frozen=True)
class HardDistillationConfig:
    """Who teaches the second head of a student with a distillation token."""

    teacher: str | None = None
    """of a student with a distillation token: classifier whose most probable class its second head learns, timm:NAME or
    RUN folder; --soft-labels takes a cache's in its place"""
    teacher_weights: str | None = None
    """checkpoint file of timm's model, or random; None: timm's own, or the RUN's"""

    def __post_init__(self) -> None:
        if self.teacher is None and self.teacher_weights is not None:
            raise UserError(f"--teacher-weights {self.teacher_weights!r} is of no teacher: give --teacher, too")


@dataclass(frozen=True)
class TransferConfig:
    """Train a classifier of labelled images from a pre-trained image tower."""

    data: OmitArgPrefixes[LabelledImageConfig] = field(default_factory=LabelledImageConfig)
    soft: OmitArgPrefixes[SoftLabelConfig] = field(default_factory=SoftLabelConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    sides: OmitArgPrefixes[SideConfig] = field(default_factory=SideConfig)
    mix: OmitArgPrefixes[MixConfig] = field(default_factory=MixConfig)
    tuning: OmitArgPrefixes[TuningConfig] = field(default_factory=TuningConfig)
    distillation: OmitArgPrefixes[HardDistillationConfig] = field(default_factory=HardDistillationConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    freeze: bool = True
    """train the head alone, the rest stays as it is, in eval mode"""
    augment: bool = True
    """draw views; off, with freeze, features of the plain crops are computed once: much faster, no augmentation"""
    range_augment: bool = False
    """brightness, contrast and noise of learned ranges, on the device"""
    smoothing: float = 0.1
    """label smoothing of the cross-entropy; soft labels are not smoothed"""
    class_map: str = ""
    """Transfer Init: class map of `clipmill classes`, whose rows of the pre-trained head the classes start from"""
    copy_bias: bool = False
    """Transfer Init takes the rows' biases, too, which hold how often captions name a synset"""
    repeats: int = 1
    """views of an image that a batch has (repeated augmentation); DeiT has 3"""

    def __post_init__(self) -> None:
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        if not (self.augment or self.freeze):
            raise UserError("--no-augment is for a frozen tower: give --freeze, or leave it out")
        if self.range_augment and not self.augment:
            raise UserError("--range-augment draws views, which --no-augment does not: leave one of them out")
        if self.soft.soft_labels is not None and not self.augment:
            raise UserError("--soft-labels are those of views, which --no-augment does not draw: leave one of them out")
        if self.mixes and not self.augment:
            raise UserError("--mixup, --cutmix and --erasing change images, which --no-augment does not draw")
        require(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        size, sides = self.tuning.image_size, self.sides.sides
        if size is not None and self.augment and sides and size not in sides:
            raise UserError(
                f"--image-size {size}: batches of --sides {' '.join(map(str, sides))} never show that size; give "
                f"--sides {size} --base-side {size}"
            )

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect on a frozen tower, on plain crops, or on the head that is asked for."""
        if not self.augment:
            names = (*field_values(self.views), *field_values(self.sides), "repeats")
            yield Unused(names, "with --no-augment")
        if self.freeze:
            yield Unused(("layer_decay", "drop_path"), "with --freeze: the head alone is trained")
        if not self.class_map:
            yield Unused(("copy_bias",), "without --class-map")
        if self.tuning.keep_head:
            yield Unused(("head_std",), "with --keep-head")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed or erased."""
        return bool(self.mix.mixup or self.mix.cutmix or self.mix.erasing)
