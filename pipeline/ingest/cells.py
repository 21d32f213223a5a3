"""From the cells of a list to rows: which columns count, what is not a caption, how much of a cell is kept.

Every reader of lists (`text_lists`, `parquet_lists`) ends here, so that one list in two forms gives the same rows.
"""

import os
import re
from typing import Any

from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_FOUND,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    FileRef,
    Row,
    decode_text,
    find_column,
)
from pipeline.ingest.source_io import local_stamp
from shards_spec.files import UserError, is_url, join
from shards_spec.names import is_image

URL_COLUMNS = (*URL_NAMES, "image")  # a list's column image may hold URLs
PATH_COLUMNS = (  # filepath first: open_clip's
    "filepath",
    "file_path",
    "image_path",
    "img_path",
    "file_name",
    "filename",
    "path",
)
PATH_CAPTIONS = (*CAPTION_NAMES, "title")  # open_clip's lists of files have filepath and title
URL_PATTERN = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
NO_CAPTION = frozenset({"\\N", "NaN", "nan"})  # how databases and pandas write that there is none
MAX_CELL_BYTES = 1 << 15  # of a caption, of a URL, and of a row's other columns together
KEPT_CHARS = 1000  # of what was longer: enough to recognise it
NO_URL = "no URL"
CAPTION_TOO_LONG = "caption too long"
ADDRESS_TOO_LONG = "address too long"
NAMES_SHOWN = 20  # of a list's columns, in a message
NAME_CHARS = 40  # of a column's name, in a message


def format_names(names: list[str]) -> str:
    """Column names for a message, shortened when they are many or long."""
    cut = [name if len(name) <= NAME_CHARS else f"{name[:NAME_CHARS]}..." for name in names[:NAMES_SHOWN]]
    return str(cut) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def locate_columns(names: list[str], columns: Columns) -> tuple[int | None, int | None]:
    """Indexes of the caption and the URL column, by the given names or by the usual ones; None for one not there.

    A column of file names stands in for a column of URLs.
    """
    captions: tuple[str, ...] = CAPTION_NAMES
    url = find_column(columns[1], URL_COLUMNS, names)
    if url is None and columns[1] is None:
        url = find_column(None, PATH_COLUMNS, names)
        captions = PATH_CAPTIONS
    return find_column(columns[0], captions, names), url


def pick_columns(source: str, names: list[str], columns: Columns) -> tuple[int, int]:
    """Indexes of the caption and the URL column. Raises UserError naming the list's columns when one is missing."""
    caption, url = locate_columns(names, columns)
    for index, given, option in ((caption, columns[0], "--caption-col"), (url, columns[1], "--url-col")):
        if index is None and given is not None:
            raise UserError(
                f"--source {source}: no column {given!r}; its columns are {format_names(names)}; change {option}"
            )
    if caption is None or url is None:
        raise UserError(
            f"--source {source}: its columns are {format_names(names)}; it needs url (or URL) and caption (or TEXT), "
            "or name them with --url-col and --caption-col"
        )
    check_once(source, names, [names[caption], names[url]])
    return caption, url


def check_once(source: str, names: list[str], chosen: list[str]) -> None:
    """Raises UserError when a chosen column's name is there more than once: readers disagree which of them counts."""
    for name in chosen:
        if names.count(name) > 1:
            raise UserError(f"--source {source} has the column {name!r} more than once; rename or drop one of them")


def is_address(cell: str) -> bool:
    """Whether a cell looks like the address of an image: a URL, or a file name with an image's ending."""
    bare = cell.strip(' "\r')
    return URL_PATTERN.match(bare) is not None or is_image(bare)


def files_folder(source: str, column: str, first: str | None) -> str | None:
    """The folder below which a list's column names files; None when the column holds URLs.

    A column names files when it is called so, or when its ``first`` cell is not a URL but a file beside the list.
    """
    folder = os.path.dirname(source if is_url(source) else os.path.abspath(source))
    if column.strip().lower() in PATH_COLUMNS:
        return folder
    cell = (first or "").strip()
    if not cell or URL_PATTERN.match(cell) or is_url(source) or "\0" in cell:
        return None
    return folder if os.path.isfile(os.path.join(folder, cell)) else None


def make_row(
    caption: bytes | None,
    address: bytes | None,
    folder: str | None = None,
    extra: dict[str, Any] | None = None,
    note: str | None = None,
) -> Row:
    """The row of a caption and an address, both in UTF-8 unless they are damaged.

    Args:
        caption: None when there is none.
        address: A URL, or a file's path below ``folder``.
        folder: As `files_folder` gives it.
        extra: The list's other columns.
        note: See `Row`.
    """
    text, problem = _text(caption, CAPTION_TOO_LONG)
    if text in NO_CAPTION:
        text = None
    url, url_problem = _text(address, ADDRESS_TOO_LONG)
    url = (url or "").strip()
    if problem is None and url_problem == ADDRESS_TOO_LONG:  # one that is not UTF-8 is tried as it is
        problem = ADDRESS_TOO_LONG
    if problem is None and not url:
        problem = NO_URL
    kept = {} if extra is None else extra
    if folder is None or problem is not None or URL_PATTERN.match(url):
        return Row(text, url or None, problem, note=note, extra=kept)
    path = join(folder, url) if is_url(folder) else os.path.join(folder, url)
    try:
        stamp = "" if is_url(path) else local_stamp(path)
    except (OSError, ValueError):
        return Row(text, url, NOT_FOUND, note=note, extra=kept)
    return Row(text, url, None, stamp, FileRef(path), note, kept)


def _text(cell: bytes | None, too_long: str) -> tuple[str | None, str | None]:
    """(text, problem); of a cell that is too long the beginning is kept."""
    if cell is not None and len(cell) > MAX_CELL_BYTES:
        return cell[:KEPT_CHARS].decode(errors="ignore"), too_long
    text, broken = decode_text(cell)
    return text, NOT_UTF8 if broken else None


def broken_row(line: bytes, problem: str) -> Row:
    """The row of a line without the columns it should have: its text is kept as its URL or its caption."""
    text = decode_text(line[:MAX_CELL_BYTES])[0] or ""
    if len(line) > MAX_CELL_BYTES:
        text = text[:KEPT_CHARS]
    return Row(None, text, problem) if URL_PATTERN.match(text) else Row(text or None, None, problem)
