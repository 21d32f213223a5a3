"""Options and numbers of the recipe clip (`training.recipes.clip`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.unused_options import Unused
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig


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

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect."""
        yield from self.run.unused_without_eval_data()


def config() -> ClipConfig:
    """Return the recipe's own numbers."""
    return ClipConfig(
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup=2000),
        run=RunConfig(out="runs/clip", epochs=32),
    )
