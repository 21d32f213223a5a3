"""Where pictures come from: lists of URLs, and pictures that are there. Each is an iterator of rows in a fixed order.

A row that cannot be used (no URL, a caption that is no UTF-8) is still a row, with its problem named. A source is one
file, a folder or a glob, local or an fsspec URL; the files of a folder or a glob are read as one list, by name.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from pipeline.local import (
    METADATA,
    SourceFile,
    clean_name,
    folder_rows,
    mean_sample_bytes,
    webdataset_rows,
)
from pipeline.parquet_lists import picture_column, picture_parquet_rows
from pipeline.places import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    Row,
    expected_errors,
    find_column,
    json_text,
    lines,
    local_stamp,
    open_list,
    open_parquet,
    plain_bytes,
    stamp_of,
    text_of,
)
from shards_spec.files import DataError, UserError, filesystem, is_url, join, open_read, store_errors
from shards_spec.folders import walk
from shards_spec.manifest import STATS_PATTERN
from shards_spec.names import is_image

Format = Literal["cc3m", "cc12m", "csv", "parquet", "jsonl", "folder", "hf-parquet", "webdataset", "img2dataset"]
WEB_NAMES = (*URL_NAMES, "image")  # a list's column image may hold addresses
URL_PATTERN = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
KINDS = {  # of files that a folder or a glob can have
    "tar": (".tar",),
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tab", ".tsv.gz", ".tab.gz"),
}
KINDS_OF_FORM = {
    "webdataset": ("tar",), "parquet": ("parquet",), "hf-parquet": ("parquet",), "jsonl": ("jsonl",),
    "csv": ("csv", "tsv"), "cc3m": ("tsv",), "cc12m": ("tsv",),
}  # fmt: skip
HEAD_LINES = 20  # of a list, to tell its form and its columns
HEAD_BYTES = 1 << 20  # of a list, to estimate its lines
NAMES_SEEN = 10_000  # of a folder, to tell its form
FOOTERS_READ = 100  # of Parquet files, to count their rows
NO_COLUMN = "missing column"
BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
UNREADABLE: tuple[type[Exception], ...] = (*BROKEN_GZIP, DataError, UserError)
__all__ = ["Format", "Row", "detect", "estimate_rows", "folder_rows", "list_rows", "source_files"]


# the files of a source


def source_files(source: str, form: Format | None = None) -> list[SourceFile]:
    """The source's list files or tars, sorted by name. Raises UserError when there is none.

    Of a folder, those that ``form`` can be (without a form: all that a list can be).
    """
    try:
        info = _info(source)
        if info is None:
            files = _globbed(source)
        elif info["type"] == "directory":
            files = _in_folder(source, form)
        else:
            return [_file(source, os.path.basename(source.rstrip("/")), info)]
    except OSError as error:
        raise UserError(f"--source {source}: cannot be listed ({error})") from error
    return sorted(files, key=lambda file: file.below)


def _info(source: str) -> dict[str, Any] | None:
    """Type and size as fsspec tells them; None when nothing has that name."""
    if not is_url(source):
        return {"type": "directory" if os.path.isdir(source) else "file"} if os.path.exists(source) else None
    fs, inner = filesystem(source)
    try:
        with store_errors(source):
            info: dict[str, Any] = fs.info(inner)
    except FileNotFoundError:
        return None
    return info


def _file(path: str, below: str, info: dict[str, Any]) -> SourceFile:
    if clean_name(path) != path:
        raise UserError(f"--source: the file name {clean_name(path)!r} is not UTF-8; rename it")
    if is_url(path):
        return SourceFile(path, below, info.get("size") or 0, stamp_of(info))
    stamp = local_stamp(path)
    return SourceFile(path, below, int(stamp.split()[0]), stamp)


def _globbed(source: str) -> list[SourceFile]:
    """Files that match; below the folders without a wildcard."""
    parts = source.split("/")
    wild = [number for number, part in enumerate(parts) if "*" in part or (not is_url(source) and glob.has_magic(part))]
    if not wild:
        raise UserError(f"--source {source}: no such file or folder")
    fixed = wild[0]
    if is_url(source) and fixed < 3:
        raise UserError(f"--source {source}: begins with a wildcard; give a bucket or folder before it")
    folder, pattern = "/".join(parts[:fixed]) or ("/" if source.startswith("/") else "."), "/".join(parts[fixed:])
    if is_url(source):
        fs, inner = filesystem(folder)
        with store_errors(source):
            found = fs.glob(f"{inner.rstrip('/')}/{pattern}", detail=True)
        cut = len(inner.rstrip("/")) + 1
        below = {path[cut:]: info for path, info in found.items() if info["type"] == "file"}
    else:
        below = {name: {} for name in glob.glob(pattern, root_dir=folder, recursive=True)}
        below = {name: info for name, info in below.items() if os.path.isfile(join(folder, name))}
    if not parts[-1].startswith("_"):  # such as Spark's _SUCCESS
        below = {name: info for name, info in below.items() if not name.rpartition("/")[2].startswith("_")}
    if not below:
        raise UserError(f"--source {source}: no file matches it")
    return [_file(name if folder == "." else join(folder, name), name, info) for name, info in below.items()]


def _in_folder(source: str, form: Format | None) -> list[SourceFile]:
    kinds = KINDS_OF_FORM.get(form or "", tuple(KINDS))
    found = [
        (prefix + name, info)
        for prefix, files in walk(source)
        for name, info in files.items()
        if not name.startswith((".", "_")) and _kind(name) in kinds
    ]
    if not found:
        endings = ", ".join(ending for kind in kinds for ending in KINDS[kind])
        raise UserError(f"--source {source}: the folder has no file for --format {form} ({endings})")
    return [_file(join(source, below), below, info) for below, info in found]


def _kind(name: str) -> str | None:
    return next((kind for kind, endings in KINDS.items() if name.lower().endswith(endings)), None)


# which form


def detect(source: str, columns: Columns = (None, None)) -> Format:
    """The form of a source, from its first lines or its file names. Raises UserError."""
    info = _info(source)
    if info is not None and info["type"] == "directory" and (form := _detect_folder(source, columns)) is not None:
        return form
    files = source_files(source)
    kinds = sorted({_kind(file.path) or "other" for file in files})
    if len(kinds) > 1:
        raise UserError(f"--source {source}: has files of several kinds ({', '.join(kinds)}); name one with a glob "
                        "such as '*.parquet', or with --format")  # fmt: skip
    try:
        return _detect_file(next((file.path for file in files if file.size), files[0].path), columns)
    except BROKEN_GZIP as error:
        raise UserError(f"--source {source}: broken gzip file ({error}); fetch it again") from error
    except UserError:
        raise
    except expected_errors(source) as error:
        raise UserError(f"--source {source}: cannot be read ({error})") from error


def _detect_folder(source: str, columns: Columns) -> Format | None:
    """By the names in it; None when its list files or tars have to tell."""
    names = list(islice((prefix + name for prefix, files in walk(source) for name in files), NAMES_SEEN))
    if any(STATS_PATTERN.fullmatch(name) for name in names):
        return "img2dataset"
    picture = next((name for name in names if is_image(name)), None)
    own = [name for name in names if not name.rpartition("/")[2].startswith((".", "_")) and _kind(name)]
    if picture is None:
        if own and all(name.rpartition("/")[2] in METADATA for name in own):
            return _detect_metadata(join(source, own[0]), columns)
        return None if own else "folder"
    large = next((name for name in own if _kind(name) in ("tar", "parquet")), None)
    if large is not None:
        raise UserError(
            f"--source {source}: has pictures ({picture}) and {large}; name what is meant with --format "
            "(folder, webdataset, parquet, hf-parquet), or with a glob such as '*.parquet'"
        )
    return "folder"


def _detect_metadata(path: str, columns: Columns) -> Format | None:
    """A folder with nothing but ``metadata.csv``: its pictures are missing, unless that is a list of URLs."""
    try:
        _detect_file(path, columns)
    except UserError:
        return "folder"
    return None


def _detect_file(path: str, columns: Columns) -> Format:
    with open_list(path) as file:
        head = file.read(512)
    if head[:4] == b"PAR1":
        return _detect_parquet(path, columns)
    if head[257:262] == b"ustar" or path.lower().endswith(".tar"):
        if _packed(path):
            raise UserError(f"--source {path}: a tar packed with gzip has no places; unpack it (gunzip) first")
        return "webdataset"
    if is_image(path):
        raise UserError(f"--source {path}: a picture; give its folder")
    found = [text_of(line)[0] or "" for line in islice(lines(path), HEAD_LINES)]
    return _detect_list(path, [line for line in found if line.strip()], columns)


def _packed(path: str) -> bool:
    with open_read(path) as file:
        return file.read(2) == b"\x1f\x8b"


def _detect_parquet(path: str, columns: Columns) -> Format:
    try:
        with open_parquet(path) as table:
            leaf = picture_column(table.schema_arrow)
            if leaf is None or leaf == columns[1]:
                return "parquet"
            if leaf.endswith(".bytes"):
                return "hf-parquet"
            first = next(table.iter_batches(1, columns=[leaf]), None)
            cell = first.column(0)[0].as_py() if first is not None and len(first) else None
            return "parquet" if URL_PATTERN.match((cell or b"")[:100].decode(errors="replace")) else "hf-parquet"
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--source {path}: not a readable Parquet file with text columns ({error})") from error


def _detect_list(source: str, found: list[str], columns: Columns) -> Format:
    if not found:
        raise UserError(f"--source {source} is empty; give a list with a URL and a caption per line")
    if found[0].lstrip().startswith("{") and _object(found[0].encode()) is not None:
        return "jsonl"
    if found[0].strip() in ("[", "{") or found[0].startswith(("[{", "[ {")):
        raise UserError(f"--source {source}: JSON, but not one object per line; write it so (jq -c '.[]')")
    header = _header(found[0])[0]
    if find_column(columns[1], URL_NAMES, header) is not None or None not in _found(header, columns):
        return "csv"
    if columns != (None, None):
        _pick(source, header, columns)
    fields = [line.split("\t") for line in found if "\t" in line]
    url_first = sum(bool(URL_PATTERN.match(row[0])) for row in fields)
    url_last = sum(bool(URL_PATTERN.match(row[-1])) for row in fields)
    if url_first == url_last:
        raise UserError(
            f"--source {source}: cannot tell its form from its first lines ({found[0][:80]!r}): no tab between a "
            "caption and a URL, no header with a column url; name it with --format, or its columns with --url-col "
            "and --caption-col"
        )
    return "cc12m" if url_first > url_last else "cc3m"


# rows


def list_rows(source: str, form: Format, columns: Columns = (None, None)) -> Iterator[Row]:
    """Rows of a source in the order of its files, memory bounded. Raises UserError for a file that cannot be read."""
    if form == "folder":
        yield from folder_rows(source)
        return
    files = source_files(source, form)
    try:
        if form == "webdataset":
            yield from webdataset_rows(files, columns)
        elif form == "hf-parquet":
            yield from picture_parquet_rows(files, columns)
        else:
            for file in files:
                yield from _list_file_rows(file.path, form, columns)
    except UserError:
        raise
    except expected_errors(source) as error:
        raise UserError(f"--source {source}: cannot be read ({error})") from error


def _list_file_rows(path: str, form: Format, columns: Columns) -> Iterator[Row]:
    readers: dict[str, Callable[[str, Columns], Iterator[Row]]] = {
        "parquet": _parquet_rows, "csv": _csv_rows, "jsonl": _jsonl_rows
    }  # fmt: skip
    try:
        if form in readers:
            yield from readers[form](path, columns)
        else:
            for line in lines(path):
                yield _tsv_row(line, url_first=form == "cc12m")
    except BROKEN_GZIP as error:
        raise UserError(f"--source {path}: broken gzip file ({error}); fetch it again") from error


def _tsv_row(line: bytes, url_first: bool) -> Row:
    """CC12M is URL, tab, caption; CC3M is caption, tab, URL. Further tabs belong to the caption."""
    if b"\t" not in line:
        text = text_of(line)[0]
        return Row(None, text, NO_COLUMN) if URL_PATTERN.match(text or "") else Row(text, None, NO_COLUMN)
    first, last = line.split(b"\t", 1) if url_first else line.rsplit(b"\t", 1)
    return _row(*((last, first) if url_first else (first, last)))


def _row(caption: bytes | None, url: bytes | None) -> Row:
    text, broken = text_of(caption)
    address = (text_of(url)[0] or "").strip()
    return Row(text, address or None, NOT_UTF8 if broken else None if address else "no URL")


def _header(line: str) -> tuple[list[str], str]:
    delimiter = "\t" if "\t" in line else ","
    try:
        return next(csv.reader([line], delimiter=delimiter), []), delimiter
    except csv.Error:
        return [line], delimiter


def _found(names: list[str], columns: Columns) -> tuple[int | None, int | None]:
    return find_column(columns[0], CAPTION_NAMES, names), find_column(columns[1], WEB_NAMES, names)


def _pick(source: str, names: list[str], columns: Columns) -> tuple[int, int]:
    """Indexes of the caption and the URL. Raises UserError that names the columns that are there."""
    caption, url = _found(names, columns)
    for index, given, option in ((caption, columns[0], "--caption-col"), (url, columns[1], "--url-col")):
        if index is None and given is not None:
            raise UserError(f"--source {source}: no column {given!r}; its columns are {names}; change {option}")
    if caption is None or url is None:
        raise UserError(
            f"--source {source}: its columns are {names}; it needs url (or URL) and caption (or TEXT), or name them "
            "with --url-col and --caption-col"
        )
    return caption, url


def _csv_rows(source: str, columns: Columns) -> Iterator[Row]:
    first = next(lines(source), None)
    if first is None:
        return  # an empty part of a list
    header, delimiter = _header(text_of(first)[0] or "")
    caption, url = _pick(source, header, columns)
    with open_list(source) as packed, io.TextIOWrapper(packed, "utf-8-sig", "surrogateescape", newline="") as file:
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
                joined = ",".join(fields).encode(errors="surrogateescape")
                yield Row(text_of(joined)[0] or None, None, NO_COLUMN)
            else:
                yield _row(raw[caption], raw[url])


def _object(line: bytes) -> dict[str, Any] | None:
    """The line's JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _jsonl_rows(source: str, columns: Columns) -> Iterator[Row]:
    head = [_object(line) or {} for line in islice(lines(source), HEAD_LINES)]
    if not head:
        return  # an empty part of a list
    names = list(dict.fromkeys(name for fields in head for name in fields))
    caption, url = (names[index] for index in _pick(source, names, columns))
    for line in lines(source):
        fields = _object(line)
        if fields is None:
            yield Row(text_of(line)[0] or None, None, "not a JSON object")
            continue
        text, problem = json_text(fields.get(caption))
        address = (json_text(fields.get(url))[0] or "").strip() or None
        yield Row(text, address, problem or (None if address else "no URL"))


def _parquet_rows(source: str, columns: Columns) -> Iterator[Row]:
    try:
        with open_parquet(source) as table:
            names = table.schema_arrow.names
            chosen = [names[index] for index in _pick(source, names, columns)]
            for batch in table.iter_batches(1024, columns=chosen):
                captions, urls = (plain_bytes(batch.column(name)) for name in chosen)
                yield from map(_row, captions, urls)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--source {source}: not a readable Parquet file with text columns ({error})") from error


# how many


def estimate_rows(source: str, form: Format) -> tuple[int, bool] | None:
    """(rows, whether exact) without reading the source; None when only reading it would tell."""
    if form in ("folder", "img2dataset"):
        return None
    try:
        files = [file for file in source_files(source, form) if file.size]
        if not files:
            return None
        if form in ("parquet", "hf-parquet"):
            return _parquet_estimate(files)
        total = sum(file.size for file in files)
        if form == "webdataset":
            mean = mean_sample_bytes(files[0].path, 100)
            return (round(total / mean), False) if mean else None
        counted, used, whole = _count_lines(files[0])
        headers = len(files) if form == "csv" else 0
        exact = whole and len(files) == 1 and form != "csv"  # a CSV row may have several lines
        return max(0, round(counted * total / max(used, 1)) - headers), exact
    except UNREADABLE + expected_errors(source):
        return None  # whoever reads it, says why


def _parquet_estimate(files: list[SourceFile]) -> tuple[int, bool]:
    chosen = files if len(files) <= FOOTERS_READ else files[:: -(-len(files) // FOOTERS_READ)]
    rows = 0
    for file in chosen:
        with open_parquet(file.path) as table:
            rows += table.metadata.num_rows
    if len(chosen) == len(files):
        return rows, True
    return round(rows * sum(file.size for file in files) / sum(file.size for file in chosen)), False


def _count_lines(file: SourceFile) -> tuple[int, int, bool]:
    """(lines, bytes of the file they take, whether that is all) of the first MiB."""
    with open_read(file.path) as opened:
        head = opened.read(HEAD_BYTES)
    text, used = head, len(head)
    if head[:2] == b"\x1f\x8b":
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(head)
        used -= len(unpacker.unused_data)  # of a further packed piece
    whole = used >= file.size
    unfinished = whole and text and not text.endswith(b"\n")
    return text.count(b"\n") + bool(unfinished), used, whole
