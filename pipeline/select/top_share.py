"""`select --top`: the best share of all samples by one fact, exactly that many of them.

DataComp keeps the 30 % with the best cosines (arXiv 2304.14108, section 3.4: "CLIP score").
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Values = tuple[np.ndarray, list[str]]  # float64 (n,) of samples, NaN where not known, and their keys


@dataclass(frozen=True)
class TopShare:
    """Who is in: values above the threshold, and of those equal to it the keys up to the last one.

    ``threshold`` is None where none is in. ``samples`` were to choose from, of which ``kept`` are in.
    """

    threshold: float | None
    last_key: str
    kept: int
    samples: int

    def keeps(self, values: np.ndarray, keys: list[str]) -> np.ndarray:
        """Whether each sample is in, bool (n,)."""
        if self.threshold is None:
            return np.zeros(len(values), bool)
        kept: np.ndarray = values > self.threshold
        for row in np.flatnonzero(values == self.threshold).tolist():
            kept[row] = keys[row] <= self.last_key
        return kept


def find_top_share(share: float, read: Callable[[], Iterable[Values]]) -> TopShare:
    """The best share of the samples that ``read`` gives part by part, every time it is called.

    Rounded up to a whole sample. Equal values are ordered by their keys, the first is the best; samples without a
    value count, and are in last. Memory: 8 bytes a sample, and the keys of those at the threshold.
    """
    parts = [np.empty(0, np.float64)]
    samples = 0
    for values, _ in read():
        samples += len(values)
        parts.append(values[~np.isnan(values)])
    known = np.concatenate(parts)
    kept = min(math.ceil(Fraction(str(share)) * samples), len(known))
    if not kept:
        return TopShare(None, "", 0, samples)
    threshold = float(np.partition(known, len(known) - kept)[len(known) - kept])
    equal = kept - int((known > threshold).sum())
    keys = np.concatenate([_keys_at(threshold, *part) for part in read()])  # as bytes, whose order is that of texts
    last = np.partition(keys, equal - 1)[equal - 1]
    return TopShare(threshold, bytes(last).decode(errors="surrogatepass"), kept, samples)


def _keys_at(threshold: float, values: np.ndarray, keys: list[str]) -> np.ndarray:
    """The UTF-8 of the keys whose value is the threshold."""
    rows = np.flatnonzero(values == threshold).tolist()
    return np.array([keys[row].encode(errors="surrogatepass") for row in rows], np.bytes_)
