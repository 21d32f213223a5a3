"""Fields between delimiters, with or without quotes, as they are found in lists from the web.

**Quotes.** A line is cut as RFC 4180 says (a field in quotes may hold delimiters, doubled quotes and line ends) where
that fits: where it gives an address in the address's column. Otherwise the line is cut at each delimiter and only a
field that is wholly quoted loses its quotes, as in the lists of CC3M and CC12M, whose captions hold raw quotes.
Delimiters beyond those of the header belong to the caption. A field may span lines when its closing quote comes within
`MAX_ROW_LINES` lines, the joined row has the header's number of fields, and not both its first and its last line are
rows by themselves: a quote that is never closed neither loses its own row nor takes others.
"""

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.ingest.cells import is_address, locate_columns
from pipeline.ingest.rows import Columns, decode_text
from pipeline.ingest.source_io import MAX_LINE_BYTES

DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
MAX_ROW_LINES = 100  # of a row with line ends in its quotes
MAX_ROW_BYTES = 1 << 18  # of such a row
QUOTE = b'"'
csv.field_size_limit(2 * MAX_LINE_BYTES)  # the module's own limit is 131,072


@dataclass(frozen=True)
class Shape:
    """The columns of a delimited list: their delimiter, their number, the indexes of caption and address."""

    delimiter: str
    width: int
    caption: int
    url: int


CC3M = Shape("\t", width=2, caption=0, url=1)
CC12M = Shape("\t", width=2, caption=1, url=0)


def header_of(line: bytes, columns: Columns) -> tuple[list[str], str]:
    """(names, delimiter) of a first line: the delimiter that gives both columns, else the one that gives most names."""
    headers = []
    for delimiter in DELIMITERS:
        text = line.rstrip(b"\r")
        fields = _parse_quoted(text, delimiter)[0] or text.split(delimiter.encode())
        names = [decode_text(field)[0] or "" for field in fields]
        if None not in locate_columns(names, columns):
            return names, delimiter
        headers.append((names, delimiter))
    return max(headers, key=lambda header: len(header[0]))


def split_rows(texts: Iterator[bytes], shape: Shape) -> Iterator[tuple[bytes, list[bytes]]]:
    """(line, or lines joined, and its fields) of each row; ``texts`` as `source_io.raw_lines` gives them."""
    lines = _Lookahead(_split_returns(texts, shape))
    while (line := lines.take()) is not None:
        text = line.removesuffix(b"\r")
        if QUOTE not in text:
            yield text, _join_extra(text.split(shape.delimiter.encode()), shape)
            continue
        fields, is_open = _parse_quoted(text, shape.delimiter)
        spanning = _spanning_row(line, lines, shape) if is_open else None
        yield spanning or (text, _line_fields(text, fields, shape))


def unquoted(field: bytes) -> bytes:
    """The field without its quotes when it is wholly quoted, which takes quotes inside it to be doubled."""
    if len(field) < 2 or not (field.startswith(QUOTE) and field.endswith(QUOTE)):
        return field
    inner = field[1:-1]
    return field if QUOTE in inner.replace(b'""', b"") else inner.replace(b'""', QUOTE)


class _Lookahead:
    """Lines that can be looked at before they are taken."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._ahead = deque[bytes]()

    def take(self) -> bytes | None:
        """The next line; None at the end."""
        return self._ahead.popleft() if self._ahead else next(self._lines, None)

    def peek(self, index: int) -> bytes | None:
        """The line ``index`` lines after the next one; None beyond the end."""
        while len(self._ahead) <= index:
            line = next(self._lines, None)
            if line is None:
                return None
            self._ahead.append(line)
        return self._ahead[index]

    def drop(self, number: int) -> None:
        """Take lines that were looked at."""
        for _ in range(number):
            self._ahead.popleft()


def _split_returns(texts: Iterator[bytes], shape: Shape) -> Iterator[bytes]:
    """The lines; one with carriage returns inside is several when each of its parts is a row by itself."""
    for text in texts:
        parts = text.removesuffix(b"\r").split(b"\r")
        if len(parts) > 1 and all(_has_address(_cut_fields(part, shape), shape) for part in parts):
            yield from parts
        else:
            yield text


def _parse_quoted(text: bytes, delimiter: str) -> tuple[list[bytes] | None, bool]:
    """(fields as RFC 4180 cuts them, None when it cannot; whether a quote is still open at the end)."""
    try:
        fields = next(csv.reader([text.decode("latin-1")], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return [field.encode("latin-1") for field in fields], False


def _line_fields(text: bytes, quoted: list[bytes] | None, shape: Shape) -> list[bytes]:
    """A line's fields: those by its quotes, unless only those cut at each delimiter give an address."""
    cut = _cut_fields(text, shape)
    if quoted is None:
        return cut
    fields = _join_extra(quoted, shape)
    return fields if _has_address(fields, shape) or not _has_address(cut, shape) else cut


def _cut_fields(text: bytes, shape: Shape) -> list[bytes]:
    """A line's fields when a quote means nothing but around a whole field."""
    return [unquoted(field) for field in _join_extra(text.split(shape.delimiter.encode()), shape)]


def _join_extra(fields: list[bytes], shape: Shape) -> list[bytes]:
    """Fields by column: those beyond the columns' number are part of the caption.

    Where the address comes after the caption, the last field that can be it tells where the caption ends.
    """
    while len(fields) > shape.width and not fields[-1]:
        fields = fields[:-1]
    extra = len(fields) - shape.width
    if extra <= 0:
        return fields
    in_caption = extra
    if shape.url > shape.caption:
        for number in range(extra, -1, -1):
            if is_address(decode_text(fields[shape.url + number])[0] or ""):
                in_caption = number
                break
    end = shape.caption + in_caption + 1
    caption = shape.delimiter.encode().join(fields[shape.caption : end])
    return [*fields[: shape.caption], caption, *fields[end:]]


def _has_address(fields: list[bytes], shape: Shape) -> bool:
    if len(fields) <= max(shape.caption, shape.url):
        return False
    return is_address(decode_text(fields[shape.url])[0] or "")


def _spanning_row(line: bytes, lines: _Lookahead, shape: Shape) -> tuple[bytes, list[bytes]] | None:
    """The row of a line with an open quote and the lines up to its closing quote, which are taken.

    None, and no line is taken, when these are not one row.
    """
    joined = line
    for number in range(1, MAX_ROW_LINES):
        last = lines.peek(number - 1)
        if last is None:
            return None
        joined += b"\n" + last
        if len(joined) > MAX_ROW_BYTES:
            return None
        if QUOTE not in last:
            continue
        fields, is_open = _parse_quoted(joined.removesuffix(b"\r"), shape.delimiter)
        if is_open:
            continue
        if fields is None or len(fields) != shape.width:
            return None
        if all(_has_address(_cut_fields(end.removesuffix(b"\r"), shape), shape) for end in (line, last)):
            return None  # both are rows by themselves
        lines.drop(number)
        return joined, fields
    return None
