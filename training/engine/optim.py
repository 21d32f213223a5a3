"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimConfig

UNDECAYED = ("bn", "ln", "bias", "logit_scale", "layer_scale")  # by name: open_clip's rule, and timm's 3-d scales
RANGES = ".ranges."  # of `RangeAugment`
FUSED_DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that the optimizer updates in the same way.

    Attributes:
        params: The parameters.
        weight_decay: Their weight decay.
        lr_factor: Multiplies the schedule's learning rate, as layer-wise decay does.
        fixed_lr: A learning rate in place of the schedule's, constant from the first step to the last.
        maximize: Gradient ascent instead of descent, for multipliers of constraints.
        betas: AdamW's betas; None takes the config's.
        eps: AdamW's eps; None takes the config's.
    """

    params: list[nn.Parameter]
    weight_decay: float = 0.0
    lr_factor: float = 1.0
    fixed_lr: float | None = None
    maximize: bool = False
    betas: tuple[float, float] | None = None
    eps: float | None = None

    def lr(self, scheduled: float) -> float:
        """Return the group's learning rate where the schedule's is ``scheduled``."""
        return scheduled * self.lr_factor if self.fixed_lr is None else self.fixed_lr

    def as_dict(self) -> dict[str, Any]:
        """Return the group as torch's optimizers take it.

        Rates are left out: they change with the step, and a checkpoint of the optimizer holds what is given here.
        """
        options: dict[str, Any] = {"params": self.params, "weight_decay": self.weight_decay}
        if self.maximize:
            options["maximize"] = True
        if self.betas is not None:
            options["betas"] = self.betas
        if self.eps is not None:
            options["eps"] = self.eps
        return options


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: at least two dimensions and no exempt name, or one of RangeAugment's ranges.

    corenet exempts tensors of exactly one dimension. RangeAugment's six scalars have none there, so they decay.
    """
    if RANGES in f".{name}":
        return True
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)


def param_groups(module: nn.Module, weight_decay: float) -> list[ParamGroup]:
    """Return the trainable parameters of a module in two groups: those that decay, and those that do not."""
    decayed = list[nn.Parameter]()
    exempt = list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else exempt).append(parameter)
    return [ParamGroup(decayed, weight_decay), ParamGroup(exempt, 0.0)]


def learning_rate(step: int, config: OptimConfig, total: int) -> float:
    """Return the schedule's learning rate of a step, 0 to ``total`` - 1.

    ``lr * (step + 1) / warmup`` in the warm-up, then by ``schedule`` towards ``final_lr``.
    """
    if step < config.warmup:
        if config.warmup_lr is not None:
            return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.final_lr + (config.lr - config.final_lr) * left


def build_optimizer(
    module: nn.Module, config: OptimConfig, groups: Sequence[ParamGroup] | None = None, *, fused: bool = True
) -> torch.optim.AdamW:
    """Return AdamW over ``groups``, by default the two groups of `param_groups`.

    Where device and types allow it, it is the fused one: one kernel reads and writes each number once, without copies
    of parameters during a step.

    Args:
        module: Has the parameters.
        config: Rates, betas and eps.
        groups: The parameters.
        fused: Whether it may be the fused one.
    """
    if groups is None:
        groups = param_groups(module, config.weight_decay)
    options = [group.as_dict() for group in groups]
    parameters = list(chain.from_iterable(group.params for group in groups))
    is_fused = fused and all(map(can_fuse, parameters))
    return torch.optim.AdamW(
        options, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=is_fused or None
    )


def can_fuse(parameter: Tensor) -> bool:
    """Return whether torch's fused AdamW takes a parameter: real numbers without gaps, on a device that has the kernel.

    Gradients and state of a parameter with gaps are laid out otherwise, which the kernel for CPUs does not see.
    """
    is_dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() and is_dense


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take a state that was saved on any device, in any memory format.

    A group of the state says whether it was fused, which is a matter of the device and not of the run; and the fused
    kernel wants its state laid out as the parameters are. Raises ValueError where the groups are others.

    Args:
        optimizer: The optimizer.
        state: Its `state_dict` of then.
    """
    own = [group["fused"] for group in optimizer.param_groups]
    groups = state["param_groups"]
    if len(groups) == len(own):  # else the optimizer says what does not fit
        groups = [{**group, "fused": fused} for group, fused in zip(groups, own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)


def set_lr(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], scheduled: float) -> None:
    """Give each group its learning rate of a step, where the schedule's is ``scheduled``."""
    for options, group in zip(optimizer.param_groups, groups, strict=True):
        options["lr"] = group.lr(scheduled)


def keep_state(before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> None:
    """Hand an optimizer's state on to its successor, for parameters that are the same objects of the same shape.

    Others begin without state. A task that wants none kept replaces its parameters by new ones.
    """
    for group in after.param_groups:
        for parameter in group["params"]:
            state = before.state.get(parameter, {})
            tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
            if state and all(value.shape == parameter.shape for value in tensors):
                after.state[parameter] = state
