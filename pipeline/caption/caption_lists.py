"""Captions that others wrote, from lists: Parquet, JSON Lines, CSV and TSV, read row by row in bounded memory.

The readers are those of `ingest`, so a list that it takes is read here by the same rules.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from pipeline.caption.config import ListOptions
from pipeline.ingest.cells import MAX_CELL_BYTES, NO_CAPTION, check_once, format_names
from pipeline.ingest.delimited import Shape, header_of, split_rows
from pipeline.ingest.parquet_cells import check_types, read_cells, source_errors
from pipeline.ingest.rows import CAPTION_NAMES, URL_NAMES, decode_text, find_column, json_bytes, json_captions
from pipeline.ingest.source_files import SourceFile, source_files
from pipeline.ingest.source_io import BROKEN_GZIP, expected_errors, lines, open_list, open_parquet, raw_lines
from pipeline.pack.caption_cleaning import clean_caption
from shards_spec.files import UserError
from shards_spec.sample import parse_object

# columns by which captions are joined when none is named, the surest first: keys of two downloads look alike
ID_NAMES = {"uid": ("uid",), "url": URL_NAMES, "sha256": ("sha256",), "key": ("key", "__key__")}
# columns with captions when none is named: those of published recaptions before that of the alt-text
CAPTION_COLUMNS = ("re_caption", "vlm_caption", "syn_text", "captions", *CAPTION_NAMES)
HEAD_OBJECTS = 1000  # of JSON Lines, that tell its columns
PARQUET_MAGIC = b"PAR1"
JSON_ARRAY = re.compile(rb"\[\s*(?:[\[{\]]|$)")
TOO_LONG = "too long"  # why captions are left out
NOT_UTF8 = "not UTF-8"
NO_TEXT = "no text"
Form = Literal["parquet", "jsonl", "delimited"]


@dataclass(frozen=True)
class ListColumns:
    """Which columns of the files are read: the image's, as ``by`` calls it in raw/, and those with captions."""

    by: str
    by_col: str
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListedRow:
    """A row of a list: which image it is about, and the cells with captions as they came.

    ``name`` is None where the row cannot be used, for the ``problem``. ``not_text`` is the number of values in place of
    captions that are neither text nor null. ``place`` is the file and the row where there is something to say of it.
    """

    name: str | None
    cells: list[bytes | None] = field(default_factory=list)
    problem: str = ""
    not_text: int = 0
    place: str = ""

    def captions(self) -> tuple[list[str], list[str]]:
        """The captions, and why further ones are left out; nulls, and what databases write for them, are neither."""
        captions = list[str]()
        left_out = [NO_TEXT] * self.not_text
        for cell in self.cells:
            if cell is None:
                continue
            text, broken = decode_text(cell)
            if len(cell) > MAX_CELL_BYTES:
                left_out.append(TOO_LONG)
            elif broken or text is None:
                left_out.append(NOT_UTF8)
            elif text not in NO_CAPTION:
                captions.append(text)
        return captions, left_out


def list_files(sources: tuple[str, ...]) -> list[SourceFile]:
    """The files of all ``--from``, in the order given. Raises UserError."""
    files = list[SourceFile]()
    for source in sources:
        with _as_from():
            files += source_files(source)
    return files


def pick_columns(files: list[SourceFile], options: ListOptions, raw_columns: list[str]) -> ListColumns:
    """The columns that join the files with raw/, by their names in the first file. Raises UserError."""
    path = files[0].path
    with _reading(path):
        names = _column_names(path, _form(path), options.by_col, options.caption_col)
        if not names:
            raise UserError(f"--from {path} is empty, or no list; leave it out")
        by, by_col = _pick_by(path, names, options, raw_columns)
        captions = options.caption_col or _usual_captions(path, names)
        for name in options.caption_col:
            if name not in names:
                raise UserError(
                    f"--from {path}: no column {name!r}; its columns are {format_names(names)}; change --caption-col"
                )
        check_once(path, names, [by_col, *captions])
    return ListColumns(by, by_col, captions)


def listed_rows(path: str, columns: ListColumns) -> Iterator[ListedRow]:
    """The rows of one file, in order. Raises UserError for a file that cannot be read or lacks a column."""
    with _reading(path):
        form = _form(path)
        if form == "jsonl":  # whose rows may lack any key: the last one tells whether all do
            yield from _json_rows(path, columns)
            return
        names = _column_names(path, form, columns.by_col, columns.captions)
        if not names:
            return  # an empty part of a list
        _check_columns(path, columns, names)
        if form == "parquet":
            yield from _parquet_rows(path, columns)
        else:
            yield from _delimited_rows(path, names, columns)


def image_name(text: str, by: str) -> str:
    """What an image is called in both lists: hexadecimal digits of a sha256 in either case."""
    return text.strip().lower() if by == "sha256" else text.strip()


def cleaned(text: str) -> str:
    """A caption of others as it is stored: one line, cleaned as pack cleans an original caption."""
    return " ".join(clean_caption(text)[0].split())


@contextmanager
def _as_from() -> Iterator[None]:
    """Name the option --from in what ingest's readers say of a --source."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("--source", "--from").replace("--url-col", "--by-col")
        raise UserError(text.replace(", and --format where it is given", "")) from error


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Errors of reading a file as UserErrors."""
    with _as_from():
        try:
            yield
        except BROKEN_GZIP as error:
            raise UserError(f"--from {path}: broken gzip file ({error}); download it again") from error
        except UserError:
            raise
        except expected_errors(path) as error:
            raise UserError(f"--from {path}: cannot be read ({error})") from error


def _form(path: str) -> Form:
    with open_list(path) as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    if JSON_ARRAY.match(head):
        raise UserError(
            f"--from {path} is one JSON array; `jq -c '.[]' {shlex.quote(path)} > NEW.jsonl` "
            "makes it JSON Lines, an object a line"
        )
    return "jsonl" if head.startswith(b"{") else "delimited"


def _check_columns(path: str, columns: ListColumns, names: list[str]) -> None:
    """Raise UserError where a file with these columns lacks one of those that the first file has."""
    missing = [name for name in (columns.by_col, *columns.captions) if name not in names]
    if missing:
        raise UserError(f"--from {path}: no column {missing[0]!r}; its columns are {format_names(names)}")


def _column_names(path: str, form: Form, by_col: str | None, captions: tuple[str, ...]) -> list[str]:
    """The names of a file's columns; none of an empty one."""
    if form == "parquet":
        with source_errors(path), open_parquet(path) as table:
            return list(table.schema_arrow.names)
    if form == "delimited":
        return _header(path, by_col, captions)[0]
    names = dict[str, None]()
    for line in islice(lines(path), HEAD_OBJECTS):
        names.update(dict.fromkeys(_object(line) or {}))
    return list(names)


def _header(path: str, by_col: str | None, captions: tuple[str, ...]) -> tuple[list[str], str]:
    """(names, delimiter) of a delimited file; no names of an empty one."""
    first = next(raw_lines(path), b"")
    names, delimiter = header_of(first, (captions[0] if captions else None, by_col))
    return [name.strip() for name in names] if first.strip() else [], delimiter


def _pick_by(path: str, names: list[str], options: ListOptions, raw_columns: list[str]) -> tuple[str, str]:
    """The column of raw/ and the column of the file that say of which image a row is. Raises UserError."""
    if options.by == "auto":
        for by, usual in ID_NAMES.items():
            found = find_column(options.by_col, usual, names)
            is_meant = options.by_col is None or options.by_col.lower() in usual
            if found is not None and by in raw_columns and is_meant:
                return by, names[found]
        hint = f"; say --by with --by-col {options.by_col}" if options.by_col is not None else ""
        raise UserError(
            f"--from {path}: no column that raw/ has too, of {', '.join(ID_NAMES)}; its columns are "
            f"{format_names(names)}, those of raw/ {format_names(raw_columns)}; name them with --by and --by-col{hint}"
        )
    if options.by not in raw_columns:
        raise UserError(f"--by {options.by}: raw/ has no such column; its columns are {format_names(raw_columns)}")
    found = find_column(options.by_col, ID_NAMES.get(options.by, (options.by.lower(),)), names)
    if found is None:
        missing = options.by_col or options.by
        raise UserError(f"--from {path}: no column {missing!r}; its columns are {format_names(names)}; change --by-col")
    return options.by, names[found]


def _usual_captions(path: str, names: list[str]) -> tuple[str, ...]:
    found = find_column(None, CAPTION_COLUMNS, names)
    if found is None:
        raise UserError(
            f"--from {path}: its columns are {format_names(names)}; which of them has the captions? Name it with "
            "--caption-col"
        )
    return (names[found],)


def _parquet_rows(path: str, columns: ListColumns) -> Iterator[ListedRow]:
    first, *others = columns.captions
    with source_errors(path), open_parquet(path) as table:
        schema = table.schema_arrow
        _check_key_type(path, schema, columns)
        for caption in columns.captions:
            check_types(path, schema, caption, columns.by_col)
        for number, cells in enumerate(read_cells(path, table, first, columns.by_col, others), start=1):
            if cells is None:
                yield ListedRow(None, problem="rows too large to be read", place=f"{path}, row {number}")
                continue
            captions = list(cells.captions)
            for name in others:
                captions += json_captions(cells.others.get(name))[0]
            yield _row(decode_text(cells.url)[0], captions, columns, (path, number))


def _delimited_rows(path: str, names: list[str], columns: ListColumns) -> Iterator[ListedRow]:
    _, delimiter = _header(path, columns.by_col, columns.captions)
    by, *indexes = (names.index(name) for name in (columns.by_col, *columns.captions))
    rows = split_rows(islice(raw_lines(path), 1, None), Shape(delimiter, len(names), indexes[0], by))
    for number, (_, fields) in enumerate(rows, start=1):
        if len(fields) <= max(by, *indexes):
            yield ListedRow(None, problem="rows without all columns", place=f"{path}, row {number}")
        else:
            texts: list[bytes | None] = [fields[index] for index in indexes]
            yield _row(decode_text(fields[by])[0], texts, columns, (path, number))


def _json_rows(path: str, columns: ListColumns) -> Iterator[ListedRow]:
    names = dict[str, None]()
    for number, line in enumerate(lines(path), start=1):
        fields = _object(line)
        if fields is None:
            yield ListedRow(None, problem="rows that are no JSON object", place=f"{path}, row {number}")
            continue
        names.update(dict.fromkeys(fields))
        captions = list[bytes | None]()
        not_text = 0
        for name in columns.captions:
            captions += json_captions(fields.get(name))[0]
            not_text += _not_text(fields.get(name))
        image = fields.get(columns.by_col)
        text = decode_text(json_bytes(image))[0] if isinstance(image, str) else _number(image)
        yield _row(text, captions, columns, (path, number), not_text)
    if names:
        _check_columns(path, columns, list(names))


def _not_text(value: Any) -> int:
    """How many values in place of captions are neither text nor null."""
    values = value if isinstance(value, list) else [value]
    return sum(not isinstance(own, str | None) for own in values)


def _row(
    name: str | None, cells: list[bytes | None], columns: ListColumns, place: tuple[str, int], not_text: int = 0
) -> ListedRow:
    """A row of the file and the number ``place``."""
    name = image_name(name or "", columns.by)
    if not name:
        return ListedRow(None, problem="rows that name no image", place=f"{place[0]}, row {place[1]}")
    return ListedRow(name, cells, not_text=not_text, place=f"{place[0]}, row {place[1]}" if not_text else "")


def _check_key_type(path: str, schema: pa.Schema, columns: ListColumns) -> None:
    """Raise UserError for keys that are numbers: they have lost their zeros."""
    kind = schema.field(columns.by_col).type
    if columns.by == "key" and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(
            f"--source {path}: the column {columns.by_col!r} is {kind}; keys are text, such as 000000000: write "
            "them with their zeros, or join by another column with --by"
        )


def _number(value: Any) -> str | None:
    """A whole number as text: keys and uids may be written so."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(line)
    except ValueError:
        return None
