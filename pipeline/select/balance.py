"""`select --balance`: frequent entries are thinned out, as MetaCLIP does it (arXiv 2309.16671, Algorithm 1).

MetaCLIP's entries are substrings out of WordNet and Wikipedia; here they are the synsets that `pack` gave a caption.
With t samples of an entry wanted, each entry of a caption keeps it with probability min(1, t / count), and one that
does is enough. Captions without an entry go, as there. The count is that of the samples that all other rules leave:
what is thinned out is their distribution.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards_spec.counter_rng import uniform_draws


@dataclass(frozen=True)
class EntryCounts:
    """How many samples have each entry, and how many are wanted."""

    counts: dict[str, int]
    wanted: int
    seed: int

    def keeps(self, entries: list[list[str]], keys: list[str]) -> np.ndarray:
        """Whether each sample is drawn, bool (n,); ``entries`` are those of its caption, each once.

        One draw per sample, by its key, is compared with the probability that any of its entries keeps it.
        """
        return np.array([self._keeps(own, key) for own, key in zip(entries, keys, strict=True)], bool)

    def _keeps(self, entries: list[str], key: str) -> bool:
        misses = 1.0
        for entry in entries:
            count = self.counts[entry]
            if count <= self.wanted:
                return True
            misses *= 1 - self.wanted / count
        return bool(entries) and float(uniform_draws(f"{self.seed}/balance/{key}", 1)[0]) >= misses


def count_entries(parts: Iterable[pa.Array]) -> dict[str, int]:
    """Number of samples of each entry; each of ``parts`` has the lists of some samples' entries."""
    counts = Counter[str]()
    for part in parts:
        for pair in pc.value_counts(pc.list_flatten(part)):
            counts[pair["values"].as_py()] += pair["counts"].as_py()
    return dict(sorted(counts.items()))
