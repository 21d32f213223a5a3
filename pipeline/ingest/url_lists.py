"""Where images come from: lists of URLs, and images that are there. Each is an iterator of rows in a fixed order.

A row that cannot be used (no URL, a caption that is no UTF-8) is still a row, with its problem named. A source is one
file, a folder or a glob, local or an fsspec URL; the files of a folder or a glob are read as one list, by name.
"""

import glob
import gzip
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain, islice
from typing import Any, Literal

from pipeline.ingest.image_folder import folder_rows, warn_of_no_caption
from pipeline.ingest.metadata import METADATA
from pipeline.ingest.parquet_lists import image_parquet_rows, parquet_form, parquet_rows
from pipeline.ingest.rows import (
    Columns,
    Row,
    SourceFile,
    expected_errors,
    local_stamp,
    open_list,
    open_parquet,
    stamp_of,
)
from pipeline.ingest.text_lists import CC3M, CC12M, address_rows, delimited_rows, detect_text, headless_rows, json_rows
from pipeline.ingest.webdataset_source import mean_sample_bytes, webdataset_rows
from shards_spec.files import DataError, UserError, filesystem, is_url, join, open_read, store_errors
from shards_spec.folders import walk
from shards_spec.layout import STATS_PATTERN
from shards_spec.library_errors import no_regular_file
from shards_spec.names import PACKED_ENDINGS, clean_name, endings_line, file_ending, is_ignored, is_image, packed_kind

log = logging.getLogger(__name__)
Format = Literal["cc3m", "cc12m", "csv", "parquet", "jsonl", "txt", "folder", "hf-parquet", "webdataset", "img2dataset"]
KINDS = {  # of files that a folder or a glob can have
    "tar": (".tar",),
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tab", ".tsv.gz", ".tab.gz"),
}
KINDS_OF_FORM = {
    "webdataset": ("tar",), "parquet": ("parquet",), "hf-parquet": ("parquet",), "jsonl": ("jsonl",),
    "csv": ("csv", "tsv"), "cc3m": ("tsv",), "cc12m": ("tsv",), "txt": ("txt",),
}  # fmt: skip
ENDINGS = {**KINDS, "txt": (".txt", ".txt.gz")}  # a text file in a folder is a list only when the form says so
HEAD_BYTES = 1 << 20  # of a list, to estimate its lines
NAMES_SEEN = 10_000  # of a folder, to tell its form
FOOTERS_READ = 100  # of Parquet files, to count their rows
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
    if (reason := no_regular_file(path)) is not None:  # reading a pipe would wait for ever
        raise UserError(f"--source {path} {reason}; name a file")
    stamp = local_stamp(path)
    return SourceFile(path, below, int(stamp.split()[0]), stamp)


def _globbed(source: str) -> list[SourceFile]:
    """Files that match; below the folders without a wildcard."""
    parts = source.split("/")
    wild = [number for number, part in enumerate(parts) if "*" in part or (not is_url(source) and glob.has_magic(part))]
    if not wild:
        hint = "; give a glob ('*.tar'), or leave the quotes away for the shell to expand it" if "{" in source else ""
        raise UserError(f"--source {source}: no such file or folder{hint}")
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
    below = {name: info for name, info in below.items() if not is_ignored(name)}
    if not below:
        raise UserError(f"--source {source}: no file matches it")
    return [_file(name if folder == "." else join(folder, name), name, info) for name, info in below.items()]


def _in_folder(source: str, form: Format | None) -> list[SourceFile]:
    kinds = KINDS_OF_FORM.get(form or "", tuple(KINDS))
    endings = tuple(ending for kind in kinds for ending in ENDINGS[kind])
    every = [(prefix + name, info) for prefix, files in walk(source) for name, info in files.items()]
    found = [item for item in every if not _base(item[0]).startswith("_") and item[0].lower().endswith(endings)]
    left_out = Counter(file_ending(name) for name, _ in every)
    left_out.subtract(file_ending(name) for name, _ in found)
    if form is not None and (left_out := +left_out):
        hint = "; unpack what is packed" if set(PACKED_ENDINGS) & set(left_out) else ""
        _warn_once(f"--source {source}: files that are not taken: {endings_line(left_out)}{hint}")
    if not found:
        raise UserError(f"--source {source}: the folder has no file for --format {form} ({', '.join(endings)})")
    return [_file(join(source, below), below, info) for below, info in found]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


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
    image = next((name for name in names if is_image(name)), None)
    if any(map(STATS_PATTERN.fullmatch, names)) and (image is None or any(name.endswith(".tar") for name in names)):
        return "img2dataset"  # with images and no tar, it is img2dataset's output format "files"
    own = [name for name in names if not _base(name).startswith("_") and _kind(name)]
    if image is None:
        if own and all(_base(name) in METADATA for name in own):
            return _detect_metadata(join(source, own[0]), columns)
        if not own and (packed := _packed_files(names)):
            raise UserError(f"--source {source}: {packed}, which cannot be read in place; unpack them")
        return None if own else "folder"
    lists = (name for name in own if _base(name) not in METADATA)
    large = next((name for name in lists if _kind(name) in ("tar", "parquet")), None)
    if large is not None:
        raise UserError(
            f"--source {source}: has images ({image}) and {large}; name what is meant with --format "
            "(folder, webdataset, parquet, hf-parquet), or with a glob such as '*.parquet'"
        )
    return "folder"


@cache
def _warn_once(text: str) -> None:
    """A source's files are listed several times."""
    log.warning(text)


def _packed_files(names: Iterable[str]) -> str:
    """``has 12 .tar.gz``; empty when no file is packed so that it cannot be read."""
    endings = Counter(ending for ending in map(file_ending, names) if ending in PACKED_ENDINGS)
    return f"has {endings_line(endings)}" if endings else ""


def _detect_metadata(path: str, columns: Columns) -> Format | None:
    """A folder with nothing but ``metadata.csv``: its images are missing, unless that is a list of URLs."""
    try:
        _detect_file(path, columns)
    except UserError:
        return "folder"
    return None


def _detect_file(path: str, columns: Columns) -> Format:
    with open_list(path) as file:
        head = file.read(512)
    if head[:4] == b"PAR1":
        return parquet_form(path, columns)
    if head[257:262] == b"ustar" or (path.lower().endswith(".tar") and not packed_kind(head)):
        if _packed(path):
            raise UserError(f"--source {path}: a tar packed with gzip has no places; unpack it (gunzip) first")
        return "webdataset"
    if is_image(path):
        raise UserError(f"--source {path}: an image; give its folder")
    if (packed := packed_kind(head)) is not None:
        raise UserError(f"--source {path}: {packed}; unpack it first")
    return detect_text(path, columns)


def _packed(path: str) -> bool:
    with open_read(path) as file:
        return file.read(2) == b"\x1f\x8b"


# rows


def list_rows(source: str, form: Format, columns: Columns = (None, None)) -> Iterator[Row]:
    """Rows of a source in the order of its files, memory bounded. Raises UserError for a file that cannot be read."""
    if form == "folder":
        yield from folder_rows(source, columns)
        return
    files = source_files(source, form)
    try:
        if form == "webdataset":
            yield from webdataset_rows(files, columns)
            return
        if form == "hf-parquet":
            rows = image_parquet_rows(files, columns)
        else:
            rows = chain.from_iterable(_list_file_rows(file.path, form, columns) for file in files)
        hint = "the caption's column has none; name another with --caption-col"
        yield from rows if form == "txt" else warn_of_no_caption(rows, source, lambda: hint)
    except UserError:
        raise
    except expected_errors(source) as error:
        raise UserError(f"--source {source}: cannot be read ({error})") from error


def _list_file_rows(path: str, form: Format, columns: Columns) -> Iterator[Row]:
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        "parquet": partial(parquet_rows, path, columns),
        "csv": partial(delimited_rows, path, columns),
        "jsonl": partial(json_rows, path, columns),
        "txt": partial(address_rows, path, columns),
        "cc3m": partial(headless_rows, path, CC3M),
        "cc12m": partial(headless_rows, path, CC12M),
    }
    try:
        yield from readers[form]()
    except BROKEN_GZIP as error:
        raise UserError(f"--source {path}: broken gzip file ({error}); fetch it again") from error


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
        text = unpacker.decompress(head, 16 * HEAD_BYTES)
        used -= len(unpacker.unused_data) + len(unpacker.unconsumed_tail)  # a further packed piece; beyond the limit
    whole = used >= file.size
    unfinished = whole and text and not text.endswith((b"\n", b"\r"))
    return (text.count(b"\n") or text.count(b"\r")) + bool(unfinished), used, whole
