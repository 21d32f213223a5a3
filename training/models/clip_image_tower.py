"""Image towers of open_clip's in timm's form: a linear head on their pooled features, before the CLIP's projection.

For those that timm does not have: ViTs cut by masks, ViTs with other poolings or norms, and CLIP's ResNets. The options
that rebuild one are open_clip's ``embed_dim``, ``vision_cfg`` and ``quick_gelu``. Images of other sides are taken: the
positions are resized for them by bicubic interpolation, as timm's ViTs do.

Importing this module makes `clip_image_tower` known to timm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.func import functional_call

import training.models.tinyclip_pruned  # noqa: F401  makes the towers that masks cut known to open_clip
from shards_spec.files import UserError
from shards_spec.open_clip_plugins import build_image_tower

NAME = "clip_image_tower"
POSITIONS = "positional_embedding"
RESNET_STRIDE = 32  # pixels of an image to a side of a position of its last map


class PooledAttention(nn.Module):
    """CLIP's attention pooling of a map (B, C, H, W) without its projection: heads' outputs (B, C) side by side.

    Args:
        pool: open_clip's, whose parameters it takes.
        grid: Positions a side of the map for which ``pool`` has positions.
    """

    def __init__(self, pool: AttentionPool2d, grid: int) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.q_proj = pool.q_proj
        self.k_proj = pool.k_proj
        self.v_proj = pool.v_proj
        self.num_heads = pool.num_heads
        self.grid_size = (grid, grid)

    def forward(self, maps: Tensor) -> Tensor:
        """Return what the mean of the map finds in it, (B, C)."""
        positions = resized(self.positional_embedding, self.grid_size, (maps.shape[2], maps.shape[3]))
        tokens = maps.flatten(2).mT
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), dim=1) + positions.to(tokens.dtype)
        found = F.scaled_dot_product_attention(
            self._by_head(self.q_proj(tokens[:, :1])),
            self._by_head(self.k_proj(tokens)),
            self._by_head(self.v_proj(tokens)),
        )
        pooled: Tensor = found.transpose(1, 2).flatten(1)
        return pooled

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, C / H)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


def resized(positions: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Return positions (1 + N', D) of another grid, of those (1 + N, D) of one; the first token's stays."""
    if before == after:
        return positions
    other: Tensor = resample_abs_pos_embed(positions.unsqueeze(0), list(after), list(before), num_prefix_tokens=1)
    return other[0]


class ClipImageTower(nn.Module):
    """An image tower of open_clip's with timm's methods, images (B, 3, S, S) -> logits (B, K).

    Dropout of patches is for pre-training and left out.

    Args:
        embed_dim: Width of the CLIP's embedding, to which the head's features are projected there.
        vision_cfg: open_clip's description of the tower.
        quick_gelu: Whether its activation is QuickGELU.
        num_classes: K; 0 has no head.
        dynamic_img_size: Whether images of other sides are taken.

    Raises:
        UserError: This open_clip cannot build the tower.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        quick_gelu: bool = False,
        num_classes: int = 1000,
        dynamic_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.dynamic_img_size = dynamic_img_size
        tower = build_image_tower(embed_dim, vision_cfg, quick_gelu)
        self.tower: Any = tower
        if isinstance(tower, ModifiedResNet):
            grid = tower.image_size // RESNET_STRIDE
            tower.attnpool = PooledAttention(tower.attnpool, grid)
            self.patch_size = (RESNET_STRIDE, RESNET_STRIDE)
            self.grid_size = (grid, grid)
            self.num_features = tower.attnpool.q_proj.out_features
        else:
            self.num_features = len(tower.proj)
            self.patch_size = tower.patch_size
            self.grid_size = tower.grid_size
            tower.proj = None
            tower.output_tokens = False
            tower.patch_dropout = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new head over so many classes; 0 has none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def forward_features(self, images: Tensor) -> Tensor:
        """Return pooled features (B, D) of normalised images (B, 3, S, S), before the CLIP's projection."""
        grid = (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1])
        if grid != self.grid_size and not self.dynamic_img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, and dynamic_img_size is off")
        others = {}
        if grid != self.grid_size and not isinstance(self.tower, ModifiedResNet):  # which resizes in its pooling
            others[POSITIONS] = resized(self.tower.positional_embedding, self.grid_size, grid)
        features: Tensor = functional_call(self.tower, others, (images,)) if others else self.tower(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K) of pooled features (B, D), or these with ``pre_logits``."""
        if pre_logits:
            return features
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of normalised images (B, 3, S, S)."""
        return self.forward_head(self.forward_features(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input, and compute the block again for its gradient; a ResNet's are kept."""
        self.tower.set_grad_checkpointing(enable)


default_cfgs = generate_default_cfgs(
    {f"{NAME}.untrained": {"url": "", "input_size": (3, 224, 224), "classifier": "head", "num_classes": 1000}}
)


@register_model
def clip_image_tower(pretrained: bool = False, **options: Any) -> ClipImageTower:
    """Build the image tower that the options describe. Raises UserError without a description."""
    if "vision_cfg" not in options:
        raise UserError(
            f"timm:{NAME} is the form in which image towers of CLIPs are kept: name the CLIP's RUN or local-dir:PATH"
        )
    colours = ("in_chans",)  # timm's default, which CLIP's towers do not ask for: images have three channels
    model: ClipImageTower = build_model_with_cfg(ClipImageTower, NAME, pretrained, kwargs_filter=colours, **options)
    return model
