"""TinyCLIP's released students whose sizes were learned (arXiv 2309.12314): importing this makes their names known.

How many dimensions, heads and neurons they have is nowhere published; a checkpoint's tensors tell it. So a name stands
for the whole OpenCLIP ViT-B/32 that they were cut from, and takes the sizes of the checkpoint that is loaded. The
authors read such a file by putting it back into the whole model with masks and cutting it again; the result is the same
(`tinyclip_pruning.to_full_size` is the first half of that).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.open_clip_plugins import ModelPlugin, register_models
from training.losses.sparsity import TowerSize
from training.models.tinyclip import from_released
from training.models.tinyclip_convert import Config, State, build_pruned, is_pruned, resize, with_text_prefix
from training.models.tinyclip_pruned import TOWER
from training.models.tinyclip_pruning import reshape_like

CONFIGS = Path(__file__).parent / "configs" / "tinyclip_auto"
NORM_EPS = 1e-5
VIT_B = (TowerSize(768, 12, 3072, 12), TowerSize(512, 8, 2048, 12))  # OpenCLIP's ViT-B/32: image and text tower


def from_learned_sizes(
    state: Mapping[str, Tensor],
    *,
    original: tuple[TowerSize, TowerSize] = VIT_B,
    quick_gelu: bool = False,
) -> tuple[nn.Module, Config]:
    """Return the model of a released checkpoint with learned sizes, and its config, read from its tensors' shapes.

    Args:
        state: A state dict with the authors' names or open_clip's, those of the text tower with or without ``text.``.
        original: Image and text tower before pruning.
        quick_gelu: Whether it was trained with QuickGELU; the released models were not.

    Raises:
        UserError: A tensor is missing or has a shape that does not fit the others.
    """
    try:
        named = from_released(dict(state)) or state
        weights = {name: value.float() for name, value in with_text_prefix(named).items() if value.is_floating_point()}
        config = _read_config(weights, original, quick_gelu)
        _complete(weights, config)
        return build_pruned(config, weights).eval(), config
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"this is no checkpoint of a pruned CLIP: {str(error).splitlines()[-1].strip()}") from error


def _read_config(weights: State, original: tuple[TowerSize, TowerSize], quick_gelu: bool) -> Config:
    """The config of tensors with open_clip's names."""
    kernel = weights["visual.conv1.weight"]
    grid = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    vision = {
        "tower": TOWER,
        "image_size": grid * kernel.shape[-1],
        "patch_size": kernel.shape[-1],
        **_common(weights, "visual.", original[0]),
        "no_ln_pre": "visual.ln_pre.weight" not in weights,
        "pool_type": "tok",
        "final_ln_after_pool": False,
    }
    text = {
        "tower": TOWER,
        "context_length": len(weights["text.positional_embedding"]),
        "vocab_size": len(weights["text.token_embedding.weight"]),
        **_common(weights, "text.", original[1]),
        "no_causal_mask": False,
        "pool_type": "argmax",
        "eos_id": 2,
    }
    config = {
        "embed_dim": weights["visual.proj"].shape[1],
        "custom_text": True,
        "quick_gelu": quick_gelu,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    return resize(config, weights)


def _common(weights: State, prefix: str, original: TowerSize) -> Config:
    """The part of both towers' descriptions that is alike; the sizes are those before pruning."""
    numbers = [re.match(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.", name) for name in weights]
    layers = max(int(number[1]) for number in numbers if number is not None) + 1
    return {
        "width": original.width,
        "heads": [original.heads] * layers,
        "neurons": [original.neurons] * layers,
        "head_width": original.width // original.heads,
        "norm_eps": NORM_EPS,
        "act_kwargs": None,
        "original": {"width": original.width, "heads": original.heads, "neurons": original.neurons},
        "masks": False,
    }


def _complete(weights: State, config: Config) -> None:
    """Give layers that lost all heads or neurons the constant that remains, and drop the norms before them.

    The released code drops the whole attention, also its constant, and keeps matrices of size 0 of an MLP.
    """
    for part, prefix in (("vision_cfg", "visual."), ("text_cfg", "text.")):
        zeros = weights[f"{prefix}positional_embedding"].new_zeros(config[part]["width"])
        for layer, (heads, neurons) in enumerate(zip(config[part]["heads"], config[part]["neurons"], strict=True)):
            block = f"{prefix}transformer.resblocks.{layer}."
            if not heads:
                _keep_constant(weights, block, "attn.", "attn.out_proj.bias", zeros)
            if not neurons:
                _keep_constant(weights, block, "mlp.", "mlp.c_proj.bias", zeros)


def _keep_constant(weights: State, block: str, module: str, bias: str, zeros: Tensor) -> None:
    """Drop a module of a block and the norm before it, but for one bias."""
    constant = weights.get(block + bias, zeros)
    norm = "ln_1." if module == "attn." else "ln_2."
    for name in [name for name in weights if name.startswith((block + module, block + norm))]:
        del weights[name]
    weights[block + bias] = constant


def _convert_state_dict(model: nn.Module, state: State) -> State | None:
    """Give a model the sizes of a released checkpoint; None when the file is another's, so that others may know it."""
    named = from_released(state) if is_pruned(model) else None
    if named is None:
        return None
    weights = with_text_prefix(named)
    config: Config = {
        "vision_cfg": model.visual.description,  # type: ignore[union-attr]
        "text_cfg": model.text.description,  # type: ignore[union-attr]
    }
    _complete(weights, resize(config, weights))
    reshape_like(model, config, weights)
    return weights


register_models(ModelPlugin(configs=CONFIGS, convert_state_dict=_convert_state_dict))
