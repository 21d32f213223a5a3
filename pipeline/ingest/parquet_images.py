"""Parquet files with the images in them, as on Hugging Face."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.cells import NO_URL, URL_PATTERN, check_once, format_names, make_row
from pipeline.ingest.parquet_cells import (
    CELL_TOO_LARGE,
    check_types,
    column_size,
    is_binary,
    other_columns,
    read_cells,
    source_errors,
)
from pipeline.ingest.rows import CAPTION_NAMES, URL_NAMES, Columns, ParquetRef, Row, find_column
from pipeline.ingest.source_files import SourceFile
from pipeline.ingest.source_io import open_parquet, open_random_access
from shards_spec.files import UserError, is_url
from shards_spec.parquet_footer import row_groups
from shards_spec.sample import NAMED_IMAGES

URL_BYTES = 100  # of a cell that tell whether it is a URL


def parquet_form(path: str, columns: Columns) -> Literal["parquet", "hf-parquet"]:
    """Whether a Parquet file is a list (parquet) or has images in it (hf-parquet). Raises UserError."""
    with source_errors(path), open_parquet(path) as table:
        leaf = image_column(table.schema_arrow, columns[1])
        if leaf is None:
            return "parquet"
        _check_leaf_once(path, table, leaf)
        if leaf.endswith(".bytes"):
            return "hf-parquet"
        return "parquet" if _starts_with_url(path, table, leaf) else "hf-parquet"


def _starts_with_url(path: str, table: pq.ParquetFile, column: str) -> bool:
    """Whether the first cell of a column of bytes is a URL and not an image."""
    if not table.num_row_groups:
        return False
    with open_random_access(path) as file:
        chunks = row_groups(file, table.num_row_groups)[0]
        rows = table.metadata.row_group(0).num_rows
        if column_size(file, chunks, column, rows=rows, remote=is_url(path)).too_large:
            return False
    batch = next(table.iter_batches(1, columns=[column]), None)
    if batch is None or not len(batch):
        return False
    cell = batch.column(0)[0].as_py() or b""
    return URL_PATTERN.match(cell[:URL_BYTES].decode(errors="replace")) is not None


def image_column(schema: pa.Schema, given: str | None = None) -> str | None:
    """Path of the leaf that holds encoded images: of a struct (``image.bytes``), or a column of bytes.

    The column ``given`` by name comes first, then those with usual names for images, then the first struct. None when
    there is no such column.
    """
    leaves = {}
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type):
            leaves[field.name] = f"{field.name}.bytes"
        elif is_binary(kind) and (field.name == given or field.name.strip().lower() in NAMED_IMAGES):
            leaves[field.name] = field.name
    if given in leaves:
        return leaves[given]
    index = find_column(None, NAMED_IMAGES, list(leaves))
    return list(leaves.values())[index or 0] if leaves else None


def _check_leaf_once(source: str, table: pq.ParquetFile, leaf: str) -> None:
    """Raises UserError when the images' column, or the path of its leaf, is there more than once."""
    check_once(source, table.schema_arrow.names, [leaf.removesuffix(".bytes")])
    check_once(source, [table.schema.column(index).path for index in range(len(table.schema))], [leaf])


def image_parquet_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per row of the Parquet files; of a row with a list of captions, one each.

    Raises UserError for a file without images or without a caption column.
    """
    for file in files:
        with source_errors(file.path), open_parquet(file.path) as table:
            yield from _file_rows(file, table, columns)


def _file_rows(file: SourceFile, table: pq.ParquetFile, columns: Columns) -> Iterator[Row]:
    schema = table.schema_arrow
    leaf = image_column(schema, columns[1])
    if leaf is None:
        raise UserError(f"--source {file.path}: no column holds images; its columns are {format_names(schema.names)}")
    _check_leaf_once(file.path, table, leaf)
    caption, url = _text_columns(file.path, schema, leaf, columns)
    image_names = (leaf, leaf.removesuffix(".bytes"))
    others = other_columns(schema, [caption, *([] if url is None else [url]), *image_names])
    rows = zip(row_refs(file.path, table, leaf), read_cells(file.path, table, caption, url, others), strict=False)
    for number, (ref, cells) in enumerate(rows):
        name = f"{file.below}#{number}"  # stands for the URL where there is none
        if cells is None:
            yield Row(None, name, CELL_TOO_LARGE, file.stamp)
            continue
        for text in cells.captions:
            row = make_row(text, cells.url, extra=cells.others)
            problem = None if row.problem == NO_URL else row.problem
            yield replace(row, url=row.url or name, problem=problem, stamp=file.stamp, image_ref=ref)


def _text_columns(path: str, schema: pa.Schema, leaf: str, columns: Columns) -> tuple[str, str | None]:
    """(caption column, URL column or None) beside the images' ``leaf``. Raises UserError."""
    image_names = (leaf, leaf.removesuffix(".bytes"))
    names = [name for name in schema.names if name not in image_names]
    given_url = None if columns[1] in image_names else columns[1]  # --url-col may name the images' column
    caption = find_column(columns[0], CAPTION_NAMES, names)
    url = find_column(given_url, URL_NAMES, names)
    if caption is None:
        missing = f"no column {columns[0]!r}" if columns[0] is not None else "no caption column"
        raise _missing_column(path, missing, leaf, names, "--caption-col")
    if url is None and given_url is not None:
        raise _missing_column(path, f"no column {given_url!r}", leaf, names, "--url-col")
    caption_name = names[caption]
    url_name = names[url] if url is not None else None
    check_once(path, names, [caption_name] if url_name is None else [caption_name, url_name])
    check_types(path, schema, caption_name, url_name)
    return caption_name, url_name


def _missing_column(path: str, missing: str, leaf: str, names: list[str], option: str) -> UserError:
    return UserError(
        f"--source {path}: {missing} beside its images {leaf}; it has {format_names(names)}; give {option}"
    )


def row_refs(path: str, table: pq.ParquetFile, leaf: str) -> Iterator[ParquetRef]:
    """Where the images of all rows of a Parquet file lie, in order."""
    for group in range(table.num_row_groups):
        for row in range(table.metadata.row_group(group).num_rows):
            yield ParquetRef(path, leaf, group, row)
