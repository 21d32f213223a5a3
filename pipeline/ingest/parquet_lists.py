"""Parquet files as sources: lists of URLs, and files with the images in them. Memory is bounded for any content."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingest.cells import MAX_CELL_BYTES, URL_PATTERN, check_once, files_folder, make_row, pick_columns, shown
from pipeline.ingest.parquet_pages import MAX_PAGE_BYTES, largest_pages
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    URL_NAMES,
    Columns,
    ParquetPlace,
    Row,
    SourceFile,
    find_column,
    open_parquet,
    open_parts,
    text_of,
)
from shards_spec.files import UserError, is_url
from shards_spec.library_errors import parquet_errors
from shards_spec.parquet_footer import Chunk, row_groups
from shards_spec.sample import NAMED_IMAGES

log = logging.getLogger(__name__)
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 25  # read at a time, if every cell were as large as the largest page
LARGE = 1 << 22  # bytes of a dictionary or a page; writers aim at 1 MiB
MAX_TEXTS, MAX_VALUES = 1000, 64  # captions of a row, values of another column's, on an average
CELL_TOO_LARGE = "cell too large"
TYPE_CHARS = 80  # of a type's name in a message


# types


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of a type has text or bytes, whatever Arrow's way to store them; a column of nulls has none."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return is_binary(kind) or any(
        test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type is one of bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_texts(kind: pa.DataType) -> bool:
    """Whether a type is a list of texts, each of them a caption."""
    tests = (
        pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
        pa.types.is_large_list_view,
    )  # fmt: skip
    return any(test(kind) for test in tests) and is_text(kind.value_type)


def _check_types(source: str, schema: pa.Schema, caption: str, url: str | None) -> None:
    """Raises UserError that names a column, and its type, that is no text."""
    for name, option, allowed in ((caption, "--caption-col", "text or a list of texts"), (url, "--url-col", "text")):
        kind = schema.field(name).type if name is not None else pa.null()
        if not is_text(kind) and not (name == caption and _is_texts(kind)):
            raise UserError(
                f"--source {source}: the column {name!r} is {str(kind)[:TYPE_CHARS]}, not {allowed}; change {option}"
            )


def _texts(cells: pa.Array) -> list[list[bytes | None]]:
    """The captions of each cell: one, none (a null), or those of its list."""
    if not _is_texts(cells.type):
        return [[cell] for cell in _plain(cells)]
    flat = iter(_plain(cells.flatten()))
    lists = [list(islice(flat, length or 0)) for length in pc.list_value_length(cells).to_pylist()]
    return [[text for text in texts if text is not None] or [None] for texts in lists]


def _plain(cells: pa.Array) -> list[bytes | None]:
    """The bytes of each cell, as many as tell that it is too large; a dictionary's are one object for all its cells."""
    if isinstance(cells, pa.ExtensionArray):
        return _plain(cells.storage)
    if isinstance(cells, pa.DictionaryArray):
        used = cells.indices.drop_null().unique()
        values = dict(zip(used.to_pylist(), _plain(cells.dictionary.take(used)), strict=True))
        return [values.get(index) for index in cells.indices.to_pylist()]
    plain: list[bytes | None] = pc.binary_slice(cells.cast(pa.large_binary()), 0, MAX_CELL_BYTES + 1).to_pylist()
    return plain


# what both forms share


@contextmanager
def _source_errors(path: str) -> Iterator[None]:
    try:
        with parquet_errors(path, given=True):
            yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("--source") else f"--source {text}") from error


def parquet_form(path: str, columns: Columns) -> Literal["parquet", "hf-parquet"]:
    """Whether a Parquet file is a list or has images in it. Raises UserError."""
    with _source_errors(path), open_parquet(path) as table, open_parts(path) as file:
        leaf = image_column(table.schema_arrow, columns[1])
        if leaf is None:
            return "parquet"
        _check_leaf(path, table, leaf)
        if (
            leaf.endswith(".bytes")
            or not table.num_row_groups
            or _sizes(
                file,
                row_groups(file, table.num_row_groups)[0],
                table.metadata.row_group(0).num_rows,
                leaf,
                is_url(path),
            ).too_large
        ):
            return "hf-parquet"
        first = next(table.iter_batches(1, columns=[leaf]), None)
        cell = first.column(0)[0].as_py() if first is not None and len(first) else None
        return "parquet" if URL_PATTERN.match((cell or b"")[:100].decode(errors="replace")) else "hf-parquet"


@dataclass(frozen=True)
class Sizes:
    """Of a row group's column: bytes of the largest dictionary and of the largest other page, its texts' leaves."""

    dictionary: int
    page: int
    leaves: tuple[str, ...]
    values: float  # of a row, on an average

    @property
    def can_be_kept(self) -> bool:
        """Whether the cells may be kept beside the caption: no long lists, no long texts in lists."""
        flat = not any("." in leaf for leaf in self.leaves)
        return self.values <= MAX_VALUES and not self.too_large and (flat or max(self.dictionary, self.page) <= LARGE)

    @property
    def too_large(self) -> bool:
        """Whether they are not to be unpacked."""
        return max(self.dictionary, self.page) > MAX_PAGE_BYTES or self.values > MAX_TEXTS


def _sizes(file: IO[bytes], columns: tuple[Chunk, ...], rows: int, name: str, remote: bool) -> Sizes:
    """Of a row group's column."""
    own = [column for column in columns if f"{column.path}.".startswith(f"{name}.")]
    texts = [column for column in own if column.is_text]
    pages = [largest_pages(file, column, remote) for column in texts]
    dictionary, page = (max((pair[which] for pair in pages), default=0) for which in (0, 1))
    values = max((column.values for column in own), default=0) / max(rows, 1)
    return Sizes(dictionary, page, tuple(column.path for column in texts), values)


def _batches(
    source: str, table: pq.ParquetFile, wanted: list[str], others: list[str]
) -> Iterator[pa.RecordBatch | int]:
    """Batches of the wanted columns and of those others that can be read, in the file's order.

    Of a row group whose wanted columns are too large: how many rows it has.
    """
    left_out = set[str]()
    with open_parts(source) as file:
        for group, chunks in enumerate(row_groups(file, table.num_row_groups)):
            rows = int(table.metadata.row_group(group).num_rows)
            sizes = {name: _sizes(file, chunks, rows, name, is_url(source)) for name in (*wanted, *others)}
            if any(sizes[name].too_large for name in wanted):
                yield rows
                continue
            names = [*wanted, *(name for name in others if sizes[name].can_be_kept)]
            left_out |= set(others) - set(names)
            yield from _group_batches(source, group, {name: sizes[name] for name in names})
    if left_out:
        log.warning("%s: cells too large to be kept in the columns %s", source, shown(sorted(left_out)))


def _group_batches(source: str, group: int, sizes: dict[str, Sizes]) -> Iterator[pa.RecordBatch]:
    """Batches that are small even when every cell is as large as the largest page.

    Cells of a large dictionary stay its indices: one value of 1 MB that a thousand rows have is 1 MB.
    """
    large = {name for name, size in sizes.items() if size.dictionary > LARGE}
    pages = [size.page if name in large else max(size.page, size.dictionary) for name, size in sizes.items()]
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, *pages)))
    leaves = [leaf for name in large for leaf in sizes[name].leaves]
    with open_parquet(source, leaves) as table:
        yield from table.iter_batches(rows, row_groups=[group], columns=list(sizes), use_threads=False)


def _other_cells(batch: pa.RecordBatch, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """The other columns of each row; too long a text is left out."""
    names = [name for name in batch.schema.names if name not in chosen]
    columns = [_values(batch.column(name)) for name in names]
    return (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)) if names else repeat({})


def _values(cells: pa.Array) -> list[Any]:
    if not is_text(cells.type):
        return cast(list[Any], cells.to_pylist())
    return [text_of(cell)[0] if cell is None or len(cell) <= MAX_CELL_BYTES else None for cell in _plain(cells)]


def other_columns(schema: pa.Schema, chosen: list[str]) -> list[str]:
    """Names of a list's columns that are kept beside the chosen ones: those of bytes, such as images, are not."""
    names = schema.names
    return [
        name for name in names if name not in chosen and names.count(name) == 1 and _is_kept(schema.field(name).type)
    ]


def other_types(source: str) -> dict[str, pa.DataType]:
    """Types of the columns of a Parquet file, as raw shards can have them: text without a dictionary or views."""
    with _source_errors(source), open_parquet(source) as table:
        schema = table.schema_arrow
        names = [name for name in schema.names if schema.names.count(name) == 1]
        kinds = {name: schema.field(name).type for name in names}
        return {name: pa.string() if is_text(kind) else kind for name, kind in kinds.items()}


def _is_kept(kind: pa.DataType) -> bool:
    parts = [kind.field(index).type for index in range(kind.num_fields)]  # of a list or a struct
    return not is_binary(kind) and all(_is_kept(part) for part in parts)


# lists


def parquet_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list; of a row with several captions, a row each. Raises UserError."""
    with _source_errors(source), open_parquet(source) as table:
        schema = table.schema_arrow
        caption, url = (schema.names[index] for index in pick_columns(source, schema.names, columns))
        _check_types(source, schema, caption, url)
        batches = _batches(source, table, [caption, url], other_columns(schema, [caption, url]))
        first = next(batches, 0)
        address = None if isinstance(first, int) or not len(first) else text_of(_plain(first.column(url)[:1])[0])[0]
        folder = files_folder(source, url, address)
        for batch in chain([first], batches):
            if isinstance(batch, int):
                yield from (Row(None, None, CELL_TOO_LARGE) for _ in range(batch))
                continue
            links, others = _plain(batch.column(url)), _other_cells(batch, [caption, url])
            for texts, link, extra in zip(_texts(batch.column(caption)), links, others, strict=False):
                yield from (make_row(text, link, folder, extra) for text in texts)


# images in the file


def image_column(schema: pa.Schema, given: str | None = None) -> str | None:
    """The leaf that holds encoded images: of a struct (``image.bytes``), or a binary column with an image's name.

    A column ``given`` by name comes before the usual ones.
    """
    found = {}
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type):
            found[field.name] = f"{field.name}.bytes"
        elif is_binary(kind) and (field.name == given or field.name.strip().lower() in NAMED_IMAGES):
            found[field.name] = field.name
    if given in found:
        return found[given]
    index = find_column(None, NAMED_IMAGES, list(found))
    return list(found.values())[index or 0] if found else None


def _check_leaf(source: str, table: pq.ParquetFile, leaf: str) -> None:
    """Raises UserError when the images' column, or the path of its leaf, is there more than once."""
    check_once(source, table.schema_arrow.names, [leaf.removesuffix(".bytes")])
    check_once(source, [table.schema.column(index).path for index in range(len(table.schema))], [leaf])


def image_parquet_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per row of the Parquet files. Raises UserError for a file without images or without a caption column."""
    for file in files:
        with _source_errors(file.path), open_parquet(file.path) as table:
            yield from _image_rows(file, table, columns)


def _image_rows(file: SourceFile, table: pq.ParquetFile, columns: Columns) -> Iterator[Row]:
    schema = table.schema_arrow
    leaf = image_column(schema, columns[1])
    if leaf is None:
        raise UserError(f"--source {file.path}: no column holds images; its columns are {shown(schema.names)}")
    _check_leaf(file.path, table, leaf)
    own = (leaf, leaf.removesuffix(".bytes"))
    names = [name for name in schema.names if name not in own]
    link = None if columns[1] in own else columns[1]
    caption, url = find_column(columns[0], CAPTION_NAMES, names), find_column(link, URL_NAMES, names)
    if caption is None or (url is None and link is not None):
        wanted, option = (columns[0], "--caption-col") if caption is None else (link, "--url-col")
        there = f"no column {wanted!r}" if wanted is not None else "no caption column"
        raise UserError(f"--source {file.path}: {there} beside its images {leaf}; it has {shown(names)}; give {option}")
    chosen = [names[index] for index in (caption, url) if index is not None]
    check_once(file.path, names, chosen)
    _check_types(file.path, schema, chosen[0], chosen[1] if url is not None else None)
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    places = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    number = 0
    for batch in _batches(file.path, table, chosen, other_columns(schema, [*chosen, *own])):
        if isinstance(batch, int):
            for _ in range(batch):
                next(places)
                yield Row(None, f"{file.below}#{number}", CELL_TOO_LARGE, file.stamp)
                number += 1
            continue
        links = _plain(batch.column(chosen[1])) if url is not None else [None] * len(batch)
        others = _other_cells(batch, chosen)
        for texts, address, extra in zip(_texts(batch.column(chosen[0])), links, others, strict=False):
            place = ParquetPlace(file.path, leaf, *next(places))
            for text in texts:
                yield _image_row(make_row(text, address, extra=extra), f"{file.below}#{number}", file.stamp, place)
            number += 1


def _image_row(row: Row, number: str, stamp: str, place: ParquetPlace) -> Row:
    """The row as of an image that needs no address."""
    problem = None if row.problem == "no URL" else row.problem
    return Row(row.caption, row.url or number, problem, stamp, place, row.note, row.extra)
