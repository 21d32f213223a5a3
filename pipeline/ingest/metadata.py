"""Lists of a folder's images with their captions, as they are published beside images.

Hugging Face's ``metadata.csv``, ``.jsonl``, ``.parquet`` (``file_name``, ``text`` or ``caption``); Flickr's
``captions.txt``, ``results.csv`` and ``.token``; COCO's and Karpathy's JSON. All their captions are in memory at once.
"""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pipeline.ingest.cells import NO_URL, format_names
from pipeline.ingest.delimited import header_of
from pipeline.ingest.json_annotations import FILE_NAMES, TEXT_NAMES, Entry, json_entries
from pipeline.ingest.parquet_lists import parquet_rows
from pipeline.ingest.rows import NOT_FOUND, NOT_UTF8, Row, SourceCaption, decode_text, find_column
from pipeline.ingest.source_io import lines, open_parquet
from pipeline.ingest.text_lists import HEAD_LINES, NO_COLUMN, delimited_rows, json_rows
from shards_spec.files import UserError, exists, is_url, join, open_read
from shards_spec.library_errors import no_regular_file, parquet_errors, parse_json
from shards_spec.names import IMAGE_ENDINGS, clean_name, file_ending
from shards_spec.sample import parse_object

log = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LISTS = re.compile(
    r"(?!.*lemma)"  # Flickr8k also has its captions' words in their basic forms
    r"(.*caption.*\.(txt|csv|tsv|json)|metadata\.(tsv|json)|results.*\.(csv|token)|.*\.token(\.txt)?|dataset_.*\.json)",
    re.IGNORECASE,
)
TOKEN = re.compile(r"(?P<file>[^\t]+?\.\w+)(#\d+)?\t(?P<text>.*)")  # a line of Flickr8k.token.txt
MAX_JSON_BYTES = 1 << 27  # COCO's captions of 2017 have 92 MB
NO_FILE = "metadata row without file_name"
TRIED_FILES = 5  # of a list, to find the folder where its images lie
TRIED_FOLDERS = 100


def is_list(name: str, files: dict[str, Any]) -> bool:
    """Whether a file of a folder with ``files`` may list images; ``captions.txt`` beside ``captions.jpg`` does not."""
    if name.lower() in METADATA:
        return True
    if not LISTS.fullmatch(name):
        return False
    stem = os.path.splitext(name)[0]
    return not any(stem + ending in files or stem + ending.upper() in files for ending in IMAGE_ENDINGS)


def read_lists(folder: str, lists: list[str], prefixes: list[str], given: str | None) -> dict[str, list[SourceCaption]]:
    """Path of each image below ``folder`` to its captions; for a line without a file name, ``list:line``.

    A metadata file replaces what lists before it say of its images; other lists add captions that are new.

    Args:
        folder: The source.
        lists: Paths of the lists below it, in the order of `folders.walk`.
        prefixes: Prefixes of all folders below it, for lists whose images lie elsewhere.
        given: Name of the caption column; None: one of the usual ones.

    Raises:
        UserError: A list cannot be read, or lacks a column.
    """
    captions = dict[str, list[SourceCaption]]()
    for below in lists:
        is_metadata = below.rpartition("/")[2].lower() in METADATA
        for path, texts in _read_list(folder, below, prefixes, given).items():
            former = [] if is_metadata else captions.get(path, [])
            new = [text for text in texts if text not in former] if former else texts
            captions[path] = former + new
    return captions


def _read_list(folder: str, below: str, prefixes: list[str], given: str | None) -> dict[str, list[SourceCaption]]:
    """Captions of one list as of `read_lists`; none, with a warning, for a file that is left out."""
    prefix, _, name = below.rpartition("/")
    prefix += "/" if prefix else ""
    path = join(folder, below)
    if (reason := no_regular_file(path)) is not None:
        log.warning("%s: left out, it %s", path, reason)
        return {}
    if name.lower() in METADATA:
        entries = list(_table_entries(path, given) or ())
    else:
        entries = list(list_entries(path, given) or ())
        files = [file for file, _ in islice(entries, TRIED_FILES) if file]
        images_prefix = _find_images(folder, prefix, prefixes, files)
        if images_prefix is None:
            why = "none of its images is here" if entries else "it is not a list of captions"
            log.warning("%s: left out, %s", path, why)
            return {}
        prefix = images_prefix
    captions = dict[str, list[SourceCaption]]()
    for number, (file, texts) in enumerate(entries, start=1):
        if file is None:
            lacks_column = any(text.problem == NO_COLUMN for text in texts)
            captions[f"{below}:{number}"] = [SourceCaption(None, NO_COLUMN if lacks_column else NO_FILE)]
        else:
            image = prefix + _path_below(join(folder, prefix), file)
            captions.setdefault(image, []).extend(texts)
    return captions


def _path_below(folder: str, file: str) -> str:
    """A file name in a list as a path below the folder, in the first of its spellings under which a file is there.

    Backslashes are Windows' separators; accents may be characters of their own (macOS) or not. Names of remote files
    are not looked up.
    """
    path = file.replace("\\", "/")
    if not is_url(folder):
        spellings = (file, path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
        path = next((name for name in spellings if os.path.lexists(os.path.join(folder, name))), path)
        root = os.path.abspath(folder)
        if os.path.isabs(path) and os.path.commonpath((root, path)) == root:
            path = os.path.relpath(path, folder)
    return clean_name(os.path.normpath(path).replace(os.sep, "/"))


def _find_images(folder: str, own: str, prefixes: list[str], files: list[str]) -> str | None:
    """The prefix of the folder where a list's files lie; None when none of `TRIED_FOLDERS` has one of them.

    Tried are the list's ``own`` folder, those in it, the one above, those in that.
    """
    above = own.rstrip("/").rpartition("/")[0]
    above += "/" if above else ""
    inside = [prefix for prefix in prefixes if prefix.startswith(own)]
    beside = [prefix for prefix in prefixes if prefix.startswith(above)]
    candidates = list(dict.fromkeys([own, *inside, above, *beside]))[:TRIED_FOLDERS]
    matches = (prefix for prefix in candidates if _has_one(folder, prefix, files))
    first = next(matches, None)
    if first is not None and first != own and not is_url(folder):  # looking on would cost requests to a store
        second = next(matches, None)
        if second is not None:
            log.warning(
                "%s: files of a list here are in %s and in %s; the first ones get its captions",
                join(folder, own),
                first,
                second or folder,
            )
    return first


def _has_one(folder: str, prefix: str, files: list[str]) -> bool:
    return any(exists(join(folder, prefix + _path_below(join(folder, prefix), file))) for file in files)


# tables: Hugging Face's metadata, Flickr's lists


def _table_entries(path: str, given: str | None) -> Iterator[Entry] | None:
    """File names with captions from a table; None for a table without these columns.

    Raises UserError for a metadata file without these columns, and as the readers of lists do.
    """
    names = [name.strip() for name in _column_names(path, given)]
    is_metadata = os.path.basename(path).lower() in METADATA
    file = find_column(None, ("file_name",) if is_metadata else FILE_NAMES, names)
    text = find_column(given, TEXT_NAMES, names)
    if not names and path.lower().endswith(".jsonl") and any(line.strip() for line in lines(path)):
        raise UserError(f"{path}: none of its first lines is a JSON object; it needs file_name and text")
    if is_metadata and names and file is None:
        raise UserError(f"{path}: its columns are {format_names(names)}; it needs file_name and text")
    if is_metadata and names and text is None and given is not None:
        raise UserError(f"{path}: no column {given!r}; its columns are {format_names(names)}; change --caption-col")
    if file is None or (text is None and not is_metadata):
        return None
    columns = (names[file if text is None else text], names[file])
    match file_ending(path):
        case ".jsonl":
            rows = json_rows(path, columns)
        case ".parquet":
            rows = parquet_rows(path, columns)
        case _:
            rows = delimited_rows(path, columns)
    return _row_entries(rows, has_text=text is not None)


def _column_names(path: str, given: str | None) -> list[str]:
    """The columns of a table.

    Of JSON Lines with several columns for captions, those that most of the first lines have.
    """
    ending = file_ending(path)
    if ending == ".parquet":
        with parquet_errors(path, given=True), open_parquet(path) as table:
            names: list[str] = table.schema_arrow.names
        return names
    head = list(islice((line for line in lines(path) if line.strip()), HEAD_LINES))
    if ending != ".jsonl":
        return header_of(head[0], (given, None))[0] if head else []
    counts = Counter[str]()
    for line in head:
        counts.update(_object(line).keys())
    if given:
        return list(counts)
    most = max((count for name, count in counts.items() if name.lower() in TEXT_NAMES), default=0)
    return [name for name, count in counts.items() if name.lower() not in TEXT_NAMES or count == most]


def _object(line: bytes) -> dict[str, Any]:
    """The line's JSON object; an empty one when it is not one."""
    try:
        return parse_object(line)
    except ValueError:
        return {}


def _row_entries(rows: Iterator[Row], *, has_text: bool) -> Iterator[Entry]:
    for row in rows:
        if row.url is None and row.caption is None and row.problem != NO_URL:
            continue  # an empty line
        caption = row.caption.strip() if row.caption is not None and has_text else None
        problem = None if row.problem == NOT_FOUND else row.problem  # the image may lie in another folder
        yield row.url, [SourceCaption(caption, problem, row.note)]


# lists of Flickr, COCO, Karpathy


def list_entries(path: str, given: str | None) -> Iterator[Entry] | None:
    """File names with captions; None for a file that is not such a list. Raises UserError."""
    if path.lower().endswith(".json"):
        with open_read(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES >> 20} MiB of JSON; convert it to metadata.jsonl")
        return json_entries(parse_json(path, data, given=True), given)
    is_text = file_ending(path) != ".parquet"
    if is_text and TOKEN.fullmatch(next(lines(path), b"").decode(errors="replace")):
        return _token_entries(path)
    return _table_entries(path, given)


def _token_entries(path: str) -> Iterator[Entry]:
    for line in lines(path):
        match = TOKEN.fullmatch(line.decode(errors="surrogateescape"))
        if match is not None:
            text, broken = decode_text(match["text"].strip().encode(errors="surrogateescape"))
            yield match["file"], [SourceCaption(text or None, NOT_UTF8 if broken else None)]
        elif line.strip():
            yield None, []
