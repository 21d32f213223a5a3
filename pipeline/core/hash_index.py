"""Which of many 64-bit hashes are within a few bits of others that come later.

Norouzi, Punjani, Fleet 2012, "Fast Search in Hamming Space with Multi-Index Hashing": of two hashes within 11 bits one
of the four quarters differs in at most two. So the hashes are sorted by each quarter, and those are compared whose
quarter is one of the 137 that are so near.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.near_duplicates import hamming_distances

QUARTERS = 4
QUARTER_BITS = 16
QUARTER_NEAR = 2  # bits in which a quarter may differ
MAX_INDEX_BITS = QUARTERS * (QUARTER_NEAR + 1) - 1  # of the whole hash, up to which none is missed
COMPARED_AT_ONCE = 1 << 21  # pairs, 60 MB


def _near_quarters() -> np.ndarray:
    """All numbers of 16 bits with at most QUARTER_NEAR ones: int64 [137]."""
    near = [0]
    for ones in range(1, QUARTER_NEAR + 1):
        near += [sum(1 << bit for bit in bits) for bits in itertools.combinations(range(QUARTER_BITS), ones)]
    return np.array(near, np.int64)


class HashIndex:
    """Hashes in a folder of files that processes share, sorted by each quarter.

    Memory: 24 bytes a hash and 1 MB, of pages that the system may drop.
    """

    def __init__(self, folder: Path) -> None:
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._orders = [np.load(folder / f"order-{quarter}.npy", mmap_mode="r") for quarter in range(QUARTERS)]
        self._starts = [np.load(folder / f"starts-{quarter}.npy", mmap_mode="r") for quarter in range(QUARTERS)]
        self._near_quarters = _near_quarters()

    @staticmethod
    def build(folder: Path, hashes: np.ndarray) -> None:
        """Write the files of an index of hashes, uint64 [n]."""
        np.save(folder / "hashes.npy", hashes)
        for quarter in range(QUARTERS):
            keys = _quarter(hashes, quarter)
            order = np.argsort(keys, kind="stable")
            np.save(folder / f"order-{quarter}.npy", order.astype(np.uint32))
            np.save(folder / f"starts-{quarter}.npy", np.searchsorted(keys[order], np.arange((1 << QUARTER_BITS) + 1)))

    def near(self, queries: np.ndarray, near_bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs within ``near_bits`` (at most MAX_INDEX_BITS): index of the query and of the hash, int64, each once.

        Queries, uint64 [n], that are 0 have no hash and no pairs.
        """
        assert near_bits <= MAX_INDEX_BITS
        pairs = set[tuple[int, int]]()
        for quarter in range(QUARTERS):
            for rows, entries in self._candidates(queries, quarter):
                near = hamming_distances(queries[rows], self._hashes[entries]) <= near_bits
                pairs.update(zip(rows[near].tolist(), entries[near].tolist(), strict=True))
        found = np.array(sorted(pairs), np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def _candidates(self, queries: np.ndarray, quarter: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (query, hash) with near quarters, about COMPARED_AT_ONCE at a time."""
        present = np.flatnonzero(queries)
        starts = self._starts[quarter]
        keys = _quarter(queries[present], quarter)[:, None] ^ self._near_quarters
        firsts = starts[keys].ravel()
        counts = starts[keys + 1].ravel() - firsts
        rows = np.repeat(present, keys.shape[1])
        ends = np.cumsum(counts)
        done = 0
        while done < len(counts):
            before = ends[done - 1] if done else 0
            stop = max(done + 1, int(np.searchsorted(ends, before + COMPARED_AT_ONCE, side="right")))
            part = slice(done, stop)
            places = np.arange(ends[stop - 1] - before) + np.repeat(
                firsts[part] - (ends[part] - counts[part] - before), counts[part]
            )
            yield np.repeat(rows[part], counts[part]), self._orders[quarter][places].astype(np.int64)
            done = stop


def _quarter(hashes: np.ndarray, quarter: int) -> np.ndarray:
    """Sixteen bits of each hash: int64 [n]."""
    shifted = hashes >> np.uint64(QUARTER_BITS * quarter)
    return (shifted & np.uint64((1 << QUARTER_BITS) - 1)).astype(np.int64)
