"""Mini-DeiT and Mini-Swin (MiniViT, arXiv 2204.07154) for timm and open_clip.

timm's ViT and Swin whose blocks are tied in groups (`training.models.weight_tying`) and have weight transformations of
their own (`training.models.minivit_parts`). The files and the counts of parameters shrink; layers, time and memory of a
step do not, and the transformations add a little to both.

What a group shares: projections of queries, keys, values and outputs, the MLP, and in Swin the table of relative
positions. What each block has of its own: norms, head maps, iRPE's table (DeiT), convolution (Swin), drop path.

timm names: ``mini_deit_tiny|small|base_patch16_224``, ``mini_deit_base_patch16_384``,
``mini_swin_tiny|small|base_patch4_window7_224``, ``mini_swin_base_patch4_window12_384``; for tests ``mini_deit_test``
and ``mini_swin_test``, for the study ``mini_swin_study``. Options besides timm's: ``groups``, ``head_maps``, ``irpe``
(DeiT); ``local`` and ``mask_always`` (Swin). The authors' checkpoints load as they are
(`training.models.minivit_released`).
"""

from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from training.choices import HeadMaps, Local
from training.models.minivit_parts import MappedAttention, MiniSwinBlock
from training.models.minivit_released import load_hook
from training.models.weight_tying import group_map, point_to_first, tie

Groups = int | Sequence[int]
DEIT_SHARED = ("attn.qkv", "attn.proj", "mlp")
SWIN_SHARED = (*DEIT_SHARED, "attn.relative_position_bias_table")
NOT_OF_DEIT = ("class_token", "reg_tokens", "patch_drop_rate", "qk_norm", "scale_attn_norm", "fc_norm")


class MiniDeiT(VisionTransformer):
    """timm's ViT without a CLS token, pooled by the mean behind its last norm, with tied blocks and iRPE.

    Args:
        groups: Number of groups of equal size, or the size of each; as many as blocks ties none.
        head_maps: How the maps across heads start: "random" (release), "identity" (for inherited weights), or "none".
        irpe: Whether keys have relative positions.
        options: Those of timm's ViT.

    Raises:
        ValueError: The groups are none of the blocks, or an option is not for these models: tokens besides the patches
            of the whole grid, or norms of queries and keys.
    """

    def __init__(self, groups: Groups = 6, head_maps: HeadMaps = "random", irpe: bool = True, **options: Any) -> None:
        if unfit := [name for name in NOT_OF_DEIT if options.get(name)]:
            raise ValueError(f"{unfit[0]} is no option of a Mini-DeiT")
        options.setdefault("global_pool", "avg")
        super().__init__(**{**options, "class_token": False, "fc_norm": False})
        grid = self.patch_embed.grid_size
        for block in self.blocks:
            block.attn = MappedAttention(block.attn, head_maps, grid if irpe else None)
        tie(self.blocks, group_map(len(self.blocks), groups), DEIT_SHARED, "first")
        self.register_load_state_dict_pre_hook(load_hook)  # type: ignore[no-untyped-call]

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that a recipe exempts from weight decay.

        Head maps are among them: identity maps would be pulled towards 0.
        """
        return {*super().no_weight_decay(), *_head_maps(self)}


class MiniSwin(SwinTransformer):
    """timm's Swin with tied blocks, head maps and depth-wise convolutions.

    Args:
        groups: For each stage, the number of groups of equal size or the size of each.
        head_maps: As in `MiniDeiT`.
        local: In front of the MLP: "stream" (release), "residual" (the identity at the start), or "none".
        mask_always: Mask unshifted windows, too, as the released models do.
        options: Those of timm's Swin.
    """

    def __init__(
        self,
        groups: Sequence[Groups] = (1, 1, 1, 1),
        head_maps: HeadMaps = "random",
        local: Local = "stream",
        mask_always: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if len(groups) != len(self.layers):
            raise ValueError(f"groups {list(groups)}: give one entry for each of the {len(self.layers)} stages")
        for stage, stage_groups in zip(self.layers, groups, strict=True):
            blocks: Any = stage.blocks
            for index, block in enumerate(blocks):
                blocks[index] = _mini_block(block, head_maps, local, mask_always)
            tie(blocks, group_map(len(blocks), stage_groups), SWIN_SHARED, "first")
        self.register_load_state_dict_pre_hook(load_hook)  # type: ignore[no-untyped-call]

    def no_weight_decay(self) -> set[str]:
        """As `MiniDeiT.no_weight_decay`; relative positions do not decay either."""
        return {*super().no_weight_decay(), *_head_maps(self)}

    def set_input_size(self, *args: Any, **options: Any) -> None:
        """Change the sizes of images and windows, as timm's Swin does. Tables of positions stay shared."""
        super().set_input_size(*args, **options)
        for stage in self.layers:
            point_to_first(stage.blocks)


def _head_maps(model: Any) -> set[str]:
    """The names of the maps across heads."""
    return {name for name, _ in model.named_parameters() if name.endswith(("attn.before.weight", "attn.after.weight"))}


def _mini_block(block: Any, head_maps: HeadMaps, local: Local, mask_always: bool) -> MiniSwinBlock:
    """A `MiniSwinBlock` with the options that timm built a block with."""
    attention = block.attn
    made = MiniSwinBlock(
        head_maps,
        local,
        mask_always,
        dim=block.dim,
        input_resolution=block.input_resolution,
        num_heads=attention.num_heads,
        head_dim=attention.qkv.out_features // 3 // attention.num_heads,
        window_size=block.window_size,
        shift_size=block.target_shift_size,
        always_partition=block.always_partition,
        dynamic_mask=block.dynamic_mask,
        mlp_ratio=block.mlp_ratio,
        qkv_bias=attention.qkv.bias is not None,
        proj_drop=attention.proj_drop.p,
        attn_drop=attention.attn_drop.p,
        norm_layer=lambda dim, **placed: type(block.norm1)(dim, eps=block.norm1.eps, **placed),
    )
    made.drop_path1 = block.drop_path1
    made.drop_path2 = block.drop_path2
    return made


_DEIT: dict[str, dict[str, Any]] = {
    "mini_deit_tiny_patch16_224": {"embed_dim": 192, "num_heads": 3},
    "mini_deit_small_patch16_224": {"embed_dim": 384, "num_heads": 6},
    "mini_deit_base_patch16_224": {"embed_dim": 768, "num_heads": 12, "drop_path_rate": 0.1},
    "mini_deit_base_patch16_384": {"embed_dim": 768, "num_heads": 12, "drop_path_rate": 0.1, "img_size": 384},
    "mini_deit_test": {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32, "groups": 2},
}
_SWIN_TINY: dict[str, Any] = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "drop_path_rate": 0.0,
}
_SWIN_SMALL = {**_SWIN_TINY, "depths": (2, 2, 18, 2), "groups": (1, 1, 9, 1), "drop_path_rate": 0.1}
_SWIN_BASE = {**_SWIN_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.2}
_SWIN: dict[str, dict[str, Any]] = {
    "mini_swin_tiny_patch4_window7_224": _SWIN_TINY,
    "mini_swin_small_patch4_window7_224": _SWIN_SMALL,
    "mini_swin_base_patch4_window7_224": _SWIN_BASE,
    "mini_swin_base_patch4_window12_384": {**_SWIN_BASE, "window_size": 12, "img_size": 384},
    "mini_swin_test": {
        "embed_dim": 16,
        "depths": (2, 4),
        "num_heads": (2, 4),
        "groups": (1, 2),
        "window_size": 4,
        "img_size": 32,
        "drop_path_rate": 0.0,
    },
    "mini_swin_study": {
        "embed_dim": 32,
        "depths": (2, 6),
        "num_heads": (2, 4),
        "groups": (1, 3),
        "patch_size": 8,
        "window_size": 3,
        "img_size": 48,
        "drop_path_rate": 0.0,
    },
}


def _default_cfg(side: int, **names: Any) -> dict[str, Any]:
    return {
        "url": "",
        "input_size": (3, side, side),
        "num_classes": 1000,
        "crop_pct": 0.9 if side < 384 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        **names,
    }


default_cfgs = generate_default_cfgs(
    {
        **{
            f"{name}.untrained": _default_cfg(size.get("img_size", 224), classifier="head")
            for name, size in _DEIT.items()
        },
        **{
            f"{name}.untrained": _default_cfg(size.get("img_size", 224), classifier="head.fc", pool_size=(7, 7))
            for name, size in _SWIN.items()
        },
    }
)


def _mini_deit(name: str, pretrained: bool, options: dict[str, Any]) -> MiniDeiT:
    model: MiniDeiT = build_model_with_cfg(MiniDeiT, name, pretrained, **{**_DEIT[name], **options})
    return model


def _mini_swin(name: str, pretrained: bool, options: dict[str, Any]) -> MiniSwin:
    model: MiniSwin = build_model_with_cfg(MiniSwin, name, pretrained, **{**_SWIN[name], **options})
    return model


@register_model
def mini_deit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> MiniDeiT:
    """Build Mini-DeiT-Ti: 12 blocks of width 192 in 6 pairs, 3,090,304 parameters."""
    return _mini_deit("mini_deit_tiny_patch16_224", pretrained, options)


@register_model
def mini_deit_small_patch16_224(pretrained: bool = False, **options: Any) -> MiniDeiT:
    """Build Mini-DeiT-S: 12 blocks of width 384 in 6 pairs, 11,450,824 parameters."""
    return _mini_deit("mini_deit_small_patch16_224", pretrained, options)


@register_model
def mini_deit_base_patch16_224(pretrained: bool = False, **options: Any) -> MiniDeiT:
    """Build Mini-DeiT-B: 12 blocks of width 768 in 6 pairs, 44,098,408 parameters."""
    return _mini_deit("mini_deit_base_patch16_224", pretrained, options)


@register_model
def mini_deit_base_patch16_384(pretrained: bool = False, **options: Any) -> MiniDeiT:
    """Build Mini-DeiT-B for 384 pixels: 44,390,248 parameters."""
    return _mini_deit("mini_deit_base_patch16_384", pretrained, options)


@register_model
def mini_deit_test(pretrained: bool = False, **options: Any) -> MiniDeiT:
    """Build a Mini-DeiT of 4 blocks of width 32 in 2 pairs for 32 pixels."""
    return _mini_deit("mini_deit_test", pretrained, options)


@register_model
def mini_swin_tiny_patch4_window7_224(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build Mini-Swin-T: each of 4 stages is a group, 12,001,765 parameters."""
    return _mini_swin("mini_swin_tiny_patch4_window7_224", pretrained, options)


@register_model
def mini_swin_small_patch4_window7_224(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build Mini-Swin-S: 24 blocks in pairs, 26,463,205 parameters."""
    return _mini_swin("mini_swin_small_patch4_window7_224", pretrained, options)


@register_model
def mini_swin_base_patch4_window7_224(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build Mini-Swin-B: 24 blocks in pairs, 46,444,852 parameters."""
    return _mini_swin("mini_swin_base_patch4_window7_224", pretrained, options)


@register_model
def mini_swin_base_patch4_window12_384(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build Mini-Swin-B for 384 pixels: 46,512,532 parameters."""
    return _mini_swin("mini_swin_base_patch4_window12_384", pretrained, options)


@register_model
def mini_swin_test(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build a Mini-Swin of 2 + 4 blocks of width 16 and 32 in pairs for 32 pixels."""
    return _mini_swin("mini_swin_test", pretrained, options)


@register_model
def mini_swin_study(pretrained: bool = False, **options: Any) -> MiniSwin:
    """Build the Mini-Swin of `make study-minivit`: 2 + 6 blocks of width 32 and 64 in pairs for 48 pixels."""
    return _mini_swin("mini_swin_study", pretrained, options)
