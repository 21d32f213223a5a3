"""Reading the bytes of an image that needs no download: a file, a member of a tar, a cell of a Parquet file.

Cells of Parquet files are compressed in pages that hold many images, so neighbouring rows are decoded together and
kept for a while (`_RowGroupCache`).
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.parquet_pages import MAX_PAGE_BYTES, largest_pages
from pipeline.ingest.rows import NOT_FOUND, FileRef, ImageRef, ParquetRef, SparseTarRef, TarRef
from pipeline.ingest.source_io import expected_errors, local_stamp, open_parquet, open_random_access
from shards_spec.files import UserError, filesystem, is_url, open_read
from shards_spec.parquet_footer import Chunk, row_groups
from shards_spec.tar_members import joined

MAX_ROW_GROUPS = 8  # kept open at once
KEEP_ROWS = 1024  # rows before the latest batch of a row group whose batches are kept
KEEP_BYTES = 1 << 28  # of decoded images, of all row groups together
BATCH_BYTES = 1 << 22  # of a batch, when its images have the mean size
LARGEST_BATCH = 1 << 26  # of a batch, if every image were as large as the largest page
NOT_READABLE = "file not readable"
TOO_LARGE = "too large"


class ImageReadError(Exception):
    """The image cannot be read; the message is a short, stable reason fit for counting."""


def read_image_bytes(ref: ImageRef, max_bytes: int) -> bytes:
    """The encoded image. Many threads may call it at once; rows of a Parquet file are cheapest in rising order.

    Raises ImageReadError: file not found, file not readable, empty file, too large (more than ``max_bytes``).
    """
    if isinstance(ref, TarRef | SparseTarRef) and ref.size > max_bytes:
        raise ImageReadError(TOO_LARGE)
    try:
        data = _read(ref, max_bytes)
    except (ImageReadError, UserError):  # UserError: the store refuses us, the image is not to blame
        raise
    except FileNotFoundError as error:
        raise ImageReadError(NOT_FOUND) from error
    except expected_errors(ref.path) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: a limit of this process, which every later row would meet too
        raise ImageReadError(NOT_READABLE) from error
    if not data:
        raise ImageReadError("empty file")
    if len(data) > max_bytes:
        raise ImageReadError(TOO_LARGE)
    return data


def clear_read_cache() -> None:
    """Drop the decoded images and close the Parquet files that are kept for neighbouring rows."""
    _row_groups.clear()


def _read(ref: ImageRef, max_bytes: int) -> bytes:
    match ref:
        case FileRef():
            return _read_file(ref.path, max_bytes)
        case TarRef():
            return _read_range(ref.path, ref.offset, ref.size)
        case SparseTarRef():
            pieces = ((start, _read_range(ref.path, offset, size)) for start, offset, size in ref.pieces)
            return joined(ref.size, pieces)
        case ParquetRef():
            return _row_groups.read(ref, max_bytes)


def _read_file(path: str, max_bytes: int) -> bytes:
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        raise ImageReadError(NOT_READABLE)  # a folder, or a pipe, which would block for ever
    with open_read(path) as file:
        if not is_url(path) and os.fstat(file.fileno()).st_size > max_bytes:
            raise ImageReadError(TOO_LARGE)
        return file.read(max_bytes + 1)


def _read_range(path: str, offset: int, size: int) -> bytes:
    if is_url(path):
        fs, inner = filesystem(path)
        data: bytes = fs.cat_file(inner, start=offset, end=offset + size) if size else b""
    else:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ImageReadError(NOT_READABLE)  # the tar was cut after it was listed
    return data


class _RowBatch(NamedTuple):
    """Encoded images of neighbouring rows of a row group."""

    first_row: int
    images: pa.Array
    is_last: bool  # of its row group

    @property
    def end_row(self) -> int:
        return self.first_row + len(self.images)

    def get(self, row: int) -> pa.Scalar | None:
        """The image of a row of the row group; None when it is not in this batch."""
        return self.images[row - self.first_row] if self.first_row <= row < self.end_row else None


def _decode_row_group(ref: ParquetRef) -> Generator[_RowBatch, None, None]:
    """The images of ``ref``'s row group in batches of about `BATCH_BYTES`; its bytes are streamed.

    Raises ImageReadError: too large (a page that would unpack to too much memory), file not readable.
    """
    with open_parquet(ref.path) as table, open_random_access(ref.path) as file:
        chunk = _image_chunk(file, table, ref)
        page_bytes = max(largest_pages(file, chunk, is_url(ref.path)))
        if page_bytes > MAX_PAGE_BYTES:
            raise ImageReadError(TOO_LARGE)  # other images of the page may be small, but none can be had alone
        total_rows = table.metadata.row_group(ref.row_group).num_rows
        rows_by_mean = BATCH_BYTES * total_rows // max(chunk.unpacked, 1)
        rows_by_largest = LARGEST_BATCH // max(page_bytes, 1)
        rows = max(1, min(KEEP_ROWS, rows_by_mean, rows_by_largest))
        first_row = 0
        for table_batch in table.iter_batches(
            rows, use_threads=False, row_groups=[ref.row_group], columns=[ref.column]
        ):
            images = table_batch.column(0)
            if pa.types.is_struct(images.type):  # ``image.bytes`` is read as a struct with this one field
                images = images.flatten()[0]
            end_row = first_row + len(images)
            yield _RowBatch(first_row, images, is_last=end_row >= total_rows)
            first_row = end_row


def _image_chunk(file: IO[bytes], table: pq.ParquetFile, ref: ParquetRef) -> Chunk:
    if ref.row_group < table.num_row_groups:
        for chunk in row_groups(file, table.num_row_groups)[ref.row_group]:
            if chunk.path == ref.column:
                return chunk
    raise ImageReadError(NOT_READABLE)  # another file than when it was listed


class _RowGroup:
    """The images of one row group: decoded batch by batch, the latest batches kept."""

    def __init__(self, ref: ParquetRef) -> None:
        self.decoding = threading.Lock()  # held while a batch is decoded
        self.batches: list[_RowBatch] = []  # kept; replaced as a whole, under the cache's lock, so that reads need none
        self._ref = ref
        self._decoder = _decode_row_group(ref)
        self._next_row = 0
        self._failure: str | None = None  # why the decoder stopped

    def get(self, row: int) -> pa.Scalar | None:
        """The image of a row; None when it is not in a batch that is kept."""
        for batch in self.batches:
            image = batch.get(row)
            if image is not None:
                return image
        return None

    def decode_next(self, row: int) -> _RowBatch:
        """Decode the next batch on the way to ``row``, from the start again when that is behind. Hold ``decoding``.

        Raises ImageReadError when the decoder fails (again, until it is started anew) or the row group ends before
        ``row``. A failure of a remote store may pass, so that the next call starts anew.
        """
        may_have_passed = self._failure == NOT_READABLE and is_url(self._ref.path)
        if row < self._next_row or may_have_passed:
            self._decoder = _decode_row_group(self._ref)
            self._next_row = 0
            self._failure = None
        if self._failure is not None:
            raise ImageReadError(self._failure)
        try:
            batch = next(self._decoder, None)
        except ImageReadError as error:
            self._failure = str(error)
            raise
        except BaseException:
            self._failure = NOT_READABLE
            raise
        if batch is None:  # the file has fewer rows than when it was listed
            self._failure = NOT_READABLE
            raise ImageReadError(NOT_READABLE)
        self._next_row = batch.end_row
        if batch.is_last:
            self._decoder.close()  # closes the file and frees its buffers
        return batch

    def drop_oldest(self, excess: int, least: int = 0) -> int:
        """Drop kept batches until ``excess`` bytes are free or ``least`` batches are left; returns the bytes freed."""
        freed = 0
        while freed < excess and len(self.batches) > least:
            freed += self.batches[0].images.nbytes
            self.batches = self.batches[1:]
        return freed


class _RowGroupCache:
    """The row groups in use, at most `MAX_ROW_GROUPS` with at most `KEEP_BYTES` of decoded images."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.groups: OrderedDict[tuple[str, str, int, str], _RowGroup] = OrderedDict()  # used least recently first

    def read(self, ref: ParquetRef, max_bytes: int) -> bytes:
        """The encoded image of a cell, empty for a null. Raises ImageReadError, and what PyArrow and stores raise."""
        group = self._group(ref)
        image = group.get(ref.row)
        while image is None:
            with group.decoding:
                image = group.get(ref.row)  # another thread may have decoded it meanwhile
                if image is None:
                    batch = _decoder_thread.submit(group.decode_next, ref.row).result()
                    self._keep(group, batch)
                    image = batch.get(ref.row)
        buffer = image.as_buffer()
        if buffer is None:
            return b""
        if buffer.size > max_bytes:  # before it is copied
            raise ImageReadError(TOO_LARGE)
        data: bytes = buffer.to_pybytes()
        return data

    def clear(self) -> None:
        with self._lock:
            self.groups.clear()

    def _group(self, ref: ParquetRef) -> _RowGroup:
        stamp = "" if is_url(ref.path) else local_stamp(ref.path)  # a file that was rewritten is read anew
        key = (ref.path, ref.column, ref.row_group, stamp)
        with self._lock:
            if key not in self.groups:
                self.groups[key] = _RowGroup(ref)
            self.groups.move_to_end(key)
            while len(self.groups) > MAX_ROW_GROUPS:
                self.groups.popitem(last=False)
            return self.groups[key]

    def _keep(self, group: _RowGroup, batch: _RowBatch) -> None:
        """Keep a new batch; drop what is far behind it, then what was used least recently, down to the limit."""
        with self._lock:
            first_kept = batch.first_row - KEEP_ROWS
            nearby = [kept for kept in group.batches if first_kept < kept.first_row < batch.first_row]
            group.batches = [*nearby, batch]
            excess = -KEEP_BYTES
            for kept_group in self.groups.values():
                excess += sum(kept.images.nbytes for kept in kept_group.batches)
            for other in self.groups.values():
                if other is not group:
                    excess -= other.drop_oldest(excess)
            group.drop_oldest(excess, least=1)


_row_groups = _RowGroupCache()
# One thread for all: one batch is decoded at a time, which bounds the memory however many threads read.
_decoder_thread = ThreadPoolExecutor(1)
