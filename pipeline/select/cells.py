"""Unit embeddings on disk, and their division into cells by spherical k-means."""

import logging
import os
from collections.abc import Iterator

import numpy as np

from shards_spec.counter_rng import raw_draws
from shards_spec.files import DISK_FULL, UserError
from shards_spec.messages import counted

log = logging.getLogger(__name__)
ROUNDS = 10  # of k-means
SEEN_OF_CELL = 64  # embeddings that k-means sees for each centre
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
            f"--semantic-duplicates needs {needed:.1f} GB for embeddings in {os.path.dirname(self._path)}, which has "
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
    for start in range(0, len(embeddings), step):
        stop = min(len(embeddings), start + step)
        cells[start:stop], similarities[start:stop] = _nearest(embeddings.read(start, stop), centres)
    order = np.argsort(cells, kind="stable")
    ends = np.cumsum(np.bincount(cells, minlength=len(centres)))
    for start, stop in zip(np.append(0, ends[:-1]), ends, strict=True):
        rows = order[start:stop]
        if len(rows):
            yield rows[np.argsort(similarities[rows].round(DECIMALS), kind="stable")]


def _centres(embeddings: Embeddings, number: int) -> np.ndarray:
    """Unit centres, float32 (number, D), by k-means over some of the embeddings."""
    rows = np.arange(len(embeddings))
    wanted = max(number, min(MOST_SEEN, SEEN_OF_CELL * number))
    if wanted < len(rows):
        rows = np.unique(raw_draws("select/cells", wanted) % np.uint64(len(rows))).astype(np.int64)
    seen = embeddings.take(rows)
    number = min(number, len(seen))
    centres = seen[np.linspace(0, len(seen) - 1, number).astype(np.int64)]
    log.info("select: k-means of %s over %s", counted(number, "cell"), counted(len(seen), "embedding", style=","))
    step = max(1, PRODUCTS // number)
    for _ in range(ROUNDS):
        sums = np.zeros_like(centres)
        for start in range(0, len(seen), step):
            block = seen[start : start + step]
            cells, _ = _nearest(block, centres)
            order = np.argsort(cells, kind="stable")
            own, first = np.unique(cells[order], return_index=True)
            sums[own] += np.add.reduceat(block[order], first)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), centres)
    return centres


def _nearest(block: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each embedding, and its similarity to that one's centre."""
    cosines = block @ centres.T
    cells = cosines.argmax(axis=1)
    return cells, np.take_along_axis(cosines, cells[:, None], axis=1)[:, 0]
