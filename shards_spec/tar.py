"""Shards as plain uncompressed tar files: written reproducibly, read from a buffer, broken ones named.

Writing gives USTAR with fixed times and owners, members of a sample adjacent and sorted by extension (webdataset's
order), two zero blocks at the end padded to 10,240 bytes. Reading also takes what others write (`tar_members`).
"""

import contextlib
import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from shards_spec.files import DataError, atomic_writer, read_buffer
from shards_spec.layout import remake_advice
from shards_spec.sample import MAX_NAME_BYTES, Sample, check_key, split_name, subsamples
from shards_spec.tar_members import BLOCK, NO_TARGET, Member, byte_sum, scan

AT_ONCE = 1 << 20  # bytes hashed and written at a time


def write_shard(path: str, samples: Iterable[Sample]) -> tuple[int, str]:
    """Write samples in the given order; return (count, sha256 of the file).

    Raises DataError for a bad or repeated key; nothing appears under ``path`` then.
    """
    digest = hashlib.sha256()
    written = 0
    seen = set[str]()
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
    """The members' bytes in the file, about `AT_ONCE` at a time."""
    pieces = list[bytes]()
    size = 0
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
    """A member's header without name, size and checksum, and the sum of its bytes with spaces for the checksum."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = 0o444, 0
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[148:156] = bytes(12), b" " * 8
    return bytes(block), sum(block)


def _header(name: str, size: int) -> bytes:
    """The header that tarfile writes in USTAR format, made in a tenth of its time."""
    encoded = name.encode()
    if len(encoded) > MAX_NAME_BYTES:
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode, info.mtime = 0o444, 0
        return info.tobuf(tarfile.USTAR_FORMAT)
    blank, total = _blank_header()
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (total + byte_sum(encoded) + byte_sum(digits))
    return encoded + blank[len(encoded) : 124] + digits + blank[136:148] + checksum + blank[156:]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[memoryview]:
    try:
        with read_buffer(path) as buffer:
            yield buffer
    except FileNotFoundError as error:
        raise DataError(f"{path}: is not there; {remake_advice(path)}") from error


def read_shard(path: str, start: int = 0) -> Iterator[Sample]:
    """Samples in file order, the first one's header lies at byte ``start``.

    Raises DataError naming the file and the last whole member when the tar is broken or gone.
    """
    with _opened(path) as buffer:
        for key, members in index_shard(buffer, path, start):
            yield read_sample(buffer, key, members)


def read_sample(buffer: memoryview, key: str, members: dict[str, Member]) -> Sample:
    """A sample with copies of its members' bytes."""
    return Sample(key, {extension: member.read(buffer) for extension, member in members.items()})


def shard_keys(path: str) -> list[str]:
    """Keys in file order; no image is copied. Raises DataError as `read_shard` does."""
    with _opened(path) as buffer:
        return [key for key, _ in index_shard(buffer, path)]


@dataclass(frozen=True)
class TarIndex:
    """The bytes of a tar and where its samples lie, as far as it is whole; ``error`` is what ends it before its time.

    Iterating over it is iterating over `index_shard`, any number of times and without reading the headers again.
    """

    buffer: memoryview
    entries: list[tuple[str, dict[str, Member]]]
    error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Member]]]:
        yield from self.entries
        if self.error is not None:
            raise self.error

    def keys(self) -> list[str]:
        """Keys in file order. Raises DataError as `index_shard` does."""
        return [key for key, _ in self]

    def samples(self) -> Iterator[Sample]:
        """As `read_shard`."""
        for key, members in self:
            yield read_sample(self.buffer, key, members)


def index_tar(buffer: memoryview, path: str) -> TarIndex:
    """`index_shard` of a whole tar; what is wrong with the tar is raised where the index is iterated over."""
    entries = list[tuple[str, dict[str, Member]]]()
    try:
        for entry in index_shard(buffer, path):
            entries.append(entry)
    except Exception as error:  # damaged bytes raise anything
        return TarIndex(buffer, entries, error)
    return TarIndex(buffer, entries)


def open_tar(path: str) -> TarIndex:
    """`index_tar` of a file. Raises DataError when it is not there."""
    with _opened(path) as buffer:
        return index_tar(buffer, path)


def index_shard(buffer: memoryview, path: str, start: int = 0) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group members into samples: (key, extension -> Member), in file order from byte ``start``.

    Members of a sample must be adjacent (webdataset's rule); images with their own captions under one key are samples
    of their own (`sample.subsamples`). Links to what is not in the tar are no members. Raises DataError on a broken
    tar, a member that cannot be read, a repeated extension or a key that comes back later.
    """
    key: str | None = None
    members = dict[str, Member]()
    seen = set[str]()
    for member in scan(buffer, path, start):
        if member.problem == NO_TARGET:
            continue
        if member.problem is not None:
            raise DataError(f"{path}: member {member.name}: {member.problem}; unpack it and pack it again")
        new_key, extension = split_name(member.name)
        if new_key != key:
            if key is not None:
                yield from subsamples(key, members)
            if new_key in seen:
                raise DataError(
                    f"{path}: key {new_key} is there twice, or its members are not beside each other; make the shard "
                    "again with unique keys, or pack it anew with tar --sort=name"
                )
            seen.add(new_key)
            key, members = new_key, {}
        if extension in members:
            raise DataError(f"{path}: key {new_key} has two members .{extension}; make the shard again")
        members[extension] = member
    if key is not None:
        yield from subsamples(key, members)
