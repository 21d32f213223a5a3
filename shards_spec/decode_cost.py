"""What decoding an image would cost beyond its pixels, told from its bytes before it begins: no clock decides.

A progressive JPEG is gone through once per scan, a JPEG 2000 keeps four kilobytes per code-block; a few bytes of a file
ask for thousands of either.
"""

import re
import struct
from collections.abc import Iterator

JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)  # not a stuffed byte, a restart or a fill byte
START, SIZE, STYLE, OWN_STYLE = (
    b"\xff\x4f\xff\x51",
    b"\xff\x51",
    b"\xff\x52",
    b"\xff\x53",
)  # of JPEG 2000; a component's
TILE, TILE_DATA = b"\xff\x90", b"\xff\x93"


def jpeg_scans(data: bytes) -> int:
    """How often a JPEG's decoder goes through the image."""
    place = scans = 0
    while (marker := JPEG_MARKER.search(data, place)) and marker[1] != b"\xd9":  # the end of the image
        place = marker.end()
        if marker[1] not in (b"\xd8", b"\x01"):  # which have no length
            place += int.from_bytes(data[place : place + 2], "big")
        scans += marker[1] == b"\xda"
    return scans


def jpeg2000_blocks(data: bytes) -> int:
    """The most code-blocks that a JPEG 2000's decoder keeps at a time: a tile's, in the finest style of any."""
    most, start = 0, data.find(START)
    while start >= 0:
        most, start = max(most, _stream_blocks(data, start + 2)), data.find(START, start + 1)
    return most


def _stream_blocks(data: bytes, place: int) -> int:
    """Of the code stream whose first segment is at ``place``; ISO/IEC 15444-1, annex A."""
    most, width, height, components = 0, 0, 0, 0
    for kind, body in _segments(data, place):
        if kind == SIZE and len(body) >= 36:
            _, right, bottom, _, _, tile_width, tile_height, _, _, components = struct.unpack(">H8IH", body[:36])
            width, height = min(right, tile_width), min(bottom, tile_height)
        elif kind in (STYLE, OWN_STYLE):
            flags = 0 if kind == STYLE else 1 + (components > 256)  # where they stand
            style = body[5:] if kind == STYLE else body[flags + 1 :]
            if len(style) >= 5:
                sized = body[flags] & 1
                most = max(most, components * _tile_blocks(width, height, style, style[5:] if sized else b""))
    return most


def _tile_blocks(width: int, height: int, style: bytes, precincts: bytes) -> int:
    """Of one component: its resolutions, from the smallest; ``precincts`` has a byte for each, or is empty."""
    levels, total = style[0], 0
    for resolution in range(min(levels, 32) + 1):
        wide, high = (-(-side >> (levels - resolution)) for side in (width, height))
        size = precincts[resolution] if resolution < len(precincts) else 0xFF
        bands, halved = (3, 1) if resolution else (1, 0)  # of half the sides each
        across, down = (
            -(-side >> halved) >> min((exponent & 15) + 2, max(0, part - halved))
            for side, exponent, part in ((wide, style[1], size & 15), (high, style[2], size >> 4))
        )
        total += bands * (across + 1) * (down + 1)
    return total


def _segments(data: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    """Marker and content of the segments of a code stream, those in the headers of its tiles too."""
    after = 0  # where the tile ends whose header is read
    while place + 4 <= len(data):
        kind, length = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == TILE_DATA:
            if after <= place:
                return
            place = after
            continue
        body = data[place + 4 : place + 2 + length]
        if kind == TILE:
            after = place + int.from_bytes(body[2:6], "big")
        yield kind, body
        place += 2 + max(length, 2)
