"""Self-attention of one new token per caption, as a Triton kernel for CUDA.

torch's attention kernels work on tiles of 64 queries, of which a caption being written has one. This kernel reads a
row's keys and values once and does nothing else; it also puts the new key and value into the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(32)  # tokens that are read at once


@triton.jit(do_not_specialize=["past", "length"])  # type: ignore[untyped-decorator]
def _attend(new, keys, values, attended, past, length, scale, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program per row and head; ``past`` tokens are in the cache, the new one comes behind them."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    lane = tl.arange(0, width)
    mine = new + (3 * row * heads + head) * width + lane
    query = tl.load(mine).to(tl.float32) * scale
    key = tl.load(mine + heads * width)
    value = tl.load(mine + 2 * heads * width)
    cache = (row * heads + head) * length * width
    tl.store(keys + cache + past * width + lane, key)
    tl.store(values + cache + past * width + lane, value)
    greatest = tl.sum(query * key.to(tl.float32), 0)  # of the scores so far: softmax's numbers are relative to it
    total = tl.exp(greatest - greatest)
    result = value.to(tl.float32)
    for first in range(0, past, BLOCK):
        token = first + tl.arange(0, BLOCK)
        places = cache + token[:, None] * width + lane[None, :]
        there = token[:, None] < past
        old_keys = tl.load(keys + places, mask=there, other=0.0).to(tl.float32)
        old_values = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(token < past, tl.sum(query[None, :] * old_keys, 1), float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 0))
        shrunk = tl.exp(greatest - higher)
        weights = tl.exp(scores - higher)
        total = total * shrunk + tl.sum(weights, 0)
        result = result * shrunk + tl.sum(weights[:, None] * old_values, 0)
        greatest = higher
    tl.store(attended + (row * heads + head) * width + lane, (result / total).to(attended.dtype.element_ty))


def attend(new: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """The heads' values (R, 1, H·D) side by side of the tokens ``new`` (R, 1, 3·H·D): query, key, value.

    ``keys`` and ``values`` (R, H, T_max, D), contiguous, hold ``past`` tokens, and then the new one. D is a power of 2.
    """
    rows, heads, length, width = keys.shape
    attended = new.new_empty(rows, 1, heads * width)
    with torch.cuda.device_of(new):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _attend[(rows, heads)](new, keys, values, attended, past, length, width**-0.5, width=width, num_warps=2)
    return attended
