"""How large the pages of a Parquet column are, from their headers alone: a small file may unpack to gigabytes.

PyArrow unpacks a page as a whole and does not tell its size before. A page's header is a Thrift struct in the compact
protocol (https://github.com/apache/parquet-format, PageHeader): its first fields are the kind of page, the size
unpacked and the size in the file. Only these are read; the rest is stepped over.
"""

from typing import IO

import pyarrow.parquet as pq

MAX_PAGE_BYTES = 1 << 28  # unpacked; larger ones are not read. Writers aim at 1 MiB, DuckDB at 100
USUAL_PAGE_BYTES = 1 << 20
USUAL_RATIO = 20  # of unpacked to packed bytes: more makes the pages of a remote file worth a request each
HEADER_BYTES = 1 << 16
DICTIONARY = 2  # kind of a page
STOP, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = 0, 3, (4, 5, 6), 7, 8, (9, 10), 12  # Thrift's compact types


def largest_pages(file: IO[bytes], column: pq.ColumnChunkMetaData, remote: bool) -> tuple[int, int]:
    """Bytes of a column chunk's dictionary and of its largest other page, unpacked.

    Of the whole chunk where its headers make no sense. Of a ``remote`` file whose size is usual they are taken to be
    the usual ones: each header would cost a request.
    """
    unpacked = int(column.total_uncompressed_size)
    if remote and unpacked <= USUAL_RATIO * column.total_compressed_size:
        usual = min(unpacked, USUAL_PAGE_BYTES)
        return usual, usual
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < (first := column.dictionary_page_offset) < at:
        at = first
    largest, end = {True: 0, False: 0}, at + int(column.total_compressed_size)
    while at < end:
        file.seek(at)
        try:
            kind, size, packed, length = _header(file.read(HEADER_BYTES))
        except (IndexError, KeyError, RecursionError):
            return unpacked, unpacked
        if size < 0 or packed < 0:
            return unpacked, unpacked
        largest[kind == DICTIONARY] = max(largest[kind == DICTIONARY], size)
        at += length + packed
    return largest[True], largest[False]


def _header(data: bytes) -> tuple[int, int, int, int]:
    """(kind, bytes unpacked, bytes in the file, bytes of the header itself) of a page."""
    found, field, at = dict[int, int](), 0, 0
    while (head := data[at]) != STOP:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _integer(data, at)
        if head & 15 in INTEGERS:
            found[field], at = _integer(data, at)
        else:
            at = _after(data, at, head & 15)
    return found[1], found[2], found[3], at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(value, place after it) of a variable-length number."""
    value = shift = 0
    while data[at] & 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _number(data, at)
    return (value >> 1) ^ -(value & 1), at


def _after(data: bytes, at: int, kind: int) -> int:
    """The place after a field's value. Raises IndexError at the end of the data, KeyError for an unknown type."""
    if kind in (1, 2):  # true and false are in the type
        return at
    if kind in INTEGERS:
        return _number(data, at)[1]
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    if kind == BINARY:
        size, at = _number(data, at)
        return at + size
    if kind in LISTS:
        many, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if many == 15:
            many, at = _number(data, at)
        if many > len(data):  # a value takes a byte at least
            raise IndexError(many)
        for _ in range(many):
            at = _after(data, at, BYTE if inner in (1, 2) else inner)
        return at
    if kind == STRUCT:
        while (head := data[at]) != STOP:
            at = _after(data, _integer(data, at + 1)[1] if not head >> 4 else at + 1, head & 15)
        return at + 1
    raise KeyError(kind)
