"""Batch normalisation among processes and chunks: statistics over all ranks, and updated once.

A BatchNorm counts as frozen when it is in eval mode or none of its parameters is trained; those are never touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.engine.distributed import SumOverRanks


class CpuSyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm for the CPU, where torch's own refuses: mean and variance over the samples of all ranks."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, C, ...); n may differ between ranks."""
        if not self.training:
            output: Tensor = super().forward(input)
            return output
        assert self.momentum is not None  # a cumulative average: no model here has one
        values = input if input.dtype == torch.float64 else input.float()
        dims, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        count = SumOverRanks.apply(values.new_tensor(values.numel() / values.shape[1]))
        mean = SumOverRanks.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(dims)) / count
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        normalised: Tensor = normal.to(input.dtype)
        return normalised


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """timm's norm with activation."""

    act: nn.Module
    drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, then apply dropout and activation."""
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


def synchronise(module: nn.Module, device: str) -> int:
    """Make the trained BatchNorms of a module take their statistics over all ranks; return how many were changed.

    The instance stays, only its class changes, so that names, shared modules and references to them do.
    """
    plain, act = (CpuSyncBatchNorm, CpuSyncBatchNormAct) if device == "cpu" else (nn.SyncBatchNorm, SyncBatchNormAct)
    changed = 0
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, plain) and not frozen(norm):
            norm.__class__ = act if isinstance(norm, BatchNormAct2d) else plain
            norm.process_group = None  # type: ignore[assignment]  # all ranks
            changed += 1
    return changed


def frozen(norm: _BatchNorm) -> bool:
    """Return whether a norm is held in eval mode, or has parameters and none of them is trained."""
    parameters = list(norm.parameters())
    return not norm.training or (bool(parameters) and not any(parameter.requires_grad for parameter in parameters))


def moving(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms whose running statistics a forward pass moves."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


def statistics(module: nn.Module) -> list[Tensor]:
    """Return the running statistics that a forward pass moves, the buffers themselves."""
    return list(chain.from_iterable(norm.buffers() for norm in moving(module)))


class SavedStatistics:
    """The running statistics that a forward pass moves, and a copy of them that can be put back.

    A device copies all of one type by one call; there are hundreds in a convolutional tower, in every step.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = statistics(module)
        by_type = {buffer.dtype: [other for other in buffers if other.dtype == buffer.dtype] for buffer in buffers}
        self._live = list(by_type.values())
        self._saved = [[buffer.clone() for buffer in live] for live in self._live]

    @torch.no_grad()
    def save(self) -> None:
        """Copy them as they are now."""
        for saved, live in zip(self._saved, self._live, strict=True):
            torch._foreach_copy_(saved, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was saved last."""
        for saved, live in zip(self._saved, self._live, strict=True):
            torch._foreach_copy_(live, saved)


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Within, forward passes normalise as usual and leave the running statistics as they are.

    By a momentum of 0 and not without buffers: a recomputed activation must save the same tensors as the first time.
    """
    norms = moving(module)
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    counters = [counter for _, counter in kept if counter is not None]
    copies = iter(torch._foreach_add(counters, 0) if counters else [])  # one call for all
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else next(copies)
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
