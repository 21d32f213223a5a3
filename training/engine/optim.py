"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from training.config import require

UNDECAYED = ("bn", "ln", "bias", "logit_scale", "layer_scale")  # by name: open_clip's rule, and timm's 3-d scales
RANGES = ".ranges."  # of `RangeAugment`


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate by the step, and an average of the weights."""

    lr: float = 1e-4
    """peak learning rate"""
    weight_decay: float = 0.2
    """of matrices; biases, norms and the logit scale have none"""
    beta1: float = 0.9
    """AdamW"""
    beta2: float = 0.98
    """AdamW; CLIP takes 0.98 for ViT, 0.999 for ResNet"""
    eps: float = 1e-6
    """AdamW; CLIP takes 1e-6 for ViT, 1e-8 for ResNet"""
    warmup: int = 2000
    """steps of linear warm-up"""
    warmup_lr: float | None = None
    """learning rate that the warm-up begins at; None: its first step has lr / warmup"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """way of the learning rate after the warm-up: down to final_lr in half a cosine or a line, or as it is"""
    final_lr: float = 0.0
    """learning rate that cosine and linear end at"""
    clip_norm: float | None = None
    """clip the gradient's global L2 norm to this; None does not clip"""
    ema_decay: float | None = None
    """keep an exponential moving average of the student's weights, say 0.9998; eval and export then take it"""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        first = self.warmup_lr
        require(first is None or 0 < first <= self.lr, "warmup_lr", first, f"above 0, to --lr ({self.lr:g}), or None")
        require(0 <= self.final_lr <= self.lr, "final_lr", self.final_lr, f"from 0 to --lr ({self.lr:g})")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "in (0, 1), or None")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0 or None")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: at least two dimensions and no exempt name, or one of RangeAugment's ranges.

    corenet exempts tensors of exactly one dimension. RangeAugment's six scalars have none there, so they decay.
    """
    if RANGES in f".{name}":
        return True
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters in two groups: decayed, and not."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]


def learning_rate(step: int, config: OptimConfig, total: int) -> float:
    """Of step 0 … total-1: ``lr * (step+1) / warmup``, then by ``schedule`` towards ``final_lr``."""
    if step < config.warmup:
        if config.warmup_lr is not None:
            return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.final_lr + (config.lr - config.final_lr) * left


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over a module's trainable parameters."""
    groups = param_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
