"""Weight inheritance as functions of state dicts, and freezing.

A student's tensor is a copy of the teacher's of another name, of a part of it, or its own. In SiCLIP (arXiv 2411.14789,
section 3.2) all but the attention blocks is MobileCLIP-S0's and stays frozen. Decisions that the paper leaves open: the
tail after the attention blocks is frozen, too; the new blocks' norm and FFN start from those of the blocks that they
replace.
"""

import re
from collections.abc import Callable, Collection
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Tensor]  # a state dict
# a tensor of a `SasStack`: tower and layers, kind, number of the block or of the group, rest of the name
STACK = re.compile(r"(visual\.trunk\.stages\.3\.blocks|text\.layers)\.0\.(qk|blocks)\.(\d+)\.(.+)")


def inherit(target: State, source: State, name_in_source: Callable[[str], str | None]) -> State:
    """Return a state dict in which tensors of ``target`` are replaced by copies of tensors of ``source``.

    Args:
        target: The state dict that inherits.
        source: The state dict that is inherited from.
        name_in_source: Gives the name in ``source`` for a name in ``target``, or None to keep the target's tensor.

    Raises:
        ValueError: The source has no such tensor, or it has another shape.
    """
    inherited = {}
    for name, value in target.items():
        source_name = name_in_source(name)
        if source_name is None:
            inherited[name] = value
            continue
        if source_name not in source:
            raise ValueError(f"{name}: nothing to inherit, the source has no {source_name}")
        source_value = source[source_name]
        if source_value.shape != value.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, {source_name} of the source {list(source_value.shape)}"
            )
        inherited[name] = source_value.clone()
    return inherited


def in_teacher(name: str) -> str | None:
    """Return the name that a tensor of a SiCLIP model has in MobileCLIP-S0; None for Wq, Wk and the gains."""
    match = STACK.fullmatch(name)
    if match is None:
        return name
    tower, kind, block, rest = match.groups()
    if kind == "qk" or not rest.startswith(("norm.", "ffn.")):
        return None
    if tower.startswith("visual"):  # timm's name of the FFN
        rest = rest.replace("ffn.", "mlp.", 1)
    return f"{tower}.{block}.{rest}"


def inherit_siclip(
    student: State, teacher: State, *, random_ffn: bool = False, keys: bool = False, exact_norm: bool = False
) -> tuple[State, list[str]]:
    """Return the student's state dict with MobileCLIP-S0's weights, and the names that SiCLIP freezes.

    Everything outside the SAS-P blocks is frozen, except the logit scale.

    Args:
        student: A state dict of a SiCLIP model.
        teacher: A state dict of its MobileCLIP-S0.
        random_ffn: Leave the FFNs of the SAS-P blocks as they are.
        keys: Start each Wk from that of the teacher's first block of the group.
        exact_norm: Make the image blocks' BatchNorms the identity in eval mode: the frozen tail expects features of the
            teacher's scale, and the blocks have no skip connection that would preserve it.

    Raises:
        ValueError: The teacher has another architecture.
    """

    def name_in_source(name: str) -> str | None:
        match = STACK.fullmatch(name)
        if match is not None and random_ffn and match[4].startswith("ffn."):
            return None
        return in_teacher(name)

    state = inherit(student, teacher, name_in_source)
    for name in state:
        match = STACK.fullmatch(name)
        if match is None:
            continue
        tower, kind, number, rest = match.groups()
        if keys and kind == "qk":
            queries = state[name].chunk(2)[0]
            first_block = int(number) * _blocks_per_group(student, tower)
            state[name] = torch.cat((queries, _teacher_keys(teacher, tower, first_block, rest)))
        if exact_norm and rest == "norm.weight" and tower.startswith("visual"):
            norm = name.removesuffix("weight")
            state[name] = (state[norm + "running_var"] + nn.BatchNorm2d(1).eps).sqrt()
            state[norm + "bias"] = state[norm + "running_mean"].clone()
    return state, [name for name in student if STACK.fullmatch(name) is None and name != "logit_scale"]


def _blocks_per_group(student: State, tower: str) -> int:
    """How many SAS-P blocks of a tower share Wq and Wk."""
    numbers: dict[str, set[str]] = {"qk": set(), "blocks": set()}
    for name in student:
        match = STACK.fullmatch(name)
        if match is not None and match[1] == tower:
            numbers[match[2]].add(match[3])
    return len(numbers["blocks"]) // len(numbers["qk"])


def _teacher_keys(teacher: State, tower: str, block: int, rest: str) -> Tensor:
    """The rows of a block's qkv weight or bias (``rest``) that project to keys."""
    mixer = "token_mixer.qkv" if tower.startswith("visual") else "qkv"
    return teacher[f"{tower}.{block}.{mixer}.{rest}"].chunk(3)[1]


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """Freeze the parameters and BatchNorm statistics of these names.

    BatchNorms whose statistics are named are put into eval mode, and ``train()`` no longer changes it: a single forward
    pass in train mode would update the statistics.
    """
    frozen = set(names)
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, submodule in module.named_modules():
        if isinstance(submodule, _BatchNorm) and f"{name}.running_mean" in frozen:
            submodule.eval()
            submodule.train = MethodType(_stay_in_eval, submodule)  # type: ignore[method-assign]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
