"""Random numbers that belong to a name: the same on every machine, whatever was drawn before."""

import hashlib

import numpy as np


def raw_draws(name: str, count: int) -> np.ndarray:
    """``count`` uint64 of Philox keyed by the first 16 bytes of blake2b(name); numpy guarantees this stream."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    raw: np.ndarray = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return raw


def draw_index(name: str, count: int) -> int:
    """One number below ``count``: the 64 bits of blake2b(name), little-endian, modulo ``count``."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def uniform_draws(name: str, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1): the upper 53 bits of each raw draw."""
    return (raw_draws(name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
