"""Which images repeat an earlier one: equal files, and perceptual hashes that differ in a few bits.

Pure functions, no files. `ingest` uses them within a shard, `dedup` over all shards.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

EXACT_DUPLICATE, NEAR_DUPLICATE = "duplicate image", "near-duplicate image"  # reasons on disk
INDEX_BITS = np.uint64(32)  # a row as one number: its canonical position above, its own position below
INDEX_MASK = np.uint64(0xFFFFFFFF)
NO_ROW = np.uint64(0xFFFFFFFFFFFFFFFF)  # in place of a row's index: the image repeats no other and stays
BIT_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
MAX_NEAR_BITS = 8  # of 64; beyond it different images look alike, and the search over all shards takes hours
MAX_COMPARED = 64  # images with one signature that another one is compared with; images after those stay, undecided


def hamming_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of bits that differ, pair by pair: two arrays uint64 [n] to integers [n]."""
    differing = one ^ other
    counts: np.ndarray
    if hasattr(np, "bitwise_count"):  # numpy 2
        counts = np.bitwise_count(differing)
    else:
        counts = BIT_COUNTS[differing.view(np.uint8).reshape(-1, 8)].sum(axis=1)
    return counts


def parse_hashes(hashes: Sequence[str | None]) -> np.ndarray:
    """Hexadecimal hashes as uint64 [n]; 0, which no image has, for None. Raises ValueError for other than 16 digits."""
    if any(text is not None and len(text) != 16 for text in hashes):
        raise ValueError("a hash that has not 16 hexadecimal digits")
    return np.array([int(text, 16) if text is not None else 0 for text in hashes], np.uint64)


def min_by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, ascending, and the smallest value of each; all uint64 [n]."""
    if not len(keys):
        return keys, values
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.minimum.reduceat(values, starts)


def band_masks(near_bits: int, count: int) -> list[np.uint64]:
    """Bit masks such that two hashes within ``near_bits`` agree on all bits of at least one of them.

    Pigeonhole: of near_bits + m bands at least m have no differing bit (Manku, Jain, Das Sarma 2007, "Detecting
    Near-Duplicates for Web Crawling", section 3). Of 1 to 4 the m is taken that costs least for ``count`` hashes: with
    many hashes, more and wider masks pay.
    """

    def cost(chosen: int) -> float:
        width = 0.75 * 64 * chosen / (near_bits + chosen)  # bits of real hashes are not independent
        return math.comb(near_bits + chosen, chosen) * (15 + count / 2**width)

    chosen = min(range(1, 5), key=cost)
    edges = [64 * band // (near_bits + chosen) for band in range(near_bits + chosen + 1)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [np.uint64(sum(agreeing)) for agreeing in itertools.combinations(bands, chosen)]


def near_pairs(hashes: np.ndarray, mask: np.uint64, near_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs of hashes (uint64 [n], distinct) that agree under ``mask`` and are within ``near_bits``.

    The pairs come in pieces; within a piece no index appears twice on the same side. Memory: a few arrays of n.
    """
    keys = hashes & mask
    order = np.argsort(keys, kind="stable")
    keys, hashes = keys[order], hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    ends = np.repeat(starts + sizes, sizes)
    left = np.flatnonzero(ends > np.arange(len(keys)) + 1)
    for step in itertools.count(1):
        left = left[ends[left] > left + step]
        if not len(left):
            return
        near = left[hamming_distances(hashes[left], hashes[left + step]) <= near_bits]
        if len(near):
            yield order[near], order[near + step]


def min_over_neighbours(hashes: np.ndarray, values: np.ndarray, mask: np.uint64, near_bits: int) -> np.ndarray:
    """Per hash (uint64 [n], distinct) the smallest value among its own and those of its `near_pairs`."""
    best = values.copy()
    for one, other in near_pairs(hashes, mask, near_bits):
        best[one] = np.minimum(best[one], values[other])
        best[other] = np.minimum(best[other], values[one])
    return best


def canonical_index(values: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Per row the index of the row that it repeats; NO_ROW for rows that stay.

    ``values`` are the rows' own numbers (see `INDEX_BITS`), ``minima`` the smallest number among the images alike:
    uint64 [n]. A row stays when no image alike has an earlier canonical position.
    """
    return np.where(minima >> INDEX_BITS < values >> INDEX_BITS, minima & INDEX_MASK, NO_ROW)


def find_duplicates(
    urls: Sequence[str | None],
    sha256s: Sequence[str | None],
    hashes: Sequence[str | None],
    near_bits: int | None,
    same: Callable[[int, int], bool] | None = None,
) -> dict[int, int]:
    """Rows of one shard that repeat an image: index of each to the index of the row that stays in its place.

    Equal ``sha256s`` are duplicates. With ``near_bits`` so are rows whose ``hashes`` differ in at most that many bits
    and whose images ``same`` (it gets the indices of two rows) finds to be one. The order of the list decides: a row
    goes when an image alike has an earlier canonical position, which is that of the first row with the same URL. So
    rows that share a URL, several captions of one image, are never duplicates of each other. Rows with neither sha256
    nor hash (failed ones) are ignored.
    """
    rows = [i for i in range(len(urls)) if sha256s[i] is not None or hashes[i] is not None]
    canonical = _canonical_positions(urls, rows)
    values = (np.array([canonical[i] for i in rows], np.uint64) << INDEX_BITS) | np.array(rows, np.uint64)

    exact = np.full(len(urls), NO_ROW)
    near = np.full(len(urls), NO_ROW)
    if near_bits is not None:
        _mark_duplicates(near, parse_hashes([hashes[i] for i in rows]), values, near_bits)
    _mark_duplicates(exact, _number_texts([sha256s[i] for i in rows]), values, 0)
    kept = _follow_to_kept(exact, near)

    if same is not None:
        candidates = np.flatnonzero((near != NO_ROW) & (exact == NO_ROW))
        pairs = zip(candidates.tolist(), kept[candidates].tolist(), strict=True)
        confirmed = confirm_duplicates(pairs, canonical, same)
        near = np.full(len(urls), NO_ROW)
        near[list(confirmed)] = list(confirmed.values())
        kept = _follow_to_kept(exact, near)
    gone = np.flatnonzero(kept != NO_ROW)
    return dict(zip(gone.tolist(), kept[gone].tolist(), strict=True))


def _canonical_positions(urls: Sequence[str | None], rows: list[int]) -> dict[int, int]:
    """Row to the first of the ``rows`` with its URL; rows without a URL to themselves."""
    first = dict[str, int]()
    canonical = dict[int, int]()
    for row in rows:
        url = urls[row]
        canonical[row] = row if url is None else first.setdefault(url, row)
    return canonical


def _number_texts(texts: list[str | None]) -> np.ndarray:
    """Equal texts get equal numbers from 1 on, None and empty ones 0: uint64 [n]."""
    numbers = dict[str, int]()
    return np.array([numbers.setdefault(text, len(numbers) + 1) if text else 0 for text in texts], np.uint64)


def _follow_to_kept(exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Per row the row that stays in its place: the one that it repeats may itself repeat an earlier one."""
    kept = np.where(exact != NO_ROW, exact, near)
    gone = np.flatnonzero(kept != NO_ROW)
    while (moves := kept[kept[gone].astype(np.int64)] != NO_ROW).any():
        moving = gone[moves]
        kept[moving] = kept[kept[moving].astype(np.int64)]
    return kept


def _mark_duplicates(kept: np.ndarray, keys: np.ndarray, values: np.ndarray, near_bits: int) -> None:
    """Enter into ``kept`` the rows that go because of ``keys`` (uint64 like ``values``, 0: no key)."""
    has_key = keys != 0
    keys, values = keys[has_key], values[has_key]
    unique, minima = min_by_key(keys, values)
    best = minima
    for mask in band_masks(near_bits, len(unique)) if near_bits else []:
        best = np.minimum(best, min_over_neighbours(unique, minima, mask, near_bits))
    canonical = canonical_index(values, best[np.searchsorted(unique, keys)])
    gone = canonical != NO_ROW
    kept[(values[gone] & INDEX_MASK).astype(np.int64)] = canonical[gone]


def confirm_duplicates(
    candidates: Iterable[tuple[int, int]], positions: Mapping[int, int], same: Callable[[int, int], bool]
) -> dict[int, int]:
    """Of rows that may be duplicates those that are: row to the row that stays in its place.

    ``candidates`` are pairs (row, first row of its group, which stays), ``positions`` the canonical position of each
    row (rows of one URL share one and are never compared), ``same`` compares two rows. A row goes when it is the same
    as a row of its group that stays; else it stays, and later rows are compared with it, too.
    """
    kept_for = dict[int, int]()
    staying = dict[int, list[int]]()
    for row, first in sorted(candidates, key=lambda pair: (positions[pair[0]], pair[0])):
        group = staying.setdefault(first, [first])
        match = next((other for other in group if positions[other] < positions[row] and same(other, row)), None)
        if match is not None:
            kept_for[row] = match
        elif len(group) < MAX_COMPARED:
            group.append(row)
    return kept_for
