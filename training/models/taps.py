"""Reading intermediate values of a model while it runs, by forward hooks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.fastvit import Attention
from torch import Tensor, nn

from training.models.siclip import SasStack
from training.models.text_tower import TransformerLayer


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, C/H)."""
    return tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(1, 2)


@torch.no_grad()
def attention_maps(tower: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return the softmax attention of each attention block of a tower, in the order in which the blocks run.

    Works on the image and text towers of MobileCLIP and SiCLIP. For SAS-P blocks these are the attention matrices, not
    the shaped matrices, which are no distributions.

    Args:
        tower: The tower; it is run once on ``inputs``.
        inputs: Pixels (B, 3, S, S) or tokens (B, T), as the tower takes them.

    Returns:
        One (B, H, T, T) tensor in float32 per block, H heads over T tokens.
    """
    maps: list[Tensor] = []

    def keep_attention(heads: int) -> Callable[..., None]:
        def hook(module: nn.Linear, _: object, projected: Tensor) -> None:
            width = module.in_features
            projected = projected.float()
            query = _split_heads(projected[..., :width], heads)
            key = _split_heads(projected[..., width : 2 * width], heads)
            maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))

        return hook

    handles = []
    for module in tower.modules():
        if isinstance(module, Attention):
            handles.append(module.qkv.register_forward_hook(keep_attention(module.num_heads)))
        elif isinstance(module, TransformerLayer):
            handles.append(module.qkv.register_forward_hook(keep_attention(module.heads)))
        elif isinstance(module, SasStack):
            # a shared projection runs once per block of its group, and its hook with it
            handles += [qk.register_forward_hook(keep_attention(module.heads)) for qk in module.qk]
    try:
        tower(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return maps


class Tapped(NamedTuple):
    """What a forward pass with taps gave."""

    output: Any
    """the pass's own result; None where it was stopped early"""
    taps: dict[str, list[Any]]
    """outputs of each tapped module in the order of its calls: a module that several blocks share has several"""


class _EarlyExit(Exception):  # no error: it ends a forward pass
    pass


def run_with_taps(
    module: nn.Module, run: Callable[[Any], Any], taps: Sequence[str], until: str | None = None
) -> Tapped:
    """Run a module and keep what some of its submodules return. Gradients flow through what is kept.

    Args:
        module: The model.
        run: Called with the model; may call any of its methods.
        taps: Names of submodules, as ``named_modules`` has them.
        until: Name of a submodule whose first call ends the pass, so that nothing behind it is computed.

    Raises:
        ValueError: The module has no submodule of such a name.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    unknown = [name for name in (*taps, *filter(None, [until])) if name not in modules]
    if unknown:
        raise ValueError(f"no submodule {unknown[0]!r} to tap")
    kept: dict[str, list[Any]] = {name: [] for name in taps}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: kept[name].append(output)

    def stop(*_: Any) -> None:
        raise _EarlyExit

    handles = [modules[name].register_forward_hook(keep(name)) for name in taps]
    if until is not None:  # after the others, so that a module can be tapped and be the last one
        handles.append(modules[until].register_forward_hook(stop))
    try:
        return Tapped(run(module), kept)
    except _EarlyExit:
        return Tapped(None, kept)
    finally:
        for handle in handles:
            handle.remove()
