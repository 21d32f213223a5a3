"""Duplicates within one shard, distances of signatures, masks that miss no pair."""

import random
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_duplicates import expected_drops, random_rows

from pipeline.core.near_duplicates import (
    BIT_COUNTS,
    band_masks,
    find_duplicates,
    hamming_distances,
)


def test_distances_without_numpy_2(monkeypatch):
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 2**64, 1000, np.uint64) for _ in range(2))
    expected = [(int(a) ^ int(b)).bit_count() for a, b in zip(one, other, strict=True)]
    assert hamming_distances(one, other).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert hamming_distances(one, other).tolist() == expected
    assert BIT_COUNTS[255] == 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 80), st.sampled_from([None, 0, 1, 3, 6, 10]))
def test_duplicates_of_a_shard_follow_the_rule(seed, count, near_bits):
    rows = random_rows(seed, count)
    found, expected = find_duplicates(*rows, near_bits), expected_drops(*rows, near_bits)
    assert set(found) == set(expected)
    assert not set(found.values()) & set(found)  # the one that stays does stay


def test_captions_of_one_image_are_no_duplicates():
    assert find_duplicates(["u", "u", "v", "u", "v"], ["a"] * 5, [None] * 5, None) == {2: 0, 4: 0}
    assert find_duplicates(["u", "v", "u"], [None] * 3, [None] * 3, 3) == {}
    assert find_duplicates([None, None], ["a", "a"], [None] * 2, None) == {1: 0}
    chain = [f"{n:016x}" for n in (0b1, 0b111, 0b11111, 0b1111111)]
    assert find_duplicates(list("abcd"), list("abcd"), chain, 2) == {1: 0, 2: 0, 3: 0}
    assert find_duplicates(list("abcd"), list("abcd"), chain, None) == {}


def test_a_shard_takes_milliseconds():
    rng = np.random.default_rng(0)
    hashes = [f"{number:016x}" for number in rng.integers(1, 2**64, 1000, np.uint64).tolist()]
    for near_bits in (None, 3, 10):
        start = time.perf_counter()
        assert find_duplicates([str(i) for i in range(1000)], [str(i % 900) for i in range(1000)], hashes, near_bits)
        assert time.perf_counter() - start < 0.25  # measured: 1 to 4 ms


def test_band_masks_miss_no_pair():
    rng = random.Random(0)
    for near_bits in (0, 1, 3, 5, 10):
        for count in (100, 100_000, 10_000_000):
            masks = [int(mask) for mask in band_masks(near_bits, count)]
            for _ in range(200):
                flips = sum(1 << bit for bit in rng.sample(range(64), near_bits))
                assert any(not mask & flips for mask in masks)
