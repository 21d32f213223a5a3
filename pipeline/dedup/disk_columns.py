"""Columns of numbers, and keys, in temporary files: what `dedup` compares does not have to fit into memory."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

NUMBER_BYTES = 8


class DiskColumn:
    """Numbers (uint64) in a file; `blocks` gives ``block_size`` of them at a time."""

    def __init__(self, path: str, block_size: int) -> None:
        self._path = path
        self._block_size = block_size
        self._length = 0
        open(path, "wb").close()

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        """Add values at the end."""
        self.write(self._length, values)
        self._length += len(values)

    def write(self, start: int, values: np.ndarray) -> None:
        """Overwrite values from index ``start`` on."""
        with open(self._path, "r+b") as file:
            file.seek(start * NUMBER_BYTES)
            file.write(np.ascontiguousarray(values, np.uint64).data)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values from index ``start`` to before ``stop``."""
        return np.fromfile(self._path, np.uint64, stop - start, offset=start * NUMBER_BYTES)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All values in blocks, each with the index of its first one."""
        for start in range(0, self._length, self._block_size):
            yield start, self.read(start, min(self._length, start + self._block_size))

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


class DiskKeys:
    """The keys of all images in a file, by the images' indices; those of one shard are padded to one width.

    ``starts`` has the index of each shard's first image, and the number of all images at the end.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by close()
        self.starts = [0]
        self._offsets = [0]  # of each shard's first key in the file
        self._widths = list[int]()

    def append(self, keys: list[str]) -> None:
        """Add the keys of the next shard."""
        data = np.array([key.encode() for key in keys], np.bytes_)
        self._file.write(data.tobytes())
        self._widths.append(data.itemsize)
        self._offsets.append(self._offsets[-1] + len(keys) * data.itemsize)
        self.starts.append(self.starts[-1] + len(keys))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> str:
        shard = bisect_right(self.starts, index) - 1
        width = self._widths[shard]
        self._file.seek(self._offsets[shard] + (index - self.starts[shard]) * width)
        return self._file.read(width).rstrip(b"\0").decode()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
