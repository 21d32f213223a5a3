"""Which sample comes at which position: arithmetic, so resuming is arithmetic too.

The stream is endless. Position ``epoch * N + p`` is the p-th sample of that epoch, N the samples of the dataset, so
a batch may cross epochs. An epoch permutes the shards, takes them in windows of ``window`` shards, and permutes all
samples within a window: every sample comes once per epoch, and at most ``window`` shards are open at a time.

Permutations sort raw Philox draws, whose stream numpy guarantees; ``Generator.permutation`` it may change.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards_spec.draws import raw_draws
from shards_spec.files import UserError
from training.recent import Recent


@dataclass(frozen=True)
class Place:
    """A position's sample: its epoch, its shard and its index in the shard."""

    epoch: int
    shard: int
    index: int


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # (shards,) shard ids in the epoch's order
    starts: np.ndarray  # (windows + 1,) first position of each window, then N


class Order:
    """The order of a dataset whose shard i holds ``sizes[i]`` samples. Memory: one permutation per window in use."""

    def __init__(self, sizes: list[int], seed: int, window: int = 8) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.window = seed, window
        self.total = int(self.sizes.sum())
        if self.total < 1:
            raise UserError("the dataset holds no sample: run the stages that fill it first")
        # two of each, since a batch may lie across two windows or epochs
        self._epochs: Recent[int, _Epoch] = Recent(2)
        self._windows: Recent[tuple[int, int], tuple[np.ndarray, np.ndarray]] = Recent(2)

    def locate(self, position: int) -> Place:
        """The sample at ``position`` >= 0 of the endless stream."""
        epoch, offset = divmod(position, self.total)
        layout = self._epochs.get(epoch, lambda: self._epoch(epoch))
        number = int(np.searchsorted(layout.starts, offset, side="right")) - 1
        shards, places = self._windows.get((epoch, number), lambda: self._window(epoch, number, layout))
        place = int(places[offset - layout.starts[number]])
        ends = np.cumsum(self.sizes[shards])
        which = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[which])
        return Place(epoch, shard, place - int(ends[which] - self.sizes[shard]))

    def _epoch(self, epoch: int) -> _Epoch:
        shards = _permutation(f"{self.seed}/{epoch}", len(self.sizes))
        ends = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return _Epoch(shards, np.append(ends[: -1 : self.window], self.total))

    def _window(self, epoch: int, number: int, layout: _Epoch) -> tuple[np.ndarray, np.ndarray]:
        shards = layout.shards[number * self.window : (number + 1) * self.window]
        return shards, _permutation(f"{self.seed}/{epoch}/{number}", int(self.sizes[shards].sum()))


def _permutation(name: str, count: int) -> np.ndarray:
    return np.argsort(raw_draws(f"order/{name}", count), kind="stable")


def batch_positions(
    samples_seen: int, batches: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[range]:
    """Positions of a rank's share of each of the next ``batches`` global batches.

    The global batch is ``batch_size`` positions from ``samples_seen`` on (counted over all ranks); rank r takes the
    r-th contiguous slice of it, so the slices tile it for any world size that divides it. Raises UserError.
    """
    if batch_size % world_size:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of the {world_size} processes")
    share = batch_size // world_size
    for batch in range(batches):
        start = samples_seen + batch * batch_size + rank * share
        yield range(start, start + share)
