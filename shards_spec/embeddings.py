"""The teacher cache's files: Parquet, one fixed-size-binary column per view and per caption.

A column holds vectors, or a classifier's soft labels as bytes, which `soft_labels` reads.

Fixed-size binary holds the vector's little-endian bytes; Parquet would widen int8 lists to int32 and reads lists of
float16 fifteen times slower. int8 vectors have a float32 column ``NAME_scale`` beside them: value = int8 · scale. A
file has one row group and one page per column, uncompressed: a column's vectors are the last bytes of its chunk, so
that single rows are read without the others. The small columns come first.
"""

import json
import mmap
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards_spec.files import DataError, is_url, open_read
from shards_spec.library_errors import parquet_errors
from shards_spec.parquet import open_table, write_table
from shards_spec.parquet_footer import row_groups
from shards_spec.sample import parse_object

Dtype = Literal["float32", "float16", "int8"]
STORED: dict[str, Any] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),  # bytes of soft labels and of recorded views
}
FIX = "delete it and run `clipmill cache` again"
LAYOUT = 2  # of a file; 1 had several pages per column and no identities


@dataclass(frozen=True)
class Vectors:
    """A column as stored: ``values`` (n, D), ``scale`` (n,) float32 for int8, ``present`` (n,) false where null.

    Values of uint8 are the bytes of soft labels or of recorded views.
    """

    values: np.ndarray
    scale: np.ndarray | None
    present: np.ndarray

    def take(self, rows: np.ndarray) -> "Vectors":
        """Those rows, in that order."""
        return Vectors(self.values[rows], None if self.scale is None else self.scale[rows], self.present[rows])

    def put(self, rows: np.ndarray, other: "Vectors") -> None:
        """Overwrite rows with another column's."""
        self.values[rows], self.present[rows] = other.values, other.present
        if self.scale is not None:
            self.scale[rows] = other.scale

    def as_floats(self) -> np.ndarray:
        """(n, D): floats as stored, int8 as float32; NaN where null."""
        floats = self.values if self.scale is None else self.values.astype(np.float32) * self.scale[:, None]
        return floats if self.present.all() else np.where(self.present[:, None], floats, np.nan).astype(floats.dtype)


def empty_vectors(rows: int, dim: int, dtype: "np.dtype[Any]") -> Vectors:
    """A column of nulls, of one of the types that are stored."""
    scale = np.zeros(rows, np.float32) if dtype == STORED["int8"] else None
    return Vectors(np.zeros((rows, dim), dtype), scale, np.zeros(rows, bool))


def encode_vectors(values: np.ndarray, dtype: Dtype) -> Vectors:
    """(n, D) floats as they are stored; a row with NaN becomes null."""
    present = ~np.isnan(values).any(axis=1)
    values = np.where(present[:, None], values, 0)
    if dtype != "int8":
        return Vectors(values.astype(STORED[dtype]), None, present)
    scale = np.maximum(np.abs(values).max(axis=1, initial=0), 1e-12) / 127
    return Vectors(np.rint(values / scale[:, None]).astype(np.int8), scale.astype(np.float32), present)


def id_column(name: str) -> str:
    """The column that says what ``image_3``, ``soft_3`` or ``text_0`` was made from; views of an image share one."""
    return "id_image" if name.startswith(("image_", "soft_", "view_")) else f"id_{name}"


def write_vectors(
    path: str, keys: list[str], columns: dict[str, Vectors], ids: dict[str, np.ndarray], meta: dict[str, Any]
) -> str:
    """Write rows in shard order and return the file's sha256.

    ``ids`` maps ``id_image``, ``id_text_0`` … to uint64 (n,), 0 where there is nothing. ``meta`` is JSON and goes to
    the schema's metadata with ``dtype``, ``dim`` and ``layout``.
    """
    small: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    small |= {name: pa.array(own, pa.uint64(), mask=own == 0) for name, own in ids.items()}
    for name, column in columns.items():
        if column.scale is not None:
            small[f"{name}_scale"] = pa.array(column.scale, pa.float32(), mask=~column.present)
    arrays = small | {name: _fixed_binary(column) for name, column in columns.items()}
    first = next(iter(columns.values()), None)
    stored = {dtype: name for name, dtype in STORED.items()}[first.values.dtype] if first else "float16"
    info = {**meta, "dtype": stored, "dim": first.values.shape[1] if first else 0, "layout": LAYOUT}
    schema = pa.schema(
        [pa.field(name, array.type, nullable=name != "key") for name, array in arrays.items()],
        metadata={"clipmill": json.dumps(info)},
    )
    rows = max(1, len(keys))
    return write_table(
        path,
        pa.Table.from_arrays(list(arrays.values()), schema=schema),
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=rows,
        max_rows_per_page=rows,
        data_page_size=2**31 - 1,
    )


def write_embeddings(
    path: str, keys: list[str], columns: dict[str, np.ndarray], meta: dict[str, Any], dtype: Dtype = "float16"
) -> None:
    """Float arrays (n, D) as a file without identities; a row of NaN becomes null."""
    write_vectors(path, keys, {name: encode_vectors(values, dtype) for name, values in columns.items()}, {}, meta)


def _fixed_binary(column: Vectors) -> Any:
    present, width = column.present, column.values.shape[1] * column.values.dtype.itemsize
    validity = None if present.all() else pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
    return pa.Array.from_buffers(
        pa.binary(width), len(present), [validity, pa.py_buffer(np.ascontiguousarray(column.values).tobytes())]
    )


def _open_cache(path: str, file: IO[bytes]) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """A cache file and its metadata. Raises DataError when it is another Parquet file."""
    parquet = open_table(path, file)
    stored = (parquet.schema_arrow.metadata or {}).get(b"clipmill")
    if stored is None:
        raise DataError(f"{path}: no clipmill metadata in it; it is not a teacher cache")
    return parquet, parse_object(stored)


def read_meta(path: str) -> dict[str, Any]:
    """The cache file's own metadata. Raises DataError when the file is no teacher cache."""
    with parquet_errors(path, fix=FIX), open_read(path) as file:
        return _open_cache(path, file)[1]


class EmbeddingFile:
    """One file of the cache, opened: metadata, keys and identities in memory, vectors when asked for.

    Of a local file only the bytes of the rows asked for are read, of a URL whole columns, which are kept. ``at`` is
    where its bytes are when not under ``path``: another file, or memory. Raises DataError when it is no teacher cache,
    broken or of another layout, FileNotFoundError.
    """

    def __init__(self, path: str, at: str | memoryview | None = None) -> None:
        self.path = path
        self._data = at if isinstance(at, memoryview) else None
        self._at = at if isinstance(at, str) else path
        self._is_remote = is_url(self._at)
        with parquet_errors(path, fix=FIX), self._open() as file:
            parquet, self.meta = _open_cache(path, file)
            if self.meta.get("layout") != LAYOUT:
                raise DataError(
                    f"{path}: its layout is {self.meta.get('layout', 1)}, this clipmill reads {LAYOUT}; run "
                    "`clipmill cache` with --overwrite"
                )
            columns = parquet.schema_arrow.names
            self.names = [name for name in columns if _holds_vectors(name)]
            small = parquet.read([name for name in columns if name not in self.names])
            self._keys = small.column("key")
            self._small = {name: _as_numpy(small.column(name)) for name in small.column_names[1:]}
            self.dim, self.dtype = self.meta["dim"], STORED[self.meta["dtype"]]
            self._ends = dict[str, int]()  # where each column's vectors end
            if parquet.metadata.num_row_groups:
                chunks = row_groups(file, parquet.metadata.num_row_groups)[0]
                self._ends = {chunk.path: chunk.data_page + chunk.packed for chunk in chunks}
        self._whole = dict[str, Vectors]()
        self._values_from = dict[str, np.ndarray]()
        if self._data is None and not self._is_remote:
            self._descriptor = os.open(self._at, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row."""
        keys: list[str] = self._keys.to_pylist()
        return keys

    def key(self, index: int) -> str:
        """The key of one row; unlike `keys`, it makes no list of all."""
        return str(self._keys[index])

    def ids(self, name: str) -> np.ndarray | None:
        """Content ids, uint64 (n,), of what each row of a column was made from, 0 where null; None when not known."""
        return self._small.get(id_column(name))

    def vectors(self, name: str) -> Vectors:
        """A whole column. Raises DataError when the file has none of that name."""
        if name not in self.names:
            raise DataError(f"{self.path}: no column {name}, it has {self.names}; run `clipmill cache` with more views")
        present, end = self._present(name), self._ends[name]
        start = end - int(present.sum()) * self.dim * self.dtype.itemsize
        dense = np.frombuffer(self._read(start, end), self.dtype).reshape(-1, self.dim)
        values = dense
        if len(dense) != len(self):
            values = np.zeros((len(self), self.dim), self.dtype)
            values[present] = dense
        return Vectors(values, self._small.get(f"{name}_scale"), present)

    def read_rows(self, name: str, start: int, into: np.ndarray) -> None:
        """Fill a C-contiguous (n, D) array of the stored type with rows from ``start`` on of a column without nulls.

        Raises DataError when the file is shorter than that.
        """
        width = self.dim * self.dtype.itemsize
        begin = self._ends[name] - (len(self) - start) * width
        if self._data is not None or self._is_remote:
            data = self._read(begin, begin + into.nbytes)
            into[:] = np.frombuffer(data, self.dtype).reshape(into.shape)
        elif os.preadv(self._descriptor, [into.data], begin) != into.nbytes:
            raise DataError(f"{self.path}: shorter than its footer says; {FIX}")

    def row(self, name: str, index: int) -> np.ndarray:
        """(D,) float32 of one row; NaN where null. Raises DataError as `vectors` does."""
        stored = self.stored_row(name, index)
        if stored is None:
            return np.full(self.dim, np.nan, np.float32)
        values: np.ndarray = stored.astype(np.float32)
        scale = self._small.get(f"{name}_scale")
        if scale is not None:
            values *= scale[index]
        return values

    def stored_row(self, name: str, index: int) -> np.ndarray | None:
        """(D,) of one row as it is stored; None where null. Raises DataError as `vectors` does."""
        if self._is_remote or name not in self._ends:
            if name not in self._whole:
                self._whole[name] = self.vectors(name)
            whole = self._whole[name]
            row: np.ndarray | None = whole.values[index] if whole.present[index] else None
            return row
        values_from = int(self._count_values(name)[index])
        if not values_from:
            return None
        width = self.dim * self.dtype.itemsize
        start = self._ends[name] - values_from * width
        held = self._mapped if self._data is None else self._data
        return np.frombuffer(self._checked(held[max(start, 0) : start + width], width), self.dtype)

    def _present(self, name: str) -> np.ndarray:
        """Where the column has a value, bool (n,): false where the column is null."""
        present: np.ndarray = self._count_values(name) != 0
        return present

    def _count_values(self, name: str) -> np.ndarray:
        """How many values the column has from each row on, int32 (n,); 0 where it is null."""
        if name not in self._values_from:
            known = self.ids(name)
            if known is None:  # a file without identities: the column itself says where it is null
                with parquet_errors(self.path, fix=FIX), self._open() as file:
                    known = open_table(self.path, file).read(columns=[name]).column(name).is_valid().to_numpy()
            present = known != 0
            self._values_from[name] = np.where(present, present[::-1].cumsum(dtype=np.int32)[::-1], 0)
        return self._values_from[name]

    def _open(self) -> IO[bytes]:
        if self._data is None:
            return open_read(self._at)
        return cast(IO[bytes], pa.BufferReader(pa.py_buffer(self._data)))

    @cached_property
    def _mapped(self) -> memoryview:
        """A local file's bytes, for single rows: a call of the system makes the Python after it slower as well."""
        mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # the rows beside one are not wanted
        return memoryview(mapped)

    def _read(self, start: int, end: int) -> bytes | memoryview:
        data: bytes | memoryview
        if start < 0:
            raise DataError(f"{self.path}: shorter than its columns; {FIX}")
        if self._data is not None:
            data = self._data[start:end]
        elif not self._is_remote:
            data = os.pread(self._descriptor, end - start, start)
        else:
            with open_read(self._at) as file:
                file.seek(start)
                data = file.read(end - start)
        return self._checked(data, end - start)

    def _checked(self, data: bytes | memoryview, size: int) -> bytes | memoryview:
        if len(data) != size:
            raise DataError(f"{self.path}: shorter than its footer says; {FIX}")
        return data


def _holds_vectors(name: str) -> bool:
    return name.startswith(("image_", "text_", "soft_", "view_")) and not name.endswith("_scale")


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, 0 where null."""
    filled = column.fill_null(0) if column.null_count else column
    numbers: np.ndarray = filled.to_numpy()
    return numbers


def read_embeddings(path: str, names: list[str]) -> tuple[list[str], dict[str, np.ndarray], dict[str, Any]]:
    """Keys, the asked columns as float arrays (n, dim) (floats as stored, int8 as float32), and the metadata.

    Null rows come as NaN. Raises DataError when a column is not there or the file is broken.
    """
    file = EmbeddingFile(path)
    return file.keys, {name: file.vectors(name).as_floats() for name in names}, file.meta
