"""Column chunks of a Parquet file from its footer, a Thrift struct in the compact protocol.

PyArrow's own way to them (``RowGroupMetaData.column``) ends the process when a chunk's statistics make no sense. The
structs are those of https://github.com/apache/parquet-format (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

# types of the compact protocol
STOP = 0
TRUE, FALSE = 1, 2
BYTE = 3
INTEGERS = (4, 5, 6)
DOUBLE = 7
BINARY = 8
LISTS = (9, 10)
STRUCT = 12
MOST_BITS = 70  # of a variable-length number, whose values have 64
# fields on the way to a chunk's description: FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data
GROUPS = 4
COLUMNS = 1
DESCRIBED = 3
# fields of ColumnMetaData
TYPE = 1
PATH = 3
VALUES = 5
UNPACKED = 6
PACKED = 7
DATA_PAGE = 9
DICTIONARY_PAGE = 11
TEXTS = (6, 7)  # physical types of texts and bytes: BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY
FIELDS = (TYPE, PATH, VALUES, UNPACKED, PACKED, DATA_PAGE, DICTIONARY_PAGE)
WANTED: dict[int, Any] = {GROUPS: {COLUMNS: {DESCRIBED: {field: {} for field in FIELDS}}}}


@dataclass(frozen=True)
class Chunk:
    """A column of a row group: the path of its leaf, where its pages begin, its bytes packed and unpacked."""

    path: str
    is_text: bool
    values: int
    unpacked: int
    packed: int
    data_page: int
    dictionary_page: int | None


def row_groups(file: IO[bytes], number: int) -> tuple[tuple[Chunk, ...], ...]:
    """The column chunks of each row group of a file that PyArrow opened, and found ``number`` groups in.

    Raises ValueError for a footer that makes no sense.
    """
    end = file.seek(0, 2) - 8  # the footer's length and a magic word are last
    file.seek(max(end, 0))
    start = end - int.from_bytes(file.read(4), "little")
    file.seek(max(start, 0))
    groups = _read(file.read(max(end - start, 0)))
    if len(groups) != number:
        raise ValueError("its footer makes no sense")
    return groups


@lru_cache(maxsize=4)
def _read(footer: bytes) -> tuple[tuple[Chunk, ...], ...]:
    try:
        found, _ = read_struct(footer, 0, WANTED)
        return tuple(tuple(_chunks(group)) for group in found.get(GROUPS, []))
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its footer makes no sense") from error


def _chunks(group: dict[int, Any]) -> Iterator[Chunk]:
    for column in group[COLUMNS]:
        own = column[DESCRIBED]
        path = b".".join(own[PATH]).decode()
        values, unpacked, packed, page = (own[field] for field in (VALUES, UNPACKED, PACKED, DATA_PAGE))
        dictionary = own.get(DICTIONARY_PAGE)
        if not all(isinstance(number, int) for number in (values, unpacked, packed, page, dictionary or 0)):
            raise TypeError(path)
        yield Chunk(path, own[TYPE] in TEXTS, values, unpacked, packed, page, dictionary)


def read_struct(data: bytes, at: int, wanted: dict[int, Any]) -> tuple[dict[int, Any], int]:
    """The wanted fields of a struct, each with those wanted of it, and the place after it.

    Raises IndexError at the end of the data, KeyError for an unknown type, RecursionError.
    """
    found, field = dict[int, Any](), 0
    while (head := data[at]) != STOP:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _integer(data, at)
        if field in wanted:
            found[field], at = _value(data, at, head & 15, wanted[field])
        else:
            at = _after(data, at, head & 15)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, wanted: dict[int, Any]) -> tuple[Any, int]:
    if kind in INTEGERS:
        return _integer(data, at)
    if kind == BINARY:
        size, at = _number(data, at)
        return data[at : at + size], at + size
    if kind == STRUCT:
        return read_struct(data, at, wanted)
    if kind in LISTS:
        many, inner, at = _list(data, at)
        values = []
        for _ in range(many):
            value, at = _value(data, at, inner, wanted)
            values.append(value)
        return values, at
    raise KeyError(kind)


def _list(data: bytes, at: int) -> tuple[int, int, int]:
    """(values, their type, place of the first)."""
    many, inner = data[at] >> 4, data[at] & 15
    at += 1
    if many == 15:
        many, at = _number(data, at)
    if many > len(data):  # a value takes a byte at least
        raise IndexError(many)
    return many, inner, at


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(value, place after it) of a variable-length number."""
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if shift > MOST_BITS:
            raise IndexError(shift)
    return value | data[at] << shift, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _number(data, at)
    return (value >> 1) ^ -(value & 1), at


def _after(data: bytes, at: int, kind: int) -> int:
    """The place after a field's value. Raises as `read_struct` does."""
    if kind in (TRUE, FALSE):  # the type is the value
        return at
    if kind in INTEGERS:
        return _number(data, at)[1]
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    if kind == BINARY:
        size, at = _number(data, at)
        return at + size
    if kind in LISTS:
        many, inner, at = _list(data, at)
        for _ in range(many):
            at = _after(data, at, BYTE if inner in (TRUE, FALSE) else inner)
        return at
    if kind == STRUCT:
        while (head := data[at]) != STOP:
            at = _after(data, _integer(data, at + 1)[1] if not head >> 4 else at + 1, head & 15)
        return at + 1
    raise KeyError(kind)
