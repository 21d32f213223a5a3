"""One file without some samples: what stays has the bits it had."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards_spec.embeddings import EmbeddingFile, id_column, write_vectors
from shards_spec.parquet import open_parquet, read_table, write_table
from shards_spec.tar import read_shard, write_shard

OF_WRITER = ("dtype", "dim", "layout")  # metadata of embeddings that their writer adds


def write_like(path: str, new: str, table: pa.Table) -> str:
    """Write a table in row groups and with the compression of the file ``path``; returns its sha256."""
    with open_parquet(path) as file:
        options = _writer_options(file.metadata)
    return write_table(new, table, **options)


def _writer_options(metadata: pq.FileMetaData) -> dict[str, Any]:
    """What `pyarrow.parquet.write_table` takes to write as another file was written."""
    options = dict[str, Any]()
    if metadata.num_row_groups > 1:
        options["row_group_size"] = metadata.row_group(0).num_rows
    if metadata.num_row_groups and metadata.num_columns:
        options["compression"] = metadata.row_group(0).column(0).compression.lower().replace("uncompressed", "none")
    return options


def write_without_rows(path: str, new: str, keys: Collection[str]) -> None:
    """Write a Parquet file without the rows of these keys."""
    table = read_table(path)
    gone = pc.is_in(table.column("key"), pa.array(list(keys), table.column("key").type))
    write_like(path, new, table.filter(pc.invert(gone)))


def write_without_samples(path: str, new: str, keys: Collection[str]) -> None:
    """Write a tar without the samples of these keys."""
    write_shard(new, (sample for sample in read_shard(path) if sample.key not in keys))


def write_without_vectors(path: str, new: str, rows: np.ndarray) -> None:
    """Write a file of embeddings with these ``rows`` (indices) alone, bit by bit."""
    file = EmbeddingFile(path)
    columns = {name: file.vectors(name).take(rows) for name in file.names}
    ids = dict[str, np.ndarray]()
    for name in file.names:
        known = file.ids(name)
        if known is not None:
            ids[id_column(name)] = known[rows]
    meta = {name: value for name, value in file.meta.items() if name not in OF_WRITER}
    write_vectors(new, [file.keys[row] for row in rows.tolist()], columns, ids, meta)
