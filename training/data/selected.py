"""The samples of a selection: which row of a shard stands at which place of an epoch's order, and what it may show."""

from dataclasses import dataclass

from shards_spec.files import UserError
from shards_spec.layout import select_parquet
from shards_spec.sample import check_keys
from shards_spec.selection import ShardSelection, again, read_selection, selected_sizes
from training.data.lru import LRUCache
from training.data.order import Order


@dataclass(frozen=True)
class SamplePlace:
    """A sample at its place in an epoch.

    ``place`` is its place among the shard's selected samples; an epoch has it ``copies`` times, of which this is the
    ``copy``-th, from 0. ``captions`` are the captions that it may show, None for all.
    """

    index: int
    """row of the shard"""
    place: int
    copy: int = 0
    copies: int = 1
    captions: list[int] | None = None

    def turn(self, epoch: int) -> int:
        """How often it was shown before: what views and captions are drawn by, so that copies differ."""
        return epoch * self.copies + self.copy


class SelectionReader:
    """ROOT/select/NAME, read beside the shards: its files are read and checked one shard at a time.

    Attributes:
        sizes: Samples that an epoch has of each shard.
        hashes: The sha256 of each shard's selection.

    Args:
        root: The dataset.
        name: Name of the selection.
        shards: Number of shards that are read.
        capacity: Number of shards whose selections stay in memory.

    Raises:
        UserError: There is no such selection, or it is not finished.
        DataError: It belongs to other shards.
    """

    def __init__(self, root: str, name: str, shards: int, capacity: int = 24) -> None:
        self.root, self.name = root, name
        self.sizes, self.hashes = selected_sizes(root, name, shards)
        self._shards: LRUCache[int, ShardSelection] = LRUCache(capacity)

    def sample(self, shard: int, place: int, keys: list[str]) -> SamplePlace:
        """Return the sample at a place among a shard's selected ones.

        Args:
            shard: The shard.
            place: Place from 0, below ``sizes[shard]``.
            keys: The keys of the shard's samples, in the order of its tar.

        Raises:
            DataError: The selection is damaged, or of other samples.
        """
        selection = self._shards.get(shard, lambda: self._read(shard, keys))
        return _at(selection, int(selection.rows[place]), place)

    def copies(self, shard: int, index: int) -> list[SamplePlace]:
        """Return all places of a row of a shard: none where it is not selected."""
        selection = read_selection(self.root, self.name, shard)
        end = int(selection.ends[index])
        return [_at(selection, index, place) for place in range(end - int(selection.copies[index]), end)]

    def _read(self, shard: int, keys: list[str]) -> ShardSelection:
        selection = read_selection(self.root, self.name, shard)
        check_keys(select_parquet(self.root, self.name, shard), selection.keys, keys, again(self.root, self.name))
        return selection


def _at(selection: ShardSelection, index: int, place: int) -> SamplePlace:
    copies = int(selection.copies[index])
    first = int(selection.ends[index]) - copies
    return SamplePlace(index, place, place - first, copies, selection.captions[index])


def order_of(sizes: list[int], selection: SelectionReader | None, seed: int, streams: int, window: int) -> Order:
    """Return the order of all samples of shards, or of the selected ones.

    Args:
        sizes: Samples of each shard.
        selection: What is selected of them, if anything.
        seed: Of the order.
        streams: Parts of an epoch that are read side by side.
        window: Shards that are mixed at a time in each.

    Raises:
        UserError: There is no sample.
    """
    if selection is None:
        return Order(sizes, seed, streams, window)
    if not any(selection.sizes):
        raise UserError(f"--select {selection.name}: no sample of the shards that are read is selected")
    return Order(selection.sizes, seed, streams, window, selection.hashes)
