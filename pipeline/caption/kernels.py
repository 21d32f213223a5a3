"""Triton kernels for CUDA where they work.

Each is tried once per process: on a few random numbers it must give what torch gives, else torch's own kernels are used
and the log says why. A kernel that compiles for a card that nobody tried is not right for that.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from shards_spec.library_errors import short

log = logging.getLogger(__name__)
K = TypeVar("K")
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
SampleIncomplete = Callable[[Tensor, Tensor, float, Tensor, Tensor], None]
LogTotals = Callable[[Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
SMALLEST_WIDTH = 16  # of a head
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of sums of a few hundred numbers


@cache
def attention_kernel(width: int, dtype: torch.dtype, device: torch.device) -> Attend | None:
    """`attention_kernel.attend` for heads of this width; None leaves it to torch."""
    if width < SMALLEST_WIDTH or width & (width - 1):
        return None
    check = partial(check_attention, width=width, dtype=dtype, device=device)
    kernel: Attend | None = _kernel("attention_kernel", "attend", device, check)
    return kernel


@cache
def nucleus_kernel(device: torch.device) -> SampleIncomplete | None:
    """`sampling_kernels.sample_incomplete`; None where the host sees to large nuclei."""
    check = partial(check_nucleus, device=device)
    kernel: SampleIncomplete | None = _kernel("sampling_kernels", "sample_incomplete", device, check)
    return kernel


@cache
def log_totals_kernel(device: torch.device) -> LogTotals | None:
    """`sampling_kernels.log_totals`; None leaves it to torch."""
    check = partial(check_log_totals, device=device)
    kernel: LogTotals | None = _kernel("sampling_kernels", "log_totals", device, check)
    return kernel


@cache
def norm_kernel(device: torch.device) -> AddNorm | None:
    """`norm_kernel.add_norm`; None leaves it to torch."""
    kernel: AddNorm | None = _kernel("norm_kernel", "add_norm", device, partial(check_norm, device=device))
    return kernel


def _kernel(module: str, name: str, device: torch.device, check: Callable[[Any], None]) -> Any:
    """A kernel of a module of this folder that imports Triton, where its check passes on a CUDA device; else None."""
    if device.type != "cuda":
        return None

    def tried() -> Any:
        kernel = getattr(import_module(f"pipeline.caption.{module}"), name)
        check(kernel)
        return kernel

    return _unless_it_fails(tried)


def check_attention(attend: Attend, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ArithmeticError unless ``attend`` gives torch's numbers, with a cache that is part full, and fills it."""
    rows = 3
    heads = 2
    length = 40
    keys, values = (_random(number, (rows, heads, length, width), device).to(dtype) for number in (0, 1))
    for past in (0, 5, length - 1):
        new = _random(2, (rows, 1, 3 * heads * width), device).to(dtype)
        query, key, value = new.view(rows, 1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        found = attend(new, keys, values, past)
        read = slice(0, past + 1)
        expected = F.scaled_dot_product_attention(query, keys[:, :, read], values[:, :, read])
        _check_close(found, expected.transpose(1, 2).flatten(2), "attention")
        for cache_of, newest in ((keys, key), (values, value)):
            _check_close(cache_of[:, :, past : past + 1], newest, "the cache")


def check_norm(add_norm: AddNorm, device: torch.device) -> None:
    """Raise ArithmeticError unless ``add_norm`` gives torch's sum and layer norm, also of a width that is no power."""
    for width in (64, 768):
        x, delta = (_random(number, (5, width), device) for number in (0, 1))
        weight, bias = (_random(number, (width,), device) for number in (2, 3))
        total = x + delta
        expected = F.layer_norm(total, (width,), weight, bias, 1e-5)
        _check_close(add_norm(x, delta, weight, bias, 1e-5), expected, "a layer norm")
        _check_close(x, total, "a sum")


def check_log_totals(log_totals: LogTotals, device: torch.device) -> None:
    """Raise ArithmeticError unless ``log_totals`` gives torch's, of more tokens than it reads at once."""
    logits = 5 * _random(0, (3, 5000), device)
    logits[:, 100] = -torch.inf  # as of a token that must not be written
    _check_close(log_totals(logits), logits.logsumexp(-1), "a sum of exponentials")


def check_nucleus(sample_incomplete: SampleIncomplete, device: torch.device) -> None:
    """Raise ArithmeticError unless ``sample_incomplete`` samples from the nuclei, and only where it is to.

    The nucleus of each row is found here by a sort; in the first row a token has nearly all the probability.
    """
    top_p = 0.7
    scores = 3 * _random(0, (8, 5000), device)
    scores[0, 4321] = 40.0
    seeds = torch.arange(8, device=device)
    chosen = torch.full_like(seeds, -1)
    complete = seeds == 7
    sample_incomplete(scores, seeds, top_p, chosen, complete)
    ordered = scores.double().softmax(-1).sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values  # what more likely tokens have together
    place = (ordered.indices == chosen[:, None]).int().argmax(-1, keepdim=True)
    is_inside = before.gather(1, place)[:, 0] < top_p + 1e-4
    if int(chosen[7]) != -1 or int(chosen[0]) != 4321 or not bool(is_inside[:7].all()):
        raise ArithmeticError("sampling from a nucleus has another result than torch's")


def _random(number: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of a stream of their own: the global one is left as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(device)


def _check_close(found: Tensor, expected: Tensor, name: str) -> None:
    bound = TOLERANCE[found.dtype]
    if not torch.allclose(found, expected, rtol=bound, atol=bound):
        raise ArithmeticError(f"{name} has another result than torch's")


def _unless_it_fails(tried: Callable[[], K]) -> K | None:
    """The kernel, tried; Triton may be missing, and it needs a C compiler and a card that it knows."""
    try:
        return tried()
    except Exception as error:  # of many kinds: of imports, compilers, drivers
        _warn(short(error))
        return None


@cache
def _warn(reason: str) -> None:
    """Once for all kernels."""
    log.warning("Triton does not work here, so captions take longer: %s", reason)
