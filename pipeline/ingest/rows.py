"""The rows that every kind of source gives, and where the image of a row lies when it needs no download.

Also what their readers share: the usual names of columns, and text from bytes that may not be UTF-8.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

URL_NAMES = ("url", "image_url", "img_url")
CAPTION_NAMES = ("caption", "text", "alt_text", "alt")
NOT_UTF8 = "caption is not UTF-8"
NOT_TEXT = "caption is not text"
NOT_FOUND = "file not found"

Columns = tuple[str | None, str | None]  # names of the caption column and the URL column; None: found by their names


@dataclass(frozen=True)
class FileRef:
    """A file that is the image."""

    path: str


@dataclass(frozen=True)
class TarRef:
    """A member of a tar: ``size`` bytes from ``offset``."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class SparseTarRef:
    """A sparse member of a tar, ``size`` bytes in all.

    Each of ``pieces`` is (first byte in the member, offset in the tar, bytes); what lies between them is zeros.
    """

    path: str
    size: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ParquetRef:
    """A cell of a Parquet file: ``column`` is the path of its leaf (``image.bytes``), ``row`` counts in the group."""

    path: str
    column: str
    row_group: int
    row: int


# The fields after ``path`` are hashed into a shard's inputs: their order must not change.
ImageRef = FileRef | TarRef | SparseTarRef | ParquetRef


@dataclass(slots=True, unsafe_hash=True)
class Row:
    """One input of `ingest`: an image and its caption, or the reason why it cannot be used.

    Nothing changes a row; it is not frozen because every task of an array makes all of a list, and freezing takes five
    times as long.

    Attributes:
        caption: The caption; None when there is none.
        url: The image's URL, or its path below the source.
        problem: Why the row cannot be used; None when it can. The reason is written to ``raw/``.
        stamp: Changes with the content of the file that ``image_ref`` lies in: size, and modification time or etag.
        image_ref: Where the image's bytes lie; None: ``url`` is downloaded.
        note: What was left out of a row that is used; written to ``raw/`` too.
        extra: The other columns of the list, by name.
        label: The number of the image's class; None where the source has no classes.
    """

    caption: str | None
    url: str | None
    problem: str | None = None
    stamp: str = ""
    image_ref: ImageRef | None = None
    note: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    label: int | None = None


class SourceCaption(NamedTuple):
    """A caption, why its row cannot be used, and what is to be noted of a row that can."""

    text: str | None = None
    problem: str | None = None
    note: str | None = None


def find_column(given: str | None, candidates: tuple[str, ...], columns: list[str]) -> int | None:
    """Index of the column named ``given``; without it, of the first candidate that is there, whatever its case.

    None when there is no such column.
    """
    stripped = [column.strip() for column in columns]
    if given is not None:
        return stripped.index(given) if given in stripped else None
    lowered = [column.lower() for column in stripped]
    return next((lowered.index(name) for name in candidates if name in lowered), None)


def decode_text(data: bytes | None) -> tuple[str | None, bool]:
    """(text, whether it was not UTF-8): bytes that are not UTF-8 become U+FFFD."""
    if data is None:
        return None, False
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def json_text(value: object) -> tuple[str | None, str | None]:
    """(text, problem) of a caption from JSON, where lone surrogates and values other than text are possible."""
    if value is None:
        return None, None
    if not isinstance(value, str):
        return None, NOT_TEXT
    text, broken = decode_text(value.encode(errors="surrogatepass"))
    return text, NOT_UTF8 if broken else None


def json_captions(value: object) -> tuple[list[bytes | None], str | None]:
    """(captions, note) of a value from JSON: each text of a list is one; other values give None and a note."""
    if value is None or isinstance(value, str):
        return [json_bytes(value)], None
    if not isinstance(value, list):
        return [None], NOT_TEXT
    texts = [json_bytes(text) for text in value if isinstance(text, str)]
    if texts:
        return texts, None
    return [None], NOT_TEXT if value else None


def captions_of(value: object) -> list[SourceCaption]:
    """`json_captions` as text."""
    texts, note = json_captions(value)
    captions = []
    for data in texts:
        text, broken = decode_text(data)
        captions.append(SourceCaption(text, NOT_UTF8 if broken else None, note))
    return captions


def json_bytes(value: object) -> bytes | None:
    """A text from JSON, in which lone surrogates are possible, as bytes; None for what is not text."""
    return value.encode(errors="surrogatepass") if isinstance(value, str) else None
