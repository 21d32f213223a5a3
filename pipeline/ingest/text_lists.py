"""Lists that are text: fields between delimiters, with or without a header, JSON Lines, plain addresses.

**Quotes.** A line is cut as RFC 4180 says (a field in quotes may hold delimiters, doubled quotes and line ends) where
that fits: it gives an address in the address's column. Otherwise the line is cut at each delimiter and only a field
that is wholly quoted loses its quotes, as in the lists of CC3M and CC12M, whose captions hold raw quotes. Delimiters
too many belong to the caption. A field may span lines when its closing quote comes within `MAX_ROW_LINES` lines, the
joined row has the header's number of fields, and not both its first and its last line are rows by themselves: an open
quote costs its own row nothing and takes no other.
"""

import csv
import logging
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from pipeline.ingest.cells import (
    MAX_CELL_BYTES,
    URL_PATTERN,
    broken_row,
    files_folder,
    found_columns,
    is_address,
    make_row,
    pick_columns,
)
from pipeline.ingest.rows import NOT_TEXT, NOT_UTF8, URL_NAMES, Caption, Columns, Row, decode_text, find_column
from pipeline.ingest.source_io import MAX_LINE_BYTES, lines, raw_lines
from shards_spec.files import UserError
from shards_spec.library_errors import what_it_is
from shards_spec.sample import parse_object

log = logging.getLogger(__name__)
TextForm = Literal["cc3m", "cc12m", "csv", "jsonl", "txt"]
DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
HEAD_LINES = 20  # of a list, to tell its form and its columns
MOST_HEAD_LINES, MOST_NAMES = 10_000, 10_000  # of JSON Lines, whose first objects may lack a column
MAX_ROW_LINES, MAX_ROW_BYTES = 100, 1 << 18  # of a row with line ends in its quotes
NO_COLUMN, LINE_TOO_LONG, NO_OBJECT = "missing column", "line too long", "not a JSON object"
PLAIN_ADDRESS = re.compile(r"[a-z][a-z0-9+.\-]*://\S+", re.IGNORECASE)
csv.field_size_limit(2 * MAX_LINE_BYTES)  # the module's own limit is 131,072


# which form


def detect_text(source: str, columns: Columns) -> TextForm:
    """The form of a text list, from its first lines. Raises UserError."""
    head = list(islice(lines(source), HEAD_LINES))
    found = [text for line in head if (text := decode_text(line)[0] or "").strip()]
    if not found:
        raise UserError(f"--source {source} is empty; give a list with a URL and a caption per line")
    _warn_of_encoding(source, head)
    if found[0].startswith("{") and any(_object(line) is not None for line in head):
        return "jsonl"
    if found[0].strip() in ("[", "{") or found[0].startswith(("[{", "[ {")):
        raise UserError(f"--source {source}: JSON, but not one object per line; write it so (jq -c '.[]')")
    names, _ = header_of(found[0].encode(), columns)
    if columns[0] is None and _is_plain(source, found, columns):
        return "txt"
    if find_column(columns[1], URL_NAMES, names) is not None or None not in found_columns(names, columns):
        return "csv"
    if columns != (None, None):
        pick_columns(source, names, columns)
    return _headless_form(source, found)


def _is_plain(source: str, found: list[str], columns: Columns) -> bool:
    """Whether the lines are addresses and nothing else, below a header ``url`` or without one.

    Of a ``.txt`` at least half of them: a remark is a row with its problem. Lines of a ``.csv`` that have a delimiter
    hold more than addresses, unless a header says that they do not.
    """
    headed = len(found) > 1 and find_column(columns[1], URL_NAMES, [_bare(found[0].encode())]) is not None
    plain = [PLAIN_ADDRESS.fullmatch(_bare(text.encode())) is not None for text in found[headed:]]
    name = source.lower().removesuffix(".gz")
    if name.endswith(".txt"):
        return 2 * sum(plain) >= len(plain) and not any("\t" in text for text in found)
    cut = not headed and name.endswith(".csv") and any(_is_cut_by(sign, found) for sign in ",;|")
    return all(plain) and not cut


def _headless_form(source: str, found: list[str]) -> TextForm:
    fields = [line.split("\t") for line in found if "\t" in line]
    url_first = sum(bool(URL_PATTERN.match(row[0])) for row in fields)
    url_last = sum(bool(URL_PATTERN.match(row[-1])) for row in fields)
    if url_first != url_last:
        return "cc12m" if url_first > url_last else "cc3m"
    if (what := what_it_is(source)) is not None and not what[0].startswith("is packed"):
        raise UserError(f"--source {source} {what[0]}; {what[1]}")
    if any(len(line) >= MAX_LINE_BYTES for line in found):
        raise UserError(f"--source {source}: one of its first lines has more than {MAX_LINE_BYTES >> 20} MiB; cut it")
    other = next((sign for sign in ",;|" if _is_cut_by(sign, found)), None)
    if other is not None:
        last = found[0].split(other)[-1].strip(' "')
        header = f"caption{other}url" if URL_PATTERN.match(last) else f"url{other}caption"
        raise UserError(
            f"--source {source}: its fields are cut by {DELIMITERS[other]} ({other!r}) and it has no header with a "
            f"column url; put a first line such as {header} before it"
        )
    raise UserError(
        f"--source {source}: cannot tell its form from its first lines ({found[0][:80]!r}): no tab between a "
        "caption and a URL, no header with a column url; name it with --format, or its columns with --url-col "
        "and --caption-col"
    )


def _is_cut_by(delimiter: str, found: list[str]) -> bool:
    """Whether most lines have an address as a whole first or last field."""
    rows = [[field.strip(' "') for field in line.split(delimiter)] for line in found]
    hits = sum(len(row) > 1 and any(PLAIN_ADDRESS.fullmatch(row[place]) for place in (0, -1)) for row in rows)
    return 2 * hits > len(found)


def _warn_of_encoding(source: str, head: list[bytes]) -> None:
    foreign = [line for line in head if not line.isascii()]
    if foreign and all(decode_text(line)[1] for line in foreign):
        log.warning(
            "%s: none of the first %d lines with other than ASCII letters is UTF-8; if it is latin-1, make it UTF-8 "
            "first (iconv -f LATIN1 -t UTF-8), or these rows are left out as 'caption is not UTF-8'",
            source, len(foreign),
        )  # fmt: skip


# fields between delimiters


@dataclass(frozen=True)
class Shape:
    """Of a delimited list: how many columns between which delimiters, and which hold the caption and the address."""

    delimiter: str
    width: int
    caption: int
    url: int


CC3M, CC12M = Shape("\t", 2, 0, 1), Shape("\t", 2, 1, 0)


def header_of(line: bytes, columns: Columns) -> tuple[list[str], str]:
    """(names, delimiter) of a first line: the delimiter that gives both columns, else the one that gives most names."""
    cuts = []
    for delimiter in DELIMITERS:
        fields = _rfc(line.rstrip(b"\r"), delimiter)[0] or _cut(line.rstrip(b"\r"), delimiter)
        names = [decode_text(field)[0] or "" for field in fields]
        if None not in found_columns(names, columns):
            return names, delimiter
        cuts.append((names, delimiter))
    return max(cuts, key=lambda cut: len(cut[0]))


def _cut(line: bytes, delimiter: str) -> list[bytes]:
    return line.split(delimiter.encode())


def _rfc(text: bytes, delimiter: str) -> tuple[list[bytes] | None, bool]:
    """(fields as RFC 4180 cuts them, None when it cannot; whether a quote is still open)."""
    try:
        fields = next(csv.reader([text.decode("latin-1")], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return [field.encode("latin-1") for field in fields], False


def _placed(fields: list[bytes], shape: Shape) -> list[bytes]:
    """Fields by column: those too many are the caption's; the address tells how many of them stand before it."""
    while len(fields) > shape.width and not fields[-1]:
        fields = fields[:-1]
    more = len(fields) - shape.width
    if more <= 0:
        return fields
    shift = 0 if shape.url < shape.caption else 1
    fits = (n for n in range(more, -1, -1) if is_address(decode_text(fields[shape.url + n * shift])[0] or ""))
    end = shape.caption + next(fits, more) + 1
    return [*fields[: shape.caption], shape.delimiter.encode().join(fields[shape.caption : end]), *fields[end:]]


def _has_address(fields: list[bytes], shape: Shape) -> bool:
    whole = len(fields) > max(shape.caption, shape.url)
    return whole and is_address(decode_text(fields[shape.url])[0] or "")


def _unquoted(field: bytes) -> bytes:
    """The field without its quotes when it is wholly quoted: those inside are doubled."""
    if len(field) < 2 or not (field.startswith(b'"') and field.endswith(b'"')):
        return field
    inner = field[1:-1]
    return field if b'"' in inner.replace(b'""', b"") else inner.replace(b'""', b'"')


def split_rows(texts: Iterator[bytes], shape: Shape) -> Iterator[tuple[bytes, list[bytes]]]:
    """(line, or lines joined, and its fields) of each row; ``texts`` as `raw_lines` gives them."""
    ahead, texts = deque[bytes](), _apart(texts, shape)
    while (line := ahead.popleft() if ahead else next(texts, None)) is not None:
        text = line.removesuffix(b"\r")
        if b'"' not in text:
            yield text, _placed(_cut(text, shape.delimiter), shape)
            continue
        fields, is_open = _rfc(text, shape.delimiter)
        if is_open and (spanning := _spanning(line, ahead, texts, shape)) is not None:
            yield spanning
            continue
        alone, strict = _alone(text, shape), _placed(fields, shape) if fields is not None else None
        by_quotes = strict is not None and (_has_address(strict, shape) or not _has_address(alone, shape))
        yield text, strict if strict is not None and by_quotes else alone


def _apart(texts: Iterator[bytes], shape: Shape) -> Iterator[bytes]:
    """The lines; one with carriage returns inside is several when each of its parts is a row by itself."""
    for text in texts:
        parts = text.removesuffix(b"\r").split(b"\r")
        several = len(parts) > 1 and all(_has_address(_alone(part, shape), shape) for part in parts)
        yield from parts if several else [text]


def _alone(text: bytes, shape: Shape) -> list[bytes]:
    """A line's fields when a quote means nothing but around a whole field."""
    return [_unquoted(field) for field in _placed(_cut(text, shape.delimiter), shape)]


def _spanning(
    line: bytes, ahead: deque[bytes], texts: Iterator[bytes], shape: Shape
) -> tuple[bytes, list[bytes]] | None:
    """The row of a line with an open quote and of those after it, which are taken; None when it is no such row."""
    joined = line
    for number in range(1, MAX_ROW_LINES):
        if number > len(ahead):
            if (more := next(texts, None)) is None:
                return None
            ahead.append(more)
        last = ahead[number - 1]
        joined += b"\n" + last
        if len(joined) > MAX_ROW_BYTES:
            return None
        fields, is_open = _rfc(joined.removesuffix(b"\r"), shape.delimiter) if b'"' in last else (None, True)
        if is_open:
            continue
        both = all(_has_address(_alone(end.removesuffix(b"\r"), shape), shape) for end in (line, last))
        if fields is None or len(fields) != shape.width or both:
            return None
        for _ in range(number):
            ahead.popleft()
        return joined, fields
    return None


def delimited_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list with a header."""
    texts = raw_lines(source)
    first = next(texts, None)
    if first is None:
        return  # an empty part of a list
    names, delimiter = header_of(first, columns)
    caption, url = pick_columns(source, names, columns)
    rows = split_rows(texts, Shape(delimiter, len(names), caption, url))
    head = list(islice(rows, 1))
    cell = decode_text(head[0][1][url])[0] if head and len(head[0][1]) > url else None
    folder = files_folder(source, names[url], cell)
    others = [index for index in range(len(names)) if index not in (caption, url)]
    for text, fields in chain(head, rows):
        if len(fields) <= max(caption, url):
            yield broken_row(text, LINE_TOO_LONG if len(text) >= MAX_LINE_BYTES else NO_COLUMN)
            continue
        kept = sum(len(field) for field in fields) <= 3 * MAX_CELL_BYTES
        cells = {names[index]: decode_text(fields[index])[0] for index in others if index < len(fields)} if kept else {}
        yield make_row(fields[caption], fields[url], folder, cells)


def headless_rows(source: str, shape: Shape) -> Iterator[Row]:
    """Rows of a list without a header: `CC3M` is caption, tab, URL; `CC12M` is URL, tab, caption."""
    for text, fields in split_rows(raw_lines(source), shape):
        if len(fields) < shape.width:
            yield broken_row(text, LINE_TOO_LONG if len(text) >= MAX_LINE_BYTES else NO_COLUMN)
        else:
            yield make_row(fields[shape.caption], fields[shape.url])


def url_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list of addresses alone, one a line, below a header or without one: images without captions.

    Raises UserError when the header is not the one that was named.
    """
    for number, line in enumerate(lines(source)):
        headed = not number and find_column(columns[1], URL_NAMES, [_bare(line)]) is not None
        if not number and not headed and columns[1] is not None:
            raise UserError(
                f"--source {source}: no column {columns[1]!r}; its first line is {_bare(line)[:80]!r}; change --url-col"
            )
        if not headed:
            yield make_row(None, _unquoted(line.strip()))


def _bare(line: bytes) -> str:
    """The one field of a line."""
    return (decode_text(_unquoted(line.strip()))[0] or "").strip()


# JSON Lines


def _object(line: bytes) -> dict[str, Any] | None:
    """The line's JSON object; None also for one that is nested too deep."""
    try:
        return parse_object(line)
    except ValueError:
        return None


def json_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list with a JSON object per line; of one with several captions, a row each."""
    head = [_object(line) or {} for line in islice(lines(source), HEAD_LINES)]
    if not head:
        return  # an empty part of a list
    names = _json_names(source, columns)
    caption, url = (names[index] for index in pick_columns(source, names, columns))
    folder = files_folder(
        source, url, next((text for fields in head if isinstance(text := fields.get(url), str)), None)
    )
    for line in lines(source):
        fields = _object(line)
        if fields is None:
            yield broken_row(line, NO_OBJECT)
            continue
        kept = len(line) <= 3 * MAX_CELL_BYTES
        cells = {name: value for name, value in fields.items() if kept and name not in (caption, url)}
        captions, note = json_captions(fields.get(caption))
        for text in captions:
            yield make_row(text, _json_bytes(fields.get(url)), folder, cells, note)


def _json_names(source: str, columns: Columns) -> list[str]:
    """Names in a list's first lines, up to the one that has the last of both columns: a key may be left out."""
    names = dict[str, None]()
    for number, line in enumerate(islice(lines(source), MOST_HEAD_LINES)):
        if number >= HEAD_LINES and None not in found_columns(list(names), columns):
            break
        names.update(dict.fromkeys(_object(line) or {}))
        if len(names) > MOST_NAMES:
            break
    return list(names)


def json_captions(value: object) -> tuple[list[bytes | None], str | None]:
    """(captions, what to note): each text of a list is one; of what is no text there is none."""
    if value is None or isinstance(value, str):
        return [_json_bytes(value)], None
    texts = [_json_bytes(text) for text in value if isinstance(text, str)] if isinstance(value, list) else []
    return (texts, None) if texts else ([None], None if value == [] else NOT_TEXT)


def captions_of(value: object) -> list[Caption]:
    """`json_captions` as text."""
    texts, note = json_captions(value)
    found = [decode_text(text) for text in texts]
    return [Caption(text, NOT_UTF8 if broken else None, note) for text, broken in found]


def _json_bytes(value: object) -> bytes | None:
    """A text, in which half surrogates are possible, as bytes."""
    return value.encode(errors="surrogatepass") if isinstance(value, str) else None
