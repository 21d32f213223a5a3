"""CoCa (Yu et al., arXiv 2205.01917): contrastive and captioning loss; makes the captioner of `clipmill caption`.

Weights of the two losses, 1 and 2, are the paper's and open_clip's; the rest is the clip recipe's. Reads the raw
shards: no synthetic captions exist yet. Cost: above the clip recipe per step: a decoder as deep as the
text tower comes on top, over the same tokens.

    clipmill train coca --data ROOT --out RUN
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip import CoCaLoss
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.config import DataConfig, ModelConfig, RunConfig, ViewConfig, require
from training.optim import OptimConfig
from training.teacher_cache import TeacherCache


@dataclass(frozen=True)
class Config:
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


def config() -> Config:
    """The recipe's own numbers."""
    return Config(
        data=DataConfig(folder="raw", captions="original"),
        student=ModelConfig(model="coca_ViT-B-32"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup=2000),
        run=RunConfig(out="runs/coca", epochs=32),
    )


class Task(nn.Module):
    """An open_clip CoCa model and the weights of its two losses."""

    def __init__(self, student: Any, clip_weight: float, caption_weight: float) -> None:
        super().__init__()
        self.student = student
        self.loss = CoCaLoss(caption_weight, clip_weight, pad_id=self.student.pad_id)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``contrastive`` and ``caption``; the captioning loss leaves padding out."""
        output = self.student(batch["images"], batch["tokens"])
        with torch.autocast(output["logits"].device.type, enabled=False):
            contrastive, caption = self.loss(
                output["image_features"].float(), output["text_features"].float(), output["logits"].float(),
                output["labels"], output["logit_scale"],
            )  # fmt: skip
        return {"contrastive": contrastive, "caption": caption}

    def after_step(self) -> None:
        """Logit scale at most 100, as in CLIP."""
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, math.log(100))


def build(config: Config, student: LoadedModel, cache: TeacherCache | None) -> Task:
    """The task of a config. Raises UserError when the model is no CoCa."""
    if "multimodal_cfg" not in student.config:
        raise UserError(f"--model {config.student.model!r} has no text decoder: the coca recipe needs a CoCa model")
    return Task(student.model, config.clip_weight, config.caption_weight)
