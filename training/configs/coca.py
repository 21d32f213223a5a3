"""Options and numbers of the recipe coca (`training.recipes.coca`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from shards_spec.messages import require
from shards_spec.unused_options import Unused
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig


@dataclass(frozen=True)
class CocaConfig:
    """Train a CoCa model: contrastive and captioning loss."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    clip_weight: float = 1.0
    """weight of the contrastive loss"""
    caption_weight: float = 2.0
    """weight of the captioning loss"""

    def __post_init__(self) -> None:
        require(self.clip_weight >= 0, "clip_weight", self.clip_weight, "0 or more")
        require(self.caption_weight >= 0, "caption_weight", self.caption_weight, "0 or more")
        require(self.clip_weight + self.caption_weight > 0, "clip_weight", 0.0, "above 0 when --caption-weight is 0")

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect."""
        yield from self.run.unused_without_eval_data()
        yield from self.run.unused_without_frozen_weights("by this recipe, which trains all weights")


def config() -> CocaConfig:
    """Return the recipe's own numbers."""
    return CocaConfig(
        data=DataConfig(folder="raw", captions="original"),
        student=ModelConfig(model="coca_ViT-B-32"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup=2000),
        run=RunConfig(out="runs/coca", epochs=32),
    )
