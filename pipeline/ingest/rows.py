"""One input, and the place where its image's bytes lie when they need no download.

Also what all sources share: text from bytes, lines of packed files, columns by name, files read in parts.
"""

import codecs
import contextlib
import errno
import gzip
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.parquet_pages import MAX_PAGE_BYTES, largest_pages
from shards_spec.files import UserError, filesystem, is_url, open_read, store_errors
from shards_spec.parquet_footer import row_groups
from shards_spec.tar_members import joined

URL_NAMES, CAPTION_NAMES = ("url", "image_url", "img_url"), ("caption", "text", "alt_text", "alt")
MAX_LINE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18  # of a list, read at a time
PART_BYTES = 1 << 16  # read ahead at one go from a remote file of which only parts are needed
MAX_GROUPS = 8  # Parquet row groups open at once
KEEP_ROWS, KEEP_BYTES = 1024, 1 << 28  # of images decoded from Parquet: per row group, and of all together
BATCH_BYTES, LARGEST_BATCH = 1 << 22, 1 << 26  # usual, and if every image were as large as the largest page
NOT_UTF8 = "caption is not UTF-8"
NOT_READABLE = "file not readable"
TOO_LARGE = "too large"

Columns = tuple[str | None, str | None]  # names of the caption column and the URL column; None: found by their names


@dataclass(frozen=True)
class FilePlace:
    """A file that is the image."""

    path: str


@dataclass(frozen=True)
class TarPlace:
    """A member of a tar."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class SparsePlace:
    """A sparse member of a tar, ``size`` bytes: pieces of (first byte in the member, place in the tar, bytes)."""

    path: str
    size: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ParquetPlace:
    """A cell of a Parquet file: ``column`` is the path of its leaf (``image.bytes``), ``row`` counts in the group."""

    path: str
    column: str
    row_group: int
    row: int


Place = FilePlace | TarPlace | SparsePlace | ParquetPlace


class PlaceError(Exception):
    """No image there; the message is a short, stable reason fit for counting."""


@dataclass(frozen=True)
class Row:
    """One input. ``url`` is an address, or a path below the source; ``problem`` names why the row cannot be used.

    ``stamp`` changes with the content of the file that ``place`` lies in: size, and modification time or etag.
    ``place`` is where the image's bytes lie; without one, ``url`` is fetched. ``note`` says what was not taken of a
    row that is used. ``extra`` has the list's other columns, by their names.
    """

    caption: str | None
    url: str | None
    problem: str | None = None
    stamp: str = ""
    place: Place | None = None
    note: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; ``below`` is its path below the source's folder."""

    path: str
    below: str
    size: int
    stamp: str


class Caption(NamedTuple):
    """A caption, why its row cannot be used, and what is to be noted of a row that can."""

    text: str | None = None
    problem: str | None = None
    note: str | None = None


# what all sources share


def text_of(data: bytes | None) -> tuple[str | None, bool]:
    """The text, and whether it was broken UTF-8 (its broken bytes are replaced then)."""
    if data is None:
        return None, False
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def json_text(value: object) -> tuple[str | None, str | None]:
    """(text, problem) of a caption out of JSON, where half surrogates and lists are possible."""
    if value is None or isinstance(value, str):
        text, broken = text_of(value.encode(errors="surrogatepass") if value is not None else None)
        return text, NOT_UTF8 if broken else None
    return None, "caption is not text"


@contextlib.contextmanager
def open_list(path: str) -> Iterator[IO[bytes]]:
    """The file, unpacked when it is gzip (whatever its name)."""
    with open_read(path) as file:
        magic = file.read(2)
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if magic == b"\x1f\x8b" else file


def lines(path: str) -> Iterator[bytes]:
    """Lines without their ends; what goes beyond 1 MiB of a line is dropped. Raises UserError for UTF-16."""
    return (line.rstrip(b"\r\n") for line in raw_lines(path))


def raw_lines(path: str) -> Iterator[bytes]:
    """As `lines`, but the carriage return before a line feed stays. Memory: a line and a block.

    A text whose first line ends in a carriage return alone, and most of whose first lines do, has such ends.
    """
    with open_list(path) as file:
        rest, end = file.read(BLOCK_BYTES), b"\n"
        _check_encoding(path, rest)
        rest = rest.removeprefix(codecs.BOM_UTF8)
        first, feeds, returns = re.search(rb"\r(?!\n)|\n", rest), rest.count(b"\n"), rest.count(b"\r")
        if first is not None and first[0] == b"\r" and returns > 2 * feeds:
            end = b"\r"
        *whole, rest = rest.split(end)
        yield from (line[:MAX_LINE_BYTES] for line in whole)
        while block := file.read(BLOCK_BYTES):
            *whole, rest = (rest + block).split(end)
            yield from (line[:MAX_LINE_BYTES] for line in whole)
            rest = rest[:MAX_LINE_BYTES]
        if rest:
            yield rest


def _check_encoding(path: str, head: bytes) -> None:
    """Raises UserError for UTF-16 and UTF-32: by their mark, or by the zeros between the letters of an alphabet."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        name = "UTF-32" if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
    elif len(head) > 7 and max(head[:1000:2].count(0), head[1:1000:2].count(0)) > len(head[:1000]) // 4:
        name = "UTF-16 or UTF-32"
    else:
        return
    raise UserError(f"{path} is {name}, not UTF-8; iconv -f {name[:6]} -t UTF-8 makes it so")


def find_column(given: str | None, candidates: tuple[str, ...], columns: list[str]) -> int | None:
    """Index of the column ``given``; else of the first candidate there, in capitals or not. None: not there."""
    stripped = [column.strip() for column in columns]
    if given is not None:
        return stripped.index(given) if given in stripped else None
    lowered = [column.lower() for column in stripped]
    return next((lowered.index(name) for name in candidates if name in lowered), None)


def stamp_of(info: dict[str, Any]) -> str:
    """The stamp of a remote file from what its store tells of it."""
    names = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((info[name] for name in names if info.get(name)), "")
    return f"{info.get('size')} {version}"


def local_stamp(path: str) -> str:
    """Size and modification time. Raises OSError."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def open_parts(path: str) -> IO[bytes]:
    """A reader for a file of which only parts are needed: nothing is read ahead, of a remote one little."""
    if not is_url(path):
        return cast(IO[bytes], open(path, "rb", buffering=0))
    fs, inner = filesystem(path)
    with store_errors(path):
        return cast(IO[bytes], fs.open(inner, "rb", block_size=PART_BYTES, cache_type="readahead"))


@contextlib.contextmanager
def open_parquet(path: str, as_dictionary: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is streamed: without ``pre_buffer`` no row group is in memory as a whole.

    The leaves of ``as_dictionary`` come as their dictionary and indices where the file has them so.
    """
    piece = 1 << (23 if is_url(path) else 20)  # a request to a store takes longer
    with (
        open_parts(path) if is_url(path) else contextlib.nullcontext(path) as source,
        pq.ParquetFile(source, read_dictionary=list(as_dictionary), buffer_size=piece, pre_buffer=False) as table,
    ):
        yield table


# images


def expected_errors(path: str) -> tuple[type[Exception], ...]:
    """What a file that cannot be read raises; of a remote store it may be any error of its client's own."""
    return (Exception,) if is_url(path) else (OSError, pa.ArrowException, ValueError)


def read_place(place: Place, max_bytes: int) -> bytes:
    """The encoded image. Raises PlaceError: file not found, file not readable, empty file, too large.

    Many threads may call it at once. Rows of a Parquet row group are cheapest in rising order.
    """
    if isinstance(place, TarPlace | SparsePlace) and place.size > max_bytes:
        raise PlaceError(TOO_LARGE)
    try:
        if isinstance(place, ParquetPlace):
            data = _pool.read(place, max_bytes)
        elif isinstance(place, TarPlace):
            data = _read_part(place)
        elif isinstance(place, SparsePlace):
            parts = ((start, _read_part(TarPlace(place.path, at, size))) for start, at, size in place.pieces)
            data = joined(place.size, parts)
        else:
            data = _read_file(place.path, max_bytes)
    except (PlaceError, UserError):  # the latter: the store refuses us, no image is to blame
        raise
    except FileNotFoundError as error:
        raise PlaceError("file not found") from error
    except expected_errors(place.path) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # our own limit, not the file's fault: every later row would fail for it
        raise PlaceError(NOT_READABLE) from error
    if not data:
        raise PlaceError("empty file")
    if len(data) > max_bytes:
        raise PlaceError(TOO_LARGE)
    return data


def forget_places() -> None:
    """Let go of the decoded images and open files that neighbouring rows would have used."""
    _pool.clear()


def _read_file(path: str, max_bytes: int) -> bytes:
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        raise PlaceError(NOT_READABLE)  # a folder; a pipe, which would be read for ever
    with open_read(path) as file:
        if not is_url(path) and os.fstat(file.fileno()).st_size > max_bytes:
            raise PlaceError(TOO_LARGE)
        return file.read(max_bytes + 1)


def _read_part(place: TarPlace) -> bytes:
    if is_url(place.path):
        fs, inner = filesystem(place.path)
        data: bytes = fs.cat_file(inner, start=place.offset, end=place.offset + place.size) if place.size else b""
    else:
        with open(place.path, "rb") as file:
            data = os.pread(file.fileno(), place.size, place.offset)
    if len(data) != place.size:
        raise PlaceError(NOT_READABLE)  # cut since it was listed
    return data


class _Group:
    """One row group's image column, decoded batch by batch; the last batches are kept."""

    def __init__(self, place: ParquetPlace) -> None:
        self.lock = threading.Lock()  # held while decoding
        self.batches: list[tuple[int, pa.Array]] = []  # (first row, images); changed under the pool's lock only
        self.next = 0  # row after the last one decoded
        self.problem: str | None = None
        self._place, self._arrays = place, _arrays(place)

    def find(self, row: int) -> pa.Scalar | None:
        """The cell, when its batch is kept."""
        return next((cells[row - start] for start, cells in self.batches if start <= row < start + len(cells)), None)

    def advance(self, row: int) -> pa.Array:
        """The next batch, from the group's start again when ``row`` has gone by. Raises PlaceError at its end."""
        if row < self.next or (self.problem == NOT_READABLE and is_url(self._place.path)):
            self._arrays, self.next, self.problem = _arrays(self._place), 0, None
        if self.problem is not None:
            raise PlaceError(self.problem)
        self.problem = NOT_READABLE
        try:
            cells, left = next(self._arrays, (None, 0))
        except PlaceError as error:
            self.problem = str(error)
            raise
        if cells is None:
            raise PlaceError(NOT_READABLE)  # the file has fewer rows than when it was listed
        self.problem = None
        self.next += len(cells)
        if not left:
            self._arrays.close()  # nothing more to decode: lets go of the file and its buffers
        return cells


def _arrays(place: ParquetPlace) -> Generator[tuple[pa.Array, int], None, None]:
    """(images, rows left) of a row group in batches of about 4 MiB; its bytes are streamed, never all in memory."""
    with open_parquet(place.path) as table, open_parts(place.path) as file:
        chunks = (
            row_groups(file, table.num_row_groups)[place.row_group] if place.row_group < table.num_row_groups else ()
        )
        column = next((chunk for chunk in chunks if chunk.path == place.column), None)
        if column is None:
            raise PlaceError(NOT_READABLE)  # another file than when it was listed
        group = table.metadata.row_group(place.row_group)
        page, size = max(largest_pages(file, column, is_url(place.path))), column.unpacked
        if page > MAX_PAGE_BYTES:
            raise PlaceError(TOO_LARGE)  # the image itself is not the only one in it, but none can be had
        rows = max(1, min(KEEP_ROWS, BATCH_BYTES * group.num_rows // max(size, 1), LARGEST_BATCH // max(page, 1)))
        groups = {"row_groups": [place.row_group], "columns": [place.column]}
        left = group.num_rows
        for batch in table.iter_batches(rows, use_threads=False, **groups):
            cells = batch.column(0)
            left -= len(cells)
            yield cells.flatten()[0] if pa.types.is_struct(cells.type) else cells, left


class _Pool:
    """The row groups in use, the latest last. Bounded in number and in bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, str, int, str], _Group] = OrderedDict()

    def read(self, place: ParquetPlace, max_bytes: int) -> bytes:
        stamp = "" if is_url(place.path) else local_stamp(place.path)
        group = self._group(place, stamp)
        cell = group.find(place.row)
        while cell is None:
            with group.lock:
                if (cell := group.find(place.row)) is not None:
                    break
                start = group.next if place.row >= group.next else 0
                cells = _decoder.submit(group.advance, place.row).result()
                self._keep(group, start, cells)
                cell = cells[place.row - start] if start <= place.row < start + len(cells) else None
        data = cell.as_buffer()
        if data is not None and data.size > max_bytes:  # before it is copied
            raise PlaceError(TOO_LARGE)
        return data.to_pybytes() if data is not None else b""

    def _group(self, place: ParquetPlace, stamp: str) -> _Group:
        key = (place.path, place.column, place.row_group, stamp)
        with self._lock:
            if key not in self._groups:
                self._groups[key] = _Group(place)
            self._groups.move_to_end(key)
            while len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
            return self._groups[key]

    def _keep(self, group: _Group, start: int, cells: pa.Array) -> None:
        """Add a batch, drop what is far behind it, and the oldest while all groups hold too much."""
        with self._lock:
            near = [(first, kept) for first, kept in group.batches if start - KEEP_ROWS < first < start]
            group.batches = [*near, (start, cells)]
            total = sum(kept.nbytes for other in self._groups.values() for _, kept in other.batches)
            for other in self._groups.values():
                while total > KEEP_BYTES and other.batches and other.batches[-1][1] is not cells:
                    total -= other.batches[0][1].nbytes
                    other.batches = other.batches[1:]
            while total > KEEP_BYTES and len(group.batches) > 1:
                total -= group.batches[0][1].nbytes
                group.batches = group.batches[1:]

    def clear(self) -> None:
        with self._lock:
            self._groups.clear()


_pool = _Pool()
_decoder = ThreadPoolExecutor(1)
