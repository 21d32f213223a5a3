"""Where pictures come from: lists of URLs, and local folders. Each is an iterator of rows in a fixed order.

A row that cannot be used (no URL, a caption that is no UTF-8) is still a row, with its problem named.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from shards_spec.files import UserError, exists, is_url, join, names, open_read, read_bytes

Format = Literal["cc3m", "cc12m", "csv", "parquet", "folder", "img2dataset"]
URL_NAMES, CAPTION_NAMES = ("url", "image_url"), ("caption", "text")
URL_PATTERN = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
SHARD_PATTERN = re.compile(r"\d+(\.tar|_stats\.json)")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
METADATA = ("metadata.csv", "metadata.jsonl")  # Hugging Face imagefolder
MAX_LINE_BYTES = 1 << 20
HEAD_LINES = 20  # of a list, to tell its form
NOT_UTF8 = "caption is not UTF-8"
NO_COLUMN = "missing column"


@dataclass(frozen=True)
class Row:
    """One input. ``url`` is an address, or a path below the folder; ``problem`` names why the row cannot be used.

    ``stamp`` changes with a local file's content: size and modification time.
    """

    caption: str | None
    url: str | None
    problem: str | None = None
    stamp: str = ""


def detect(source: str) -> Format:
    """The form of a source, from its first lines or its file names. Raises UserError."""
    if not exists(source):
        raise UserError(f"--source {source}: no such file or folder")
    if not is_url(source) and os.path.isdir(source):
        return "img2dataset" if any(SHARD_PATTERN.fullmatch(name) for name in names(source)) else "folder"
    try:
        with open_read(source) as file:
            magic = file.read(4)
    except (IsADirectoryError, FileNotFoundError):  # a folder on an object store
        return "img2dataset"
    if magic == b"PAR1":
        return "parquet"
    lines = [_text(line)[0] or "" for line in islice(_lines(source), HEAD_LINES)]
    return _detect_list(source, [line for line in lines if line.strip()])


def _detect_list(source: str, lines: list[str]) -> Format:
    if not lines:
        raise UserError(f"--source {source} is empty; give a list with a URL and a caption per line")
    if _find(URL_NAMES, _header(lines[0])[0]) is not None:
        return "csv"
    fields = [line.split("\t") for line in lines if "\t" in line]
    url_first = sum(bool(URL_PATTERN.match(row[0])) for row in fields)
    url_last = sum(bool(URL_PATTERN.match(row[-1])) for row in fields)
    if url_first == url_last:
        raise UserError(
            f"--source {source}: cannot tell its form from its first lines ({lines[0][:80]!r}): no tab between a "
            "caption and a URL, no header with a column url; name it with --format"
        )
    return "cc12m" if url_first > url_last else "cc3m"


def list_rows(source: str, form: Format) -> Iterator[Row]:
    """Rows of a list of URLs in file order, memory bounded. Raises UserError for a file that cannot be read."""
    if not exists(source):
        raise UserError(f"--source {source}: no such file or folder")
    try:
        if form == "parquet":
            yield from _parquet_rows(source)
        elif form == "csv":
            yield from _csv_rows(source)
        else:
            for line in _lines(source):
                yield _tsv_row(line, url_first=form == "cc12m")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"--source {source}: broken gzip file ({error}); fetch it again") from error


@contextlib.contextmanager
def _open_list(source: str) -> Iterator[IO[bytes]]:
    """The file, unpacked when it is gzip (whatever its name)."""
    with open_read(source) as file:
        magic = file.read(2)
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if magic == b"\x1f\x8b" else file


def _lines(source: str) -> Iterator[bytes]:
    """Lines without their ends; what goes beyond 1 MiB of a line is dropped."""
    with _open_list(source) as file:
        first = True
        while line := file.readline(MAX_LINE_BYTES):
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                pass
            yield line.removeprefix(b"\xef\xbb\xbf" if first else b"").rstrip(b"\r\n")
            first = False


def _tsv_row(line: bytes, url_first: bool) -> Row:
    """CC12M is URL, tab, caption; CC3M is caption, tab, URL. Further tabs belong to the caption."""
    if b"\t" not in line:
        text = _text(line)[0]
        return Row(None, text, NO_COLUMN) if URL_PATTERN.match(text or "") else Row(text, None, NO_COLUMN)
    first, last = line.split(b"\t", 1) if url_first else line.rsplit(b"\t", 1)
    return _row(*((last, first) if url_first else (first, last)))


def _row(caption: bytes | None, url: bytes | None) -> Row:
    text, broken = _text(caption)
    address = (_text(url)[0] or "").strip()
    return Row(text, address or None, NOT_UTF8 if broken else None if address else "no URL")


def _text(data: bytes | None) -> tuple[str | None, bool]:
    """The text, and whether it was broken UTF-8 (its broken bytes are replaced then)."""
    if data is None:
        return None, False
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def _header(line: str) -> tuple[list[str], str]:
    delimiter = "\t" if "\t" in line else ","
    return next(csv.reader([line], delimiter=delimiter)), delimiter


def _find(candidates: tuple[str, ...], columns: list[str]) -> int | None:
    lowered = [column.strip().lower() for column in columns]
    return next((lowered.index(name) for name in candidates if name in lowered), None)


def _columns(source: str, columns: list[str]) -> tuple[int, int]:
    caption, url = _find(CAPTION_NAMES, columns), _find(URL_NAMES, columns)
    if caption is None or url is None:
        raise UserError(f"--source {source}: its columns are {columns}; it needs url (or URL) and caption (or TEXT)")
    return caption, url


def _csv_rows(source: str) -> Iterator[Row]:
    header, delimiter = _header(_text(next(_lines(source), b""))[0] or "")
    caption, url = _columns(source, header)
    with _open_list(source) as packed, io.TextIOWrapper(packed, "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        next(reader)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield Row(None, None, "not a CSV row")
                continue
            raw = [field.encode(errors="surrogateescape") for field in fields]
            if len(raw) <= max(caption, url):
                yield Row(",".join(fields).encode(errors="replace").decode() or None, None, NO_COLUMN)
            else:
                yield _row(raw[caption], raw[url])


def _parquet_rows(source: str) -> Iterator[Row]:
    try:
        with open_read(source) as file:
            table = pq.ParquetFile(file)
            columns = table.schema_arrow.names
            chosen = [columns[index] for index in _columns(source, columns)]
            for batch in table.iter_batches(1024, columns=chosen):
                captions, urls = (batch.column(name).cast(pa.large_binary()).to_pylist() for name in chosen)
                yield from map(_row, captions, urls)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"--source {source}: not a readable Parquet file with text columns ({error})") from error


def folder_rows(folder: str) -> Iterator[Row]:
    """Pictures of a folder and the folders in it, sorted; memory grows with its metadata files only.

    The caption of ``x.jpg`` stands in ``x.txt`` beside it, or in a ``metadata.csv`` or ``metadata.jsonl``
    (``file_name``, ``text`` or ``caption``) in its folder or one above; a picture without one has none. What a
    metadata file names and is not there comes last, as a row with its problem.
    """
    if is_url(folder) or not os.path.isdir(folder):
        raise UserError(f"--source {folder}: not a local folder")
    listed: dict[str, Row] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        for name in METADATA:
            if name in files:
                listed.update(_metadata(join(parent, name), prefix))
        for name in sorted(files):
            if name.lower().endswith(PICTURES):
                yield _picture_row(folder, prefix + name, listed.pop(prefix + name, None))
    for path in sorted(listed):
        yield Row(listed[path].caption, path, listed[path].problem or "file not found")


def _picture_row(folder: str, path: str, listed: Row | None) -> Row:
    try:
        status = os.stat(join(folder, path))
    except OSError:
        return Row(listed.caption if listed else None, path, "file not found")  # a link to nowhere
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    if listed is not None:
        return Row(listed.caption, path, listed.problem, stamp)
    beside = os.path.splitext(join(folder, path))[0] + ".txt"
    text, broken = _text(read_bytes(beside) if os.path.isfile(beside) else None)
    return Row(text.strip() if text is not None else None, path, NOT_UTF8 if broken else None, stamp)


def _metadata(path: str, prefix: str) -> Iterator[tuple[str, Row]]:
    """(path below the source folder, row) of each line. Raises UserError for a file without the columns."""
    for number, fields in enumerate(_metadata_fields(path), start=1):
        lowered = {str(name).lower(): value for name, value in fields.items()}
        if not isinstance(lowered.get("file_name"), str):
            yield f"{prefix}{os.path.basename(path)}:{number}", Row(None, None, "metadata row without file_name")
            continue
        file = prefix + os.path.normpath(lowered["file_name"]).replace(os.sep, "/")
        value = next((lowered[name] for name in ("text", "caption") if lowered.get(name) is not None), None)
        text, broken = _text(str(value).encode(errors="surrogatepass") if value is not None else None)
        yield file, Row(text, file, NOT_UTF8 if broken else None)


def _metadata_fields(path: str) -> Iterator[dict[str, Any]]:
    if path.endswith(".csv"):
        with io.TextIOWrapper(open_read(path), "utf-8-sig", "surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            if "file_name" not in [name.lower() for name in reader.fieldnames or []]:
                raise UserError(f"{path}: its columns are {reader.fieldnames}; it needs file_name and text")
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(f"{path}: not a CSV file ({error})") from error
        return
    for line in _lines(path):
        if line.strip():
            try:
                fields = json.loads(line.decode(errors="surrogateescape"))
            except json.JSONDecodeError:
                fields = {}
            yield fields if isinstance(fields, dict) else {}
