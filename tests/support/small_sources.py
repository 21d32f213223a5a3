"""Sources for tests of `ingest`: files on a disk or an object store, and the rows that are read from them."""

import io
from dataclasses import astuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.detect import detect
from pipeline.ingest.rows import Row
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import sha256_json, write_bytes

LIMIT = 1 << 20  # bytes of an image


def empty_store() -> str:
    """The URL of an empty folder on an object store, in this process's memory."""
    fs = fsspec.filesystem("memory")
    if fs.exists("/sources"):
        fs.rm("/sources", recursive=True)
    return "memory://sources"


def rows_of(source: object, columns=(None, None)) -> list[Row]:
    """What `ingest` sees; every row can be hashed as it does."""
    form = detect(str(source), columns)
    rows = list(list_rows(str(source), form, columns))
    assert sha256_json([astuple(row) for row in rows])
    assert len(set(rows)) == len(rows)
    return rows


def plain(rows: list[Row]) -> list[tuple[str | None, str | None, str | None]]:
    """(caption, URL, problem) of each row."""
    return [(row.caption, row.url, row.problem) for row in rows]


def put(folder: object, name: str, data: str | bytes) -> None:
    """Write a file below a local or a remote folder."""
    content = data.encode() if isinstance(data, str) else data
    path = f"{folder}/{name}"
    if path.startswith("memory://"):
        fsspec.filesystem("memory").pipe_file(path, content)
    else:
        write_bytes(path, content)


def parquet_bytes(rows: list[dict], schema: pa.Schema | None = None, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, **options)
    return file.getvalue()
