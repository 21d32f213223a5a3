"""Captions, URLs and other cells of Parquet files as rows of a list. Memory is bounded whatever the file holds."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingest.cells import MAX_CELL_BYTES, format_names
from pipeline.ingest.parquet_pages import MAX_PAGE_BYTES, largest_pages
from pipeline.ingest.rows import decode_text
from pipeline.ingest.source_io import open_parquet, open_random_access
from shards_spec.files import UserError, is_url
from shards_spec.library_errors import parquet_errors
from shards_spec.parquet_footer import Chunk, row_groups

log = logging.getLogger(__name__)
BATCH_ROWS = 1024  # read at a time
BATCH_BYTES = 1 << 27  # read at a time, if every cell were as large as the largest page
LARGE_BYTES = 1 << 22  # of a dictionary or a page; writers aim at 1 MiB
MAX_CAPTIONS = 1000  # of a row, on average: with more, the row group is not read
MAX_VALUES = 64  # of a row's cell in another column, on average: with more, it is not kept
TYPE_CHARS = 80  # of a type's name in a message
CELL_TOO_LARGE = "cell too large"


@contextmanager
def source_errors(path: str) -> Iterator[None]:
    """Turn what PyArrow raises over a source's file into a UserError that begins with --source."""
    try:
        with parquet_errors(path, given=True):
            yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("--source") else f"--source {text}") from error


# types of columns


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of a type holds text or bytes, however Arrow stores them, or nothing but nulls."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return is_binary(kind) or any(test(kind) for test in tests)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column of a type holds bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_text_list(kind: pa.DataType) -> bool:
    """Whether a column of a type holds lists of texts, each of them a caption."""
    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests) and is_text(kind.value_type)


def _has_binary(kind: pa.DataType) -> bool:
    """Whether a type is one of bytes, or a list or a struct with bytes in it."""
    parts = [kind.field(index).type for index in range(kind.num_fields)]
    return is_binary(kind) or any(_has_binary(part) for part in parts)


def check_types(source: str, schema: pa.Schema, caption: str, url: str | None) -> None:
    """Raises UserError naming a column, and its type, that does not hold text."""
    caption_type = schema.field(caption).type
    if not is_text(caption_type) and not _is_text_list(caption_type):
        raise UserError(
            f"--source {source}: the column {caption!r} is {str(caption_type)[:TYPE_CHARS]}, not text or a list of "
            "texts; change --caption-col"
        )
    if url is not None and not is_text(schema.field(url).type):
        kind = str(schema.field(url).type)[:TYPE_CHARS]
        raise UserError(f"--source {source}: the column {url!r} is {kind}, not text; change --url-col")


def other_columns(schema: pa.Schema, chosen: list[str]) -> list[str]:
    """Names of the columns that are kept beside the ``chosen`` ones: those of bytes, such as images, are not."""
    names = schema.names
    candidates = [name for name in names if name not in chosen and names.count(name) == 1]
    return [name for name in candidates if not _has_binary(schema.field(name).type)]


def other_types(source: str) -> dict[str, pa.DataType]:
    """Types of the columns of a Parquet file as raw shards have them: text without a dictionary or views."""
    with source_errors(source), open_parquet(source) as table:
        schema = table.schema_arrow
        types = {}
        for name in schema.names:
            if schema.names.count(name) == 1:
                kind = schema.field(name).type
                types[name] = pa.string() if is_text(kind) else kind
        return types


# sizes of columns


@dataclass(frozen=True)
class ColumnSize:
    """How much memory a column of a row group may take.

    Attributes:
        dictionary: Bytes of the largest dictionary, unpacked.
        page: Bytes of the largest other page, unpacked.
        text_leaves: Paths of the leaf columns that hold text.
        values: Values per row, on average.
    """

    dictionary: int
    page: int
    text_leaves: tuple[str, ...]
    values: float

    @property
    def too_large(self) -> bool:
        """Whether the column must not be unpacked."""
        return max(self.dictionary, self.page) > MAX_PAGE_BYTES or self.values > MAX_CAPTIONS

    @property
    def can_be_kept(self) -> bool:
        """Whether the cells may be kept beside the caption: no long lists, no long texts in lists."""
        is_flat = not any("." in leaf for leaf in self.text_leaves)
        is_small = is_flat or max(self.dictionary, self.page) <= LARGE_BYTES
        return self.values <= MAX_VALUES and not self.too_large and is_small


def column_size(file: IO[bytes], chunks: tuple[Chunk, ...], name: str, *, rows: int, remote: bool) -> ColumnSize:
    """The size of the column ``name`` of a row group with ``chunks`` and ``rows``."""
    own = [chunk for chunk in chunks if f"{chunk.path}.".startswith(f"{name}.")]
    text_chunks = [chunk for chunk in own if chunk.is_text]
    pages = [largest_pages(file, chunk, remote) for chunk in text_chunks]
    return ColumnSize(
        dictionary=max((dictionary for dictionary, _ in pages), default=0),
        page=max((page for _, page in pages), default=0),
        text_leaves=tuple(chunk.path for chunk in text_chunks),
        values=max((chunk.values for chunk in own), default=0) / max(rows, 1),
    )


# cells


class Cells(NamedTuple):
    """The cells of a row: its captions (one, None for a null, or those of a list), its URL, its other columns."""

    captions: list[bytes | None]
    url: bytes | None
    others: dict[str, Any]


def read_cells(
    source: str, table: pq.ParquetFile, caption: str, url: str | None, others: list[str]
) -> Iterator[Cells | None]:
    """The cells of each row, in the file's order; None for a row whose caption or URL is too large to be read.

    Of the ``others``, those whose cells are too large are left out, with a warning.
    """
    wanted = [caption] if url is None else [caption, url]
    left_out = set[str]()
    with open_random_access(source) as file:
        for group, chunks in enumerate(row_groups(file, table.num_row_groups)):
            rows = int(table.metadata.row_group(group).num_rows)
            sizes = {}
            for name in (*wanted, *others):
                sizes[name] = column_size(file, chunks, name, rows=rows, remote=is_url(source))
            if any(sizes[name].too_large for name in wanted):
                yield from (None for _ in range(rows))
                continue
            kept = [name for name in others if sizes[name].can_be_kept]
            left_out |= set(others) - set(kept)
            for batch in _batches(source, group, {name: sizes[name] for name in (*wanted, *kept)}):
                yield from _batch_cells(batch, caption, url)
    if left_out:
        log.warning("%s: cells too large to be kept in the columns %s", source, format_names(sorted(left_out)))


def _batches(source: str, group: int, sizes: dict[str, ColumnSize]) -> Iterator[pa.RecordBatch]:
    """Batches that take at most `BATCH_BYTES`, even when every cell is as large as the largest page.

    Columns with a large dictionary are read as indices into it: a value of 1 MB that a thousand rows have takes 1 MB.
    """
    page_bytes = [1]
    dictionary_leaves: list[str] = []
    for size in sizes.values():
        if size.dictionary > LARGE_BYTES:
            dictionary_leaves += size.text_leaves
            page_bytes.append(size.page)
        else:
            page_bytes.append(max(size.page, size.dictionary))
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(page_bytes)))
    with open_parquet(source, dictionary_leaves) as table:
        yield from table.iter_batches(rows, row_groups=[group], columns=list(sizes), use_threads=False)


def _batch_cells(batch: pa.RecordBatch, caption: str, url: str | None) -> Iterator[Cells]:
    captions = _texts(batch.column(caption))
    urls: list[bytes | None] = [None] * len(batch) if url is None else _bytes(batch.column(url))
    names = [name for name in batch.schema.names if name not in (caption, url)]
    columns = [_values(batch.column(name)) for name in names]
    if not columns:
        return map(Cells, captions, urls, repeat({}))
    others = (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    return map(Cells, captions, urls, others)


def _texts(cells: pa.Array) -> list[list[bytes | None]]:
    """The captions of each cell: its text, None for a null, or the texts of its list."""
    if not _is_text_list(cells.type):
        return [[cell] for cell in _bytes(cells)]
    flat = iter(_bytes(cells.flatten()))
    captions: list[list[bytes | None]] = []
    for length in pc.list_value_length(cells).to_pylist():
        texts: list[bytes | None] = [text for text in islice(flat, length or 0) if text is not None]
        captions.append(texts or [None])
    return captions


def _bytes(cells: pa.Array) -> list[bytes | None]:
    """The bytes of each cell, cut where it is too large; equal cells of a dictionary are one object."""
    if isinstance(cells, pa.ExtensionArray):
        return _bytes(cells.storage)
    if isinstance(cells, pa.DictionaryArray):
        used = cells.indices.drop_null().unique()
        values = dict(zip(used.to_pylist(), _bytes(cells.dictionary.take(used)), strict=True))
        return [values.get(index) for index in cells.indices.to_pylist()]
    # one byte more than allowed tells that the cell is too large
    cut: list[bytes | None] = pc.binary_slice(cells.cast(pa.large_binary()), 0, MAX_CELL_BYTES + 1).to_pylist()
    return cut


def _values(cells: pa.Array) -> list[Any]:
    """The cells of another column; a text that is too long becomes None."""
    if not is_text(cells.type):
        return cast(list[Any], cells.to_pylist())
    return [decode_text(cell)[0] if cell is None or len(cell) <= MAX_CELL_BYTES else None for cell in _bytes(cells)]
