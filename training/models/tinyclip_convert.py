"""From open_clip's CLIPs to those of `tinyclip_pruned`, and their sizes as a state dict tells them."""

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from shards_spec.files import UserError
from training.models.tinyclip_pruned import PREPROCESSING, TOWER, PrunedImageTower, PrunedTextTower

State = dict[str, Tensor]  # a state dict
Config = dict[str, Any]  # open_clip's model config
TEXT_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
POOLER = "visual.attn_pool.attn."
TOP_LEVEL = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
TOKENIZER = ("tokenizer_kwargs", "tokenizer_mode", "hf_tokenizer_name")


def is_pruned(model: nn.Module) -> bool:
    """Return whether a model has the towers of `tinyclip_pruned`."""
    towers = (getattr(model, "visual", None), getattr(model, "text", None))
    return isinstance(towers[0], PrunedImageTower) and isinstance(towers[1], PrunedTextTower)


def build_pruned(config: Config, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the model of a config with copies of the tensors of ``state``, on their device, in training mode.

    No random numbers are drawn, so that a model may be made in the middle of a training.

    Raises:
        RuntimeError: The tensors do not fit.
    """
    options = {name: value for name, value in config.items() if name != "custom_text"}
    with torch.device("meta"):
        model: nn.Module = open_clip.model.CustomTextCLIP(**options)
    model.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    return model


def from_open_clip(model: nn.Module, config: Config) -> tuple[nn.Module, Config]:
    """Return a CLIP of open_clip's as one whose layers can be pruned, with copies of its weights, and its config.

    Args:
        model: With a ViT and open_clip's own text transformer.
        config: The model's config.

    Raises:
        UserError: It has another tower, or one with parts that masks do not know; the message names them.
    """
    if is_pruned(model):
        return build_pruned(config, model.state_dict()).train(model.training), config
    check_supported(model, config)
    visual: Any = model.visual
    text: Any = getattr(model, "text", model)
    text_config = config.get("text_cfg") or {}
    block = text.transformer.resblocks[0]
    pruned: Config = {
        "embed_dim": config["embed_dim"],
        "custom_text": True,
        "quick_gelu": isinstance(block.mlp.gelu, QuickGELU),
        **{name: config[name] for name in TOP_LEVEL if name in config},
    }
    pruned["vision_cfg"] = {
        "tower": TOWER,
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        **_block_sizes(visual.transformer, config.get("vision_cfg") or {}),
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
    }
    if visual.attn_pool is not None:
        pooler = visual.attn_pool
        sizes = {"heads": pooler.attn.num_heads, "queries": len(pooler.query), "norm_eps": pooler.ln_k.eps}
        pruned["vision_cfg"]["attn_pool"] = sizes
    pruned["text_cfg"] = {
        "tower": TOWER,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        **_block_sizes(text.transformer, text_config),
        "no_causal_mask": text.attn_mask is None,
        "pool_type": getattr(text, "text_pool_type", None) or text.pool_type,
        "eos_id": text_config.get("eos_id", 2),
        **{name: text_config[name] for name in TOKENIZER if name in text_config},
    }
    copy = build_pruned(pruned, _unpacked(with_text_prefix(model.state_dict()))).train(model.training)
    for name in PREPROCESSING:
        if hasattr(visual, name):
            setattr(copy.visual, name, getattr(visual, name))
    return copy, pruned


def with_text_prefix(state: Mapping[str, Tensor]) -> State:
    """Return a state dict in which the text tower's names begin with ``text.``, as in open_clip's CustomTextCLIP."""
    return {f"text.{name}" if name.startswith(TEXT_PARTS) else name: value for name, value in state.items()}


def _unpacked(state: State) -> State:
    """The matrices of an attentional pooling one by one; torch packs them where tokens and features are as wide."""
    packed = f"{POOLER}in_proj_weight"
    if packed not in state:
        return state
    matrices = zip("qkv", state[packed].chunk(3), strict=True)
    unpacked = {f"{POOLER}{name}_proj_weight": matrix for name, matrix in matrices}
    return {name: value for name, value in state.items() if name != packed} | unpacked


def _block_sizes(transformer: Any, config: Config) -> Config:
    """The part of a tower's description that its blocks give."""
    block = transformer.resblocks[0]
    layers = len(transformer.resblocks)
    heads, neurons = block.attn.num_heads, block.mlp.c_fc.out_features
    return {
        "width": transformer.width,
        "heads": [heads] * layers,
        "neurons": [neurons] * layers,
        "head_width": transformer.width // heads,
        "norm_eps": block.ln_1.eps,
        "act_kwargs": config.get("act_kwargs"),
        "original": {"width": transformer.width, "heads": heads, "neurons": neurons},
        "masks": False,
    }


def check_supported(model: nn.Module, config: Config) -> None:
    """Raise UserError for a model whose towers cannot have masks, and say which part is the reason."""
    visual: Any = getattr(model, "visual", None)
    text: Any = getattr(model, "text", model)
    if not isinstance(visual, VisionTransformer):
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise UserError(f"masks need a ViT of open_clip's as image tower, not {kind}: {_ADVICE}")
    if model is not text and not isinstance(text, TextTransformer):
        raise UserError(f"masks need open_clip's own text transformer, not {type(text).__name__}: {_ADVICE}")
    if type(model) not in (open_clip.model.CLIP, open_clip.model.CustomTextCLIP):
        raise UserError(f"masks need a CLIP of two towers, not {type(model).__name__}: {_ADVICE}")
    reasons = {
        "two attentional poolings": visual.attn_pool is not None and visual.attn_pool_contrastive is not None,
        "a dropout of patches": not isinstance(visual.patch_dropout, nn.Identity),
        "images that are not square": visual.image_size[0] != visual.image_size[1],
        "patches that are not square": visual.patch_size[0] != visual.patch_size[1],
        "output_tokens": bool(visual.output_tokens) or bool(getattr(text, "output_tokens", False)),
        "fixed positions": (config.get("vision_cfg") or {}).get("pos_embed_type", "learnable") != "learnable",
        "an image tower without one feature": visual.pool_type not in ("tok", "avg") or visual.proj is None,
        "a class token in the text": getattr(text, "cls_emb", None) is not None,
        "a mask of padding": bool(getattr(text, "use_pad_mask", False)),
        "a text tower without a plain projection": not isinstance(text.text_projection, nn.Parameter),
    }
    transformers: dict[str, Any] = {"image": visual.transformer, "text": text.transformer}
    for tower, transformer in transformers.items():
        for block in transformer.resblocks:
            is_plain = type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity)
            reasons[f"{type(block).__name__} with other parts in its {tower} tower"] = not is_plain
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"masks do not support a model with {reason}: {_ADVICE}")


_ADVICE = "inherit by hand (--inherit manual), or take a ViT as ViT-B-32"


def sizes_of(state: Mapping[str, Tensor], prefix: str, layers: int, head_width: int) -> tuple[list[int], list[int]]:
    """Return the heads and the neurons of each layer of a tower, 0 where a layer has none.

    Args:
        state: A state dict.
        prefix: What stands before ``transformer`` in the names of the tower.
        layers: How many there are.
        head_width: Of one head.
    """
    heads, neurons = list[int](), list[int]()
    for layer in range(layers):
        block = f"{prefix}transformer.resblocks.{layer}."
        packed = state.get(block + "attn.in_proj_weight")
        hidden = state.get(block + "mlp.c_fc.weight")
        heads.append(0 if packed is None else len(packed) // (3 * head_width))
        neurons.append(0 if hidden is None else len(hidden))
    return heads, neurons


def resize(config: Config, state: Mapping[str, Tensor]) -> Config:
    """Return a config with the sizes of a state dict: widths, heads, neurons, and whether there are masks.

    Args:
        config: Of a model of `tinyclip_pruned`, which says how many layers there are and how wide a head is.
        state: A state dict with its names.
    """
    resized = dict(config)
    towers = (("vision_cfg", "visual.", "visual.class_embedding"), ("text_cfg", "text.", "text.ln_final.weight"))
    for part, prefix, vector in towers:
        tower = config[part]
        heads, neurons = sizes_of(state, prefix, len(tower["heads"]), tower["head_width"])
        masks = f"{prefix}masks.dims" in state
        resized[part] = tower | {"width": len(state[vector]), "heads": heads, "neurons": neurons, "masks": masks}
    return resized
