"""Rows of folders of images, and what sources of images that need no download share.

No image is read here; a row carries the place of its bytes. Everything works on local paths and fsspec URLs.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from pipeline.core.prefetch import batches
from pipeline.ingest.metadata import is_list, read_lists
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_UTF8,
    Caption,
    Columns,
    FileRef,
    Row,
    decode_text,
    find_column,
)
from pipeline.ingest.source_io import remote_stamp
from pipeline.ingest.text_lists import captions_of
from shards_spec.files import UserError, filesystem, is_url, join, read_bytes, store_errors
from shards_spec.folders import Files, walk
from shards_spec.names import MOST_ENDINGS, clean_name, endings_line, file_ending, is_image, undecoded_ending
from shards_spec.sample import TEXT_EXTENSIONS, parse_object

log = logging.getLogger(__name__)
MAX_TEXT_BYTES = 1 << 24  # of a file beside an image
REMOTE_TEXTS = 256  # read at once
NAME_NOT_UTF8 = "file name is not UTF-8"
NOT_READABLE, TOO_LONG, OUTSIDE = "caption not readable", "caption too long", "caption links outside of the folder"
BAD_JSON = "json beside the image does not parse"


def not_decoded(ending: str) -> str:
    """The reason of an image whose format is known and not read."""
    return f"format not decoded: {ending.removeprefix('.')}"


def warn_of_no_caption(rows: Iterable[Row], source: str, why: Callable[[], str]) -> Iterator[Row]:
    """The rows; one warning after the last when none that can be used, or fails for its caption, had one."""
    number = captions = 0
    for row in rows:
        number += 1
        captions += bool(row.caption and row.caption.strip()) and row.problem in (None, NOT_UTF8, TOO_LONG)
        yield row
    if number and not captions:
        log.warning("--source %s: no row has a caption: %s", source, why())


def seen_line(what: str, seen: Counter[str]) -> str:
    """``members seen were jpg, json``."""
    return f"{what} seen were {', '.join(ending for ending, _ in seen.most_common(MOST_ENDINGS)) or 'none'}"


# folders of images


def folder_rows(folder: str, columns: Columns = (None, None)) -> Iterator[Row]:
    """Images of a folder and the folders in it, sorted, a row per caption; memory grows with its metadata files only.

    The caption of ``x.jpg`` stands beside it in ``x.txt``, ``x.caption``, ``x.text`` or ``x.json``, or in a list of
    images (`metadata.read_lists`); an image without one has none. What a list names and is not there comes last, as a
    row with its problem. One line counts files that were not taken, by ending. Raises UserError.
    """
    if not is_url(folder) and not os.path.isdir(folder):
        raise UserError(f"--source {folder}: not a folder")
    if columns[1] is not None:
        raise UserError(
            f"--source {folder}: --url-col {columns[1]!r} means nothing for a folder of images; leave it out"
        )
    seen, lists, prefixes = Counter[str](), list[str](), list[str]()
    for prefix, files in walk(folder):
        seen.update(map(file_ending, files))
        lists += [prefix + name for name in files if is_list(name, files)]
        prefixes.append(prefix)
    given = columns[0]
    if given is not None and not lists and not {f".{given.lower()}", ".json"} & set(seen):
        raise UserError(
            f"--source {folder}: no caption column {given!r}: no list of images (metadata.csv, ...), no .json and no "
            f".{given.lower()} beside images; its files are {endings_line(seen)}; change --caption-col"
        )
    listed = read_lists(folder, lists, prefixes, given)
    rows = _folder_rows(folder, listed, set(lists), given)
    yield from warn_of_no_caption(rows, folder, partial(seen_line, "files", seen))


def _folder_rows(folder: str, listed: dict[str, list[Caption]], lists: set[str], given: str | None) -> Iterator[Row]:
    left_out = Counter[str]()
    for prefix, files in walk(folder):
        sidecars, taken = _Sidecars(files, given), _taken(files)
        for chunk in batches(taken, REMOTE_TEXTS):
            beside = {name: sidecars.of(name) for name in chunk if prefix + name not in listed}
            captions = _read_captions(folder, prefix, [text for text in beside.values() if text], given)
            for name in chunk:
                found = listed.pop(prefix + name, None) or captions.get(beside.get(name) or "", [Caption()])
                yield from _image_rows(folder, prefix + name, files[name], found)
        used = sidecars.used.union(filter(is_image, taken))
        left_out.update(file_ending(name) for name in files if name not in used and prefix + name not in lists)
    for path in sorted(listed):
        yield from (Row(caption.text, path, caption.problem or "file not found") for caption in listed[path])
    if left_out:
        log.warning("--source %s: files that are not taken: %s", folder, endings_line(left_out))


def _taken(files: Files) -> list[str]:
    """Names of images; of a format that is not decoded (``x.cr2``) unless it is there as another (``x.jpg``), too."""
    stems = {os.path.splitext(name)[0] for name in files if is_image(name)}
    return [
        name for name in files if is_image(name) or (undecoded_ending(name) and os.path.splitext(name)[0] not in stems)
    ]


class _Sidecars:
    """Files of a folder that may stand beside images."""

    def __init__(self, files: Files, given: str | None) -> None:
        texts = (given.lower(),) if given is not None else TEXT_EXTENSIONS
        self.used = set[str]()
        self._endings = tuple(f".{extension}" for extension in (*texts, "json"))
        self._names = dict[str, str]()
        for name in files:  # in capitals first, so that small letters win
            stem, ending = os.path.splitext(name)
            if ending.lower() in self._endings:
                self._names[stem + ending.lower()] = name

    def of(self, image: str) -> str | None:
        """``x.txt`` or ``x.jpg.txt`` of ``x.jpg``."""
        stems = (os.path.splitext(image)[0], image)
        found = next((self._names[s + e] for e in self._endings for s in stems if s + e in self._names), None)
        self.used |= {found} if found else set()
        return found


def _image_rows(folder: str, path: str, info: dict[str, Any], captions: list[Caption]) -> Iterator[Row]:
    place, stamp, wrong = FileRef(join(folder, path)), "", None
    clean = clean_name(path)
    if clean != path:
        wrong = NAME_NOT_UTF8
    elif is_url(folder):
        stamp = remote_stamp(info)
    else:
        try:
            status = os.stat(place.path)
            stamp = f"{status.st_size} {status.st_mtime_ns}"
            wrong = None if stat.S_ISREG(status.st_mode) else "no regular file"  # reading a pipe would wait for ever
        except OSError:
            wrong = "file not found"  # a link to nowhere
    if wrong is None and (ending := undecoded_ending(path)):
        wrong = not_decoded(ending)
    for caption in captions:
        if wrong is not None:
            yield Row(caption.text, clean, wrong, stamp)
        else:
            yield Row(caption.text, path, caption.problem, stamp, place, caption.note)


def _read_captions(folder: str, prefix: str, names: list[str], given: str | None) -> dict[str, list[Caption]]:
    """Captions by name of the file beside the image; remote ones are read together."""
    contents: list[bytes | Exception | str]
    if is_url(folder):
        fs, inner = filesystem(folder)
        nothing = [None] * len(names)
        whole = [join(inner, prefix + name) for name in names]  # no wildcards here, as in fs.cat
        with store_errors(folder):
            contents = fs.cat_ranges(whole, nothing, nothing, on_error="return") if names else []
    else:
        contents = list(map(partial(_read_local, os.path.realpath(folder)), (join(folder, prefix + n) for n in names)))
    return {name: _captions(name, data, given) for name, data in zip(names, contents, strict=True)}


def _read_local(root: str, path: str) -> bytes | str:
    """The bytes of a regular file, or why they are no caption."""
    try:
        if os.path.islink(path):
            inside = (root, os.path.realpath(os.path.dirname(path)))
            real = os.path.realpath(path)
            if os.path.exists(real) and not any(os.path.commonpath((place, real)) == place for place in inside):
                return OUTSIDE
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return NOT_READABLE
        return read_bytes(path) if status.st_size <= MAX_TEXT_BYTES else TOO_LONG
    except OSError:
        return NOT_READABLE


def _captions(name: str, data: bytes | Exception | str, given: str | None) -> list[Caption]:
    if data == OUTSIDE:  # somebody else's file, perhaps: no caption, and no fault of the image
        return [Caption(note=OUTSIDE)]
    if not isinstance(data, bytes):
        return [Caption(None, data if isinstance(data, str) else NOT_READABLE)]
    text, broken = decode_text(data)
    if broken or not name.lower().endswith(".json"):
        return [Caption((text or "").removeprefix("\ufeff").strip(), NOT_UTF8 if broken else None)]
    try:
        fields = parse_object(data)
    except ValueError as error:
        return [Caption(None, None if "no object" in str(error) else BAD_JSON)]  # a list of boxes is no caption
    names = list(fields)
    index = find_column(given, CAPTION_NAMES, names)
    return captions_of(fields[names[index]]) if index is not None else [Caption()]
