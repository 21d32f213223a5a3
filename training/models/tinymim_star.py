"""TinyMIM*-T (arXiv 2301.01296): the ViT-T of 12 heads with a distillation token that DeiT's hard distillation tunes.

Tokens are class, distillation and patches, of 198 positions; behind the last norm another one, a linear layer from 192
to 1280 and a GELU lead to the two heads, whose logits are averaged in evaluation. 5,772,224 parameters without heads.
"""

from typing import Any

import torch
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from training.models.vit_teacher import DISTILLATION_TOKEN, HEADS

NECK = 1280
EPS = 1e-6


class TinymimStar(VisionTransformerDistilled):
    """timm's distilled ViT with a neck before its two heads.

    Args:
        neck: Numbers of a feature behind it.
        options: Those of timm's VisionTransformer.
    """

    def __init__(self, neck: int = NECK, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        widen = nn.Linear(self.embed_dim, neck)
        nn.init.trunc_normal_(widen.weight, std=0.02)
        nn.init.zeros_(widen.bias)
        self.neck = nn.Sequential(nn.LayerNorm(self.embed_dim, eps=EPS), widen, nn.GELU())
        self.num_features = self.head_hidden_size = neck
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones over ``num_classes``, or by none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return the logits (B, K) of tokens (B, 198, D), the mean of both heads; both while it is distilled.

        With ``pre_logits`` it is the mean of the two features (B, 1280).
        """
        features = self.head_drop(self.neck(x[:, :2]))
        if pre_logits:
            return features.mean(dim=1)
        logits, distilled = self.head(features[:, 0]), self.head_dist(features[:, 1])
        if self.distilled_training and self.training:
            return logits, distilled
        return (logits + distilled) / 2


@register_model
def tinymim_star_tiny_patch16_224(pretrained: bool = False, **options: Any) -> TinymimStar:
    """Build TinyMIM*-T; there are no weights to fetch. Raises ValueError when they are asked for."""
    if pretrained:
        raise ValueError("TinyMIM*-T has no weights to fetch: load the authors' file, or an encoder of `tinymim`")
    shape = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 12}
    options = {name: value for name, value in options.items() if not name.startswith(("pretrained", "cache_dir"))}
    return TinymimStar(**{**shape, **options})


@torch.no_grad()
def start_from_encoder(model: TinymimStar, encoder: dict[str, Tensor]) -> None:
    """Load an encoder of pre-training, which has neither distillation token nor neck; those keep their random weights.

    Its positions are those of the class token and of the patches; the distillation token's is the class token's.

    Raises:
        RuntimeError: The encoder is of other shapes, or lacks weights.
    """
    weights = {key: value for key, value in encoder.items() if not key.startswith(HEADS)}
    positions = weights["pos_embed"]
    weights["pos_embed"] = torch.cat([positions[:, :1], positions], dim=1)
    own = (DISTILLATION_TOKEN, "neck.", "head")
    kept = {key: value for key, value in model.state_dict().items() if key.startswith(own)}
    model.load_state_dict(weights | kept, strict=True)
