"""Shards as plain uncompressed tar files: written reproducibly, read from a buffer, broken ones named.

The only module that knows tar. Writing gives USTAR with fixed times and owners, members of a sample adjacent
and sorted by extension (webdataset's order), two zero blocks at the end padded to 10,240 bytes. Reading also
takes GNU long names and pax paths, so that foreign shards work.
"""

import contextlib
import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from shards_spec.files import DataError, atomic_writer, read_buffer
from shards_spec.sample import MAX_NAME_BYTES, Sample, check_key, split_name

BLOCK = 512
AT_ONCE = 1 << 20  # bytes hashed and written at a time


class Member(NamedTuple):
    """Where a member's bytes lie in the tar."""

    name: str
    offset: int
    size: int


def write_shard(path: str, samples: Iterable[Sample]) -> tuple[int, str]:
    """Write samples in the given order; return (count, sha256 of the file).

    Raises DataError for a bad or repeated key; nothing appears under ``path`` then.
    """
    digest, written, seen = hashlib.sha256(), 0, set[str]()
    with atomic_writer(path) as file:
        for batch in _pieces(path, samples, seen):
            digest.update(batch)
            file.write(batch)
            written += len(batch)
        end = bytes(2 * BLOCK + -(written + 2 * BLOCK) % tarfile.RECORDSIZE)
        digest.update(end)
        file.write(end)
    return len(seen), digest.hexdigest()


def _pieces(path: str, samples: Iterable[Sample], seen: set[str]) -> Iterator[bytes]:
    """The members as they lie in the file, some `AT_ONCE` bytes at a time."""
    pieces, size = list[bytes](), 0
    for sample in samples:
        if check_key(sample.key) in seen:
            raise DataError(f"{path}: key {sample.key} twice; keys must be unique in a dataset")
        seen.add(sample.key)
        for extension in sorted(sample.members):
            data = sample.members[extension]
            pieces += (_header(f"{sample.key}.{extension}", len(data)), data, bytes(-len(data) % BLOCK))
            size += len(data)
        if size >= AT_ONCE:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


@cache
def _blank_header() -> tuple[bytes, int]:
    """A member's header without name, size and checksum, and the sum of its bytes with blanks for the latter."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = 0o444, 0
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[148:156] = bytes(12), b" " * 8
    return bytes(block), sum(block)


def _header(name: str, size: int) -> bytes:
    """What tarfile writes in USTAR format, in a tenth of its time."""
    encoded = name.encode()
    if len(encoded) > MAX_NAME_BYTES:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o444, 0
        return info.tobuf(tarfile.USTAR_FORMAT)
    blank, total = _blank_header()
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (total + _byte_sum(encoded) + _byte_sum(digits))
    return encoded + blank[len(encoded) : 124] + digits + blank[136:148] + checksum + blank[156:]


def _byte_sum(data: bytes) -> int:
    """Sum of at most 256 bytes: Adler-32's lower half is 1 + the sum, below its modulus 65,521 then."""
    return (zlib.adler32(data) & 0xFFFF) - 1


@contextlib.contextmanager
def _opened(path: str) -> Iterator[memoryview]:
    try:
        with read_buffer(path) as buffer:
            yield buffer
    except FileNotFoundError as error:
        raise DataError(f"{path}: is not there; make the shard again") from error


def read_shard(path: str, start: int = 0) -> Iterator[Sample]:
    """Samples in file order, the first one with its headers at byte ``start``.

    Raises DataError naming the file and the last whole member when the tar is broken or gone.
    """
    with _opened(path) as buffer:
        for key, members in index_shard(buffer, path, start):
            yield Sample(key, {ext: bytes(buffer[m.offset : m.offset + m.size]) for ext, m in members.items()})


def shard_keys(path: str) -> list[str]:
    """Keys in file order; no picture is copied. Raises DataError as `read_shard` does."""
    with _opened(path) as buffer:
        return [key for key, _ in index_shard(buffer, path)]


def index_shard(buffer: memoryview, path: str, start: int = 0) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group members into samples: (key, extension -> Member), in file order from byte ``start``.

    Members of a sample must be adjacent (webdataset's rule). Raises DataError on a broken tar, a repeated
    extension or a key that comes back later.
    """
    key, members, seen = None, dict[str, Member](), set[str]()
    for member in scan(buffer, path, start):
        new_key, extension = split_name(member.name)
        if new_key != key:
            if key is not None:
                yield key, members
            if new_key in seen:
                raise DataError(f"{path}: key {new_key} is there twice; make the shard again with unique keys")
            seen.add(new_key)
            key, members = new_key, {}
        if extension in members:
            raise DataError(f"{path}: key {new_key} has two members .{extension}; make the shard again")
        members[extension] = member
    if key is not None:
        yield key, members


def scan(buffer: memoryview, path: str, start: int = 0) -> Iterator[Member]:
    """Regular members in file order from byte ``start``, where a header lies.

    Raises DataError naming the last whole member when the tar is broken.
    """
    position, last, long_name = start, "(none)", None
    while True:
        block = bytes(buffer[position : position + BLOCK])
        if len(block) < BLOCK:
            raise DataError(f"{path}: truncated tar, last whole member {last}; make the shard again")
        kind = block[156:157]
        if kind == b"\0" and not any(block):
            if any(buffer[position + BLOCK : position + 2 * BLOCK]) or len(buffer) < position + 2 * BLOCK:
                raise DataError(f"{path}: truncated tar, last whole member {last}; make the shard again")
            return
        try:
            stored, size = _number(block[148:156]), _number(block[124:136])
        except tarfile.HeaderError as error:
            raise DataError(f"{path}: no tar header after member {last} ({error}); make the shard again") from error
        if stored != _byte_sum(block[:256]) + _byte_sum(block[256:]) - sum(block[148:156]) + 8 * ord(" "):
            raise DataError(f"{path}: damaged tar header after member {last}; make the shard again")
        data = position + BLOCK
        if data + size > len(buffer):
            raise DataError(f"{path}: truncated tar, last whole member {last}; make the shard again")
        if kind in (b"x", b"L"):
            long_name = _long_name(kind, bytes(buffer[data : data + size])) or long_name
        elif kind in (b"0", b"\0"):
            name = long_name or _short_name(block)
            yield Member(name, data, size)
            last, long_name = name, None
        position = data + size + (-size % BLOCK)


def _number(field: bytes) -> int:
    """A size or checksum of a header. Raises tarfile.HeaderError."""
    try:
        number = int(field.rstrip(b"\0 "), 8)
    except ValueError:  # empty, or one of tar's rarer forms
        number = tarfile.nti(field)  # type: ignore[attr-defined]
    if number < 0:
        raise tarfile.HeaderError("negative number")
    return number


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _long_name(kind: bytes, data: bytes) -> str | None:
    if kind == b"L":
        return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    while data:
        length = int(data.split(b" ", 1)[0])
        keyword, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        if keyword == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return None
