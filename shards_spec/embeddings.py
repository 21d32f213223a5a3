"""The teacher cache: one Parquet file per shard, one fixed-size-binary column per view and per caption.

Fixed-size binary holds the vector's little-endian bytes; Parquet would widen int8 lists to int32 and reads lists of
float16 fifteen times slower. int8 vectors have a float32 column ``NAME_scale`` beside them: value = int8 · scale.
"""

import json
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards_spec.files import DataError, atomic_writer, is_url, open_read

Dtype = Literal["float16", "int8"]


def write_embeddings(
    path: str, keys: list[str], columns: dict[str, np.ndarray], meta: dict[str, Any], dtype: Dtype = "float16"
) -> None:
    """Write rows in shard order.

    ``columns`` maps ``image_0`` … ``text_0`` … to float arrays (n, dim); a row of NaN becomes null (a sample with
    fewer captions than its neighbours). ``meta`` is JSON and goes to the schema's metadata with shape and dtype.
    """
    arrays, fields = [pa.array(keys, pa.string())], [pa.field("key", pa.string(), nullable=False)]
    dim = next(iter(columns.values())).shape[1] if columns else 0
    for name, values in columns.items():
        present = ~np.isnan(values).any(axis=1)
        vectors, scale = _encode(values, dtype)
        arrays.append(_fixed_binary(vectors, present))
        fields.append(pa.field(name, arrays[-1].type))
        if scale is not None:
            arrays.append(pa.array(scale, pa.float32(), mask=~present))
            fields.append(pa.field(f"{name}_scale", pa.float32()))
    info = {**meta, "dtype": dtype, "dim": dim}
    schema = pa.schema(fields, metadata={"clipmill": json.dumps(info)})
    with atomic_writer(path) as file:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema), file, compression="none", use_dictionary=False,
            write_statistics=False,
        )  # fmt: skip


def _encode(values: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, np.ndarray | None]:
    if dtype == "float16":
        return values.astype("<f2"), None
    scale = np.maximum(np.abs(values).max(axis=1), 1e-12) / 127
    return np.rint(np.nan_to_num(values / scale[:, None])).astype(np.int8), scale.astype(np.float32)


def _fixed_binary(vectors: np.ndarray, present: np.ndarray) -> Any:
    width = vectors.shape[1] * vectors.dtype.itemsize
    validity = None if present.all() else pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
    return pa.Array.from_buffers(
        pa.binary(width), len(vectors), [validity, pa.py_buffer(np.ascontiguousarray(vectors).tobytes())]
    )


def read_meta(path: str) -> dict[str, Any]:
    """The cache file's own metadata. Raises DataError when the file is no teacher cache."""
    try:
        with open_read(path) as file:
            stored = (pq.read_schema(file).metadata or {}).get(b"clipmill")
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(
            f"{path}: not a readable Parquet file ({error}); delete it and run `clipmill cache` again"
        ) from error
    if stored is None:
        raise DataError(f"{path}: no clipmill metadata in it; it is not a teacher cache")
    meta: dict[str, Any] = json.loads(stored)
    return meta


def read_embeddings(path: str, names: list[str]) -> tuple[list[str], dict[str, np.ndarray], dict[str, Any]]:
    """Keys, the asked columns as float arrays (n, dim) (float16 as stored, int8 as float32), and the metadata.

    Null rows come as NaN. Raises DataError when a column is not there or the file is broken.
    """
    meta = read_meta(path)
    scales = [f"{name}_scale" for name in names] if meta["dtype"] == "int8" else []
    with open_read(path) as file:
        available = pq.read_schema(file).names
        if missing := [name for name in names if name not in available]:
            raise DataError(f"{path}: no column {missing[0]}, it has {available}; run `clipmill cache` with more views")
        table = pq.read_table(path if not is_url(path) else file, columns=["key", *names, *scales]).combine_chunks()
    columns = {name: _decode(table, name, meta["dim"], meta["dtype"]) for name in names}
    return table.column("key").to_pylist(), columns, meta


def _decode(table: Any, name: str, dim: int, dtype: Dtype) -> np.ndarray:
    chunks = [_vectors(chunk, dim, dtype) for chunk in table.column(name).chunks]
    values = np.concatenate(chunks) if len(chunks) != 1 else chunks[0]
    column = table.column(name)
    if dtype == "int8":
        values = values.astype(np.float32) * table.column(f"{name}_scale").to_numpy()[:, None]
    if column.null_count:
        values = values.astype(values.dtype, copy=True)
        values[column.is_null().to_numpy()] = np.nan
    return values


def _vectors(chunk: Any, dim: int, dtype: Dtype) -> np.ndarray:
    stored = np.dtype("<f2" if dtype == "float16" else "i1")
    start = chunk.offset * dim
    return np.frombuffer(chunk.buffers()[1], stored)[start : start + len(chunk) * dim].reshape(len(chunk), dim)
