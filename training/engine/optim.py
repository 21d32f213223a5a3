"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from training.config import OptimConfig

UNDECAYED = ("bn", "ln", "bias", "logit_scale", "layer_scale")  # by name: open_clip's rule, and timm's 3-d scales
RANGES = ".ranges."  # of `RangeAugment`


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
