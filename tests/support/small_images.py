"""Odd and hostile images, byte by byte where no library writes them: PNG chunks, TIFF samples, endless scans."""

import io
import re
import struct
import zlib

import numpy as np
from PIL import Image

LONGS = (256, 257, 273, 278, 279)  # TIFF tags that are written as 32-bit numbers


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def ramp(low: float, high: float, dtype: str) -> np.ndarray:
    """(8, 64) from ``low`` at the left to ``high`` at the right."""
    return np.linspace(low, high, 64).astype(dtype)[None].repeat(8, 0)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: np.ndarray, bits: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of samples (H, W) or (H, W, C); ``before`` and ``after`` are chunks around the pixels'.

    ``colour`` is PNG's type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha.
    """
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1)
    else:
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)  # several samples a byte, the first one uppermost
        parts = samples.astype(np.uint8).reshape(height, -1, len(shifts))
        rows = (parts << shifts).sum(-1).astype(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = (png_chunk(b"IHDR", header), before, png_chunk(b"IDAT", data), after, png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(samples: np.ndarray, photometric: int = 1, order: str = "<", **tags: list[int]) -> bytes:
    """An uncompressed TIFF of samples (H, W) or (H, W, C) with their type; more tags as ``t338=[1]``."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    body += bytes(len(body) % 2)
    entries = {
        256: [width],
        257: [height],
        258: [8 * samples.dtype.itemsize] * channels,
        259: [1],
        262: [photometric],
        273: [8],
        277: [channels],
        278: [height],
        279: [len(body)],
        339: [" uif".index(samples.dtype.kind)] * channels,
    } | {int(name[1:]): value for name, value in tags.items()}
    start = 8 + len(body)
    directory, values = struct.pack(f"{order}H", len(entries)), b""
    for tag in sorted(entries):
        value = struct.pack(order + ("I" if tag in LONGS else "H") * len(entries[tag]), *entries[tag])
        if len(value) > 4:
            place = struct.pack(f"{order}I", start + 2 + 12 * len(entries) + 4 + len(values))
            values, value = values + value + bytes(len(value) % 2), place
        directory += struct.pack(f"{order}HHI", tag, 4 if tag in LONGS else 3, len(entries[tag])) + value.ljust(
            4, b"\0"
        )
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}I", start) + body + directory + bytes(4) + values


def slow_jpeg(side: int, scans: int) -> bytes:
    """A progressive JPEG of a few bytes a scan, which take a decoder as long as a whole image each."""
    data = encoded(Image.new("L", (side, side), 120), "JPEG", progressive=True)
    markers = [match.start() for match in re.finditer(rb"\xff[^\x00\xff\xd0-\xd7]", data)]
    starts = [place for place in markers if data[place + 1] == 0xDA]
    end = next(place for place in markers if place > starts[1] + 2)
    return data[:end] + data[starts[1] : end] * scans + data[end:]


def jpeg2000(side: int, precincts: int | None = None, in_tile: bool = False, **options) -> bytes:
    """A grey JPEG 2000 code stream; ``precincts`` is the byte of their size, said in the main or the tile's header."""
    data = encoded(Image.new("L", (side, side), 120), "JPEG2000", no_jp2=True, **options)
    if precincts is None:
        return data
    place = data.index(b"\xff\x52")
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    sizes = bytes([precincts]) * (data[place + 9] + 1)
    style = (
        data[place : place + 2]
        + struct.pack(">H", end - place - 2 + len(sizes))
        + b"\1"
        + data[place + 5 : end]
        + sizes
    )
    if not in_tile:
        return data[:place] + style + data[end:]
    tile = data.index(b"\xff\x90")
    length = int.from_bytes(data[tile + 6 : tile + 10], "big") + len(style)
    return data[: tile + 6] + struct.pack(">I", length) + data[tile + 10 : tile + 12] + style + data[tile + 12 :]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
