"""Triton kernels for CUDA where they work: each is tried once, and what is wrong with it is logged."""

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from shards_spec.library_errors import short

log = logging.getLogger(__name__)
K = TypeVar("K")
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
SampleIncomplete = Callable[[Tensor, Tensor, float, Tensor, Tensor], None]
LogTotals = Callable[[Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
SMALLEST_WIDTH = 16  # of a head


@cache
def attention_kernel(width: int, dtype: torch.dtype, device: torch.device) -> Attend | None:
    """`attention_kernel.attend` for heads of this width; None leaves it to torch."""
    if device.type != "cuda" or width < SMALLEST_WIDTH or width & (width - 1):
        return None

    def tried() -> Attend:
        from pipeline.caption.attention_kernel import attend

        keys = torch.zeros(1, 1, 1, width, dtype=dtype, device=device)
        attend(torch.zeros(1, 1, 3 * width, dtype=dtype, device=device), keys, torch.zeros_like(keys), 0)
        return attend

    return _unless_it_fails(tried)


@cache
def nucleus_kernel(device: torch.device) -> SampleIncomplete | None:
    """`sampling_kernels.sample_incomplete`; None where the host sees to large nuclei."""
    if device.type != "cuda":
        return None

    def tried() -> SampleIncomplete:
        from pipeline.caption.sampling_kernels import sample_incomplete

        scores = torch.zeros(1, 64, device=device)
        seeds = torch.zeros(1, dtype=torch.long, device=device)
        sample_incomplete(scores, seeds, 0.9, torch.zeros_like(seeds), torch.zeros_like(seeds, dtype=torch.bool))
        return sample_incomplete

    return _unless_it_fails(tried)


@cache
def log_totals_kernel(device: torch.device) -> LogTotals | None:
    """`sampling_kernels.log_totals`; None leaves it to torch."""
    if device.type != "cuda":
        return None

    def tried() -> LogTotals:
        from pipeline.caption.sampling_kernels import log_totals

        log_totals(torch.zeros(1, 64, device=device))
        return log_totals

    return _unless_it_fails(tried)


@cache
def norm_kernel(device: torch.device) -> AddNorm | None:
    """`norm_kernel.add_norm`; None leaves it to torch."""
    if device.type != "cuda":
        return None

    def tried() -> AddNorm:
        from pipeline.caption.norm_kernel import add_norm

        ones = torch.ones(1, 64, device=device)
        add_norm(ones.clone(), ones, ones[0], ones[0], 1e-5)
        return add_norm

    return _unless_it_fails(tried)


def _unless_it_fails(tried: Callable[[], K]) -> K | None:
    """The kernel, run once; Triton may be missing, and it needs a C compiler and a card that it knows."""
    try:
        return tried()
    except Exception as error:  # of many kinds: of imports, compilers, drivers
        _warn(short(error))
        return None


@cache
def _warn(reason: str) -> None:
    """Once for all kernels."""
    log.warning("Triton does not work here, so captions take longer: %s", reason)
