"""Which samples to leave out: images that are alike, captions that say nothing, images of an odd size.

Pure functions, no files. `ingest` uses them within a shard, `dedup` over all shards.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from pipeline.dedup.image_match import confirmed

EXACT, NEAR = "duplicate image", "near-duplicate image"  # why an image is left out
SIDE, LOW = 32, 8  # pixels of the grey thumbnail; frequencies per axis that make the signature
PLAIN = 2.0  # grey levels (orthonormal DCT): where half of the frequencies are weaker, noise would set the bits
INDEX_BITS = np.uint64(32)  # a row as one number: its canonical position above, its own position below
INDEX_MASK = np.uint64(0xFFFFFFFF)
NONE = np.uint64(0xFFFFFFFFFFFFFFFF)  # no row: this one stays
ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
MAX_NEAR_BITS = 8  # of 64; beyond it different images look alike, and the search over all shards takes hours

RUN = re.compile(r"(\S)\1{9}")
WORD_BREAK = re.compile(r"[\s,;:.!?|/·、，。_\-–—]+")
SAME_WORDS = 5
ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9+.\-]*://|www\.)\S+"
    r"|\S+@[a-z0-9.\-]+\.[a-z]+"
    r"|[a-z0-9\-]+(?:\.[a-z0-9\-]+)*\.(?:com|net|org|info)(?:/\S*)?"
    r"|\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic|svg)"
    r"|(?:img|imag|image|dsc|dscn|dscf|pict|dcim|mvi|gopr|cimg|hpim|pxl|sam|vid|photo|image|screenshot)"
    r"[ _\-]?[(]?\d{3,}[\d _\-.()]*(?:\.[a-z]{3,4})?",
    re.IGNORECASE,
)


def caption_problem(caption: str | None, min_chars: int, max_chars: int, sane: bool = True) -> str | None:
    """A short stable reason to leave a caption out, or None. Lengths in characters, without space around; 0: no limit.

    ``sane`` asks for words, in any language: letters are Unicode's, and combining marks count as letters. A missing
    caption has length 0; with ``min_chars`` 0 it is no problem.
    """
    text = (caption or "").strip()
    if len(text) < min_chars:
        return "caption too short"
    if 0 < max_chars < len(text):
        return "caption too long"
    if not text or not sane:
        return None
    if ADDRESS.fullmatch(text):
        return "caption is an address"
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "caption has no letters"
    if RUN.search(text) or _repeats_a_word(text):
        return "caption repeats itself"
    rest = sum(unicodedata.category(char)[0] == "M" or char.isspace() for char in text if not char.isalpha())
    return "caption is mostly symbols" if 2 * (letters + rest) < len(text) else None


def _repeats_a_word(text: str) -> bool:
    words = (word for word in WORD_BREAK.split(text.casefold()) if word)
    return any(sum(1 for _ in same) >= SAME_WORDS for _, same in itertools.groupby(words))


def image_problem(width: int, height: int, min_size: int, max_aspect: float) -> str | None:
    """A short stable reason to leave an image out, or None. Pixels; ``max_aspect`` is longer side / shorter side."""
    if min(width, height) < min_size:
        return "picture too small"
    return "aspect ratio too large" if max(width, height) > max_aspect * min(width, height) else None


@functools.cache
def _cosines() -> np.ndarray:
    """The first rows of the orthonormal DCT-II matrix: float64 [LOW, SIDE]."""
    angles = math.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5)
    scale = np.sqrt(np.where(np.arange(LOW) == 0, 1, 2) / SIDE)
    cosines: np.ndarray = scale[:, None] * np.cos(angles)
    return cosines


def perceptual_hash(image: Image.Image) -> str | None:
    """The DCT signature of an RGB image: 64 bits as 16 hexadecimal digits; None for a plain one.

    Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", the DCT based hash: 32 x 32 grey
    pixels, two-dimensional DCT-II, the 8 x 8 lowest frequencies; a bit says whether a coefficient is above the median.
    The constant term is left out of the median, and its bit is 0. Encoding, scaling and small changes of tone move few
    bits, an even number as 31 are set; colour plays no part. An image without structure in half of these frequencies
    (one colour, a gradient, stripes) has no signature: noise would decide it.
    """
    small = image.reduce(max(1, min(image.size) // (2 * SIDE)))  # never below twice the side: cheap, and flips nothing
    grey = small.convert("L").resize((SIDE, SIDE), Image.Resampling.HAMMING)  # half the flipped bits of BOX
    cosines = _cosines()
    waves = (cosines @ np.asarray(grey, np.float64) @ cosines.T).ravel()
    middle = waves.size // 2 - 1  # of the 63 without the constant term
    if np.sort(np.abs(waves[1:]))[middle] < PLAIN:
        return None
    bits = waves > np.sort(waves[1:])[middle]
    bits[0] = False
    return np.packbits(bits).tobytes().hex()


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ, pair by pair: two arrays uint64 [n] to integers [n]."""
    differing = one ^ other
    if hasattr(np, "bitwise_count"):  # numpy 2
        counted: np.ndarray = np.bitwise_count(differing)
        return counted
    return ONES[differing.view(np.uint8).reshape(-1, 8)].sum(axis=1)


def hash_numbers(hashes: Sequence[str | None]) -> np.ndarray:
    """Signatures as uint64 [n]; 0, which no image has, for None. Raises ValueError for other than 16 hex digits."""
    if any(text is not None and len(text) != 16 for text in hashes):
        raise ValueError("a signature that has not 16 hexadecimal digits")
    return np.array([int(text, 16) if text is not None else 0 for text in hashes], np.uint64)


def keyed_minima(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, with the smallest of its values; all uint64 [n]."""
    if not len(keys):
        return keys, values
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.minimum.reduceat(values, starts)


def band_masks(near_bits: int, count: int) -> list[np.uint64]:
    """Bit masks such that two hashes within ``near_bits`` agree on all bits of at least one of them.

    Pigeonhole: of near_bits + m bands at least m have no differing bit (Manku, Jain, Das Sarma 2007, "Detecting
    Near-Duplicates for Web Crawling", section 3). More, wider masks pay with ``count`` hashes when it is large.
    """

    def cost(chosen: int) -> float:
        width = 0.75 * 64 * chosen / (near_bits + chosen)  # bits of real hashes are not independent
        return math.comb(near_bits + chosen, chosen) * (15 + count / 2**width)

    chosen = min(range(1, 5), key=cost)
    edges = [64 * band // (near_bits + chosen) for band in range(near_bits + chosen + 1)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [np.uint64(sum(some)) for some in itertools.combinations(bands, chosen)]


def near_pairs(hashes: np.ndarray, mask: np.uint64, near_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs of hashes (uint64 [n], each once) that agree under ``mask`` and are within ``near_bits``.

    In pieces; within a piece no index stands twice on the same side. Memory: a few arrays of n.
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
        near = left[distances(hashes[left], hashes[left + step]) <= near_bits]
        if len(near):
            yield order[near], order[near + step]


def near_minima(hashes: np.ndarray, values: np.ndarray, mask: np.uint64, near_bits: int) -> np.ndarray:
    """Per hash (uint64 [n], each once) the smallest value among itself and its near ones that share ``mask``."""
    best = values.copy()
    for one, other in near_pairs(hashes, mask, near_bits):
        best[one] = np.minimum(best[one], values[other])
        best[other] = np.minimum(best[other], values[one])
    return best


def pointers(values: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """The position of the row that stays instead, per row; NONE where none of those alike stands earlier."""
    return np.where(minima >> INDEX_BITS < values >> INDEX_BITS, minima & INDEX_MASK, NONE)


def duplicates(
    urls: Sequence[str | None],
    sha256s: Sequence[str | None],
    hashes: Sequence[str | None],
    near_bits: int | None,
    same: Callable[[int, int], bool] | None = None,
) -> dict[int, int]:
    """Rows of one shard that repeat an image: index of each to the index of the row that stays in its place.

    Equal ``sha256s`` are duplicates; with ``near_bits`` also ``hashes`` that differ in at most so many bits, where
    ``same`` (of two rows' indices) says so, too. The list's
    order decides: a row goes when one alike has an earlier canonical position, that of the first row with its URL. So
    rows of one URL, several captions of an image, are never duplicates of each other. Rows with neither
    sha256 nor hash (failed ones) are not looked at.
    """
    rows = [i for i in range(len(urls)) if sha256s[i] is not None or hashes[i] is not None]
    first = dict[str, int]()
    canonical = [i if (url := urls[i]) is None else first.setdefault(url, i) for i in rows]
    values = (np.array(canonical, np.uint64) << INDEX_BITS) | np.array(rows, np.uint64)
    names = dict[str, int]()
    exact = np.array([names.setdefault(text, len(names) + 1) if (text := sha256s[i]) else 0 for i in rows], np.uint64)
    near, equal = np.full(len(urls), NONE), np.full(len(urls), NONE)
    if near_bits is not None:
        _point(near, hash_numbers([hashes[i] for i in rows]), values, near_bits)
    _point(equal, exact, values, 0)
    kept = _resolved(equal, near)
    if same is not None:
        candidates = np.flatnonzero((near != NONE) & (equal == NONE))
        pairs = zip(candidates.tolist(), kept[candidates].tolist(), strict=True)
        found, near = confirmed(pairs, dict(zip(rows, canonical, strict=True)), same), np.full(len(urls), NONE)
        near[list(found)] = list(found.values())
        kept = _resolved(equal, near)
    gone = np.flatnonzero(kept != NONE)
    return dict(zip(gone.tolist(), kept[gone].tolist(), strict=True))


def _resolved(equal: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Pointers to rows that stay: the one that a row repeats may itself repeat an earlier one."""
    kept = np.where(equal != NONE, equal, near)
    gone = np.flatnonzero(kept != NONE)
    while (onward := kept[kept[gone].astype(np.int64)] != NONE).any():
        kept[gone[onward]] = kept[kept[gone[onward]].astype(np.int64)]
    return kept


def _point(kept: np.ndarray, keys: np.ndarray, values: np.ndarray, near_bits: int) -> None:
    """Enter into ``kept`` the rows that go because of ``keys`` (uint64 like ``values``, 0: none)."""
    keys, values = keys[keys != 0], values[keys != 0]
    unique, minima = keyed_minima(keys, values)
    best = minima
    for mask in band_masks(near_bits, len(unique)) if near_bits else []:
        best = np.minimum(best, near_minima(unique, minima, mask, near_bits))
    found = pointers(values, best[np.searchsorted(unique, keys)])
    gone = found != NONE
    kept[(values[gone] & INDEX_MASK).astype(np.int64)] = found[gone]
