"""How a transformer is fine-tuned: rates by layer, drop path, another image size, a head on the patches' mean.

MAE and TinyMIM fine-tune so after masked pre-training, MiniViT from 224 to 384 pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.engine.optim import ParamGroup
from training.models.classifier import Classifier, new_classifier
from training.models.minivit_parts import resized_table

EMBEDDINGS = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.")
EXEMPT = ("pos_embed", "cls_token", "dist_token", "reg_token")  # from weight decay, as all vectors are
MEAN_POOLING = {"global_pool": "avg"}  # timm's: the mean of the patches, a norm behind it, none before

LEFT_OUT = ("norm.", "attn_pool.", "fc_norm.", "head.")  # of the model's own pooling
NEW = ("fc_norm.", "head.")


def pool_patches(base: LoadedModel) -> LoadedModel:
    """Return a classifier over one class with the base's blocks, and a new norm behind the mean of its patches.

    The base's own last norm and pooling are left out; one that pools so already stays as it is. Raises UserError for a
    model that is no ViT of timm's.
    """
    model = base.model
    if not isinstance(model.trunk, VisionTransformer):
        raise UserError(f"--pooling mean: {model.name!r} is no vision transformer of timm's; leave it out")
    if isinstance(model.trunk, VisionTransformerDistilled):
        raise UserError(f"--pooling mean: {model.name!r} has heads on its class and distillation tokens; leave it out")
    if model.trunk.global_pool == MEAN_POOLING["global_pool"]:
        return base
    pooled = new_classifier(model.name, 1, options={**model.options, **MEAN_POOLING})
    weights = {key: value for key, value in model.trunk.state_dict().items() if not key.startswith(LEFT_OUT)}
    new = {key: value for key, value in pooled.model.trunk.state_dict().items() if key.startswith(NEW)}
    pooled.model.trunk.load_state_dict(weights | new, strict=True)
    return replace(base, model=pooled.model)


def check_sides(model: Classifier, sides: Sequence[int]) -> None:
    """Raise UserError for a side of images that the model's patches, or its smallest map, do not divide."""
    patch = getattr(getattr(model.trunk, "patch_embed", model.trunk), "patch_size", (1,))[0]
    if wrong := [side for side in sides if side % patch]:
        raise UserError(f"--sides {wrong[0]}: must be a multiple of the model's patches of {patch} pixels")


@torch.no_grad()
def resize_input(base: LoadedModel, side: int) -> LoadedModel:
    """Return the base for images of another size; a run rebuilds it so.

    A ViT's positions are resized by bicubic interpolation, as MAE, DeiT and Mini-DeiT have it: timm's is smoothed.
    iRPE's tables serve any grid. A Swin's windows grow with
    its grid, 7 to 12 from 224 to 384 pixels, and so do their tables, 13 x 13 to 23 x 23 entries.

    Raises UserError for a model that is neither, or a size that its patches do not divide.
    """
    model = base.model
    trunk: Any = model.trunk
    if not isinstance(trunk, VisionTransformer | SwinTransformer):
        raise UserError(
            f"--image-size {side}: {model.name!r} is none of timm's plain ViTs and Swins, whose positions it resizes; "
            "leave it out. A convolutional network or a CLIP's tower takes any --sides"
        )
    embedding: Any = trunk.patch_embed
    patch, grid = embedding.patch_size[0], embedding.grid_size
    if side % patch:
        raise UserError(f"--image-size {side}: its patches are of {patch} pixels, give a multiple of that")
    positions = getattr(trunk, "pos_embed", None)
    windows = [module for module in trunk.modules() if isinstance(module, WindowAttention)]
    former = [(module.relative_position_bias_table, module.window_size) for module in windows]
    trunk.set_input_size(img_size=(side, side))
    options: dict[str, Any] = {"img_size": side}
    resized: Any = getattr(trunk, "pos_embed", None)
    if isinstance(positions, Tensor) and resized is not positions:
        resized.copy_(_resized_positions(positions, grid, embedding.grid_size))
    if isinstance(trunk, SwinTransformer):
        stages: Any = trunk.layers
        options["window_size"] = [list(stage.blocks[0].window_size) for stage in stages]
        for module, (table, before) in zip(windows, former, strict=True):
            if module.window_size != before:
                module.relative_position_bias_table.copy_(resized_table(table, before, module.window_size))
    model.options = {**model.options, **options}
    return replace(base, image_size=side)


def _resized_positions(positions: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Positions (1, P + N', C) of another grid, of those (1, P + N, C) with P tokens in front of the grid's."""
    prefix = positions.shape[1] - before[0] * before[1]
    plane = positions[:, prefix:].mT.reshape(1, -1, *before)
    resized = F.interpolate(plane, after, mode="bicubic", align_corners=False).flatten(2).mT
    return torch.cat([positions[:, :prefix], resized], dim=1)


def _lists_of_blocks(trunk: Any, option: str) -> list[Any]:
    """The blocks of a ViT, or of each stage of a Swin. Raises UserError that names ``option``."""
    lists: list[Any] = [getattr(trunk, "blocks", ())]
    if isinstance(trunk, SwinTransformer):
        lists = [stage.blocks for stage in trunk.layers]
    if not all(len(blocks) for blocks in lists):
        raise UserError(f"{option} is for vision transformers and Swins of timm's; leave it out")
    return lists


def set_linear_drop_path(trunk: Any, rate: float) -> None:
    """Give the blocks a drop path that grows linearly with the depth, up to ``rate``. Raises UserError."""
    blocks = list[Any]()
    for stage in _lists_of_blocks(trunk, "--drop-path"):
        blocks += stage
    if not hasattr(blocks[0], "drop_path1"):
        raise UserError("--drop-path is for vision transformers and Swins of timm's; leave it out")
    for index, block in enumerate(blocks):
        own = rate * index / max(1, len(blocks) - 1)
        block.drop_path1 = DropPath(own) if own else nn.Identity()
        block.drop_path2 = DropPath(own) if own else nn.Identity()


def layer_of(name: str, depths: Sequence[int]) -> int:
    """Return the layer of a parameter: 0 embeds, the blocks of all stages follow from 1, then comes the rest.

    Args:
        name: Its name in a trunk of timm's, a ViT or a Swin. A Swin's merging of patches belongs to the block before.
        depths: Blocks of each stage; a ViT is one stage.
    """
    if name.startswith(EMBEDDINGS):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith("layers."):
        _, stage, kind, number, *_ = name.split(".")
        before = sum(depths[: int(stage)])
        return before + int(number) + 1 if kind == "blocks" else before
    return sum(depths) + 1


def layer_groups(task: nn.Module, trunk: Any, decay: float, weight_decay: float) -> list[ParamGroup]:
    """Return a task's trainable parameters by layer of its trunk, each layer's rate ``decay`` times the next one's.

    Weights that blocks share have the rate of the first of them. Vectors, positions and tokens have no weight decay,
    nor has what the trunk exempts. What is not in the trunk has the whole rate. Raises UserError for a trunk without
    blocks.
    """
    depths = [len(blocks) for blocks in _lists_of_blocks(trunk, "--layer-decay")]
    last = sum(depths) + 1
    names = {id(value): name for name, value in trunk.named_parameters()}
    exempt_names = {*EXEMPT, *_exempt(trunk)}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for value in task.parameters():
        if not value.requires_grad:
            continue
        name = names.get(id(value), "")
        is_exempt = value.ndim <= 1 or name in exempt_names
        groups.setdefault((layer_of(name, depths), is_exempt), []).append(value)
    return [
        ParamGroup(values, 0.0 if is_exempt else weight_decay, lr_factor=decay ** (last - layer))
        for (layer, is_exempt), values in sorted(groups.items(), key=lambda item: item[0])
    ]


def exempting_groups(task: nn.Module, trunk: Any, weight_decay: float) -> list[ParamGroup]:
    """Return a task's trainable parameters in two groups: vectors and what the trunk exempts have no weight decay."""
    names = {id(value): name for name, value in trunk.named_parameters()}
    exempt_names = _exempt(trunk)
    decayed = list[nn.Parameter]()
    exempt = list[nn.Parameter]()
    for value in task.parameters():
        if value.requires_grad:
            is_exempt = value.ndim <= 1 or names.get(id(value)) in exempt_names
            (exempt if is_exempt else decayed).append(value)
    return [ParamGroup(decayed, weight_decay), ParamGroup(exempt, 0.0)]


def _exempt(trunk: Any) -> set[str]:
    """What a trunk of timm's exempts from weight decay: positions, tables of windows, head maps."""
    return set(trunk.no_weight_decay()) if hasattr(trunk, "no_weight_decay") else set()
