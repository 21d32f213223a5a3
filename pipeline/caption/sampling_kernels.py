"""What choosing tokens does over the whole vocabulary, as Triton kernels for CUDA.

Large nuclei: which rows have one is known on the device alone. In a CUDA graph the host cannot decide to sort more for
them; a kernel's programs can, each for its row. Sums of exponentials: in one reading, where torch takes six.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(2048)  # tokens that a program reads at once


@triton.jit
def _in_order(value):  # type: ignore[no-untyped-def]
    """Integers in the order of float32 numbers."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _gumbel_noise(seed, token):  # type: ignore[no-untyped-def]
    """That of `sampling`: SplitMix64's finaliser, as standard Gumbel noise in float64."""
    x = seed + token.to(tl.int64) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = (((x >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def _log_totals(logits, totals, vocabulary):  # type: ignore[no-untyped-def]
    """A program per row; each lane has its own maximum and sum."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        token = first + lane
        value = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
        higher = tl.maximum(greatest, value)
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(greatest - origin) + tl.exp(value - origin)
        greatest = higher
    most = tl.max(greatest, 0)
    tl.store(totals + row, most + tl.log(tl.sum(sums * tl.exp(greatest - most), 0)))


@triton.jit
def _sample(scores, seeds, chosen, complete, vocabulary, top_p):  # type: ignore[no-untyped-def]
    """A program per row: the least score of the nucleus by bisection, then the greatest of score and noise."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(complete + row) == 0:
        mine = scores + row * vocabulary
        lane = tl.arange(0, BLOCK)
        greatest = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            token = first + lane
            greatest = tl.maximum(greatest, tl.load(mine + token, mask=token < vocabulary, other=float("-inf")))
        most = tl.max(greatest, 0)
        masses = tl.zeros([BLOCK], tl.float64)
        for first in range(0, vocabulary, BLOCK):
            token = first + lane
            value = tl.load(mine + token, mask=token < vocabulary, other=float("-inf"))
            masses += tl.exp(value - most).to(tl.float64)
        wanted = tl.sum(masses, 0) * top_p
        low = tl.min(_in_order(greatest), 0) * 0 - 0x80000000
        high = _in_order(most)
        for _ in range(33):  # the range has 2^32 integers
            middle = low + (high - low + 1) // 2
            masses = tl.zeros([BLOCK], tl.float64)
            for first in range(0, vocabulary, BLOCK):
                token = first + lane
                value = tl.load(mine + token, mask=token < vocabulary, other=float("-inf"))
                masses += tl.where(_in_order(value) >= middle, tl.exp(value - most), 0.0).to(tl.float64)
            is_enough = tl.sum(masses, 0) >= wanted
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle - 1)
        seed = tl.load(seeds + row)
        best = tl.full([BLOCK], float("-inf"), tl.float64)
        best_token = tl.zeros([BLOCK], tl.int32)
        for first in range(0, vocabulary, BLOCK):
            token = first + lane
            value = tl.load(mine + token, mask=token < vocabulary, other=float("-inf"))
            noisy = value.to(tl.float64) + _gumbel_noise(seed, token)
            is_better = (_in_order(value) >= low) & (noisy > best)
            best = tl.where(is_better, noisy, best)
            best_token = tl.where(is_better, token, best_token)
        last = tl.max(best, 0)
        tl.store(chosen + row, tl.max(tl.where(best == last, best_token, 0), 0).to(tl.int64))


def log_totals(logits: Tensor) -> Tensor:
    """(R,) logarithms of the sums of exponentials of logits (R, V), float32 and contiguous."""
    totals = logits.new_empty(len(logits))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _log_totals[(len(logits),)](logits, totals, logits.shape[1], num_warps=8)
    return totals


def sample_incomplete(scores: Tensor, seeds: Tensor, top_p: float, chosen: Tensor, complete: Tensor) -> None:
    """Write tokens to ``chosen`` (R,) for the rows of scores (R, V) float32 that are not ``complete`` (R,) bool.

    As `sampling.sample_among` with all tokens, for ``seeds`` (R,); masses are sums of float32 exponentials.
    """
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _sample[(len(scores),)](scores, seeds, chosen, complete, scores.shape[1], top_p, num_warps=8)
