"""Which sample stands at which position. It is computed, not stored, so a run resumes at any position.

The stream of samples is endless. Position ``epoch * N + p`` is the p-th sample of that epoch, where N is the size of
the dataset; so a batch may cross epochs. An epoch permutes the shards and puts their samples into a row. The row is cut
into ``streams`` parts of equal length (plus or minus one sample), which are read side by side: position p belongs to
part p mod streams. A part permutes all samples of ``window`` shards at a time. So every sample comes once per epoch,
about streams · window shards are open at a time, and processes that take turns (`batch_positions`) read different
parts, hence different shards, when their number divides ``streams``.

Permutations sort raw Philox draws, whose stream numpy guarantees; it may change ``Generator.permutation``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np

from shards_spec.counter_rng import raw_draws
from shards_spec.files import UserError, sha256_json
from training.data.lru import LRUCache


@dataclass(frozen=True)
class SampleLocation:
    """Where the sample of a position is: its epoch, its shard and its index in the shard.

    ``window`` is the stream and the number of the window in it.
    """

    epoch: int
    shard: int
    index: int
    window: tuple[int, int]


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # (shards,) shard ids in the epoch's order
    ends: np.ndarray  # (shards,) where each of them ends in the row
    windows: list[np.ndarray]  # per stream (windows + 1,) where its windows start in the row, then its end


class Order:
    """The order of a dataset's samples. Memory: one permutation per open window.

    Args:
        sizes: Number of samples of each shard.
        seed: Seed of the permutations.
        streams: Parts of an epoch that are read side by side.
        window: Shards that are mixed at a time in each stream.
        selection: Where the sizes count selected samples only: the sha256 of each shard's selection.

    Raises:
        UserError: The dataset has no samples.
    """

    def __init__(
        self, sizes: list[int], seed: int, streams: int = 8, window: int = 2, selection: Sequence[str] = ()
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.seed = seed
        self.streams = streams
        self.window = window
        self.selection = list(selection)
        self.total = int(self.sizes.sum())
        if self.total < 1:
            raise UserError("the dataset holds no sample: run the stages that fill it first")
        # twice what is open, since a batch may cross windows or epochs
        self._epochs: LRUCache[int, _Epoch] = LRUCache(2)
        self._windows: LRUCache[tuple[int, int, int], np.ndarray] = LRUCache(2 * streams)

    @property
    def sha256(self) -> str:
        """Identity of what the positions stand for, whatever the seed: a run with another cannot be resumed."""
        sizes = self.sizes.tolist()
        return sha256_json({"sizes": sizes, "selection": self.selection} if self.selection else sizes)

    def locate(self, position: int) -> SampleLocation:
        """Return the sample at ``position`` >= 0 of the endless stream."""
        epoch, offset = divmod(position, self.total)
        layout = self._epochs.get(epoch, lambda: self._epoch(epoch))
        rank, stream = divmod(offset, self.streams)
        starts = layout.windows[stream]
        number = int(np.searchsorted(starts, starts[0] + rank, side="right")) - 1
        shuffled = self._windows.get((epoch, stream, number), lambda: self._window(epoch, stream, number, starts))
        in_row = int(starts[number] + shuffled[starts[0] + rank - starts[number]])
        nth_shard = int(np.searchsorted(layout.ends, in_row, side="right"))
        shard = int(layout.shards[nth_shard])
        shard_start = int(layout.ends[nth_shard] - self.sizes[shard])
        return SampleLocation(epoch, shard, in_row - shard_start, (stream, number))

    def position(self, epoch: int, shard: int, index: int) -> int:
        """Return where in the endless stream a sample stands in an epoch: the inverse of `locate`."""
        layout = self._epochs.get(epoch, lambda: self._epoch(epoch))
        nth_shard = int(np.flatnonzero(layout.shards == shard)[0])
        in_row = int(layout.ends[nth_shard] - self.sizes[shard]) + index
        firsts = np.array([starts[0] for starts in layout.windows])
        stream = int(np.searchsorted(firsts, in_row, side="right")) - 1
        starts = layout.windows[stream]
        number = int(np.searchsorted(starts, in_row, side="right")) - 1
        shuffled = self._windows.get((epoch, stream, number), lambda: self._window(epoch, stream, number, starts))
        rank = int(starts[number] - starts[0]) + int(np.flatnonzero(shuffled == in_row - starts[number])[0])
        return epoch * self.total + rank * self.streams + stream

    def next_shards(self, location: SampleLocation) -> list[int]:
        """Return the shards that a stream opens after the window of ``location``; none at the end of an epoch."""
        layout = self._epochs.get(location.epoch, lambda: self._epoch(location.epoch))
        stream, number = location.window
        starts = layout.windows[stream]
        following = number + 1
        if following + 1 >= len(starts):
            return []
        ends_of_window = (starts[following], starts[following + 1] - 1)
        first, last = np.searchsorted(layout.ends, ends_of_window, side="right")
        return [int(shard) for shard in layout.shards[first : last + 1] if self.sizes[shard]]

    def _epoch(self, epoch: int) -> _Epoch:
        shards = _permutation(f"{self.seed}/{epoch}", len(self.sizes))
        ends = np.cumsum(self.sizes[shards])
        cuts = np.arange(self.streams + 1) * (self.total // self.streams)
        cuts += np.minimum(np.arange(self.streams + 1), self.total % self.streams)
        windows = []
        for low, high in pairwise(cuts.tolist()):
            inner = ends[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, high, side="left")]
            windows.append(np.append(np.unique(np.append(low, inner))[:: self.window], high))
        return _Epoch(shards, ends, windows)

    def _window(self, epoch: int, stream: int, number: int, starts: np.ndarray) -> np.ndarray:
        return _permutation(f"{self.seed}/{epoch}/{stream}/{number}", int(starts[number + 1] - starts[number]))


def _permutation(name: str, count: int) -> np.ndarray:
    return np.argsort(raw_draws(f"order/{name}", count), kind="stable")


def batch_positions(
    samples_seen: int, batches: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[range]:
    """Yield the positions of a rank's share of each of the next ``batches`` global batches.

    A global batch is ``batch_size`` positions, the first one from ``samples_seen`` on (counted over all ranks). Rank r
    takes the r-th of them and every world_size-th after it, so the ranks together take each position once. Raises
    UserError when the number of ranks does not divide the batch.
    """
    if batch_size % world_size:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of the {world_size} processes")
    for batch in range(batches):
        start = samples_seen + batch * batch_size
        yield range(start + rank, start + batch_size, world_size)


@dataclass(frozen=True)
class BatchPlan:
    """The side of the images and the size of each step's global batch: pure functions of (seed, step).

    Without ``sides`` all batches are ``batch_size`` images of the student's own side. With them one side is drawn per
    step, the same for all processes, and a batch of side s has about as many pixels as ``batch_size`` images of side
    ``base``: ``int(B base^2 / s^2)`` images for each of ``parts`` equal parts B of ``batch_size``. A part is what
    CatLIP gives to each of its GPUs (arXiv 2404.15653).
    """

    batch_size: int
    sides: tuple[int, ...] = ()
    base: int = 224
    parts: int = 1
    seed: int = 0

    def side(self, step: int) -> int | None:
        """Return the side of a step's images in pixels; None is the student's own."""
        if not self.sides:
            return None
        return self.sides[int(raw_draws(f"side/{self.seed}/{step}", 1)[0] % np.uint64(len(self.sides)))]

    def size(self, step: int) -> int:
        """Return the number of samples of a step's global batch."""
        return self.of_side(self.side(step))

    def of_side(self, side: int | None) -> int:
        """Return the number of samples of a global batch of images of ``side`` pixels."""
        if side is None:
            return self.batch_size
        return self.parts * max(1, int(self.batch_size / self.parts * self.base**2 / side**2))

    @property
    def mean(self) -> float:
        """The average number of samples of a global batch."""
        sizes = [self.of_side(side) for side in self.sides or (None,)]
        return sum(sizes) / len(sizes)

    def positions(
        self, step: int, samples_seen: int, steps: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[range]:
        """Yield the positions of a rank's share of each of the next ``steps`` batches, as `batch_positions` does.

        Raises UserError when the processes cannot share them equally.
        """
        if self.sides and self.parts % world_size:
            raise UserError(f"--batch-parts {self.parts}: must be a multiple of the {world_size} processes")
        for number in range(step, step + steps):
            yield from batch_positions(samples_seen, 1, self.size(number), rank, world_size)
            samples_seen += self.size(number)

    def sides_from(self, step: int) -> Iterator[int | None]:
        """Yield the sides of the batches from ``step`` on, without end."""
        return (self.side(number) for number in count(step))
