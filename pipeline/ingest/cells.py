"""From the cells of a list to rows: which columns count, what is no caption, how much of a cell is kept.

Every reader of lists (`text_lists`, `parquet_lists`) ends here, so that one list in two forms gives the same rows.
"""

import os
import re
from typing import Any

from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    FilePlace,
    Row,
    find_column,
    local_stamp,
    text_of,
)
from shards_spec.files import UserError, is_url, join
from shards_spec.names import is_image

WEB_NAMES = (*URL_NAMES, "image")  # a list's column image may hold addresses
PATH_NAMES = ("filepath", "file_path", "image_path", "img_path", "file_name", "filename", "path")  # first: open_clip's
PATH_CAPTIONS = (*CAPTION_NAMES, "title")  # open_clip's lists of files have filepath and title
URL_PATTERN = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
NO_CAPTION = frozenset({"\\N", "NaN", "nan"})  # how databases and pandas write that there is none
MAX_CELL_BYTES = 1 << 15  # of a caption, of an address, and of a row's other columns together
KEPT_CHARS = 1000  # of what was longer: enough to recognise it
CAPTION_TOO_LONG, ADDRESS_TOO_LONG = "caption too long", "address too long"
NOT_TEXT = "caption is not text"
NOT_FOUND = "file not found"
NAMES_SHOWN, NAME_CHARS = 20, 40  # of a list's columns, in a message


def shown(names: list[str]) -> str:
    """Column names for a message, however many and long they are."""
    cut = [name if len(name) <= NAME_CHARS else f"{name[:NAME_CHARS]}..." for name in names[:NAMES_SHOWN]]
    return str(cut) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def found_columns(names: list[str], columns: Columns) -> tuple[int | None, int | None]:
    """Indexes of the caption and of the address, by the given names or by the usual ones.

    A list without a column of addresses may have one of files.
    """
    url = find_column(columns[1], WEB_NAMES, names)
    captions: tuple[str, ...] = CAPTION_NAMES
    if url is None and columns[1] is None:
        url, captions = find_column(None, PATH_NAMES, names), PATH_CAPTIONS
    return find_column(columns[0], captions, names), url


def pick_columns(source: str, names: list[str], columns: Columns) -> tuple[int, int]:
    """Indexes of the caption and the address. Raises UserError that names the columns that are there."""
    caption, url = found_columns(names, columns)
    for index, given, option in ((caption, columns[0], "--caption-col"), (url, columns[1], "--url-col")):
        if index is None and given is not None:
            raise UserError(f"--source {source}: no column {given!r}; its columns are {shown(names)}; change {option}")
    if caption is None or url is None:
        raise UserError(
            f"--source {source}: its columns are {shown(names)}; it needs url (or URL) and caption (or TEXT), or name "
            "them with --url-col and --caption-col"
        )
    check_once(source, names, [names[caption], names[url]])
    return caption, url


def check_once(source: str, names: list[str], chosen: list[str]) -> None:
    """Raises UserError when a chosen column's name is there more than once: readers disagree which of them counts."""
    if twice := next((name for name in chosen if names.count(name) > 1), None):
        raise UserError(f"--source {source} has the column {twice!r} more than once; rename or drop one of them")


def is_address(cell: str) -> bool:
    """Whether a cell looks like the address of an image: a URL, or a file name with an image's ending."""
    bare = cell.strip(' "\r')
    return URL_PATTERN.match(bare) is not None or is_image(bare)


def files_folder(source: str, column: str, first: str | None) -> str | None:
    """The folder below which a list's column names files; None when it names addresses on the web.

    It names files by its name, or when the first cell is no URL and is a file beside the list.
    """
    folder = os.path.dirname(source) if is_url(source) else os.path.dirname(os.path.abspath(source))
    if column.strip().lower() in PATH_NAMES:
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
    """The row of a caption and an address, both UTF-8 when all is well; ``folder`` as `files_folder` tells it."""
    text, problem = _text(caption, CAPTION_TOO_LONG)
    if text in NO_CAPTION:
        text = None
    url, wrong = _text(address, ADDRESS_TOO_LONG)
    url = (url or "").strip()
    problem = problem or (wrong if wrong == ADDRESS_TOO_LONG else None) or (None if url else "no URL")
    kept = extra or {}
    if folder is None or problem is not None or URL_PATTERN.match(url):
        return Row(text, url or None, problem, note=note, extra=kept)
    path = join(folder, url) if is_url(folder) else os.path.join(folder, url)
    try:
        stamp = "" if is_url(path) else local_stamp(path)
    except (OSError, ValueError):
        return Row(text, url, NOT_FOUND, note=note, extra=kept)
    return Row(text, url, None, stamp, FilePlace(path), note, kept)


def _text(cell: bytes | None, too_long: str) -> tuple[str | None, str | None]:
    """(text, problem); of too long a cell the beginning is kept."""
    if cell is not None and len(cell) > MAX_CELL_BYTES:
        return cell[:KEPT_CHARS].decode(errors="ignore"), too_long
    text, broken = text_of(cell)
    return text, NOT_UTF8 if broken else None


def broken_row(line: bytes, problem: str) -> Row:
    """The row of a line that has not the columns it should have; all of it may be an address."""
    text = text_of(line[:MAX_CELL_BYTES])[0] or ""
    text = text if len(line) <= MAX_CELL_BYTES else text[:KEPT_CHARS]
    return Row(None, text, problem) if URL_PATTERN.match(text) else Row(text or None, None, problem)
