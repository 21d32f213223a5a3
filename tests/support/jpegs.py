"""JPEGs of every kind and damage, and what both of their decoders make of them."""

import random
from collections.abc import Iterator
from itertools import product
from unittest.mock import patch

import numpy as np
from PIL import Image
from small_images import encoded

from shards_spec.files import DataError
from shards_spec.images import decode_rgb

WAYS = {
    "baseline": {"quality": 60},
    "optimized": {"quality": 95, "optimize": True},
    "progressive": {"quality": 85, "progressive": True},
    "restarts": {"quality": 75, "restart_marker_blocks": 3},
    "progressive restarts": {"quality": 40, "progressive": True, "restart_marker_rows": 1},
}
KINDS = list(product(WAYS, ("4:4:4", "4:2:2", "4:2:0")))


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves, edges and noise: something in every frequency."""
    down, across = np.mgrid[:height, :width]
    waves = np.sin(down / 5 + seed) * np.cos(across / 9) * 90 + 128
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
    pixels = np.stack([waves, np.where(across > down, 220, 30), waves[::-1]], -1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpegs() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of a JPEG of each kind, in colours and grey."""
    for number, (way, subsampling) in enumerate(KINDS):
        image = textured(61 + 7 * number, 97 - 4 * number, number)
        options = {**WAYS[way], "subsampling": subsampling}
        yield f"{way} {subsampling}", encoded(image, "JPEG", **options)
        if subsampling != "4:2:2":
            yield f"grey {way} {subsampling}", encoded(image.convert("L"), "JPEG", **options)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, markers put in, bytes left out, the end cut off: one of these or several."""
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(2, len(broken) if rng.random() < 0.7 else min(700, len(broken)))
        way = rng.randrange(4)
        if way == 0:
            broken[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            broken[place : place + 2] = bytes([0xFF, rng.randrange(0xC0, 0x100)])
        elif way == 2:
            del broken[place : place + rng.choice([1, 2, 30])]
        else:
            broken[place:place] = rng.randbytes(rng.choice([1, 3, 20]))
    if rng.random() < 0.25:
        broken = broken[: rng.randrange(3, len(broken))] + rng.choice([b"", b"\xff\xd9"])
    return bytes(broken)


def outcome(data: bytes, **options) -> tuple[tuple[int, int], bytes] | str:
    """Size and pixels as every stage decodes them, or the reason why there are none."""
    try:
        image = decode_rgb(data, **options)
    except DataError as error:
        return str(error)
    return image.size, image.tobytes()


def outcome_of_pillow(data: bytes, **options) -> tuple[tuple[int, int], bytes] | str:
    """`outcome` where Pillow decodes all JPEGs."""
    with patch("shards_spec.images.decode_jpeg", lambda image, data: None):
        return outcome(data, **options)
