"""Processes: this one's rank, start and end, and the few collectives there are, which cost one process nothing.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (submitit can export the same); without them
there is one process. Small things (flags, sizes, random states) go over gloo, features and gradients over nccl on CUDA.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shards_spec.files import DataError, UserError
from shards_spec.models import pick_device
from training.losses.similarity import ALL_ROWS, RowShare, upcast

TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 evaluates; a process that dies is noticed at once
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; every method that communicates is called by all of them, or by none."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the main one, which writes the run folder."""
        return self.rank == 0

    def row_share(self) -> RowShare:
        """Return which rows of the similarities of a gathered batch this process computes."""
        return ALL_ROWS if self.size == 1 else RowShare(self.rank, self.size, sum_over_ranks)

    def sizes(self, own: int) -> list[int]:
        """Return ``own`` of every rank."""
        if self.size == 1:
            return [own]
        everyone = torch.zeros(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(everyone, torch.tensor([own]))
        return everyone.tolist()

    def all_max(self, *values: int) -> list[int]:
        """Return the largest over the ranks of each value: a flag that one rank sets is set for all."""
        if self.size == 1:
            return list(values)
        flags = torch.tensor(values)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.tolist()

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_to_main(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        box: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, box)
        return box or []

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Within, an error on any rank ends all of them after the block.

        The rank that failed raises its error, the others raise SystemExit, so that one message is printed.
        """
        if self.size == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if self.all_max(failed is not None)[0]:
            raise failed or SystemExit(1)


@contextmanager
def processes(device: str) -> Iterator[tuple[Ranks, str]]:
    """Give this process's rank among torchrun's and its device; within, the process group exists.

    Raises UserError for a device that is not there.
    """
    ranks = _from_environment()
    device = pick_device(device)
    if ranks.size == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # streams, pinned memory and compiled kernels take the current one
        yield ranks, device
        return
    if device.startswith("cuda"):
        if device != "cuda":
            raise UserError(f"--device {device!r}: each of {ranks.size} processes takes its own; use --device cuda")
        device = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=TIMEOUT)
    log = logging.getLogger("training")
    before = log.level
    if not ranks.is_main:
        log.setLevel(logging.WARNING)
    try:
        yield ranks, device
    except (UserError, DataError, SystemExit):  # raised on all ranks, see `raise_on_all`
        dist.destroy_process_group()
        raise
    else:  # after any other error this process ends, and its closed sockets tell the others
        dist.destroy_process_group()
    finally:
        log.setLevel(before)


def _from_environment() -> Ranks:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in names))


def gather(features: dict[str, Tensor], ranks: Ranks, sizes: list[int]) -> dict[str, Tensor]:
    """Return the features of all ranks, in rank order, by one collective.

    A rank's own rows get the sum of the gradients that all ranks have at them. What a rank has, at features and at
    what the loss uses beside them (a logit scale), is to be right in the mean over the ranks. It is so for a loss that
    all ranks compute whole, and for parts that `sum_over_ranks` adds up, whose gradient is multiplied by the number of
    ranks W. The sum then is W times the gradient, and DDP's mean over the ranks, each of which goes on with its own
    rows alone, is the sum over all rows.

    Args:
        features: Tensors (n, ...) of this rank.
        ranks: The processes.
        sizes: n of each rank.

    Returns:
        Tensors (sum of ``sizes``, ...).
    """
    if ranks.size == 1:
        return features
    own = sizes[ranks.rank]
    parts = [value.detach().reshape(own, -1).contiguous().view(torch.uint8) for value in features.values()]
    packed = F.pad(torch.cat(parts, dim=1), (0, 0, 0, max(sizes) - own))
    everyone = packed.new_empty(ranks.size * len(packed), packed.shape[1])
    dist.all_gather_into_tensor(everyone, packed)
    padded = torch.split(everyone, len(packed))
    joined = torch.cat([rows[:count] for rows, count in zip(padded, sizes, strict=True)])
    columns = torch.split(joined, [part.shape[1] for part in parts], dim=1)
    gathered = {}
    for (name, value), column in zip(features.items(), columns, strict=True):
        whole = column.contiguous().view(value.dtype).reshape(-1, *value.shape[1:])
        gathered[name] = _Gathered.apply(value, whole, sizes) if value.requires_grad else whole
    return gathered


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, as they were gathered; the gradient of a rank's own is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        ctx.shape = own.shape
        ctx.dtype = own.dtype
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        most = max(ctx.sizes)  # every rank's part has one size on its way
        by_rank = torch.split(upcast(gradients[0]).reshape(sum(ctx.sizes), -1), ctx.sizes)
        padded = torch.cat([F.pad(part, (0, 0, 0, most - len(part))) for part in by_rank])
        total = padded.new_empty(most, padded.shape[1])
        dist.reduce_scatter_tensor(total, padded)
        return total[: ctx.shape[0]].reshape(ctx.shape).to(ctx.dtype), None, None


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return a tensor summed over the ranks, with the sum of the ranks' gradients at it as its gradient."""
    total: Tensor = SumOverRanks.apply(tensor)
    return total


class SumOverRanks(torch.autograd.Function):
    """A tensor summed over the ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
