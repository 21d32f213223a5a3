"""Reading intermediate values of a model while it runs, by forward hooks."""

from collections.abc import Callable

import torch
from timm.models.fastvit import Attention
from torch import Tensor, nn

from training.models.siclip import SasStack
from training.models.text_tower import TransformerLayer


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
            query, key, *_ = projected.float().unflatten(-1, (-1, module.in_features)).unbind(-2)
            query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
            key = key.unflatten(-1, (heads, -1)).transpose(1, 2)
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
