"""What makes a tower of open_clip a plain CLIP's: the only one that timm and transformers have."""

from typing import Any, NamedTuple

from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import nn

from shards_spec.files import UserError

OTHERS = "use --format open_clip or onnx"


class PlainTransformer(NamedTuple):
    """Sizes of a plain tower; ``image_size`` and ``patch_size`` are 0 for texts."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    quick_gelu: bool
    image_size: int = 0
    patch_size: int = 0


def check_plain_vit(model: nn.Module, target: str) -> PlainTransformer:
    """Return the sizes of an image tower that is CLIP's ViT.

    Args:
        model: open_clip's.
        target: The format, for messages.

    Raises:
        UserError: It is not plain; the message names what is not.
    """
    visual: Any = model.visual
    if not isinstance(visual, VisionTransformer):
        raise _refusal(target, f"its image tower is {type(visual).__name__}, not CLIP's ViT")
    reasons = {
        "its image tower pools by attention": visual.attn_pool is not None,
        f"its image tower pools by {visual.pool_type}": visual.pool_type != "tok",
        "its image tower's last LayerNorm follows the pooling": visual.final_ln_after_pool,
        "its image tower has no LayerNorm before its blocks": isinstance(visual.ln_pre, nn.Identity),
        "its image tower has no projection": visual.proj is None,
        "its images are not square": visual.image_size[0] != visual.image_size[1],
    }
    _check(reasons, target)
    sizes = _check_blocks(visual.transformer, "image", target)
    return sizes._replace(image_size=visual.image_size[0], patch_size=visual.patch_size[0])


def check_plain_text(model: nn.Module, target: str) -> PlainTransformer:
    """As `check_plain_vit`, of a text tower: a module of its own or, in open_clip's CLIP, part of the model."""
    text: Any = getattr(model, "text", model)
    if text is not model and not isinstance(text, TextTransformer):
        raise _refusal(target, f"its text tower is {type(text).__name__}, not CLIP's")
    pool = getattr(text, "pool_type", None) or text.text_pool_type
    reasons = {
        f"its text tower pools by {pool}": pool != "argmax",
        "its text tower has no causal mask": text.attn_mask is None,
        "its text tower has class tokens": getattr(text, "cls_emb", None) is not None,
        "its text tower's projection is no matrix": not isinstance(text.text_projection, nn.Parameter),
        "its logits have a bias": getattr(model, "logit_bias", None) is not None,
    }
    _check(reasons, target)
    return _check_blocks(text.transformer, "text", target)


def _check_blocks(transformer: Any, tower: str, target: str) -> PlainTransformer:
    block = transformer.resblocks[0]
    kinds = {type(found).__name__ for found in transformer.resblocks}
    if not all(type(found) is ResidualAttentionBlock for found in transformer.resblocks):
        raise _refusal(target, f"blocks of its {tower} tower are {', '.join(sorted(kinds))}")
    activation = block.mlp.gelu
    reasons = {
        f"its {tower} tower has layer scales": not isinstance(block.ls_1, nn.Identity),
        f"its {tower} tower has LayerNorms of eps {block.ln_1.eps:g}": block.ln_1.eps != 1e-5,
        f"its {tower} tower's activation is {activation}": not isinstance(activation, nn.GELU | QuickGELU)
        or getattr(activation, "approximate", "none") != "none",
        f"its {tower} tower's blocks are tied": vars(transformer.resblocks).get("tying") is not None,
    }
    _check(reasons, target)
    return PlainTransformer(
        width=block.ln_1.normalized_shape[0],
        layers=len(transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.c_fc.out_features,
        quick_gelu=isinstance(activation, QuickGELU),
    )


def _check(reasons: dict[str, bool], target: str) -> None:
    """Raise UserError that names the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise _refusal(target, reason)


def _refusal(target: str, reason: str) -> UserError:
    return UserError(f"--format {target}: {target} has no such model: {reason}; {OTHERS}")
