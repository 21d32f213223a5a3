"""A residual sum and the layer norm that follows it, as one Triton kernel for CUDA: a token has seventy such pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, delta, weight, bias, normed, width, eps, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program per row."""
    first = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, block)
    inside = lane < width
    total = tl.load(x + first + lane, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(delta + first + lane, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + first + lane, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    result = centred * scale * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + first + lane, result.to(normed.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add ``delta`` to x (.., C), in place, and return the layer norm of the sum; all are contiguous, of one type."""
    width = x.shape[-1]
    normed = torch.empty_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _add_norm[(x.numel() // width,)](
            x, delta, weight, bias, normed, width, eps, block=triton.next_power_of_2(width), num_warps=4
        )
    return normed
