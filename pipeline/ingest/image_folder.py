"""Rows of folders of images, and what all sources of images that need no download share.

No image is read here; a row says where its bytes lie. Everything works on local paths and fsspec URLs.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from pipeline.core.prefetch import batches
from pipeline.ingest.cells import CAPTION_TOO_LONG
from pipeline.ingest.metadata import is_list, read_lists
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_FOUND,
    NOT_UTF8,
    Columns,
    FileRef,
    Row,
    SourceCaption,
    captions_of,
    decode_text,
    find_column,
)
from pipeline.ingest.source_io import remote_stamp
from shards_spec.files import UserError, filesystem, is_url, join, read_bytes, store_errors
from shards_spec.folders import Files, walk
from shards_spec.names import MOST_ENDINGS, clean_name, endings_line, file_ending, is_image, undecoded_ending
from shards_spec.sample import TEXT_EXTENSIONS, parse_object

log = logging.getLogger(__name__)
MAX_TEXT_BYTES = 1 << 24  # of a file beside an image
REMOTE_TEXTS = 256  # read at once
NAME_NOT_UTF8 = "file name is not UTF-8"
NOT_REGULAR = "no regular file"
CAPTION_NOT_READABLE = "caption not readable"
CAPTION_OUTSIDE = "caption links outside of the folder"
BAD_JSON = "json beside the image does not parse"


def not_decoded(ending: str) -> str:
    """The problem of an image whose format is known and cannot be decoded."""
    return f"format not decoded: {ending.removeprefix('.')}"


def warn_of_no_caption(rows: Iterable[Row], source: str, hint: Callable[[], str]) -> Iterator[Row]:
    """The rows; one warning after the last when none of them has a caption.

    Rows that cannot be used for other reasons than their caption do not count; ``hint`` says what may be wrong.
    """
    has_rows = False
    remaining = iter(rows)
    for row in remaining:
        yield row
        has_rows = True
        is_usable = row.problem in (None, NOT_UTF8, CAPTION_TOO_LONG)
        if is_usable and row.caption and row.caption.strip():
            yield from remaining
            return
    if has_rows:
        log.warning("--source %s: no row has a caption: %s", source, hint())


def seen_line(what: str, seen: Counter[str]) -> str:
    """``members seen were jpg, json``."""
    return f"{what} seen were {', '.join(ending for ending, _ in seen.most_common(MOST_ENDINGS)) or 'none'}"


def folder_rows(folder: str, columns: Columns = (None, None)) -> Iterator[Row]:
    """Images of a folder and the folders in it, sorted, a row per caption; memory grows with its lists only.

    The caption of ``x.jpg`` stands beside it in ``x.txt``, ``x.caption``, ``x.text`` or ``x.json``, or in a list of
    images (`metadata.read_lists`); an image without one has none. What a list names and is not there comes last, as a
    row with its problem. One warning counts the files that were not taken, by ending.

    Raises UserError for a folder that cannot be listed, a list that cannot be read, and a caption column that is
    nowhere.
    """
    if not is_url(folder) and not os.path.isdir(folder):
        raise UserError(f"--source {folder}: not a folder")
    given, url_column = columns
    if url_column is not None:
        raise UserError(
            f"--source {folder}: --url-col {url_column!r} means nothing for a folder of images; leave it out"
        )
    seen = Counter[str]()
    lists: list[str] = []
    prefixes: list[str] = []
    for prefix, files in walk(folder):
        seen.update(map(file_ending, files))
        lists += [prefix + name for name in files if is_list(name, files)]
        prefixes.append(prefix)
    if given is not None and not lists and f".{given.lower()}" not in seen and ".json" not in seen:
        raise UserError(
            f"--source {folder}: no caption column {given!r}: no list of images (metadata.csv, ...), no .json and no "
            f".{given.lower()} beside images; its files are {endings_line(seen)}; change --caption-col"
        )
    listed = read_lists(folder, lists, prefixes, given)
    rows = _folder_rows(folder, listed, set(lists), given)
    yield from warn_of_no_caption(rows, folder, partial(seen_line, "files", seen))


def _folder_rows(
    folder: str, listed: dict[str, list[SourceCaption]], lists: set[str], given: str | None
) -> Iterator[Row]:
    """Rows of `folder_rows`; ``listed`` are the captions of the ``lists``, which are used up."""
    left_out = Counter[str]()
    for prefix, files in walk(folder):
        sidecars = _Sidecars(files, given)
        taken = taken_images(files)
        for chunk in batches(taken, REMOTE_TEXTS):
            beside = {name: sidecars.find(name) for name in chunk if prefix + name not in listed}
            captions = _read_captions(folder, prefix, [text for text in beside.values() if text], given)
            for name in chunk:
                own = listed.pop(prefix + name, None) or captions.get(beside.get(name) or "", [SourceCaption()])
                yield from _image_rows(folder, prefix + name, files[name], own)
        used = sidecars.used.union(filter(is_image, taken))
        left_out.update(file_ending(name) for name in files if name not in used and prefix + name not in lists)
    for path in sorted(listed):
        yield from (Row(caption.text, path, caption.problem or NOT_FOUND) for caption in listed[path])
    if left_out:
        log.warning("--source %s: files that are not taken: %s", folder, endings_line(left_out))


def taken_images(files: Files) -> list[str]:
    """Names of images, and of those that cannot be decoded (``x.cr2``) where no other has their stem (``x.jpg``)."""
    stems = {os.path.splitext(name)[0] for name in files if is_image(name)}
    taken = []
    for name in files:
        if is_image(name) or (undecoded_ending(name) and os.path.splitext(name)[0] not in stems):
            taken.append(name)
    return taken


class _Sidecars:
    """Files of a folder with the caption of the image they are named after: ``x.txt`` of ``x.jpg``."""

    def __init__(self, files: Files, given: str | None) -> None:
        texts = (given.lower(),) if given is not None else TEXT_EXTENSIONS
        self.used = set[str]()  # names of those that were found for an image
        self._endings = [f".{extension}" for extension in (*texts, "json")]
        self._names = dict[str, str]()  # name with a lower-case ending -> name
        for name in files:  # sorted: capitals come first, so that of x.TXT and x.txt the latter is used
            stem, ending = os.path.splitext(name)
            if ending.lower() in self._endings:
                self._names[stem + ending.lower()] = name

    def find(self, image: str) -> str | None:
        """``x.txt`` or ``x.jpg.txt`` of ``x.jpg``; None when there is neither."""
        stem = os.path.splitext(image)[0]
        for ending in self._endings:
            name = self._names.get(stem + ending) or self._names.get(image + ending)
            if name is not None:
                self.used.add(name)
                return name
        return None


def _image_rows(folder: str, path: str, info: dict[str, Any], captions: list[SourceCaption]) -> Iterator[Row]:
    """A row per caption of the image at ``path`` below the folder."""
    stamp, problem = stamp_and_problem(folder, path, info)
    ref = FileRef(join(folder, path))
    for caption in captions:
        if problem is not None:
            yield Row(caption.text, clean_name(path), problem, stamp)
        else:
            yield Row(caption.text, path, caption.problem, stamp, ref, caption.note)


def stamp_and_problem(folder: str, path: str, info: dict[str, Any]) -> tuple[str, str | None]:
    """(stamp of an image's file, why the image cannot be used or None)."""
    if clean_name(path) != path:
        return "", NAME_NOT_UTF8
    if is_url(folder):
        stamp = remote_stamp(info)
    else:
        try:
            status = os.stat(join(folder, path))
        except OSError:
            return "", NOT_FOUND  # a link to nowhere
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block for ever
            return stamp, NOT_REGULAR
    ending = undecoded_ending(path)
    return stamp, not_decoded(ending) if ending else None


def _read_captions(folder: str, prefix: str, names: list[str], given: str | None) -> dict[str, list[SourceCaption]]:
    """Captions by name of the file beside the image; remote ones are read together."""
    if is_url(folder):
        contents = _read_remote(folder, prefix, names)
    else:
        root = os.path.realpath(folder)
        contents = [_read_local(root, join(folder, prefix + name)) for name in names]
    return {name: _captions(name, data, given) for name, data in zip(names, contents, strict=True)}


def _read_remote(folder: str, prefix: str, names: list[str]) -> list[bytes | Exception | str]:
    """The bytes of each file, or what its store's client raised."""
    if not names:
        return []
    fs, inner = filesystem(folder)
    whole = [None] * len(names)  # ranges without start and end
    paths = [join(inner, prefix + name) for name in names]  # taken literally; fs.cat would expand wildcards
    with store_errors(folder):
        contents: list[bytes | Exception | str] = fs.cat_ranges(paths, whole, whole, on_error="return")
    return contents


def _read_local(root: str, path: str) -> bytes | str:
    """The bytes of a regular file below ``root``, or why they are not a caption."""
    try:
        if os.path.islink(path) and not _links_inside(root, path):
            return CAPTION_OUTSIDE
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return CAPTION_NOT_READABLE
        return read_bytes(path) if status.st_size <= MAX_TEXT_BYTES else CAPTION_TOO_LONG
    except OSError:
        return CAPTION_NOT_READABLE


def _links_inside(root: str, path: str) -> bool:
    """Whether a link leads below ``root``, below its own folder, or nowhere."""
    target = os.path.realpath(path)
    if not os.path.exists(target):
        return True
    own_folder = os.path.realpath(os.path.dirname(path))
    return any(os.path.commonpath((folder, target)) == folder for folder in (root, own_folder))


def _captions(name: str, data: bytes | Exception | str, given: str | None) -> list[SourceCaption]:
    """The captions in a file beside an image, from its bytes or what stood in the way of them."""
    if data == CAPTION_OUTSIDE:  # may be another person's file: not used, and the image is used without a caption
        return [SourceCaption(note=CAPTION_OUTSIDE)]
    if not isinstance(data, bytes):
        return [SourceCaption(None, data if isinstance(data, str) else CAPTION_NOT_READABLE)]
    text, broken = decode_text(data)
    if broken or not name.lower().endswith(".json"):
        return [SourceCaption((text or "").removeprefix("\ufeff").strip(), NOT_UTF8 if broken else None)]
    try:
        fields = parse_object(data)
    except ValueError as error:
        is_json = "object" in str(error)  # "is not an object": a list of boxes, say, and no captions
        return [SourceCaption(None, None if is_json else BAD_JSON)]
    names = list(fields)
    index = find_column(given, CAPTION_NAMES, names)
    return captions_of(fields[names[index]]) if index is not None else [SourceCaption()]
