"""Rows whose pictures need no download: folders of pictures, WebDataset tars.

No picture is read here; a row carries the place of its bytes. Everything works on local paths and fsspec URLs.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from pipeline.ahead import ahead, batches
from pipeline.places import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    FilePlace,
    Row,
    TarPlace,
    find_column,
    json_text,
    lines,
    local_stamp,
    open_parts,
    stamp_of,
    text_of,
)
from shards_spec.files import DataError, UserError, filesystem, is_url, join, read_bytes, store_errors
from shards_spec.folders import walk
from shards_spec.names import is_image
from shards_spec.sample import split_name
from shards_spec.tar import Member, scan

METADATA = ("metadata.csv", "metadata.jsonl")  # Hugging Face imagefolder
PICTURE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "img_bytes")
TEXTS = ("txt", "caption", "text")
MAX_TEXT_BYTES = 1 << 24  # of a member beside a picture
PEEKED_SAMPLES = 20  # of the first tar, to tell whether a named column is there at all
REMOTE_TARS, REMOTE_TEXTS = 8, 256  # listed, read at once
NAME_NOT_UTF8 = "file name is not UTF-8"


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; ``below`` is its path below the source's folder."""

    path: str
    below: str
    size: int
    stamp: str


# folders of pictures


def folder_rows(folder: str) -> Iterator[Row]:
    """Pictures of a folder and the folders in it, sorted; memory grows with its metadata files only.

    The caption of ``x.jpg`` stands in ``x.txt`` beside it, or in a ``metadata.csv`` or ``metadata.jsonl``
    (``file_name``, ``text`` or ``caption``) in its folder or one above; a picture without one has none. What a
    metadata file names and is not there comes last, as a row with its problem.
    """
    if not is_url(folder) and not os.path.isdir(folder):
        raise UserError(f"--source {folder}: not a folder")
    listed: dict[str, Row] = {}
    for prefix, files in walk(folder):
        for name in METADATA:
            if name in files:
                listed.update(_metadata(join(folder, prefix + name), prefix))
        for chunk in batches((name for name in files if is_image(name)), REMOTE_TEXTS):
            beside = {name: f"{prefix}{os.path.splitext(name)[0]}.txt" for name in chunk}
            wanted = [text for text in beside.values() if text.removeprefix(prefix) in files]
            texts = _read_texts(folder, wanted)
            for name in chunk:
                path, text = prefix + name, beside[name]
                caption, problem = texts.get(text, (None, None))
                if (row := listed.pop(path, None)) is not None:
                    caption, problem = row.caption, row.problem
                yield _picture_row(folder, path, files[name], caption, problem)
    for path in sorted(listed):
        yield Row(listed[path].caption, path, listed[path].problem or "file not found")


def _picture_row(folder: str, path: str, info: dict[str, Any], caption: str | None, problem: str | None) -> Row:
    place = FilePlace(join(folder, path))
    if (clean := clean_name(path)) != path:
        return Row(caption, clean, NAME_NOT_UTF8)
    try:
        stamp = stamp_of(info) if is_url(folder) else local_stamp(place.path)
    except OSError:
        return Row(caption, path, "file not found")  # a link to nowhere
    return Row(caption, path, problem, stamp, place)


def clean_name(name: str) -> str:
    """The name with bytes that are no UTF-8 replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _read_texts(folder: str, paths: list[str]) -> dict[str, tuple[str | None, str | None]]:
    """(caption, problem) by path below the folder; remote ones are read together."""
    contents: list[bytes | Exception] = []
    if is_url(folder):
        fs, inner = filesystem(folder)
        nothing = [None] * len(paths)
        whole = [join(inner, path) for path in paths]  # no wildcards here, as in fs.cat
        with store_errors(folder):
            contents = fs.cat_ranges(whole, nothing, nothing, on_error="return") if paths else []
    else:
        for path in paths:
            try:
                contents.append(read_bytes(join(folder, path)))
            except OSError as error:
                contents.append(error)
    found: dict[str, tuple[str | None, str | None]] = {}
    for path, data in zip(paths, contents, strict=True):
        text, broken = text_of(data) if isinstance(data, bytes) else (None, False)
        problem = NOT_UTF8 if broken else "caption not readable" if text is None else None
        found[path] = (text.strip() if text is not None else None, problem)
    return found


def _metadata(path: str, prefix: str) -> Iterator[tuple[str, Row]]:
    """(path below the source folder, row) of each line. Raises UserError for a file without the columns."""
    for number, fields in enumerate(_metadata_fields(path), start=1):
        lowered = {str(name).lower(): value for name, value in fields.items()}
        if not isinstance(lowered.get("file_name"), str):
            yield f"{prefix}{os.path.basename(path)}:{number}", Row(None, None, "metadata row without file_name")
            continue
        file = prefix + clean_name(os.path.normpath(lowered["file_name"]).replace(os.sep, "/"))
        value = next((lowered[name] for name in ("text", "caption") if lowered.get(name) is not None), None)
        text, broken = text_of(str(value).encode(errors="surrogatepass") if value is not None else None)
        yield file, Row(text, file, NOT_UTF8 if broken else None)


def _metadata_fields(path: str) -> Iterator[dict[str, Any]]:
    if path.endswith(".csv"):
        with (
            io.BytesIO(read_bytes(path)) as raw,
            io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file,
        ):
            reader = csv.DictReader(file)
            if "file_name" not in [name.lower() for name in reader.fieldnames or []]:
                raise UserError(f"{path}: its columns are {reader.fieldnames}; it needs file_name and text")
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(f"{path}: not a CSV file ({error})") from error
        return
    for line in lines(path):
        if line.strip():
            try:
                fields = json.loads(line.decode(errors="surrogateescape"))
            except (json.JSONDecodeError, RecursionError):
                fields = {}
            yield fields if isinstance(fields, dict) else {}


# WebDataset tars


class _Parts:
    """A tar as the slices that `scan` asks for, local or remote; what lies between them is skipped.

    Mapped into memory, a local tar was listed at less than half the speed, and its pictures counted as memory.
    """

    def __init__(self, path: str) -> None:
        self._file = open_parts(path)
        self._errors = partial(store_errors, path) if is_url(path) else contextlib.nullcontext
        try:
            self._size = self._file.seek(0, os.SEEK_END)
        except (ValueError, OSError) as error:
            self._file.close()
            raise UserError(f"--source {path}: its server gives whole files only ({error}); fetch it first") from error

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, piece: slice) -> bytes:
        start, stop, _ = piece.indices(self._size)
        with self._errors():
            self._file.seek(start)
            return self._file.read(max(stop - start, 0))

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _tar_buffer(path: str) -> Iterator[memoryview]:
    """The tar's bytes by slices."""
    with contextlib.closing(_Parts(path)) as parts:
        yield cast(memoryview, parts)


def tar_samples(buffer: memoryview, path: str) -> Iterator[tuple[str, dict[str, Member], str | None]]:
    """(key, extension -> member, problem) of adjacent members with one key.

    A tar that breaks off gives its whole samples, then one last item with its problem and the key it broke in.
    """
    key, members, usual = None, dict[str, Member](), set[str]()
    try:
        for member in scan(buffer, path):
            new_key, extension = split_name(member.name)
            if new_key != key or extension in members:
                if key is not None:
                    yield key, members, None
                    usual = set(members)
                key, members = new_key, {}
            members[extension] = member
    except (DataError, ValueError, IndexError) as error:
        if key is not None and usual and usual <= set(members):  # nothing is missing that the sample before had
            yield key, members, None
            key = None
        yield key or "", {}, "truncated tar" if "truncated" in str(error) else "damaged tar"
        return
    if key is not None:
        yield key, members, None


def webdataset_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per sample of the tars. Raises UserError for a column given that the first samples do not have."""
    if files:
        _check_columns(files[0].path, columns)
    if not any(is_url(file.path) for file in files):
        for file in files:
            yield from _tar_rows(file, columns)
        return
    for rows in ahead(lambda file: list(_tar_rows(file, columns)), files, REMOTE_TARS, REMOTE_TARS):
        yield from rows


def _tar_rows(file: SourceFile, columns: Columns) -> Iterator[Row]:
    with _tar_buffer(file.path) as buffer:
        for key, members, problem in tar_samples(buffer, file.path):
            name = clean_name(f"{file.below}/{key}" if key else file.below)
            if problem is not None:
                yield Row(None, name, problem, file.stamp)
            else:
                yield _sample_row(buffer, members, name, file, columns)


def _sample_row(buffer: memoryview, members: dict[str, Member], name: str, file: SourceFile, columns: Columns) -> Row:
    texts = {extension: member for extension, member in members.items() if not is_image(extension)}
    fields, problem = _json_fields(buffer, texts)
    caption, wrong = _caption(buffer, texts, fields, columns[0])
    url = _url(buffer, texts, fields or {}, columns[1]) or name
    picture = _picture_member(members)
    if picture is None:
        return Row(caption, url, "no picture", file.stamp)
    place = TarPlace(file.path, picture.offset, picture.size)
    return Row(caption, url, wrong or (problem if caption is None else None), file.stamp, place)


def _picture_member(members: dict[str, Member]) -> Member | None:
    """``jpg`` before ``image.jpg`` before other pictures such as ``mask.png``; the first of equals."""
    found = [extension for extension in members if is_image(extension)]
    plain = [extension for extension in found if "." not in extension]
    named = [extension for extension in found if extension.split(".")[0] in PICTURE_COLUMNS]
    return members[(plain or named or found)[0]] if found else None


def _member_text(buffer: memoryview, member: Member) -> tuple[str | None, str | None]:
    """(text, problem)."""
    if member.size > MAX_TEXT_BYTES:
        return None, "caption too long"
    text, broken = text_of(bytes(buffer[member.offset : member.offset + member.size]))
    return text, NOT_UTF8 if broken else None


def _json_fields(buffer: memoryview, texts: dict[str, Member]) -> tuple[dict[str, Any] | None, str | None]:
    """The sample's json member (None when there is none), and its problem when it is no JSON object."""
    member = _member(texts, ("json",))
    if member is None:
        return None, None
    text, problem = _member_text(buffer, member)
    try:
        fields = json.loads(text or "") if problem is None else None
    except (json.JSONDecodeError, RecursionError):
        fields = None
    return (fields, None) if isinstance(fields, dict) else (None, "json member is not a JSON object")


def _member(texts: dict[str, Member], names: tuple[str, ...]) -> Member | None:
    """The first member with one of the extensions, plain ones (``txt``) before longer ones (``caption.txt``)."""
    exact = next((texts[name] for name in names if name in texts), None)
    return exact or next((member for ext, member in texts.items() if ext.rpartition(".")[2] in names), None)


def _caption(
    buffer: memoryview, texts: dict[str, Member], fields: dict[str, Any] | None, given: str | None
) -> tuple[str | None, str | None]:
    """(caption, problem)."""
    if given is not None and fields is not None and given in fields:
        return json_text(fields[given])
    if (member := texts.get(given.lower()) if given is not None else _member(texts, TEXTS)) is not None:
        text, problem = _member_text(buffer, member)
        return text.strip() if text is not None else None, problem
    names = list(fields or {})
    index = find_column(None, CAPTION_NAMES, names) if given is None else None
    return json_text((fields or {})[names[index]]) if index is not None else (None, None)


def _url(buffer: memoryview, texts: dict[str, Member], fields: dict[str, Any], given: str | None) -> str | None:
    """The picture's address on the web, when the sample tells it."""
    names = list(fields)
    index = find_column(given, URL_NAMES, names)
    value = fields[names[index]] if index is not None else None
    if value is None and (member := texts.get((given or "url").lower())) is not None:
        value = _member_text(buffer, member)[0]
    return (json_text(value)[0] or "").strip() or None


def _check_columns(path: str, columns: Columns) -> None:
    """Raises UserError when a column given is in none of the first samples."""
    if columns == (None, None):
        return
    seen = dict[str, None]()
    with _tar_buffer(path) as buffer:
        for number, (_, members, _) in enumerate(tar_samples(buffer, path)):
            texts = {extension: member for extension, member in members.items() if not is_image(extension)}
            seen |= dict.fromkeys([*texts, *(_json_fields(buffer, texts)[0] or {})])
            if number == PEEKED_SAMPLES:
                break
    for given, option in zip(columns, ("--caption-col", "--url-col"), strict=True):
        if seen and given is not None and given not in seen and given.lower() not in seen:
            raise UserError(f"--source {path}: no column {given!r}; its samples have {list(seen)}; change {option}")


def mean_sample_bytes(path: str, samples: int) -> float | None:
    """Bytes of the tar per sample, by its first samples; None when it has none."""
    end = number = 0
    with _tar_buffer(path) as buffer:
        for number, (_, members, _) in enumerate(tar_samples(buffer, path), start=1):
            end = max([end, *(member.offset + member.size for member in members.values())])
            if number == samples:
                break
    return end / number if number and end else None
