"""Headers of tar files: where each member's bytes lie. Foreign forms are read as GNU tar reads them.

Concatenated tars, GNU long names, pax records, sparse members (old GNU; pax 0.0, 0.1, 1.0) and links within the tar
count; ignored files (`names.is_ignored`) do not. Formats: POSIX.1-2017 pax, GNU tar manual §D (sparse).
"""

import contextlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shards_spec.files import DataError
from shards_spec.names import is_ignored

BLOCK = 512
MOST_PADDING = 1 << 20  # zero bytes between concatenated tars; more is a hole in a damaged file
# Bytes of the zeros at the end that are read; of more, the last MiB: a sparse file of zeros may claim terabytes.
MOST_SEEN = 1 << 26
MAX_HEADER_BYTES = 1 << 20  # of pax records, of a long name, of a sparse map
MAX_SPARSE_BYTES = 1 << 26  # that a sparse member may claim to have
MOST_LINKS = 40  # followed one after the other, as in a file system
REGULAR = (b"0", b"\0", b"7")
HARD_LINK, SYMBOLIC_LINK = b"1", b"2"
SPARSE = b"S"
EXTENSIONS = (b"x", b"X", b"L", b"K")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever size their headers claim
DAMAGED_HEADER, DAMAGED_SPARSE = "damaged pax header", "damaged sparse member"
NO_TARGET = "link to what is not in the tar"

Piece = tuple[int, int, int]  # first byte in the member, where it lies in the tar, number of bytes


class TruncatedTar(DataError):
    """The tar ends before it should."""


class TrailingBytes(DataError):
    """The tar ends as it should, and what follows is no tar."""


class Member(NamedTuple):
    """Where a member's bytes lie in the tar; ``size`` is the member's own.

    A sparse member lies in ``pieces``, with zeros between them. ``problem`` names why it cannot be read.
    """

    name: str
    offset: int
    size: int
    pieces: tuple[Piece, ...] = ()
    problem: str | None = None

    def read(self, buffer: memoryview) -> bytes:
        """The member's bytes out of the tar's."""
        if not self.pieces:
            return bytes(buffer[self.offset : self.offset + self.size])
        return joined(self.size, ((start, bytes(buffer[at : at + size])) for start, at, size in self.pieces))


def joined(size: int, pieces: Iterator[tuple[int, bytes]]) -> bytes:
    """``size`` bytes: the pieces, each from its first byte on, and zeros."""
    data = bytearray(size)
    for start, piece in pieces:
        data[start : start + len(piece)] = piece
    return bytes(data)


def scan(buffer: memoryview, path: str, start: int = 0, ignored: list[str] | None = None) -> Iterator[Member]:
    """Regular members and links to such in file order from byte ``start``, where a header lies.

    The name of the first ignored member is added to ``ignored``. Raises DataError naming the last whole member when
    the tar is broken.
    """
    targets: dict[str, _Entry] | None = None
    for entry in _entries(buffer, path, start):
        if is_ignored(entry.member.name):
            if ignored is not None and not ignored:
                ignored.append(entry.member.name)
            continue
        if entry.link is None:
            yield entry.member
            continue
        targets = _targets(buffer, path) if targets is None else targets
        found = _follow(entry, targets)
        if found is None:
            yield entry.member._replace(problem=NO_TARGET)
        elif found.name != entry.member.name:  # GNU tar's way to say that a file was named twice
            yield found._replace(name=entry.member.name)


class _Entry(NamedTuple):
    """A member, and the path in the tar that it links to."""

    member: Member
    link: str | None = None


def _targets(buffer: memoryview, path: str) -> dict[str, _Entry]:
    """All members by their plain paths, as far as the tar is whole."""
    found = dict[str, _Entry]()
    with contextlib.suppress(DataError):
        for entry in _entries(buffer, path, 0):
            name = posixpath.normpath(entry.member.name)
            if entry.link is None or name not in found:
                found[name] = entry
    return found


def _follow(entry: _Entry, targets: dict[str, _Entry]) -> Member | None:
    for _ in range(MOST_LINKS):
        if entry.link is None:
            return entry.member
        following = targets.get(entry.link)
        if following is None:
            return None
        entry = following
    return None


def _entries(buffer: memoryview, path: str, start: int) -> Iterator[_Entry]:
    """Members and links, each with what extended headers before it say."""
    headers = _Headers(buffer, path, start)
    extended = _Extended()
    while (header := headers.read()) is not None:
        kind, size = header[156:157], _number(header[124:136])
        data = headers.position + BLOCK
        if kind in EXTENSIONS:
            headers.skip(data, size)
            extended.add(kind, bytes(buffer[data : data + size]) if size <= MAX_HEADER_BYTES else None)
            continue
        if kind in WITHOUT_DATA:
            size = 0
        elif extended.size is not None:
            size = extended.size
        if kind == SPARSE:
            data = extended.add_old_sparse(header, buffer, data)
        headers.skip(data, size)
        name = extended.path or _short_name(header)
        if (kind in REGULAR or kind == SPARSE) and not name.endswith("/"):  # a folder in tars before USTAR
            yield _Entry(extended.member(name, buffer, data, size))
            headers.last = name
        elif kind in (HARD_LINK, SYMBOLIC_LINK):
            link = extended.link or _text(header[157:257])
            folder = posixpath.dirname(name) if kind == SYMBOLIC_LINK else ""
            yield _Entry(Member(name, data, 0), posixpath.normpath(posixpath.join(folder, link)))
        extended = _Extended()


class _Headers:
    """The header blocks of a tar, or of several tars one after the other, in file order.

    ``position`` is where the last header lies, ``last`` the name of the last whole member, for messages.
    """

    def __init__(self, buffer: memoryview, path: str, start: int) -> None:
        self.position = start
        self.last = "(none)"
        self._next = start
        self._buffer, self._path = buffer, path
        self._ended = False  # the blocks before were the end of a tar

    def read(self) -> bytes | None:
        """The next header; None at the end of the file. Raises DataError when the tar is broken."""
        while True:
            self.position = self._next
            block = bytes(self._buffer[self.position : self.position + BLOCK])
            if len(block) < BLOCK:
                raise self._truncated()
            if block[0] != 0 or any(block):
                self._check(block)
                self._ended = False
                return block
            following = _after_end(self._buffer, self.position)
            if following is None:
                return None
            if following < 0:
                raise self._truncated()
            self._ended = True
            if following == self.position:
                raise self._damaged("more zeros than any tar has")
            self._next = following

    def skip(self, data: int, size: int) -> None:
        """Go behind ``size`` bytes from ``data`` on, those of the last header. Raises TruncatedTar."""
        if data + size > len(self._buffer):
            raise self._truncated()
        self._next = data + size + (-size % BLOCK)

    def _check(self, block: bytes) -> None:
        """Raise DataError for a block that is no header."""
        try:
            stored = _number(block[148:156])
            _number(block[124:136])
        except tarfile.HeaderError as error:
            raise self._damaged("no tar header", f" ({error})") from error
        if stored != byte_sum(block[:256]) + byte_sum(block[256:]) - sum(block[148:156]) + 8 * ord(" "):
            raise self._damaged("damaged tar header")

    def _truncated(self) -> TruncatedTar:
        return TruncatedTar(f"{self._path}: truncated tar, last whole member {self.last}; make the shard again")

    def _damaged(self, what: str, why: str = "") -> DataError:
        kind = TrailingBytes if self._ended else DataError
        return kind(f"{self._path}: {what} after member {self.last}{why}; make the shard again")


def _after_end(buffer: memoryview, position: int) -> int | None:
    """Where the next of concatenated tars begins, after the zero blocks at ``position``; None at the end of the file.

    -1: there is one zero block only; ``position``: there are more zeros than any tar has at its end.
    """
    if len(buffer) < position + 2 * BLOCK or any(buffer[position + BLOCK : position + 2 * BLOCK]):
        return -1
    seen = min(len(buffer), position + MOST_SEEN)
    for start in (*range(position, seen, MOST_PADDING), max(seen, len(buffer) - MOST_PADDING)):
        chunk = bytes(buffer[start : start + MOST_PADDING])
        if kept := chunk.lstrip(b"\0"):
            first = start + (len(chunk) - len(kept)) // BLOCK * BLOCK
            return first if first - position <= MOST_PADDING else position
    return None


@dataclass
class _Extended:
    """What the extended headers before a member say of it."""

    path: str | None = None
    link: str | None = None
    size: int | None = None
    problem: str | None = None
    real_size: int | None = None  # of a sparse member
    runs: list[int] | None = None  # first byte and number of bytes by turns; None: in the data, before the bytes
    sparse: dict[bytes, bytes] = field(default_factory=dict)

    def add(self, kind: bytes, data: bytes | None) -> None:
        """A GNU long name, or pax records; None is an extended header that is too large for one."""
        try:
            if data is None:
                raise ValueError("too large")
            if kind == b"L":
                self.path = _text(data)
            elif kind == b"K":
                self.link = _text(data)
            else:
                for keyword, value in _records(data):
                    self._add_record(keyword, value)
        except ValueError:
            self.problem = DAMAGED_HEADER

    def _add_record(self, keyword: bytes, value: bytes) -> None:
        if keyword in (b"path", b"GNU.sparse.name"):
            if keyword != b"path" or b"GNU.sparse.name" not in self.sparse:  # that path is a made-up one
                self.path = _text(value)
        elif keyword == b"linkpath":
            self.link = _text(value)
        elif keyword == b"size":
            self.size = _decimal(value)
        elif keyword in (b"GNU.sparse.size", b"GNU.sparse.realsize"):
            self.real_size = _decimal(value)
        elif keyword in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            self.runs = self.runs or []
            self.runs.append(_decimal(value))
        elif keyword == b"GNU.sparse.map":
            self.runs = [_decimal(number) for number in value.split(b",")] if value else []
        if keyword.startswith(b"GNU.sparse."):
            self.sparse[keyword] = value

    def add_old_sparse(self, header: bytes, buffer: memoryview, data: int) -> int:
        """The map in an old GNU header and in the blocks after it; where the bytes begin then."""
        try:
            self.real_size, self.runs = _number(header[483:495]), _runs(header[386:482])
            more, first = header[482], data
            while more and data - first <= MAX_HEADER_BYTES:
                block = bytes(buffer[data : data + BLOCK])
                self.runs += _runs(block[:504])
                more, data = (block[504] if len(block) == BLOCK else 0), data + BLOCK
        except tarfile.HeaderError:
            self.problem = DAMAGED_SPARSE
        return data

    def member(self, name: str, buffer: memoryview, data: int, size: int) -> Member:
        """The member whose ``size`` stored bytes begin at ``data``."""
        if self.problem is not None or (self.real_size is None and not self.sparse):
            return Member(name, data, size, problem=self.problem)
        try:
            runs, first = (self.runs, data) if self.runs is not None else _map_in_data(buffer, data, size)
            pieces = _pieces(runs, first, data + size, self.real_size or 0)
        except ValueError:
            return Member(name, data, size, problem=DAMAGED_SPARSE)
        total = self.real_size or 0
        if pieces == ((0, first, total),):
            return Member(name, first, total)
        return Member(name, data, total, pieces or ((0, data, 0),))


def _pieces(runs: list[int], first: int, end: int, total: int) -> tuple[Piece, ...]:
    """The stored runs of a sparse member, in rising order. Raises ValueError for a map that does not fit."""
    pieces = list[Piece]()
    reached = 0
    if total > MAX_SPARSE_BYTES or len(runs) % 2:
        raise ValueError("a sparse map that cannot be")
    for start, size in zip(runs[::2], runs[1::2], strict=True):
        if start < reached or start + size > total or first + size > end:
            raise ValueError("a sparse map that does not fit")
        if size:
            pieces.append((start, first, size))
        reached = start + size
        first += size
    return tuple(pieces)


def _map_in_data(buffer: memoryview, data: int, size: int) -> tuple[list[int], int]:
    """(runs, where the bytes begin) of pax sparse format 1.0. Raises ValueError."""
    text = bytes(buffer[data : data + min(size, MAX_HEADER_BYTES)])
    numbers = list[int]()
    at = 0
    while not numbers or len(numbers) < 1 + 2 * numbers[0]:
        end = text.index(b"\n", at, at + 32)
        numbers.append(_decimal(text[at:end]))
        at = end + 1
    return numbers[1:], data + at + (-at % BLOCK)


def _runs(fields: bytes) -> list[int]:
    """Pairs of 12-byte numbers; the unused ones at the end are zero bytes."""
    numbers = [fields[at : at + 12] for at in range(0, len(fields), 12)]
    return [_number(number) for number in numbers if any(number)]


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    r"""(keyword, value) of pax records ``LENGTH KEYWORD=VALUE\n``. Raises ValueError."""
    at = 0
    while at < len(data) and data[at]:
        space = data.index(b" ", at, at + 20)
        end = at + _decimal(data[at:space])
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or data[end - 1 : end] != b"\n" or not equals or end <= space:
            raise ValueError("no pax record")
        yield keyword, value
        at = end


def _decimal(text: bytes) -> int:
    """Raises ValueError for what is no number of at most 20 digits."""
    if not text.isdigit() or len(text) > 20:
        raise ValueError("no number")
    return int(text)


def _number(field: bytes) -> int:
    """A size or checksum of a header. Raises tarfile.HeaderError."""
    try:
        number = int(field.rstrip(b"\0 "), 8)
    except ValueError:  # empty, or one of tar's rarer forms
        number = tarfile.nti(field)  # type: ignore[attr-defined]
    if number < 0:
        raise tarfile.HeaderError("negative number")
    return number


def byte_sum(data: bytes) -> int:
    """Sum of at most 256 bytes: Adler-32's lower half is 1 + the sum, below its modulus 65,521 then."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _short_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    return name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
