"""open_clip's self-attention by torch's fused kernel, for CUDA devices.

open_clip hands nn.MultiheadAttention the causal mask as floats. With it torch takes neither its fast path nor the
kernel that knows causality; it adds the bias in a pass of its own, and copies queries, keys and values to another
layout. Tried with open_clip 3.3; a block that is built otherwise stays as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse_attention(model: nn.Module) -> int:
    """Change the blocks of an open_clip model that is not trained; returns how many were changed now."""
    from open_clip.transformer import ResidualAttentionBlock

    masks = [getattr(module, "attn_mask", None) for module in model.modules()]
    causal = [mask for mask in masks if isinstance(mask, Tensor) and _is_causal(mask)]
    changed = 0
    for block in model.modules():
        if type(block) is ResidualAttentionBlock and _is_plain(block.attn) and "attention" not in vars(block):
            setattr(block, "attention", FusedAttention(block, causal))  # noqa: B010  # a method, to mypy
            changed += 1
    return changed


def _is_causal(mask: Tensor) -> bool:
    """Whether it is the square mask that hides what comes later, as numbers to add."""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))


def _is_plain(attention: Any) -> bool:
    """Whether queries, keys and values of one width come from one product with a bias, and nothing is added to them."""
    return (
        attention.batch_first
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


class FusedAttention:
    """ResidualAttentionBlock.attention of ``block``; what has other keys, or a mask not in ``causal``, its own does."""

    def __init__(self, block: Any, causal: list[Tensor]) -> None:
        self.attn = block.attn
        self.own = block.attention
        self.causal = causal

    def __call__(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Any:
        """(N, L, D) to (N, L, D)."""
        is_causal = any(attn_mask is mask for mask in self.causal)
        if k_x is not None or v_x is not None or (attn_mask is not None and not is_causal):
            return self.own(q_x=q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        rows, length, width = q_x.shape
        projected = F.linear(q_x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        query, key, value = projected.view(rows, length, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        joined = attended.transpose(1, 2).reshape(rows, length, width)
        return F.linear(joined, self.attn.out_proj.weight, self.attn.out_proj.bias)
