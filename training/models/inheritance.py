"""Weight inheritance as functions of state dicts, and freezing.

A student's tensor is the teacher's of another name, part of it, or its own. SiCLIP (arXiv 2411.14789, section 3.2): all
but the attention blocks is MobileCLIP-S0's and stays frozen. What the paper leaves open, and is so here: the tail
after the attention blocks is frozen, too; the new blocks' norm and FFN begin as those of the blocks that they replace.
"""

import re
from collections.abc import Callable, Collection
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Tensor]
STACK = re.compile(r"(visual\.trunk\.stages\.3\.blocks|text\.layers)\.0\.(qk|blocks)\.(\d+)\.(.+)")


def inherit(target: State, source: State, name_in_source: Callable[[str], str | None]) -> State:
    """``target`` with every tensor for which a name in ``source`` is given replaced by a copy of that one.

    Raises ValueError when the source has no such tensor or it has another shape.
    """
    found = {}
    for name, value in target.items():
        wanted = name_in_source(name)
        if wanted is None:
            found[name] = value
        elif wanted not in source:
            raise ValueError(f"{name}: nothing to inherit, the source has no {wanted}")
        elif source[wanted].shape != value.shape:
            shapes = list(value.shape), list(source[wanted].shape)
            raise ValueError(f"{name} has shape {shapes[0]}, {wanted} of the source {shapes[1]}")
        else:
            found[name] = source[wanted].clone()
    return found


def in_teacher(name: str) -> str | None:
    """The name that a tensor of a SiCLIP model has in MobileCLIP-S0; None for Wq, Wk and the gains."""
    found = STACK.fullmatch(name)
    if found is None:
        return name
    tower, kind, block, rest = found.groups()
    if kind == "qk" or not rest.startswith(("norm.", "ffn.")):
        return None
    return f"{tower}.{block}.{rest.replace('ffn.', 'mlp.', 1) if tower.startswith('visual') else rest}"


def inherit_siclip(
    student: State, teacher: State, random_ffn: bool = False, keys: bool = False, exact_norm: bool = False
) -> tuple[State, list[str]]:
    """The student's state dict with MobileCLIP-S0's weights, and the names that SiCLIP freezes.

    Frozen is everything outside the SAS-P blocks but the logit scale. ``random_ffn`` leaves the FFNs of the SAS-P
    blocks as they are; ``keys`` gives each Wk that of the teacher's first block of the group; ``exact_norm`` makes the
    image blocks' BatchNorms the identity in eval mode, since the frozen tail expects features of the teacher's scale
    and the blocks have no skip that would carry it. Raises ValueError when the teacher is of another architecture.
    """

    def name_in_source(name: str) -> str | None:
        found = STACK.fullmatch(name)
        return None if found and random_ffn and found[4].startswith("ffn.") else in_teacher(name)

    state = inherit(student, teacher, name_in_source)
    for name in state:
        found = STACK.fullmatch(name)
        if found and found[2] == "qk" and keys:
            state[name] = torch.cat((state[name].chunk(2)[0], _teacher_keys(student, teacher, *found.groups())))
        if found and exact_norm and found[4] == "norm.weight" and found[1].startswith("visual"):
            norm = name.removesuffix("weight")
            state[name] = (state[norm + "running_var"] + nn.BatchNorm2d(1).eps).sqrt()
            state[norm + "bias"] = state[norm + "running_mean"].clone()
    return state, [name for name in student if STACK.fullmatch(name) is None and name != "logit_scale"]


def _teacher_keys(student: State, teacher: State, tower: str, _: str, group: str, rest: str) -> Tensor:
    """The rows of the teacher's qkv matrix, or bias, that make the keys of the group's first block."""
    numbers: dict[str, set[int]] = {"qk": set(), "blocks": set()}
    for found in filter(None, map(STACK.fullmatch, student)):
        if found[1] == tower:
            numbers[found[2]].add(int(found[3]))
    first = int(group) * len(numbers["blocks"]) // len(numbers["qk"])
    mixer = "token_mixer.qkv" if tower.startswith("visual") else "qkv"
    return teacher[f"{tower}.{first}.{mixer}.{rest}"].chunk(3)[1]


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """No gradient for the parameters of these names; BatchNorms whose statistics are named stay in eval mode.

    ``train()`` does not reach those any more: one pass in train mode would move their statistics.
    """
    frozen = set(names)
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and f"{name}.running_mean" in frozen:
            part.eval()
            part.train = MethodType(_stay_in_eval, part)  # type: ignore[method-assign]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
