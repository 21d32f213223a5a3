"""CatLIP's vision transformers (Mehta et al., arXiv 2404.15653; released code in apple/corenet) for timm and open_clip.

A pre-norm ViT whose patches come from three convolutions, with positions on patches only and a linear head on the
normalised CLS token. Images are RGB in [0, 1] without further normalisation, with sides that are multiples of 16:
positions are resized over the grid (``positions="grid"``), or, as the released code does, along the raster order.

timm names: ``catlip_vit_base_patch16_224``, ``_large_``, ``_huge_``, and ``catlip_vit_tiny`` for tests and studies.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Patch embedding by convolutions of stride 4, 2 and 2, of which the first one pads by 1.

    The arguments are those of timm's patch embeddings. Its BatchNorms are torch's own, not synchronised.
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **unused: Any
    ) -> None:
        super().__init__()
        assert patch_size == 16
        self.patch_size = (patch_size, patch_size)
        self.img_size = to_2tuple(img_size)
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        width = max(32, embed_dim // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, width, kernel_size=4, stride=4, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, kernel_size=2, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, embed_dim, kernel_size=2, stride=2),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels per patch."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the patches, (B, S/16, S/16, D), of images (B, 3, S, S)."""
        if images.shape[-1] % 16 or images.shape[-2] % 16:
            raise ValueError(f"images of {tuple(images.shape[-2:])}: sides must be multiples of 16")
        tokens: Tensor = self.layers(images).permute(0, 2, 3, 1)
        return tokens


class CatlipViT(VisionTransformer):
    """timm's VisionTransformer with CatLIP's stem, positions and initialisation."""

    def __init__(self, positions: Literal["grid", "raster"] = "grid", **options: Any) -> None:
        options.setdefault("norm_layer", _LayerNorm)
        options |= {"embed_layer": ConvStem, "no_embed_class": True, "dynamic_img_size": True, "weight_init": "skip"}
        super().__init__(**options)
        self.positions = positions
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.cls_token: nn.Parameter
        self.pos_embed: nn.Parameter
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=self.embed_dim**-0.5)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, H, W, D) patches -> (B, 1 + H W, D): positions are added; CLS, which has none, is put in front."""
        positions = resize_positions(self.pos_embed, self.patch_embed.grid_size, x.shape[1:3], self.positions)
        tokens = x.flatten(1, 2) + positions
        joined: Tensor = self.pos_drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1))
        return joined


class _LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with eps 1e-6; under autocast it computes in float32."""

    def __init__(self, width: int, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(width, eps, **options)


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, ...] | torch.Size, method: Literal["grid", "raster"]
) -> Tensor:
    """Interpolate position embeddings to another grid, linearly.

    Args:
        positions: (1, h w, D).
        old: (h, w).
        new: (H, W).
        method: "grid" interpolates over the plane, "raster" along the row of tokens, as the released code does.

    Returns:
        (1, H W, D).
    """
    if tuple(old) == tuple(new):
        return positions
    if method == "raster":
        row = F.interpolate(positions.float().mT, new[0] * new[1], mode="linear")
        return row.mT.to(positions.dtype)
    plane = positions.float().mT.reshape(1, -1, *old)
    resized = F.interpolate(plane, tuple(new), mode="bilinear")
    return resized.flatten(2).mT.to(positions.dtype)


_CFG = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 224 / 232,
    "interpolation": "bilinear",
    "first_conv": "patch_embed.layers.0",
    "classifier": "head",
    "num_classes": 1000,
    "url": "",
}
_SIZES = {
    "catlip_vit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "catlip_vit_large_patch16_224": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "catlip_vit_huge_patch16_224": {"embed_dim": 1280, "depth": 32, "num_heads": 20},
    "catlip_vit_tiny": {"embed_dim": 96, "depth": 3, "num_heads": 3, "img_size": 48},
}


def _default_cfg(side: int) -> dict[str, Any]:
    return {**_CFG, "input_size": (3, side, side)}


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _default_cfg(size.get("img_size", 224)) for name, size in _SIZES.items()}
)


def _vit(name: str, pretrained: bool, options: dict[str, Any]) -> CatlipViT:
    model: CatlipViT = build_model_with_cfg(CatlipViT, name, pretrained, **{**_SIZES[name], **options})
    return model


@register_model
def catlip_vit_base_patch16_224(pretrained: bool = False, **options: Any) -> CatlipViT:
    """Build ViT-B/16: 12 layers of width 768, 85,955,328 parameters without the head."""
    return _vit("catlip_vit_base_patch16_224", pretrained, options)


@register_model
def catlip_vit_large_patch16_224(pretrained: bool = False, **options: Any) -> CatlipViT:
    """Build ViT-L/16: 24 layers of width 1024, 303,838,208 parameters without the head."""
    return _vit("catlip_vit_large_patch16_224", pretrained, options)


@register_model
def catlip_vit_huge_patch16_224(pretrained: bool = False, **options: Any) -> CatlipViT:
    """Build ViT-H/16: 32 layers of width 1280 with 20 heads, 631,998,720 parameters without the head."""
    return _vit("catlip_vit_huge_patch16_224", pretrained, options)


@register_model
def catlip_vit_tiny(pretrained: bool = False, **options: Any) -> CatlipViT:
    """Build a ViT of 3 layers of width 96 for 48 pixels; options change them."""
    return _vit("catlip_vit_tiny", pretrained, options)
