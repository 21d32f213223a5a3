"""What a file is, told from its first bytes: for messages about a file that was taken for another."""

import codecs

HEAD_BYTES = 512  # that `binary_kind` needs
IMAGES = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
}
PACKED = {  # first bytes of what cannot be read in place
    b"\x1f\x8b": "packed with gzip",
    b"PK\x03\x04": "a zip file (or a spreadsheet)",
    b"PK\x05\x06": "an empty zip file",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ\0": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"7z\xbc\xaf": "a 7z file",
    b"Rar!": "a rar file",
}
PACKED_BYTES = 6  # the longest of them
OTHERS = {
    b"PAR1": "a Parquet file",
    b"ARROW1\0\0": "an Arrow file",
    b"%PDF-": "a PDF document",
    b"SQLite format 3\0": "a SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"\x7fELF": "a program",
}
TAR_MAGIC = slice(257, 262)  # "ustar" in the header of a tar's first member
BINARY = "binary"
TEXT_CONTROLS = b"\t\n\r\f\x1b"  # control characters that text may have
MIN_BYTES = 16  # from fewer bytes nothing is concluded


def packed_kind(head: bytes) -> str | None:
    """What archive or packed file begins with these bytes; None for all else."""
    return _of_magic(PACKED, head)


def image_kind(head: bytes) -> str | None:
    """What image begins with these bytes (``a JPEG image``); None for all else."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"mif1"):
        return "a HEIC or AVIF image"
    return _of_magic(IMAGES, head)


def known_kind(head: bytes) -> str | None:
    """What begins with these `HEAD_BYTES` bytes, where that is certain; None for all else."""
    tar = "a tar" if head[TAR_MAGIC] == b"ustar" else None
    return image_kind(head) or packed_kind(head) or tar or _of_magic(OTHERS, head)


def binary_kind(head: bytes) -> str | None:
    """As `known_kind`, or `BINARY` for bytes that are neither UTF-8 nor text of an 8-bit encoding; None for text."""
    if (kind := known_kind(head)) is not None:
        return kind
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a letter may be cut at the end
        return None
    except UnicodeDecodeError:
        controls = sum(byte < 32 and byte not in TEXT_CONTROLS for byte in head)
        return BINARY if len(head) >= MIN_BYTES and controls > len(head) // 20 else None


def _of_magic(kinds: dict[bytes, str], head: bytes) -> str | None:
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
