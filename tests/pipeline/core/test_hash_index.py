"""The index of hashes gives all pairs within a few bits, and no others."""

import numpy as np
import pytest

from pipeline.core.hash_index import MAX_INDEX_BITS, HashIndex
from pipeline.core.near_duplicates import hamming_distances


def test_all_pairs_and_no_others(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    hashes = draw.integers(1, 1 << 63, 3000, np.uint64)
    queries = np.concatenate([hashes[:200], draw.integers(1, 1 << 63, 50, np.uint64), np.zeros(1, np.uint64)])
    for row in range(200):  # up to 14 bits away, in few quarters and in all
        for bit in draw.integers(0, 16 if row % 3 == 0 else 64, draw.integers(0, 15)):
            queries[row] ^= np.uint64(1) << np.uint64(bit)
    HashIndex.build(tmp_path, hashes)
    for near_bits in (0, 3, MAX_INDEX_BITS):
        apart = hamming_distances(np.repeat(queries[:-1], 3000), np.tile(hashes, 250)).reshape(250, 3000)
        expected = np.argwhere(apart <= near_bits)
        for at_once in (1 << 21, 100):
            monkeypatch.setattr("pipeline.core.hash_index.COMPARED_AT_ONCE", at_once)
            rows, entries = HashIndex(tmp_path).near(queries, near_bits)
            assert np.array_equal(np.stack([rows, entries], 1), expected)
    assert len(expected) > 120
    with pytest.raises(AssertionError):
        HashIndex(tmp_path).near(queries, MAX_INDEX_BITS + 1)


def test_nothing_to_find(tmp_path):
    HashIndex.build(tmp_path, np.array([1], np.uint64))
    rows, entries = HashIndex(tmp_path).near(np.zeros(4, np.uint64), 10)
    assert len(rows) == len(entries) == 0
