"""Lists that are text: fields between delimiters, with or without a header, JSON Lines, URLs alone."""

import logging
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Literal

from pipeline.ingest.cells import (
    MAX_CELL_BYTES,
    URL_PATTERN,
    broken_row,
    files_folder,
    locate_columns,
    make_row,
    pick_columns,
)
from pipeline.ingest.delimited import DELIMITERS, Shape, header_of, split_rows, unquoted
from pipeline.ingest.rows import URL_NAMES, Columns, Row, decode_text, find_column, json_bytes, json_captions
from pipeline.ingest.source_io import MAX_LINE_BYTES, lines, raw_lines
from shards_spec.files import UserError
from shards_spec.library_errors import describe_content
from shards_spec.messages import conversion, counted
from shards_spec.sample import parse_object

log = logging.getLogger(__name__)
TextForm = Literal["cc3m", "cc12m", "csv", "jsonl", "txt"]
HEAD_LINES = 20  # of a list, that tell its form and its columns
MAX_HEAD_LINES = 10_000  # of JSON Lines, whose first objects may lack a column
MAX_NAMES = 10_000  # of columns of JSON Lines
MAX_OTHER_BYTES = 3 * MAX_CELL_BYTES  # of a row whose other columns are kept
NO_COLUMN = "missing column"
LINE_TOO_LONG = "line too long"
NO_OBJECT = "not a JSON object"
PLAIN_URL = re.compile(r"[a-z][a-z0-9+.\-]*://\S+", re.IGNORECASE)


# the form of a list


def detect_text(source: str, columns: Columns) -> TextForm:
    """The form of a text list, from its first lines. Raises UserError when it cannot be told."""
    head = list(islice(lines(source), HEAD_LINES))
    texts = [decode_text(line)[0] or "" for line in head]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--source {source} is empty; give a list with a URL and a caption per line")
    _warn_of_encoding(source, head)
    if texts[0].startswith("{") and any(_object(line) is not None for line in head):
        return "jsonl"
    if texts[0].strip() in ("[", "{") or texts[0].startswith(("[{", "[ {")):
        raise UserError(f"--source {source}: JSON, but not one object per line; convert it (jq -c '.[]')")
    names, _ = header_of(texts[0].encode(), columns)
    if columns[0] is None and _is_url_list(source, texts, columns):
        return "txt"
    if find_column(columns[1], URL_NAMES, names) is not None or None not in locate_columns(names, columns):
        return "csv"
    if columns != (None, None):
        pick_columns(source, names, columns)  # raises: names the column that is not there
    return _headless_form(source, texts)


def _is_url_list(source: str, texts: list[str], columns: Columns) -> bool:
    """Whether the lines are URLs and nothing else, with or without a header ``url``.

    In a ``.txt`` half of them are enough: a remark becomes a row with a problem. In a ``.csv``, lines with a delimiter
    hold more than URLs, unless a header says that they do not.
    """
    has_header = len(texts) > 1 and find_column(columns[1], URL_NAMES, [_only_field(texts[0].encode())]) is not None
    body = texts[1:] if has_header else texts
    urls = sum(PLAIN_URL.fullmatch(_only_field(text.encode())) is not None for text in body)
    name = source.lower().removesuffix(".gz")
    if name.endswith(".txt"):
        return 2 * urls >= len(body) and not any("\t" in text for text in texts)
    if name.endswith(".csv") and not has_header and any(_has_urls_at_ends(delimiter, texts) for delimiter in ",;|"):
        return False
    return urls == len(body)


def _headless_form(source: str, texts: list[str]) -> TextForm:
    """Caption and URL with a tab between them, in either order. Raises UserError for what is neither."""
    rows = [line.split("\t") for line in texts if "\t" in line]
    url_first = sum(bool(URL_PATTERN.match(row[0])) for row in rows)
    url_last = sum(bool(URL_PATTERN.match(row[-1])) for row in rows)
    if url_first != url_last:
        return "cc12m" if url_first > url_last else "cc3m"
    kind = describe_content(source)
    if kind is not None and not kind[0].startswith("is packed"):
        raise UserError(f"--source {source} {kind[0]}; {kind[1]}")
    if any(len(line) >= MAX_LINE_BYTES for line in texts):
        raise UserError(f"--source {source}: one of its first lines has more than {MAX_LINE_BYTES >> 20} MiB; cut it")
    for delimiter in ",;|":
        if _has_urls_at_ends(delimiter, texts):
            last = texts[0].split(delimiter)[-1].strip(' "')
            header = f"caption{delimiter}url" if URL_PATTERN.match(last) else f"url{delimiter}caption"
            raise UserError(
                f"--source {source}: its fields are cut by {DELIMITERS[delimiter]} ({delimiter!r}) and it has no "
                f"header with a column url; put a first line such as {header} before it"
            )
    raise UserError(
        f"--source {source}: cannot tell its form from its first lines ({texts[0][:80]!r}): no tab between a "
        "caption and a URL, no header with a column url; name it with --format, or its columns with --url-col "
        "and --caption-col"
    )


def _has_urls_at_ends(delimiter: str, texts: list[str]) -> bool:
    """Whether more than half of the lines have a URL as their whole first or last field."""
    number = 0
    for line in texts:
        fields = [field.strip(' "') for field in line.split(delimiter)]
        if len(fields) > 1 and (PLAIN_URL.fullmatch(fields[0]) or PLAIN_URL.fullmatch(fields[-1])):
            number += 1
    return 2 * number > len(texts)


def _warn_of_encoding(source: str, head: list[bytes]) -> None:
    non_ascii = [line for line in head if not line.isascii()]
    if non_ascii and all(decode_text(line)[1] for line in non_ascii):
        log.warning(
            "%s: none of the first %s with other than ASCII letters is UTF-8, so such rows are left out as 'caption is "
            "not UTF-8'; if it is latin-1, %s",
            source,
            counted(len(non_ascii), "line"),
            conversion("LATIN1", source),
        )


# fields between delimiters


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
    has_cell = bool(head) and len(head[0][1]) > url
    folder = files_folder(source, names[url], decode_text(head[0][1][url])[0] if has_cell else None)
    others = [index for index in range(len(names)) if index not in (caption, url)]
    for text, fields in chain(head, rows):
        if len(fields) <= max(caption, url):
            yield _short_row(text)
            continue
        cells = {}
        if sum(map(len, fields)) <= MAX_OTHER_BYTES:
            cells = {names[index]: decode_text(fields[index])[0] for index in others if index < len(fields)}
        yield make_row(fields[caption], fields[url], folder, cells)


def headless_rows(source: str, shape: Shape) -> Iterator[Row]:
    """Rows of a list without a header: `CC3M` is caption, tab, URL; `CC12M` is URL, tab, caption."""
    for text, fields in split_rows(raw_lines(source), shape):
        if len(fields) < shape.width:
            yield _short_row(text)
        else:
            yield make_row(fields[shape.caption], fields[shape.url])


def _short_row(text: bytes) -> Row:
    """The row of a line with too few fields."""
    return broken_row(text, LINE_TOO_LONG if len(text) >= MAX_LINE_BYTES else NO_COLUMN)


# URLs alone


def url_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list of URLs alone, one a line, with or without a header: images without captions.

    Raises UserError when a URL column is named and the header is not it.
    """
    texts = lines(source)
    first = next(texts, None)
    if first is None:
        return
    has_header = find_column(columns[1], URL_NAMES, [_only_field(first)]) is not None
    if not has_header and columns[1] is not None:
        raise UserError(
            f"--source {source}: no column {columns[1]!r}; its first line is {_only_field(first)[:80]!r}; "
            "change --url-col"
        )
    for line in texts if has_header else chain([first], texts):
        yield make_row(None, unquoted(line.strip()))


def _only_field(line: bytes) -> str:
    """The text of a line with one field."""
    return (decode_text(unquoted(line.strip()))[0] or "").strip()


# JSON Lines


def _object(line: bytes) -> dict[str, Any] | None:
    """The line's JSON object; None when it is not one, or is nested too deep."""
    try:
        return parse_object(line)
    except ValueError:
        return None


def json_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list with a JSON object per line; of one with several captions, one each."""
    head = [_object(line) or {} for line in islice(lines(source), HEAD_LINES)]
    if not head:
        return  # an empty part of a list
    names = _json_names(source, columns)
    if not names:
        raise UserError(f"--source {source}: none of its first lines is a JSON object; change --format")
    caption, url = (names[index] for index in pick_columns(source, names, columns))
    urls = [fields[url] for fields in head if isinstance(fields.get(url), str)]
    folder = files_folder(source, url, urls[0] if urls else None)
    for line in lines(source):
        fields = _object(line)
        if fields is None:
            yield broken_row(line, NO_OBJECT)
            continue
        others = {}
        if len(line) <= MAX_OTHER_BYTES:
            others = {name: value for name, value in fields.items() if name not in (caption, url)}
        captions, note = json_captions(fields.get(caption))
        for text in captions:
            yield make_row(text, json_bytes(fields.get(url)), folder, others, note)


def _json_names(source: str, columns: Columns) -> list[str]:
    """The keys of a list's first objects, up to the one that has the last of both columns: a key may be left out."""
    names = dict[str, None]()
    for number, line in enumerate(islice(lines(source), MAX_HEAD_LINES)):
        if number >= HEAD_LINES and None not in locate_columns(list(names), columns):
            break
        names.update(dict.fromkeys(_object(line) or {}))
        if len(names) > MAX_NAMES:
            break
    return list(names)
