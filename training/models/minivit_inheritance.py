"""Weights for MiniViT's models from ordinary ones, and back (arXiv 2204.07154, section 3.4).

The paper starts from a trained model whose adjacent layers are then shared; how their weights become one is not said,
and the released code starts from random weights. Here a group takes the weights of its first layer, of its last one, or
their mean. Norms stay those of their own layers. With head maps that start as the identity and without a norm in the
residual stream, a teacher whose layers are equal in each group is reproduced exactly.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.models.inheritance import State, inherit
from training.models.minivit import MiniDeiT, MiniSwin
from training.models.minivit_parts import ContextualPositions, HeadMap, LocalTransform
from training.models.weight_tying import tie, tied_blocks, untie

HEADS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")
OWN = (".attn.before.", ".attn.after.", ".attn.positions.", ".local.")  # what an ordinary model has not


@torch.no_grad()
def inherit_minivit(student: MiniDeiT | MiniSwin, teacher: nn.Module, source: Literal["first", "last", "mean"]) -> None:
    """Start a student from the weights of timm's ViT or Swin of the same width and depth, in place.

    A teacher's CLS token is left out; of its positions those of the patches are taken. Its head is taken where it has
    as many classes. Head maps, relative positions of iRPE and convolutions stay as they are.

    Args:
        student: The tied model.
        teacher: The ordinary model, or one of ours in other groups.
        source: The layers of a group whose weights it shares from now on.

    Raises:
        ValueError: The teacher has another width, depth, window or number of patches.
    """
    theirs = (_untied(teacher) if tied_blocks(teacher) else teacher).state_dict()
    apart = _untied(student)
    own = apart.state_dict()
    if len(_block_names(theirs)) != len(_block_names(own)):
        raise ValueError(
            f"a teacher of {len(_block_names(theirs))} blocks: inherit from a model of the student's depth, width and "
            "windows"
        )
    prefix = getattr(teacher, "num_prefix_tokens", 0)
    if "pos_embed" in theirs and not getattr(teacher, "no_embed_class", False):
        theirs["pos_embed"] = theirs["pos_embed"][:, prefix:]

    def name_in_teacher(name: str) -> str | None:
        if any(part in name for part in OWN):
            return None
        if name in HEADS and (name not in theirs or theirs[name].shape != own[name].shape):
            return None
        return name

    apart.load_state_dict(inherit(own, theirs, name_in_teacher))
    lists = dict(apart.named_modules())
    for name, blocks in tied_blocks(student).items():
        tie(lists[name], blocks.tying.groups, blocks.tying.shared, source)
    student.load_state_dict(apart.state_dict())


def expand(model: MiniDeiT | MiniSwin) -> Any:
    """Return timm's ordinary, untied ViT or Swin that computes the same.

    Tying its blocks in the same groups is the inverse.

    Raises:
        ValueError: A weight transformation of the model is not the identity.
    """
    for name, module in model.named_modules():
        if not _is_identity(module):
            raise ValueError(f"{name} is not the identity: no ordinary model computes the same")
    if any(getattr(module, "mask_always", False) for module in model.modules()):
        raise ValueError("unshifted windows are masked, too: no ordinary model computes the same")
    ordinary = _ordinary_vit(model) if isinstance(model, MiniDeiT) else _ordinary_swin(model)
    weights = _untied(model).state_dict()
    ordinary.load_state_dict({name: value for name, value in weights.items() if not any(part in name for part in OWN)})
    return ordinary.train(model.training)


def _untied(model: Any) -> Any:
    """A copy of a model whose blocks share nothing."""
    apart = deepcopy(model)
    for blocks in tied_blocks(apart).values():
        untie(blocks)
    return apart


def _block_names(state: State) -> set[str]:
    """The blocks that tensors of a state dict belong to, by the names of their first norms."""
    return {name for name in state if name.endswith(".norm1.weight")}


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is None or not tensor.any()


def _is_identity(module: nn.Module) -> bool:
    """Whether a module is no weight transformation, or one that changes nothing."""
    if isinstance(module, HeadMap):
        eye = torch.eye(len(module.weight), device=module.weight.device, dtype=module.weight.dtype)
        return torch.equal(module.weight, eye) and _is_zero(module.bias)
    if isinstance(module, ContextualPositions):
        return _is_zero(module.table)
    if isinstance(module, LocalTransform):
        return not module.in_stream and _is_zero(module.conv.weight) and _is_zero(module.conv.bias)
    return True


def _ratio(block: Any) -> float:
    """How much wider the MLP is inside."""
    ratio: float = block.mlp.fc1.out_features / block.mlp.fc1.in_features
    return ratio


def _drop_path(block: Any) -> float:
    """The drop path rate of a block, which of the last block is the model's."""
    rate: float = getattr(block.drop_path1, "drop_prob", 0.0)
    return rate


def _ordinary_vit(model: MiniDeiT) -> VisionTransformer:
    blocks: Any = model.blocks
    return VisionTransformer(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        mlp_ratio=_ratio(blocks[0]),
        class_token=False,
        fc_norm=False,
        dynamic_img_size=model.dynamic_img_size,
        drop_path_rate=_drop_path(blocks[-1]),
    )


def _ordinary_swin(model: MiniSwin) -> SwinTransformer:
    stages: list[Any] = [stage.blocks for stage in model.layers]
    embedding: Any = model.patch_embed
    return SwinTransformer(
        img_size=embedding.img_size,
        patch_size=embedding.patch_size,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        depths=tuple(len(blocks) for blocks in stages),
        num_heads=tuple(blocks[0].attn.num_heads for blocks in stages),
        window_size=stages[0][0].window_size,
        mlp_ratio=_ratio(stages[0][0]),
        drop_path_rate=_drop_path(stages[-1][-1]),
    )
