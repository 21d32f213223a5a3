"""Valid files made wrong: bytes flipped, cut, doubled, spliced, numbers made extreme. All of it from one seed."""

import random
import re
import struct

NUMBERS = (0, 1, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TEXTS = (
    b"",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"1" * 5000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\r\n",
    b"\t",
    b'"',
    b'""',
    b"'",
    b",",
    b";",
    b"|",
    b"\\N",
    b"\\",
    b"../../x",
    b"/dev/zero",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x90\x95",
    b"%00",
    b"<b>",
    b"\x1b[2J",
    b"a" * 70_000,
    b"0" * 40,
)
DIGITS = re.compile(rb"\d+")


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """``data`` after one to four changes; ``other`` is a second file of the kind to take pieces from."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(CHANGES)(rng, data, other)
    return data[: 8 << 20]


def _flip(rng: random.Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 64, 512, 5000))
    return data[:at] + data[at + length :]


def _double(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 8, 100, 512, 1024, len(data)))
    return data[: at + length] * rng.choice((1, 1, 3)) + data[at:]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _text(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TEXTS) + data[at + rng.choice((0, 0, 1, 8)) :]


def _digits(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """A number that is written out becomes another one, often of the same length."""
    found = list(DIGITS.finditer(data[: 1 << 20]))
    if not found:
        return data
    match, value = rng.choice(found), str(rng.choice(NUMBERS)).encode()
    if rng.random() < 0.5:
        value = value[: len(match[0])].rjust(len(match[0]), b"0")
    return data[: match.start()] + value + data[match.end() :]


def _binary(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """Bytes become an extreme integer, either end first."""
    size = rng.choice((1, 2, 4, 8))
    if len(data) < size:
        return data
    value = (rng.choice(NUMBERS) & ((1 << (8 * size)) - 1)).to_bytes(size, rng.choice(("little", "big")))
    # headers and footers decide most
    at = rng.choice((rng.randrange(len(data) - size + 1), rng.randrange(min(len(data) - size + 1, 64))))
    if rng.random() < 0.3:
        at = max(0, len(data) - size - rng.randrange(64))
    return data[:at] + value + data[at + size :]


def _float(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + struct.pack("<f", rng.choice((float("nan"), float("inf"), -0.0, 1e38))) + data[at + 4 :]


def _none(_rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data


CHANGES = (
    _flip,
    _flip,
    _cut,
    _remove,
    _double,
    _splice,
    _text,
    _text,
    _digits,
    _digits,
    _binary,
    _binary,
    _float,
    _none,
)
