"""The names of the authors' Mini-DeiT and Mini-Swin checkpoints (microsoft/Cream, MiniViT), and what they are here.

A released file has an entry per group, with the private parts of its blocks in lists, where a model here has an entry
per block that refers to its group's first one:

    Mini-DeiT  blocks.G.block.norm1.instances.R      blocks.B.norm1, with B = G * uses + R
               ...attn.rpe_k.instances.R.lookup_table_weight (1, d, 49)   attn.positions.table (d, 49)
               ...attn.conv_l, conv_w .instances.R.weight (M, M, 1, 1)    attn.before, attn.after .weight (M, M)
               ...attn.qkv, attn.proj, mlp           those of the group's first block
    Mini-Swin  layers.S.blocks.G.norm1_list.R, norm2_list.R, local_norm_list.R, local_conv_list.R
                                                     norm1, norm2, local.norm, local.conv of block G * uses + R
               ...proj_l.R, proj_w.R                 attn.before, attn.after
               layers.S.downsample, head             layers.S+1.downsample (timm merges where a stage starts), head.fc

Left out are tensors that are computed (``attn_mask``, ``relative_position_index``) and the projectors of a loss that
the release does not use (``fit_dense_C``). The released Swins mask unshifted windows, too: ``mask_always=True``.
"""

import re
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from training.models.weight_tying import MAP

State = MutableMapping[str, Tensor]
DEIT_BLOCK = re.compile(r"blocks\.(\d+)\.block\.(.+)")
SWIN_BLOCK = re.compile(r"(layers\.\d+\.)blocks\.(\d+)\.(.+)")
SWIN_MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
DEIT_PRIVATE = re.compile(r"(norm1|norm2|attn\.rpe_k|attn\.conv_l|attn\.conv_w)\.instances\.(\d+)\.(.+)")
SWIN_PRIVATE = re.compile(r"(norm1_list|norm2_list|proj_l|proj_w|local_norm_list|local_conv_list)\.(\d+)\.(.+)")
NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.rpe_k": "attn.positions",
    "attn.conv_l": "attn.before",
    "attn.conv_w": "attn.after",
    "norm1_list": "norm1",
    "norm2_list": "norm2",
    "proj_l": "attn.before",
    "proj_w": "attn.after",
    "local_norm_list": "local.norm",
    "local_conv_list": "local.conv",
}
LOOKUP_TABLE = "lookup_table_weight"
LEFT_OUT = (".attn_mask", ".relative_position_index")
PROJECTORS = "fit_dense_C."


def rename_released(state: State, prefix: str = "") -> None:
    """Give the tensors of a released checkpoint the names and shapes that they have here, in place.

    State dicts of other names stay as they are.

    Args:
        state: The state dict of a Mini-DeiT or a Mini-Swin.
        prefix: What stands in front of the names.
    """
    names = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
    is_deit = any(DEIT_BLOCK.fullmatch(name) for name in names)
    is_swin = any(".norm1_list." in name for name in names)
    if not is_deit and not is_swin:
        return
    tensors = {name: state.pop(own) for name, own in names.items()}
    renamed = _mini_deit(tensors) if is_deit else _mini_swin(tensors)
    state.update({prefix + name: tensor for name, tensor in renamed.items()})


def load_hook(_model: Any, state: State, prefix: str, *_: Any) -> None:
    """`rename_released` as a hook before a state dict is loaded."""
    rename_released(state, prefix)


def _mini_deit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: match.groups() for name in tensors if (match := DEIT_BLOCK.fullmatch(name))}
    members = [(int(group), part) for group, part in parts.values()]
    uses = _uses(members, DEIT_PRIVATE)
    renamed = {f"blocks.{MAP}": _group_map(members, uses)}
    for name, tensor in tensors.items():
        if name in parts:
            group, part = parts[name]
            renamed[f"blocks.{_in_block(int(group), part, uses, DEIT_PRIVATE)}"] = _reshaped(part, tensor)
        else:
            renamed[name] = tensor
    return renamed


def _mini_swin(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: value for name, value in tensors.items() if not name.endswith(LEFT_OUT)}
    kept = {name: value for name, value in kept.items() if not name.startswith(PROJECTORS)}
    parts = {name: match.groups() for name in kept if (match := SWIN_BLOCK.fullmatch(name))}
    uses = dict[str, int]()
    renamed = dict[str, Tensor]()
    for stage in dict.fromkeys(stage for stage, _, _ in parts.values()):
        members = [(int(group), part) for own, group, part in parts.values() if own == stage]
        uses[stage] = _uses(members, SWIN_PRIVATE)
        renamed[f"{stage}blocks.{MAP}"] = _group_map(members, uses[stage])
    for name, tensor in kept.items():
        if name in parts:
            stage, group, part = parts[name]
            renamed[f"{stage}blocks.{_in_block(int(group), part, uses[stage], SWIN_PRIVATE)}"] = tensor
        elif merging := SWIN_MERGING.fullmatch(name):
            renamed[f"layers.{int(merging[1]) + 1}.downsample.{merging[2]}"] = tensor
        else:
            renamed[re.sub(r"^head\.(?!fc\.)", "head.fc.", name)] = tensor
    return renamed


def _uses(members: list[tuple[int, str]], private: re.Pattern[str]) -> int:
    """How many blocks share a group's weights: the entries of its lists."""
    return 1 + max((int(match[2]) for _, part in members if (match := private.fullmatch(part))), default=0)


def _group_map(members: list[tuple[int, str]], uses: int) -> Tensor:
    """The group of each block, as `weight_tying` keeps it."""
    groups = 1 + max(group for group, _ in members)
    return torch.arange(groups).repeat_interleave(uses)


def _in_block(group: int, part: str, uses: int, private: re.Pattern[str]) -> str:
    """The name of a group's tensor behind the list of blocks."""
    match = private.fullmatch(part)
    if match is None:
        return f"{group * uses}.{part}"
    rest = "table" if match[3] == LOOKUP_TABLE else match[3]
    return f"{group * uses + int(match[2])}.{NAMES[match[1]]}.{rest}"


def _reshaped(part: str, tensor: Tensor) -> Tensor:
    """A tensor without the axes of length one that a convolution or heads that share a table have."""
    if part.endswith(LOOKUP_TABLE):
        return tensor.squeeze(0)
    return tensor.flatten(1) if ".conv_l." in part or ".conv_w." in part else tensor
