"""Parquet files as sources: lists of URLs, and files with the pictures in them."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.local import PICTURE_COLUMNS, SourceFile
from pipeline.places import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    ParquetPlace,
    Row,
    find_column,
    open_parquet,
    plain_bytes,
    text_of,
)
from shards_spec.files import UserError


def picture_column(schema: pa.Schema) -> str | None:
    """The leaf that holds encoded pictures: of a struct (``image.bytes``), or a binary column with a picture's name."""
    found = {}
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
            found[field.name] = f"{field.name}.bytes"
        elif _is_binary(kind) and field.name.strip().lower() in PICTURE_COLUMNS:
            found[field.name] = field.name
    index = find_column(None, PICTURE_COLUMNS, list(found))
    return list(found.values())[index or 0] if found else None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def picture_parquet_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per row of the Parquet files. Raises UserError for a file without pictures or without a caption column."""
    for file in files:
        try:
            with open_parquet(file.path) as table:
                yield from _parquet_rows(file, table, columns)
        except (pa.ArrowException, OSError) as error:
            wrong = f"not a readable Parquet file with text columns ({error})"
            raise UserError(f"--source {file.path}: {wrong}") from error


def _parquet_rows(file: SourceFile, table: pq.ParquetFile, columns: Columns) -> Iterator[Row]:
    schema = table.schema_arrow
    leaf = picture_column(schema)
    if leaf is None:
        raise UserError(f"--source {file.path}: no column holds pictures; its columns are {schema.names}")
    names = [name for name in schema.names if name not in (leaf, leaf.removesuffix(".bytes"))]
    caption, url = find_column(columns[0], CAPTION_NAMES, names), find_column(columns[1], URL_NAMES, names)
    if caption is None or (url is None and columns[1] is not None):
        wanted, option = (columns[0], "--caption-col") if caption is None else (columns[1], "--url-col")
        there = f"no column {wanted!r}" if wanted is not None else "no caption column"
        raise UserError(f"--source {file.path}: {there} beside its pictures {leaf}; it has {names}; give {option}")
    chosen = [names[index] for index in (caption, url) if index is not None]
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    places = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    number = 0
    for batch in table.iter_batches(1024, columns=chosen):
        texts = [plain_bytes(batch.column(name)) for name in chosen]
        for cells in zip(*texts, strict=True):
            text, broken = text_of(cells[0])
            address = (text_of(cells[1])[0] or "").strip() if url is not None else ""
            place = ParquetPlace(file.path, leaf, *next(places))
            problem = NOT_UTF8 if broken else None
            yield Row(text, address or f"{file.below}#{number}", problem, file.stamp, place)
            number += 1
