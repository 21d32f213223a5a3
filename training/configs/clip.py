"""Options and numbers of the recipe clip (`training.recipes.clip`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.unused_options import Unused
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig, is_run


@dataclass(frozen=True)
class ClipConfig:
    """Train a CLIP model with the contrastive loss."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    lock: Literal["none", "image", "text"] = "none"
    """tower that keeps the weights it starts with: the other one learns to match it (LiT)"""

    def __post_init__(self) -> None:
        name = self.student.model
        # open_clip's, which has no other weights of images
        is_plain_name = not {":", "/"} & set(name) and not is_run(name)
        if self.lock == "image" and is_plain_name and self.student.pretrained is None:
            raise UserError(random_tower_advice(self.lock, name))

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect."""
        yield from self.run.unused_without_eval_data()
        if self.lock == "none":
            yield from self.run.unused_without_frozen_weights("with --lock none: all weights are trained")


def random_tower_advice(lock: str, model: str) -> str:
    """Return what to do where a tower of random weights would be locked."""
    return (
        f"--lock {lock}: {model!r} has no weights for its {lock} tower, which would stay random: give --pretrained "
        "TAG_OR_FILE with an open_clip name, or --model local-dir:FOLDER as `clipmill export RUN --to FOLDER` writes it"
    )


def config() -> ClipConfig:
    """Return the recipe's own numbers."""
    return ClipConfig(
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup=2000),
        run=RunConfig(out="runs/clip", epochs=32),
    )
