"""Records of content ids that do not fit into memory: they are looked at in ranges of ids, one after the other."""

import os
from collections.abc import Iterator

import numpy as np

RANGES = 256  # by the upper 8 bits of an id
RANGE_SHIFT = np.uint64(64 - 8)
RECORDS_IN_MEMORY = 1 << 21  # that wait to be written, 32 MB; fewer in all are never written


class KeyRanges:
    """Records, a structured array whose field ``id`` is a content id, of all parts of a dataset.

    More than `RECORDS_IN_MEMORY` are kept in files, one per range of ids, whose paths begin with ``path``. Ids are the
    first bits of hashes, so that all ranges have about as many.
    """

    def __init__(self, path: str, dtype: "np.dtype[np.void]") -> None:
        self._start = path
        self._dtype = dtype
        self._waiting = list[np.ndarray]()
        self._number_waiting = 0
        self.is_on_disk = False

    def add(self, records: np.ndarray) -> None:
        """Add the records of a part."""
        self._waiting.append(records)
        self._number_waiting += len(records)
        if self._number_waiting > RECORDS_IN_MEMORY:
            self.write()

    def write(self) -> None:
        """Append the waiting records to the files of their ranges."""
        self.is_on_disk = True
        records = self.take_waiting()
        ranges = (records["id"] >> RANGE_SHIFT).astype(np.uint8)
        records = records[np.argsort(ranges, kind="stable")]
        ends = np.cumsum(np.bincount(ranges, minlength=RANGES))
        for number, part in enumerate(np.split(records, ends[:-1])):
            if len(part):
                with open(self._path(number), "ab") as file:
                    file.write(part.tobytes())

    def take_waiting(self) -> np.ndarray:
        """The records that are not written, which are forgotten here."""
        records = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        self._waiting, self._number_waiting = [], 0
        return records

    def read(self, number: int) -> np.ndarray:
        """The written records of a range."""
        path = self._path(number)
        return np.fromfile(path, self._dtype) if os.path.exists(path) else np.empty(0, self._dtype)

    def _path(self, number: int) -> str:
        return f"{self._start}-{number:03d}"


def ranges(*stores: KeyRanges) -> Iterator[list[np.ndarray]]:
    """The records of several stores range by range, each by ascending ids; as one range where all are in memory."""
    if not any(store.is_on_disk for store in stores):
        yield [_by_id(store.take_waiting()) for store in stores]
        return
    for store in stores:
        store.write()
    for number in range(RANGES):
        yield [_by_id(store.read(number)) for store in stores]


def _by_id(records: np.ndarray) -> np.ndarray:
    ordered: np.ndarray = records[np.argsort(records["id"], kind="stable")]
    return ordered
