"""Similarities of all pairs of a batch, whole or in blocks of rows, by one process or by several.

Losses are computed in float32 (float64 where the features are), whatever the autocast. Each of several processes
computes its `RowShare`: N / W rows against all N columns, of both directions. A process's matrix of more numbers than
`MAX_WHOLE` squared is never whole: it is computed `BLOCK_ROWS` rows at a time, and again for the backward pass. The
numbers are the same up to the order of sums; TinyCLIP's batch of 32,768 would need 30 GB otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On an H100 the affinity loss of 16,384 pairs takes 42 ms and 7.9 GB whole, 101 ms and 0.6 GB in blocks (2026-11-26,
# tests/gpu/measure_train.py). The difference is 2 % of a step of ViT-M-32: not worth a third of a 24 GB card.
MAX_WHOLE = 8192
BLOCK_ROWS = 1024


def upcast(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class RowShare:
    """Which rows of a batch's similarities this process computes, and how parts become the whole.

    Every process has the features of all pairs, in the same order. What a loss sums over its rows goes through
    ``sum_over_processes``, so its value is that of the whole batch on each of them.
    """

    rank: int = 0
    size: int = 1
    sum_over_processes: Callable[[Tensor], Tensor] = _as_it_is
    """adds up a tensor of each process, and in the backward pass their gradients at the sum"""

    def rows(self, count: int) -> slice:
        """Return this process's rows of ``count``, which are as many as there are processes at least.

        The shares of any two processes differ by one row at most.
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALL_ROWS = RowShare()


class Similarity(NamedTuple):
    """Logits ``scale * rows @ columns.T`` of row features (N, D) and column features (M, D)."""

    rows: Tensor
    columns: Tensor
    scale: Tensor | float  # the scale itself, not its logarithm

    def logits(self, part: slice | None = None) -> Tensor:
        """Return the logits of all rows (N, M), or of a part of them."""
        rows = self.rows if part is None else self.rows[part]
        with torch.autocast(rows.device.type, enabled=False):
            return self.scale * upcast(rows) @ upcast(self.columns).T

    def transposed(self) -> "Similarity":
        """Return the same with rows and columns exchanged."""
        return Similarity(self.columns, self.rows, self.scale)

    def both_directions(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the logits of a part of N rows, and those of the same part of N columns, (n, N) each."""
        if part == slice(0, len(self.rows)):
            logits = self.logits()  # once for both directions
            return logits, logits.T
        return self.logits(part), self.transposed().logits(part)


def is_whole(rows: int, columns: int) -> bool:
    """Whether a matrix of so many logits may be computed at once."""
    return rows * columns <= MAX_WHOLE**2


def mean_of_directions(
    loss: Callable[[Tensor, list[Tensor], slice], Tensor],
    student: Similarity,
    teachers: Sequence[Similarity] = (),
    *,
    share: RowShare = ALL_ROWS,
) -> Tensor:
    """Return the mean of a loss over both directions, rows to columns and columns to rows.

    Args:
        loss: Called with logits (n, N), the teachers' logits (n, N) and which rows they are; the mean over these rows.
        student: N rows and N columns.
        teachers: The same of each teacher; no gradient reaches them.
        share: The rows that this process computes.
    """
    count = len(student.rows)
    if share.size == 1 and is_whole(count, count):  # one matrix for both directions
        rows = slice(0, count)
        ours = student.both_directions(rows)
        with torch.no_grad():
            theirs = [teacher.both_directions(rows) for teacher in teachers]
        forth = loss(ours[0], [both[0] for both in theirs], rows)
        return (forth + loss(ours[1], [both[1] for both in theirs], rows)) / 2

    def one_direction(student: Similarity, teachers: Sequence[Similarity]) -> Tensor:
        def of_rows(rows: slice) -> Tensor:
            with torch.no_grad():
                targets = [teacher.logits(rows) for teacher in teachers]
            return loss(student.logits(rows), targets, rows)

        return mean_over_rows(of_rows, count, share)

    turned = [teacher.transposed() for teacher in teachers]
    return (one_direction(student, teachers) + one_direction(student.transposed(), turned)) / 2


def mean_over_rows(loss: Callable[[slice], Tensor], count: int, share: RowShare = ALL_ROWS) -> Tensor:
    """Return the mean of a loss over ``count`` rows, computed in blocks where there are many.

    Args:
        loss: The mean over a slice of the rows, each of which has ``count`` columns.
        count: The number of rows.
        share: The rows that this process computes.
    """
    own = share.rows(count)
    if is_whole(own.stop - own.start, count):
        return _mean_over_shares(loss(own), count, share)
    weights = [(rows.stop - rows.start) / (own.stop - own.start) for rows in _blocks(own)]
    terms = [weight * term for weight, term in zip(weights, _in_blocks(loss, own), strict=True)]
    return _mean_over_shares(torch.stack(terms).sum(), count, share)


def _mean_over_shares(mean: Tensor, count: int, share: RowShare) -> Tensor:
    """The mean over ``count`` rows, of the mean over this process's share of them."""
    if share.size == 1:
        return mean
    own = share.rows(count)
    return share.sum_over_processes((own.stop - own.start) / count * mean)


def for_rows(function: Callable[[slice], Tensor], count: int, share: RowShare = ALL_ROWS) -> Tensor:
    """Return what a function gives for ``count`` rows, (count,), computed in blocks where there are many.

    Args:
        function: Gives one number for each row of a slice, from ``count`` columns.
        count: The number of rows.
        share: The rows that this process computes; it returns those of all processes.
    """
    own = share.rows(count)
    if is_whole(own.stop - own.start, count):
        numbers = function(own)
    else:
        numbers = torch.cat(_in_blocks(function, own))
    if share.size == 1:
        return numbers
    return share.sum_over_processes(F.pad(numbers, (own.start, count - own.stop)))


def _in_blocks(function: Callable[[slice], Tensor], own: slice) -> list[Tensor]:
    """What a function gives for each block of rows; it is computed again for the backward pass."""
    return [checkpoint(function, rows, use_reentrant=False, preserve_rng_state=False) for rows in _blocks(own)]


def _blocks(own: slice) -> list[slice]:
    starts = range(own.start, own.stop, BLOCK_ROWS)
    return [slice(start, min(start + BLOCK_ROWS, own.stop)) for start in starts]


def pair_cross_entropy(similarity: Similarity, share: RowShare = ALL_ROWS) -> Tensor:
    """Return the mean cross-entropy of the rows, the class of a row being the column of the same index.

    Args:
        similarity: N rows and N columns.
        share: The rows that this process computes.
    """

    def of_rows(rows: slice) -> Tensor:
        return hard_cross_entropy(similarity.logits(rows), rows)

    return mean_over_rows(of_rows, len(similarity.rows), share)


def hard_cross_entropy(logits: Tensor, rows: slice) -> Tensor:
    """Return the mean cross-entropy of some rows of logits (n, N), row i's class being column i."""
    return F.cross_entropy(logits, torch.arange(rows.start, rows.stop, device=logits.device))
