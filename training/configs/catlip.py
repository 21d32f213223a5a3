"""Options and numbers of the recipe catlip (`training.recipes.catlip`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.unused_options import Unused
from training.config import DataConfig, LabelConfig, ModelConfig, OptimConfig, RunConfig, SideConfig, ViewConfig

SIDES = tuple(range(128, 321, 16))


@dataclass(frozen=True)
class CatlipConfig:
    """Train CatLIP: classify the synsets of captions."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    labels: OmitArgPrefixes[LabelConfig] = field(default_factory=LabelConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    sides: OmitArgPrefixes[SideConfig] = field(default_factory=SideConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: binary cross-entropy, summed over the classes; softmax: cross-entropy with the labels' mean"""
    frequency_bias: bool = False
    """start the head's biases at the classes' log-odds in the vocabulary's captions, not at 0"""
    range_augment: bool = True
    """brightness, contrast and noise of learned ranges, on the device"""

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect."""
        yield from self.run.unused_without_eval_data()
        yield from self.run.unused_without_frozen_weights("by this recipe, which trains all weights")


def config() -> CatlipConfig:
    """Return the paper's numbers for CC3M."""
    return CatlipConfig(
        data=DataConfig(batch_size=2048, workers=8, captions="original"),
        views=ViewConfig(scale=(0.08, 1.0), flip=0.5),
        sides=SideConfig(sides=SIDES, batch_parts=4),
        student=ModelConfig(model="timm:catlip_vit_base_patch16_224"),
        optim=OptimConfig(
            lr=2e-3,
            final_lr=2e-5,
            weight_decay=0.2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            warmup=10_000,
            warmup_lr=1e-6,
            clip_norm=1.0,
            ema_decay=1 - 5e-4,
        ),
        run=RunConfig(out="runs/catlip", epochs=25, sync_bn=False),
    )
