"""What decoding an image costs beyond its pixels, told from its bytes before it begins: no time-out decides.

A progressive JPEG is decoded once per scan, a JPEG 2000 keeps four kilobytes per code-block; a few bytes of a file can
ask for thousands of either.
"""

import re
import struct
from collections.abc import Iterator

JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)  # not a stuffed byte, a restart or a fill byte
JPEG_END = b"\xd9"
JPEG_SCAN = b"\xda"
JPEG_FRAMES = tuple(bytes([kind]) for kind in range(0xC0, 0xD0) if kind not in (0xC4, 0xC8, 0xCC))
JPEG_WITHOUT_LENGTH = (b"\xd8", b"\x01")
# markers of JPEG 2000
STREAM_START = b"\xff\x4f\xff\x51"
SIZE = b"\xff\x51"
CODING_STYLE = b"\xff\x52"
COMPONENT_STYLE = b"\xff\x53"
TILE = b"\xff\x90"
TILE_DATA = b"\xff\x93"


def jpeg_scans(data: bytes) -> int:
    """How often a JPEG's decoder goes through the image."""
    return sum(marker == JPEG_SCAN for marker in _jpeg_markers(data))


def jpeg_frame(data: bytes) -> bytes | None:
    """The first marker of a frame (SOF), which names the way of coding; None without one."""
    return next((marker for marker in _jpeg_markers(data) if marker in JPEG_FRAMES), None)


def _jpeg_markers(data: bytes) -> Iterator[bytes]:
    """The second bytes of a JPEG's markers, in their order, up to its end."""
    position = 0
    while (marker := JPEG_MARKER.search(data, position)) and marker[1] != JPEG_END:
        position = marker.end()
        if marker[1] not in JPEG_WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
        yield marker[1]


def jpeg2000_blocks(data: bytes) -> int:
    """The most code-blocks that a JPEG 2000's decoder keeps at a time: a tile's, in the finest style of any."""
    most = 0
    start = data.find(STREAM_START)
    while start >= 0:
        most = max(most, _stream_blocks(data, start + 2))
        start = data.find(STREAM_START, start + 1)
    return most


def _stream_blocks(data: bytes, start: int) -> int:
    """Code-blocks of the code stream whose first segment is at ``start``; ISO/IEC 15444-1, annex A."""
    most = 0
    width = 0
    height = 0
    components = 0
    for kind, body in _segments(data, start):
        if kind == SIZE and len(body) >= 36:
            _, right, bottom, _, _, tile_width, tile_height, _, _, components = struct.unpack(">H8IH", body[:36])
            width = min(right, tile_width)
            height = min(bottom, tile_height)
        elif kind in (CODING_STYLE, COMPONENT_STYLE):
            is_general = kind == CODING_STYLE
            flags_at = 0 if is_general else 1 + (components > 256)
            style = body[5:] if is_general else body[flags_at + 1 :]
            if len(style) >= 5:
                has_precincts = body[flags_at] & 1
                blocks = _tile_blocks(width, height, style, style[5:] if has_precincts else b"")
                most = max(most, components * blocks)
    return most


def _tile_blocks(width: int, height: int, style: bytes, precincts: bytes) -> int:
    """Code-blocks of one component of a tile, over its resolutions from the smallest.

    ``style`` begins with the number of decomposition levels and the exponents of a code-block's width and height;
    ``precincts`` has a byte for each resolution, or is empty.
    """
    levels = style[0]
    total = 0
    for resolution in range(min(levels, 32) + 1):
        scale = levels - resolution
        precinct = precincts[resolution] if resolution < len(precincts) else 0xFF
        bands, halvings = (3, 1) if resolution else (1, 0)  # but for the smallest, three bands of half the sides
        across = _blocks_along(_shift_up(width, scale), style[1], precinct & 15, halvings)
        down = _blocks_along(_shift_up(height, scale), style[2], precinct >> 4, halvings)
        total += bands * (across + 1) * (down + 1)
    return total


def _blocks_along(side: int, exponent: int, precinct_exponent: int, halvings: int) -> int:
    """Whole code-blocks along one side of a band, of a resolution's side."""
    block_exponent = min((exponent & 15) + 2, max(0, precinct_exponent - halvings))
    return _shift_up(side, halvings) >> block_exponent


def _shift_up(value: int, bits: int) -> int:
    """``value`` divided by a power of two, rounded up."""
    return -(-value >> bits)


def _segments(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Marker and content of the segments of a code stream, those in the headers of its tiles too."""
    tile_end = 0  # of the tile whose header is read
    while position + 4 <= len(data):
        kind = data[position : position + 2]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if kind == TILE_DATA:
            if tile_end <= position:
                return
            position = tile_end
            continue
        body = data[position + 4 : position + 2 + length]
        if kind == TILE:
            tile_end = position + int.from_bytes(body[2:6], "big")
        yield kind, body
        position += 2 + max(length, 2)
