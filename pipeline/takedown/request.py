"""The list of what has to go: keys, links and sha256 of images, from a text file or a Parquet file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import cast

from pipeline.ingest.source_io import lines
from pipeline.takedown.config import Kind
from shards_spec.files import UserError, exists
from shards_spec.library_errors import gzip_errors, no_regular_file
from shards_spec.messages import counted
from shards_spec.parquet import column_names, read_table
from shards_spec.sample import KEY_PATTERN

SHA256 = re.compile(r"[0-9a-fA-F]{64}")
COMMENT = re.compile(r"\s#")
KINDS: tuple[Kind, ...] = ("key", "url", "sha256")
COLUMNS: dict[str, Kind] = {"key": "key", "uid": "key", "url": "url", "sha256": "sha256"}  # of a list with columns


@dataclass
class TakedownRequest:
    """What a list names, each value with its line (from 1).

    ``keys`` are keys of samples, or values of a column ``uid`` of the source; ``images`` are sha256 in small letters.
    """

    keys: dict[str, int] = field(default_factory=dict)
    urls: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def add(self, kind: Kind, value: str, line: int) -> None:
        """One more entry."""
        values = {"key": self.keys, "url": self.urls, "sha256": self.images}[kind]
        values.setdefault(value.lower() if kind == "sha256" else value, line)

    def __len__(self) -> int:
        return len(self.keys) + len(self.urls) + len(self.images)

    def describe(self) -> str:
        """``2 keys, 1 link``."""
        parts = [counted(len(self.keys), "key"), counted(len(self.urls), "link"), counted(len(self.images), "image")]
        return ", ".join(part for part in parts if not part.startswith("0 "))


def read_request(path: str, by: str) -> TakedownRequest:
    """The list of a file; ``by`` is a kind, or ``auto``.

    Raises UserError when there is no such file, it is empty, or a value is not of its kind.
    """
    if not exists(path):
        raise UserError(f"--list {path}: no such file; give a text or Parquet file of keys, links or sha256")
    if reason := no_regular_file(path):
        raise UserError(f"--list {path} {reason}; give a text or Parquet file of keys, links or sha256")
    request = TakedownRequest()
    entries = _parquet_entries(path, by) if path.lower().endswith(".parquet") else _text_entries(path, by)
    for line, kind, value in entries:
        if kind == "sha256" and not SHA256.fullmatch(value):
            raise UserError(f"--list {path}: line {line} is no sha256 of 64 hexadecimal digits: {value[:80]!r}")
        request.add(kind, value, line)
    if not len(request):
        raise UserError(f"--list {path} names nothing: give a key, a link or a sha256 per line")
    return request


def _text_entries(path: str, by: str) -> Iterator[tuple[int, Kind, str]]:
    column: str | None = None  # that counts, of a list whose first line names columns
    place = 0
    numbered = _text_lines(path)
    first_two = list(islice(numbered, 2))
    following = first_two[1][1].split("\t") if len(first_two) == 2 else []
    for number, text in chain(first_two, numbered):
        fields = text.split("\t")
        if number == 1 and _is_header(fields, following):
            column = _pick_column(path, fields, by)
            place = fields.index(column)
            continue
        if column is not None:
            if len(fields) > place and fields[place].strip():
                yield number, COLUMNS[column], fields[place].strip()
            continue
        first, tab, rest = text.partition("\t")
        if tab and first in KINDS:
            yield number, first, rest.strip()
        elif tab:
            raise UserError(
                f"--list {path}: line {number} has a tab and does not begin with {', '.join(KINDS)}: write KIND, tab, "
                "value, or a value alone"
            )
        else:
            _check_form(path, number, text)
            yield number, _kind_of(text, by), text


def _check_form(path: str, number: int, text: str) -> None:
    """Raise UserError for a line of another form, which would be taken for a link that no row has."""
    if text[0] in "{[":
        raise UserError(
            f"--list {path}: line {number} is JSON; give a TSV or Parquet file with a column, or plain lines"
        )
    if COMMENT.search(text):
        raise UserError(
            f"--list {path}: line {number} has a comment after its value; leave it out (a link with ` #` in it: write "
            "url, tab, the link)"
        )
    if number == 1 and "," in text and set(re.split(r"[,\s\"]+", text)) & set(COLUMNS):
        raise UserError(f"--list {path}: line 1 has names of columns with commas; separate columns by tabs (TSV)")


def _text_lines(path: str) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    with gzip_errors(path):
        for number, data in enumerate(_lines_of(path), 1):
            try:
                text = data.decode().strip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"--list {path}: line {number} is not UTF-8 ({error.reason}); save the list as UTF-8"
                ) from error
            if text:
                yield number, text


def _lines_of(path: str) -> Iterator[bytes]:
    """The lines of a list. Raises UserError that names the option for a file that is no text."""
    try:
        yield from lines(path)
    except UserError as error:
        reason = str(error).replace("; check the path, and --format where it is given", "; give a text or Parquet file")
        raise UserError(f"--list {reason}") from error


def _is_header(fields: list[str], following: list[str]) -> bool:
    """Whether the fields of a first line are names of columns, and not a kind and its value, by the line after it."""
    if len(fields) < 2:
        return fields[0] in COLUMNS
    if not set(fields) & set(COLUMNS):
        return False
    is_named = fields[0] not in KINDS or len(fields) > 2 or fields[1] in (*COLUMNS, "caption")
    return is_named or (len(following) == 2 and following[0] not in KINDS)


def _kind_of(text: str, by: str) -> Kind:
    """The kind that was given, else what the value looks like: 64 hexadecimal digits, a key without dots, a link."""
    if by != "auto":
        return cast(Kind, by)
    if SHA256.fullmatch(text):
        return "sha256"
    return "key" if KEY_PATTERN.fullmatch(text) else "url"


def _parquet_entries(path: str, by: str) -> Iterator[tuple[int, Kind, str]]:
    column = _pick_column(path, column_names(path, given=True), by)
    table = read_table(path, [column], given=True)
    for number, value in enumerate(table.column(0).to_pylist(), 1):
        if value is not None and str(value).strip():
            yield number, COLUMNS[column], str(value).strip()


def _pick_column(path: str, names: list[str], by: str) -> str:
    """The one column of a list that says what has to go. Raises UserError when there is none, or several."""
    wanted = [name for name in names if name in COLUMNS and by in ("auto", COLUMNS[name])]
    if not wanted:
        raise UserError(f"--list {path}: no column key, uid, url or sha256 to go by, it has {', '.join(names)}")
    if len(wanted) > 1:
        raise UserError(f"--list {path} has the columns {', '.join(wanted)}: say --by key, url or sha256")
    return wanted[0]
