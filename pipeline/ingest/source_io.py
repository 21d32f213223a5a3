"""Opening the files of a source: lists as lines, Parquet as a stream, parts of local and remote files."""

import codecs
import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from shards_spec.file_kinds import HEAD_BYTES, binary_kind
from shards_spec.files import UserError, filesystem, is_url, open_read, store_errors
from shards_spec.messages import conversion

MAX_LINE_BYTES = 1 << 20  # of a list; the rest of a longer line is dropped
BLOCK_BYTES = 1 << 18  # of a list, read at a time
REMOTE_PART_BYTES = 1 << 16  # read ahead at one go from a remote file of which only parts are needed
GZIP_MAGIC = b"\x1f\x8b"
BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@contextlib.contextmanager
def open_list(path: str) -> Iterator[IO[bytes]]:
    """Open a list; it is unpacked when it is gzip, whatever its name."""
    with open_read(path) as file:
        magic = file.read(len(GZIP_MAGIC))
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if magic == GZIP_MAGIC else file


def lines(path: str) -> Iterator[bytes]:
    """Lines of a list without their ends, each cut after `MAX_LINE_BYTES`.

    Raises UserError for UTF-16 and UTF-32.
    """
    return (line.rstrip(b"\r\n") for line in raw_lines(path))


def raw_lines(path: str) -> Iterator[bytes]:
    """As `lines`, but a carriage return before a line feed is kept. Memory: one line and one block.

    Carriage returns alone end the lines of a file whose first line ends so, as do most lines of its first block.
    """
    with open_list(path) as file:
        block = file.read(BLOCK_BYTES)
        _check_encoding(path, block)
        if (kind := binary_kind(block[:HEAD_BYTES])) is not None:
            raise UserError(f"{path} is {kind}, not text; check the path, and --format where it is given")
        block = block.removeprefix(codecs.BOM_UTF8)
        end = _line_end(block)
        *whole, rest = block.split(end)
        yield from (line[:MAX_LINE_BYTES] for line in whole)
        while block := file.read(BLOCK_BYTES):
            *whole, rest = (rest + block).split(end)
            yield from (line[:MAX_LINE_BYTES] for line in whole)
            rest = rest[:MAX_LINE_BYTES]
        if rest:
            yield rest


def _line_end(block: bytes) -> bytes:
    """What ends the lines of a file with this first block."""
    first = re.search(rb"\r(?!\n)|\n", block)
    mostly_returns = block.count(b"\r") > 2 * block.count(b"\n")
    return b"\r" if first is not None and first[0] == b"\r" and mostly_returns else b"\n"


def _check_encoding(path: str, head: bytes) -> None:
    """Raises UserError for UTF-16 and UTF-32: by their byte order mark, or by the zero bytes between ASCII letters."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        name = "UTF-32" if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
    elif len(head) > 7 and max(head[:1000:2].count(0), head[1:1000:2].count(0)) > len(head[:1000]) // 4:
        name = "UTF-16 or UTF-32"
    else:
        return
    raise UserError(f"{path} is {name}, not UTF-8; {conversion(name[:6], path)}")


def remote_stamp(info: dict[str, Any]) -> str:
    """Size and version of a remote file, from what its store tells of it (``info`` of fsspec)."""
    names = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((info[name] for name in names if info.get(name)), "")
    return f"{info.get('size')} {version}"


def local_stamp(path: str) -> str:
    """Size and modification time of a local file. Raises OSError."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def open_random_access(path: str) -> IO[bytes]:
    """Open a file of which only parts are read: nothing is read ahead of a local file, little of a remote one."""
    if not is_url(path):
        return cast(IO[bytes], open(path, "rb", buffering=0))
    fs, inner = filesystem(path)
    with store_errors(path):
        return cast(IO[bytes], fs.open(inner, "rb", block_size=REMOTE_PART_BYTES, cache_type="readahead"))


@contextlib.contextmanager
def open_parquet(path: str, as_dictionary: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for streaming: without ``pre_buffer`` no row group is in memory as a whole.

    The leaf columns ``as_dictionary`` are read as dictionary and indices where the file stores them so.
    """
    buffer_bytes = 1 << (23 if is_url(path) else 20)  # a request to a store takes longer than a read of a disk
    source = open_random_access(path) if is_url(path) else contextlib.nullcontext(path)
    with (
        source as opened,
        pq.ParquetFile(
            opened, read_dictionary=list(as_dictionary), buffer_size=buffer_bytes, pre_buffer=False
        ) as table,
    ):
        yield table


def expected_errors(path: str) -> tuple[type[Exception], ...]:
    """What reading a damaged or missing file raises; a remote store's client may raise any error of its own."""
    return (Exception,) if is_url(path) else (OSError, pa.ArrowException, ValueError)
