"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from training.config import require

UNDECAYED = ("bn", "ln", "bias", "logit_scale")  # open_clip's and TinyCLIP's rule: exempt by name


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine to 0."""

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
    clip_norm: float | None = None
    """clip the gradient's global L2 norm to this; None does not clip"""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0 or None")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: at least two dimensions and no exempt name."""
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters in two groups: decayed, and not."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]


def cosine_lr(step: int, base: float, warmup: int, total: int) -> float:
    """Learning rate of step 0 … total-1: ``base * (step+1) / warmup``, then half a cosine down to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over a module's trainable parameters."""
    groups = param_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
