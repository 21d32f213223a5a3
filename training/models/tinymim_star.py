"""TinyMIM*-T (arXiv 2301.01296): the ViT-T of 12 heads with a distillation token that DeiT's hard distillation tunes.

Tokens are class, distillation and patches, of 198 positions; behind the last norm another one, a linear layer from 192
to 1280 and a GELU lead to the two heads, whose logits are averaged in evaluation. 5,772,224 parameters without heads.
"""

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

NECK = 1280
AUTHORS_NECK = "conv1x1."  # as the authors' code names it
HEADS = ("head.", "head_dist.", "fc_norm.")  # of fine-tuned ones
DISTILLATION_TOKEN = "dist_token"
NAME = "tinymim_star_tiny_patch16_224"
SHAPE = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 12}


class TinymimStar(VisionTransformerDistilled):
    """timm's distilled ViT with a neck before its two heads.

    It loads its own weights, also by the authors' names, and those of an encoder of pre-training, which has neither
    distillation token nor neck: these stay as they were drawn, and the token's position is the class token's.

    Args:
        neck: Numbers of a feature behind it.
        options: Those of timm's VisionTransformer.
    """

    def __init__(self, neck: int = NECK, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        widen = nn.Linear(self.embed_dim, neck)
        nn.init.trunc_normal_(widen.weight, std=0.02)
        nn.init.zeros_(widen.bias)
        self.neck = nn.Sequential(nn.LayerNorm(self.embed_dim), widen, nn.GELU())
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
        if pre_logits:
            return self.head_drop(self.neck(x[:, :2])).mean(dim=1)
        logits, distilled = self.logits_of_both(x)
        if self.distilled_training and self.training:
            return logits, distilled
        return (logits + distilled) / 2

    def logits_of_both(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) of the class head and of the distillation head, of tokens (B, 198, D)."""
        features = self.head_drop(self.neck(tokens[:, :2]))
        return self.head(features[:, 0]), self.head_dist(features[:, 1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rename the authors' neck; give an encoder's weights the token, its position and the neck that it lacks."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}{AUTHORS_NECK}")]:
            state_dict[f"{prefix}neck.{key.removeprefix(f'{prefix}{AUTHORS_NECK}')}"] = state_dict.pop(key)
        positions = state_dict.get(f"{prefix}pos_embed")
        if positions is not None and f"{prefix}{DISTILLATION_TOKEN}" not in state_dict:
            state_dict[f"{prefix}pos_embed"] = torch.cat([positions[:, :1], positions], dim=1)
            own = self.state_dict()
            new = [key for key in own if key == DISTILLATION_TOKEN or key.startswith("neck.")]
            state_dict.update({f"{prefix}{key}": own[key] for key in new})
        super()._load_from_state_dict(state_dict, prefix, *args)


default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist"),
        }
    }
)


@register_model
def tinymim_star_tiny_patch16_224(pretrained: bool = False, **options: Any) -> TinymimStar:
    """Build TinyMIM*-T; there are no weights to fetch. Options change its shape."""
    model: TinymimStar = build_model_with_cfg(TinymimStar, NAME, pretrained, **{**SHAPE, **options})
    return model
