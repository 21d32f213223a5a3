"""The index: unit features of images in Parquet files of the teacher cache's form, found again by identity.

A folder holds the features of one model. Its files are written once and never changed: new images go to a further file,
and what is there is what the files say, so a killed search loses the images of one unfinished file at the most. A row
whose identity no image has any more is dead; rows of small files and of those with many dead rows are merged.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.core.prefetch import prefetch_map
from shards_spec.embeddings import EmbeddingFile, encode_vectors, write_vectors
from shards_spec.files import DataError, join, names, remove

log = logging.getLogger(__name__)
FILE_ROWS = 65_536  # rows of a file at the most
BLOCK_ROWS = 4096  # compared with the queries at a time: 8 MB of 512 floats, which stay in a core's cache
COLUMN = "image_0"
Row = TypeVar("Row")
FILE = re.compile(r"(\d{5,})\.parquet")


@dataclass(frozen=True)
class IndexedFile:
    """A file of the index: ``ids`` (n,) uint64 identities, ``alive`` (n,) whether an image of today has them."""

    opened: EmbeddingFile
    ids: np.ndarray
    alive: np.ndarray


@dataclass(frozen=True)
class Hit:
    """An image that was found: its name, and the cosine of its feature with the query's."""

    name: str
    score: float


class FeatureIndex:
    """Features of one model, in the files of a folder. Damaged files are deleted, and their images embedded again."""

    def __init__(self, folder: str, meta: dict[str, Any]) -> None:
        self.folder = folder
        self._meta = meta
        self.files = list[IndexedFile]()
        self._next = 0
        for name in names(folder):
            if match := FILE.fullmatch(name):
                self._next = int(match[1]) + 1
                self._open(join(folder, name))
        self._sort()

    def _open(self, path: str) -> None:
        try:
            opened = EmbeddingFile(path)
            ids = opened.ids(COLUMN)
            if ids is None:
                raise DataError(f"{path}: no identities in it")
        except DataError as error:
            log.warning("%s: damaged; its images are embedded again (%s)", path, error)
            remove(path)
            return
        self.files.append(IndexedFile(opened, ids, np.zeros(len(ids), bool)))

    def _sort(self) -> None:
        """Make the table of all rows by identity; of several rows of one identity the first counts."""
        all_ids = [file.ids for file in self.files]
        self._ids, self._rows = np.unique(np.concatenate([np.empty(0, np.uint64), *all_ids]), return_index=True)
        self._starts = np.cumsum([0, *map(len, all_ids)])

    def __len__(self) -> int:
        return sum(int(file.alive.sum()) for file in self.files)

    def keep_all(self) -> None:
        """Take every identity as that of an image of today."""
        self.keep(self._ids)

    def keep(self, ids: np.ndarray) -> np.ndarray:
        """Mark rows as those of images of today; return for each of the (n,) identities whether there is one, (n,)."""
        if not len(self._ids):
            return np.zeros(len(ids), bool)
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        known: np.ndarray = self._ids[places] == ids
        rows = self._rows[places[known]]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            own = rows[numbers == number] - self._starts[number]
            self.files[number].alive[own] = True
        return known

    def add(self, keys: list[str], ids: np.ndarray, features: np.ndarray) -> None:
        """Write a further file of images of today: names, (n,) identities and (n, D) features."""
        path = join(self.folder, f"{self._next:05d}.parquet")
        write_vectors(path, keys, {COLUMN: encode_vectors(features, "float32")}, {"id_image": ids}, self._meta)
        self._next += 1
        self.files.append(IndexedFile(EmbeddingFile(path), ids, np.ones(len(ids), bool)))

    def merge(self) -> None:
        """Write the living rows of small files, and of files half dead, to files of `FILE_ROWS`; delete those."""
        small = [file for file in self.files if file.alive.sum() < max(FILE_ROWS, len(file.ids)) / 2]
        if len(small) < 2 and all(file.alive.sum() * 2 >= len(file.ids) for file in small):
            return
        self.files = [file for file in self.files if file not in small]
        waiting = list[IndexedFile]()
        for file in small:
            if sum(int(one.alive.sum()) for one in [*waiting, file]) > FILE_ROWS:
                self._merge(waiting)
                waiting = []
            waiting.append(file)
        self._merge(waiting)

    def _merge(self, files: list[IndexedFile]) -> None:
        keys, features = list[str](), list[np.ndarray]()
        for file in files:
            rows = np.flatnonzero(file.alive)
            keys += [file.opened.key(row) for row in rows.tolist()]
            features.append(file.opened.vectors(COLUMN).values[rows])
        if keys:
            self.add(keys, np.concatenate([file.ids[file.alive] for file in files]), np.concatenate(features))
        for file in files:  # after the merged file is there: a kill between leaves rows twice, of which one counts
            remove(file.opened.path)

    def search(self, queries: np.ndarray, top: int) -> list[list[Hit]]:
        """Return for each of the (q, D) unit features the ``top`` images of the highest cosine, best first.

        Equal cosines are in the order of the index. Files are compared side by side, each by one thread: a product
        of a few megabytes that is divided among threads waits for the slowest of them, on a busy machine for long.
        """
        threads = os.cpu_count() or 1
        best = [_Best[tuple[int, int]](top) for _ in queries]
        with _one_thread_each():
            of_files = prefetch_map(partial(_compare, queries=queries, top=top), self.files, threads, 2 * threads)
            for number, of_file in enumerate(of_files):
                for total, own in zip(best, of_file, strict=True):
                    total.add([(number, row) for row in own.rows], own.scores)
        return [self._hits(of_query) for of_query in best]

    def _hits(self, best: "_Best[tuple[int, int]]") -> list[Hit]:
        names = [self.files[file].opened.key(row) for file, row in best.rows]
        return [Hit(name, score) for name, score in zip(names, best.scores.tolist(), strict=True)]


class _Best(Generic[Row]):
    """The best rows of one query so far: ``rows`` and their ``scores``, best first."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.rows = list[Row]()
        self.scores = np.empty(0, np.float32)

    @property
    def least(self) -> float:
        """What a further row must exceed."""
        return float(self.scores[-1]) if len(self.rows) == self.top else -np.inf

    def add(self, rows: Sequence[Row], scores: np.ndarray) -> None:
        """Take further rows with their (n,) scores; of equal ones the first stay."""
        merged = np.concatenate([self.scores, scores])
        order = np.argsort(-merged, kind="stable")[: self.top]
        all_rows = [*self.rows, *rows]
        self.scores = merged[order]
        self.rows = [all_rows[place] for place in order]


def _compare(file: IndexedFile, queries: np.ndarray, top: int) -> list[_Best[int]]:
    """The best rows of a file for each query, its features read `BLOCK_ROWS` at a time."""
    import torch

    best = [_Best[int](top) for _ in queries]
    transposed = torch.from_numpy(np.ascontiguousarray(queries.T))
    buffer = np.empty((min(len(file.ids), BLOCK_ROWS), file.opened.dim), file.opened.dtype)
    for start in range(0, len(file.ids), BLOCK_ROWS):
        block = buffer[: len(file.ids) - start]
        file.opened.read_rows(COLUMN, start, block)
        scores = torch.mm(torch.from_numpy(block), transposed).numpy()
        scores[~file.alive[start : start + len(block)]] = -np.inf
        for query, of_query in enumerate(best):
            own = scores[:, query]
            rows = np.flatnonzero(own > of_query.least)
            if len(rows) > top:
                rows = rows[own[rows] >= np.partition(own[rows], -top)[-top]]
            if len(rows):
                of_query.add((start + rows).tolist(), own[rows])
    return best


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within, torch divides no operation among threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
