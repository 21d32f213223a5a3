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
HEADER: dict[int, Any] = {1: {}, 2: {}, 3: {}}  # fields: kind, bytes unpacked, bytes in the file


def largest_pages(file: IO[bytes], column: Chunk, remote: bool) -> tuple[int, int]:
    """(bytes of the dictionary, bytes of the largest other page) of a column chunk, unpacked.

    The bytes of the whole chunk for both where its headers make no sense. For a ``remote`` file whose compression ratio
    is usual, the size that writers aim at: reading each header would cost a request.
    """
    unpacked = column.unpacked
    if remote and unpacked <= USUAL_RATIO * column.packed:
        usual = min(unpacked, USUAL_PAGE_BYTES)
        return usual, usual
    offset = column.data_page
    if column.dictionary_page and 0 < column.dictionary_page < offset:
        offset = column.dictionary_page
    end = offset + column.packed
    largest_dictionary = 0
    largest_page = 0
    while offset < end:
        file.seek(offset)
        try:
            header, length = read_struct(file.read(HEADER_BYTES), 0, HEADER)
            kind, size, packed = (header[field] for field in HEADER)
        except (IndexError, KeyError, RecursionError):
            return unpacked, unpacked
        if not all(isinstance(number, int) and number >= 0 for number in (size, packed)):
            return unpacked, unpacked
        needed = max(size, packed)  # PyArrow allocates the packed bytes too, before it sees that they are not there
        if kind == DICTIONARY:
            largest_dictionary = max(largest_dictionary, needed)
        else:
            largest_page = max(largest_page, needed)
        offset += length + packed
    return largest_dictionary, largest_page
