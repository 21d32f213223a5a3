"""The 64-bit identity of a content: what vectors, keys and rows are compared by where 32 bytes each are too many."""

import hashlib
from collections.abc import Iterable

import numpy as np


def content_id(content: bytes) -> int:
    """The first 64 bits of the sha256 of an image's, a caption's or a key's bytes, big-endian; never 0."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") or 1


def content_ids(texts: Iterable[str | None]) -> np.ndarray:
    """`content_id` of each text's UTF-8: uint64 [texts]; 0 for None and for an empty text."""
    return np.fromiter((content_id(text.encode(errors="surrogatepass")) if text else 0 for text in texts), np.uint64)


def is_among(ids: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each of the ids (uint64 [n]) is one of the ``ascending`` ones, bool [n]; 0, which is no id, never is."""
    if not len(ascending):
        return np.zeros(len(ids), bool)
    places = np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)
    found: np.ndarray = (ascending[places] == ids) & (ids != 0)
    return found
