"""How large the pages of a Parquet column are, from their headers alone: a small file may unpack to gigabytes.

PyArrow unpacks a page as a whole and does not tell its size before. A page's header is a Thrift struct in the compact
protocol (https://github.com/apache/parquet-format, PageHeader): its first fields are the kind of page, the size
unpacked and the size in the file. Only these are read.
"""

from typing import IO, Any

from shards_spec.parquet_footer import Chunk, read_struct

MAX_PAGE_BYTES = 1 << 28  # unpacked; larger ones are not read. Writers aim at 1 MiB, DuckDB at 100
USUAL_PAGE_BYTES = 1 << 20
USUAL_RATIO = 20  # of unpacked to packed bytes: more makes the pages of a remote file worth a request each
HEADER_BYTES = 1 << 16
DICTIONARY = 2  # kind of a page
HEADER: dict[int, Any] = {1: {}, 2: {}, 3: {}}  # kind, bytes unpacked, bytes in the file


def largest_pages(file: IO[bytes], column: Chunk, remote: bool) -> tuple[int, int]:
    """Bytes of a column chunk's dictionary and of its largest other page, unpacked.

    Of the whole chunk where its headers make no sense. Of a ``remote`` file whose size is usual they are taken to be
    the usual ones: each header would cost a request.
    """
    unpacked = column.unpacked
    if remote and unpacked <= USUAL_RATIO * column.packed:
        usual = min(unpacked, USUAL_PAGE_BYTES)
        return usual, usual
    at = column.data_page
    if 0 < (first := column.dictionary_page or 0) < at:
        at = first
    largest, end = {True: 0, False: 0}, at + column.packed
    while at < end:
        file.seek(at)
        try:
            header, length = read_struct(file.read(HEADER_BYTES), 0, HEADER)
            kind, size, packed = (header[field] for field in HEADER)
        except (IndexError, KeyError, RecursionError):
            return unpacked, unpacked
        if not all(isinstance(number, int) and number >= 0 for number in (size, packed)):
            return unpacked, unpacked
        # PyArrow makes room for the packed bytes too, before it sees that they are not there
        largest[kind == DICTIONARY] = max(largest[kind == DICTIONARY], size, packed)
        at += length + packed
    return largest[True], largest[False]
