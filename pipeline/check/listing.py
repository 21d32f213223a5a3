"""The names in a folder of shards, in a few bytes a shard: a large dataset has a million files."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from shards_spec.files import join, names
from shards_spec.layout import FILE_PATTERN, STATS_PATTERN, shard_name


class FolderListing:
    """What is in ``root/folder``: ``shards``, the numbers of the finished ones, and the names of their files.

    ``shards`` is int64 [shards], ascending. ``expected`` is how many there are to be, 0 where nothing says so.
    ``others`` are the names of no finished shard, sorted.
    """

    def __init__(self, root: str, folder: str, expected: int = 0) -> None:
        self.folder = folder
        self.expected = expected
        present = names(join(root, folder))
        self.shards = np.unique(
            np.array([int(match[1]) for name in present if (match := STATS_PATTERN.fullmatch(name))], np.int64)
        )
        self.others = list[str]()
        self._kinds = dict[tuple[str, ...], int]()  # the endings of a shard's names, of which there are few kinds
        endings = dict[int, tuple[str, ...]]()
        for name in present:
            match = FILE_PATTERN.fullmatch(name)
            if match is None or not self.has(int(match[1])):
                self.others.append(name)
                continue
            shard = int(match[1])
            known = name.startswith(shard_name(shard))
            endings[shard] = (*endings.get(shard, ()), name.removeprefix(shard_name(shard)) if known else f"/{name}")
        self._kind = np.zeros(len(self.shards), np.int64)
        for place, shard in enumerate(self.shards.tolist()):
            self._kind[place] = self._kinds.setdefault(endings[shard], len(self._kinds))
        self._endings = list(self._kinds)

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        place = int(np.searchsorted(self.shards, shard))
        return place < len(self.shards) and int(self.shards[place]) == shard

    def names_of(self, shard: int) -> list[str]:
        """The names of a finished shard's files, its record's among them."""
        endings = self._endings[self._kind[np.searchsorted(self.shards, shard)]]
        return [ending[1:] if ending.startswith("/") else shard_name(shard) + ending for ending in endings]

    def is_missing(self, shard: int) -> bool:
        """Whether a shard is to be there and is not: shards of higher numbers are finished, or so many are expected."""
        last = int(self.shards[-1]) if len(self.shards) else -1
        return shard < max(last, self.expected) and not self.has(shard)

    def first_missing(self, count: int) -> list[int]:
        """The first numbers of missing shards, so many at most."""
        return list(islice(self._gaps(), count))

    def _gaps(self) -> Iterator[int]:
        following = 0
        for shard in self.shards.tolist():
            yield from range(following, shard)
            following = shard + 1
        yield from range(following, self.expected)
