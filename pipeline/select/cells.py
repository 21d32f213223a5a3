"""Unit embeddings on disk, and their division into cells by spherical k-means."""

import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np

from shards_spec.counter_rng import raw_draws
from shards_spec.files import DISK_FULL, UserError
from shards_spec.messages import counted

log = logging.getLogger(__name__)
ROUNDS = 10  # of k-means, over what it sees
ROUNDS_OF_ALL = 2  # more of them over all embeddings, where it cannot see enough of them
SEEN_OF_CELL = 256  # embeddings that k-means sees for each centre; with 64 it finds 5 % less of what is alike
MOST_SEEN = 1 << 18  # embeddings that it sees at the most: 0.5 GB of 512 numbers
PRODUCTS = 1 << 23  # cosines that are computed at a time
MAPPED_ROWS = 1024  # embeddings that are taken at a time
DECIMALS = 4  # of a similarity to the centre: what differs less is a tie, and the first one comes first


class Embeddings:
    """Unit embeddings in a file, float16 (n, D)."""

    STORED = np.dtype("<f2")

    def __init__(self, path: str) -> None:
        self._path = path
        self._rows = 0
        self.dim = 0
        open(path, "wb").close()

    def __len__(self) -> int:
        return self._rows

    def append(self, values: np.ndarray) -> None:
        """Add (n, D) at the end. Raises UserError when the disk is full."""
        self.dim = values.shape[1]
        try:
            with open(self._path, "r+b") as file:
                file.seek(self._rows * self._row_bytes)
                file.write(np.ascontiguousarray(values, self.STORED).data)
        except OSError as error:
            raise self._full(error, self._rows + len(values)) from error
        self._rows += len(values)

    def reserve(self, rows: int) -> None:
        """Make room on the disk, once the first rows are there. Raises UserError when it has none."""
        if rows > 0:
            try:
                with open(self._path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, rows * self._row_bytes)
            except OSError as error:
                raise self._full(error, rows) from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows from ``start`` to before ``stop``, float32."""
        number = (stop - start) * self.dim
        values = np.fromfile(self._path, self.STORED, number, offset=start * self._row_bytes)
        return values.reshape(-1, self.dim).astype(np.float32)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All rows, so many at a time, each time with the number of the first one."""
        for start in range(0, self._rows, size):
            yield start, self.read(start, min(self._rows, start + size))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """These rows, float32."""
        taken = np.empty((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), MAPPED_ROWS):  # mapped anew, or all that was read would count as memory
            mapped = np.memmap(self._path, self.STORED, "r", shape=(self._rows, self.dim))
            taken[start : start + MAPPED_ROWS] = mapped[rows[start : start + MAPPED_ROWS]]
        return taken

    @property
    def _row_bytes(self) -> int:
        return self.dim * self.STORED.itemsize

    def _full(self, error: OSError, rows: int) -> Exception:
        if error.errno not in DISK_FULL:
            return error
        needed = rows * self._row_bytes / 1e9
        return UserError(
            f"select needs {needed:.1f} GB for embeddings in {os.path.dirname(self._path)}, which has "
            "no room for them: name a folder on another disk with TMPDIR, and rerun the same command"
        )


def divide(embeddings: Embeddings, number: int) -> Iterator[np.ndarray]:
    """The rows of each cell, int64, by ascending similarity to its centre; cells without any are left out.

    Memory: 20 bytes an embedding, the centres, and the embeddings that k-means sees.
    """
    if not len(embeddings):
        return
    centres = _centres(embeddings, min(number, len(embeddings)))
    cells = np.empty(len(embeddings), np.uint32)
    similarities = np.empty(len(embeddings), np.float32)
    step = max(1, PRODUCTS // len(centres))
    for start, block in embeddings.blocks(step):
        stop = start + len(block)
        cells[start:stop], similarities[start:stop] = _nearest(block, centres)
    order = np.argsort(cells, kind="stable")
    ends = np.cumsum(np.bincount(cells, minlength=len(centres)))
    for start, stop in zip(np.append(0, ends[:-1]), ends, strict=True):
        rows = order[start:stop]
        if len(rows):
            yield rows[np.argsort(similarities[rows].round(DECIMALS), kind="stable")]


def _centres(embeddings: Embeddings, number: int) -> np.ndarray:
    """Unit centres, float32 (number, D), by k-means over some of the embeddings.

    Where memory allows few of them for a centre, the last rounds read all of them from the disk: a centre that is the
    mean of few is not where the middle of its cell is, and borders then divide more of what is alike.
    """
    wanted = max(number, min(MOST_SEEN, SEEN_OF_CELL * number))
    rows = np.arange(len(embeddings))
    if wanted < len(rows):
        rows = np.unique(raw_draws("select/cells", wanted) % np.uint64(len(rows))).astype(np.int64)
    seen = embeddings.take(rows)
    number = min(number, len(seen))
    step = max(1, PRODUCTS // number)
    log.info("select: k-means of %s over %s", counted(number, "cell"), counted(len(seen), "embedding", style=","))
    centres = seen[np.linspace(0, len(seen) - 1, number).astype(np.int64)]
    for _ in range(ROUNDS):
        centres = _moved(centres, (seen[start : start + step] for start in range(0, len(seen), step)))
    is_scarce = len(seen) < len(embeddings) and SEEN_OF_CELL * number > MOST_SEEN
    for _ in range(ROUNDS_OF_ALL if is_scarce else 0):
        centres = _moved(centres, (block for _, block in embeddings.blocks(step)))
    return centres


def _moved(centres: np.ndarray, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The centres of what is nearest to each of these ones; one that nothing is nearest to stays."""
    sums = np.zeros_like(centres)
    for block in blocks:
        cells, _ = _nearest(block, centres)
        order = np.argsort(cells, kind="stable")
        own, first = np.unique(cells[order], return_index=True)
        sums[own] += np.add.reduceat(block[order], first)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), centres)


def _nearest(block: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each embedding, and its similarity to that one's centre."""
    cosines = block @ centres.T
    cells = cosines.argmax(axis=1)
    return cells, np.take_along_axis(cosines, cells[:, None], axis=1)[:, 0]
