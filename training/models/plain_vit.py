"""What makes a tower of open_clip a plain CLIP's, the only one that timm and transformers have; timm's form of it."""

from typing import Any, NamedTuple

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

CLIP_VITS = {  # sizes of timm's CLIPs: patch, width, layers, heads
    "vit_base_patch32_clip": (32, 768, 12, 12),
    "vit_base_patch16_clip": (16, 768, 12, 12),
    "vit_large_patch14_clip": (14, 1024, 24, 16),
}


class NotPlain(Exception):
    """A tower has a part that a plain CLIP's has not; the message names it."""


class PlainTransformer(NamedTuple):
    """Sizes of a plain tower; ``image_size`` and ``patch_size`` are 0 for texts."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    quick_gelu: bool
    image_size: int = 0
    patch_size: int = 0


def plain_vit_sizes(visual: Any) -> PlainTransformer:
    """Return the sizes of an image tower that is CLIP's ViT. Raises NotPlain."""
    if not isinstance(visual, VisionTransformer):
        raise NotPlain(f"its image tower is {type(visual).__name__}, not CLIP's ViT")
    reasons = {
        "its image tower pools by attention": visual.attn_pool is not None,
        f"its image tower pools by {visual.pool_type}": visual.pool_type != "tok",
        "its image tower's last LayerNorm follows the pooling": visual.final_ln_after_pool,
        "its image tower has no LayerNorm before its blocks": isinstance(visual.ln_pre, nn.Identity),
        "its image tower has no projection": visual.proj is None,
        "its images are not square": visual.image_size[0] != visual.image_size[1],
    }
    _check(reasons)
    sizes = _block_sizes(visual.transformer, "image")
    return sizes._replace(image_size=visual.image_size[0], patch_size=visual.patch_size[0])


def plain_text_sizes(model: nn.Module) -> PlainTransformer:
    """As `plain_vit_sizes`, of a text tower: a module of its own or, in open_clip's CLIP, part of the model."""
    text: Any = getattr(model, "text", model)
    if text is not model and not isinstance(text, TextTransformer):
        raise NotPlain(f"its text tower is {type(text).__name__}, not CLIP's")
    pool = getattr(text, "pool_type", None) or text.text_pool_type
    reasons = {
        f"its text tower pools by {pool}": pool != "argmax",
        "its text tower has no causal mask": text.attn_mask is None,
        "its text tower has class tokens": getattr(text, "cls_emb", None) is not None,
        "its text tower's projection is no matrix": not isinstance(text.text_projection, nn.Parameter),
        "its logits have a bias": getattr(model, "logit_bias", None) is not None,
    }
    _check(reasons)
    return _block_sizes(text.transformer, "text")


def _block_sizes(transformer: Any, tower: str) -> PlainTransformer:
    block = transformer.resblocks[0]
    kinds = {type(found).__name__ for found in transformer.resblocks}
    if not all(type(found) is ResidualAttentionBlock for found in transformer.resblocks):
        raise NotPlain(f"blocks of its {tower} tower are {', '.join(sorted(kinds))}")
    activation = block.mlp.gelu
    reasons = {
        f"its {tower} tower has layer scales": not isinstance(block.ls_1, nn.Identity),
        f"its {tower} tower has LayerNorms of eps {block.ln_1.eps:g}": block.ln_1.eps != 1e-5,
        f"its {tower} tower's activation is {activation}": not isinstance(activation, nn.GELU | QuickGELU)
        or getattr(activation, "approximate", "none") != "none",
        f"its {tower} tower's blocks are tied": vars(transformer.resblocks).get("tying") is not None,
    }
    _check(reasons)
    return PlainTransformer(
        width=block.ln_1.normalized_shape[0],
        layers=len(transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.c_fc.out_features,
        quick_gelu=isinstance(activation, QuickGELU),
    )


def _check(reasons: dict[str, bool]) -> None:
    """Raise NotPlain with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise NotPlain(reason)


def timm_clip_vit(visual: Any) -> tuple[Any, dict[str, Any]]:
    """Return timm's ViT with the weights of open_clip's, and the options it is built with.

    Its classifier is the projection. Raises NotPlain for a tower that timm does not have.
    """
    import timm

    vit = plain_vit_sizes(visual)
    sizes = (vit.patch_size, vit.width, vit.layers, vit.heads)
    stem = next((name for name, found in CLIP_VITS.items() if found == sizes), None)
    name = f"{stem or 'vit_base_patch16_clip'}{'_quickgelu' if vit.quick_gelu else ''}_224"
    options: dict[str, Any] = {} if vit.image_size == 224 else {"img_size": vit.image_size}
    if stem is None:
        options |= {"patch_size": vit.patch_size, "embed_dim": vit.width, "depth": vit.layers, "num_heads": vit.heads}
    if vit.mlp_width != 4 * vit.width:
        options["mlp_ratio"] = vit.mlp_width / vit.width
    trunk = timm.create_model(name, num_classes=visual.output_dim, **options)
    trunk.load_state_dict(_clip_weights(visual))
    return trunk, options


def _clip_weights(visual: Any) -> dict[str, Tensor]:
    """The state dict of timm's ViT from open_clip's."""
    state = visual.state_dict()
    converted = {
        "cls_token": state["class_embedding"][None, None],
        "pos_embed": state["positional_embedding"][None],
        "patch_embed.proj.weight": state["conv1.weight"],
        "head.weight": state["proj"].mT,
        "head.bias": torch.zeros(state["proj"].shape[1]),
    }
    for ours, theirs in (("ln_pre", "norm_pre"), ("ln_post", "norm")):
        converted |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
    names = {"ln_1.": "norm1.", "attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.", "ln_2.": "norm2."}
    names |= {"mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}
    for layer in range(len(visual.transformer.resblocks)):
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                converted[f"blocks.{layer}.{theirs}{part}"] = state[f"transformer.resblocks.{layer}.{ours}{part}"]
    return converted
