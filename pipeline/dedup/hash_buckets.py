"""Groups of equal 64-bit hashes over columns that do not fit into memory: the hash space is gone through in buckets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.core.near_duplicates import INDEX_BITS, band_masks, min_by_key, min_over_neighbours
from pipeline.dedup.disk_columns import DiskColumn

SPREAD = np.uint64(0x9E3779B97F4A7C15)  # spreads hashes evenly over the buckets (Fibonacci hashing)
NO_NUMBERS = np.empty(0, np.uint64)

Minima = tuple[np.ndarray, np.ndarray]  # distinct hashes, ascending, and the smallest value of each: uint64 [n]


@dataclass(frozen=True)
class HashBuckets:
    """Divides hashes into ``count`` buckets; 0 is no hash and in no bucket.

    ``images_in_memory``: about how many values are held at once.
    """

    count: int
    images_in_memory: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def select(self, hashes: np.ndarray, bucket: int) -> np.ndarray:
        """Which of the hashes (uint64 [n]) belong to the bucket: bool [n]."""
        selected: np.ndarray = (self._number(hashes) == np.uint64(bucket)) & (hashes != 0)
        return selected

    def select_masked(self, hashes: np.ndarray, mask: np.uint64, bucket: int) -> np.ndarray:
        """As `select`, by the bits under ``mask`` alone; a masked hash may be 0."""
        selected: np.ndarray = self._number(hashes & mask) == np.uint64(bucket)
        return selected

    def _number(self, hashes: np.ndarray) -> np.ndarray:
        numbers: np.ndarray = ((hashes * SPREAD) >> INDEX_BITS) % np.uint64(self.count)
        return numbers

    def minima(self, hashes: DiskColumn, values: DiskColumn, bucket: int) -> Minima:
        """The distinct hashes of a bucket, each with the smallest of its ``values``."""
        parts: list[Minima] = []
        waiting = 0
        for start, block in hashes.blocks():
            selected = self.select(block, bucket)
            parts.append((block[selected], values.read(start, start + len(block))[selected]))
            waiting += len(parts[-1][0])
            if waiting > self.images_in_memory:
                parts = [_merge(parts)]
                waiting = 0
        return _merge(parts)

    def update(
        self,
        target: DiskColumn,
        rule: Callable[[np.ndarray, np.ndarray], np.ndarray],
        *,
        hashes: DiskColumn,
        values: DiskColumn,
        minima_of: Callable[[int], Minima],
    ) -> None:
        """Set ``target``, where there is a hash, to ``rule(value, smallest value of the hash)``.

        ``minima_of`` gives the distinct hashes of a bucket with their smallest values.
        """
        for bucket in self:
            distinct, minima = minima_of(bucket)
            for start, block in hashes.blocks():
                stop = start + len(block)
                selected = np.flatnonzero(self.select(block, bucket))
                own_values = values.read(start, stop)[selected]
                result = target.read(start, stop)
                result[selected] = rule(own_values, minima[np.searchsorted(distinct, block[selected])])
                target.write(start, result)


def _merge(parts: list[Minima]) -> Minima:
    hashes = np.concatenate([NO_NUMBERS, *(part[0] for part in parts)])
    values = np.concatenate([NO_NUMBERS, *(part[1] for part in parts)])
    return min_by_key(hashes, values)


class NearMinima:
    """Distinct signatures on disk, each with the smallest value among all signatures that differ in few bits.

    ``new_column`` makes an empty column of a name.
    """

    def __init__(self, buckets: HashBuckets, new_column: Callable[[str], DiskColumn]) -> None:
        self._buckets = buckets
        self._signatures = new_column("distinct_signatures")
        self._own = new_column("own_minima")  # over the images with the signature itself
        self._near = new_column("near_minima")  # over those with a near signature, too
        self._bounds = [0]  # of the buckets in these columns

    def __len__(self) -> int:
        return len(self._signatures)

    def find(self, signatures: DiskColumn, values: DiskColumn, near_bits: int) -> None:
        """Collect the signatures and compare them all."""
        for bucket in self._buckets:
            distinct, minima = self._buckets.minima(signatures, values, bucket)
            self._signatures.append(distinct)
            self._own.append(minima)
            self._near.append(minima)
            self._bounds.append(len(self))
        if not near_bits:
            return
        for mask in band_masks(near_bits, len(self)):  # near signatures agree under one of the masks at least
            for bucket in self._buckets:
                self._compare(mask, bucket, near_bits)

    def _compare(self, mask: np.uint64, bucket: int, near_bits: int) -> None:
        """Compare the signatures that agree under ``mask``, for one bucket of masked signatures."""
        places = list[tuple[int, np.ndarray]]()  # (start of a block, where in it)
        signatures = [NO_NUMBERS]
        minima = [NO_NUMBERS]
        for start, block in self._signatures.blocks():
            selected = np.flatnonzero(self._buckets.select_masked(block, mask, bucket))
            places.append((start, selected))
            signatures.append(block[selected])
            minima.append(self._own.read(start, start + len(block))[selected])
        lowered = min_over_neighbours(np.concatenate(signatures), np.concatenate(minima), mask, near_bits)
        done = 0
        for start, selected in places:
            if not len(selected):
                continue
            near = self._near.read(start, start + int(selected[-1]) + 1)
            near[selected] = np.minimum(near[selected], lowered[done : done + len(selected)])
            self._near.write(start, near)
            done += len(selected)

    def minima(self, bucket: int) -> Minima:
        """The distinct signatures of a bucket, ascending, and their smallest values."""
        start, stop = self._bounds[bucket : bucket + 2]
        return self._signatures.read(start, stop), self._near.read(start, stop)
