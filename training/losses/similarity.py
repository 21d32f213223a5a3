"""Similarities of all pairs of a batch, whole or in blocks of rows.

Losses are computed in float32 (float64 where the features are), whatever the autocast. Above `MAX_WHOLE` pairs the
matrix of all pairs is never whole: it is computed `BLOCK_ROWS` rows at a time, and again for the backward pass. The
numbers are the same up to the order of sums; TinyCLIP's batch of 32,768 would need 30 GB otherwise.
"""

from collections.abc import Callable
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


def is_whole(count: int) -> bool:
    """Whether the matrix of ``count`` pairs may be computed at once."""
    return count <= MAX_WHOLE


def mean_over_rows(loss: Callable[[slice], Tensor], count: int) -> Tensor:
    """Return the mean of a loss over ``count`` rows, computed in blocks where there are many.

    Args:
        loss: The mean over a slice of the rows.
        count: The number of rows.
    """
    if is_whole(count):
        return loss(slice(0, count))
    shares = [(rows.stop - rows.start) / count for rows in _blocks(count)]
    return torch.stack([share * term for share, term in zip(shares, _in_blocks(loss, count), strict=True)]).sum()


def for_rows(function: Callable[[slice], Tensor], count: int) -> Tensor:
    """Return what a function gives for ``count`` rows, (count, ...), computed in blocks where there are many.

    Args:
        function: Gives one entry for each row of a slice.
        count: The number of rows.
    """
    return function(slice(0, count)) if is_whole(count) else torch.cat(_in_blocks(function, count))


def _in_blocks(function: Callable[[slice], Tensor], count: int) -> list[Tensor]:
    """What a function gives for each block of rows; it is computed again for the backward pass."""
    blocks = _blocks(count)
    return [checkpoint(function, rows, use_reentrant=False, preserve_rng_state=False) for rows in blocks]


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS)]


def pair_cross_entropy(similarity: Similarity) -> Tensor:
    """Return the mean cross-entropy of the rows, the class of a row being the column of the same index."""
    device = similarity.rows.device

    def of_rows(rows: slice) -> Tensor:
        return F.cross_entropy(similarity.logits(rows), torch.arange(rows.start, rows.stop, device=device))

    return mean_over_rows(of_rows, len(similarity.rows))
