"""Small CLIPs whose weights, biases and norms are all random, and masks that keep what a test asks for."""

from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from training.models.tinyclip_convert import Config, from_open_clip
from training.models.tinyclip_masks import EVAL_SLOPE
from training.models.tinyclip_pruning import attach_masks, masks_of

VISION = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 8, "layers": 3}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 4, "layers": 3}
OFF = -30.0  # a log-alpha that keeps a unit out for sure


def plain_clip(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, Config]:
    """A CLIP of open_clip's, or with custom_text=True a CustomTextCLIP, and its config."""
    config = {"embed_dim": 16, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **options}
    kinds = {True: open_clip.model.CustomTextCLIP, False: open_clip.model.CLIP}
    torch.manual_seed(0)
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    model = kinds[options.get("custom_text", False)](**arguments)
    shake(model)
    return model.eval(), config


def shake(model: nn.Module) -> None:
    """Give biases, norms and all else values that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit_"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / max(1, parameter.ndim)


def pruned_clip(**options: Any) -> tuple[nn.Module, Config]:
    """`plain_clip` as a model of `tinyclip_pruned`, without masks."""
    return from_open_clip(*plain_clip(**options))


def masked_clip(seed: int = 0, **options: Any) -> tuple[nn.Module, Config]:
    """`pruned_clip` with random soft masks: about a third of the units are out, the others between 0.3 and 1.

    Layer 1 of each tower has lost all heads, layer 2 all neurons.
    """
    model, config = pruned_clip(**options)
    attach_masks(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for masks in masks_of(model):
            for units in masks.parameters():
                soft = 4 * torch.rand(units.shape, generator=generator) + 2.5
                units.copy_(torch.where(torch.rand(units.shape, generator=generator) < 0.35, OFF, soft))
            masks.dims[:2] = 5.0  # of neighbours
            masks.heads.view(3, -1)[:, 0] = 5.0
            masks.heads.view(3, -1)[1] = OFF
            masks.neurons.view(3, -1)[2] = OFF
    return model.eval(), config


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels and tokens; the highest id is at another place in each text."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 48, (count, 12), generator=generator)
    for row in range(count):
        tokens[row, 4 + row % 8] = 49
        tokens[row, 5 + row % 8 :] = 0
    return pixels, tokens


def features(model: Any) -> tuple[Tensor, Tensor]:
    """Both towers' features of `inputs`, not normalised."""
    pixels, tokens = inputs()
    return model.encode_image(pixels), model.encode_text(tokens)


def largest_difference(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """The largest absolute difference of two tuples of tensors."""
    return max(float((mine - theirs).detach().abs().max()) for mine, theirs in zip(one, other, strict=True))


def eval_value(log_alpha: float) -> float:
    """The value of a kept unit in evaluation."""
    return float(torch.sigmoid(torch.tensor(EVAL_SLOPE * log_alpha)))
