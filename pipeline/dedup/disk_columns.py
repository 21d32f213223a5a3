"""Columns of numbers, and keys, in temporary files: what `dedup` compares does not have to fit into memory."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np


class Column:
    """Numbers (uint64) in a file, read and written in pieces of at most ``piece`` of them."""

    def __init__(self, path: str, piece: int) -> None:
        self._path, self._piece = path, piece
        self.length = 0
        open(path, "wb").close()

    def append(self, values: np.ndarray) -> None:
        """Add at the end."""
        self.write(self.length, values)
        self.length += len(values)

    def write(self, start: int, values: np.ndarray) -> None:
        """Put values from ``start`` on."""
        with open(self._path, "r+b") as file:
            file.seek(start * 8)
            file.write(np.ascontiguousarray(values, np.uint64).data)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values from ``start`` to before ``stop``."""
        return np.fromfile(self._path, np.uint64, stop - start, offset=start * 8)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """All values, as (start, values)."""
        for start in range(0, self.length, self._piece):
            yield start, self.read(start, min(self.length, start + self._piece))

    def take(self, index: np.ndarray) -> np.ndarray:
        """The values at ``index`` (integers [n])."""
        if not len(index):
            return np.empty(0, np.uint64)
        mapped = np.memmap(self._path, np.uint64, "r")
        return np.asarray(mapped[index.astype(np.int64)])

    def put(self, index: np.ndarray, values: np.ndarray) -> None:
        """Overwrite the values at ``index`` (integers [n])."""
        if len(index):
            mapped = np.memmap(self._path, np.uint64, "r+")
            mapped[index.astype(np.int64)] = values
            mapped.flush()


class Keys:
    """The keys of all entries in a file, those of one shard padded to one width."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by Search
        self.starts, self._bases, self._widths = [0], [0], list[int]()

    def append(self, keys: list[str]) -> None:
        """The next shard's."""
        data = np.array([key.encode() for key in keys], np.bytes_)
        self._file.write(data.tobytes())
        self._widths.append(data.itemsize)
        self._bases.append(self._bases[-1] + len(keys) * data.itemsize)
        self.starts.append(self.starts[-1] + len(keys))

    def __getitem__(self, entry: int) -> str:
        shard = bisect_right(self.starts, entry) - 1
        width = self._widths[shard]
        self._file.seek(self._bases[shard] + (entry - self.starts[shard]) * width)
        return self._file.read(width).rstrip(b"\0").decode()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
