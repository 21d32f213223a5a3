#!/usr/bin/env python3
"""JPEGs by simplejpeg against Pillow, both behind `decode_rgb`; what the resizing of `ingest` costs and keeps.

    python tests/bench/decode.py [--photos 16] [--rounds 9] [FILE ...]

Milliseconds of processor time per image, the least of all rounds, both by turns; the pixels are compared. Then ways to
shrink to a shorter side of 256: milliseconds, decoding included, and decibels from a full decode and Lanczos. The
photos are those of the other benches, or the FILEs.
"""

import argparse
import io
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import simplejpeg
from photos import photo
from PIL import Image

from pipeline.ingest.images import shrink, shrunk_size
from shards_spec.images import decode_rgb

Size = tuple[int, int]
Box = tuple[float, float, float, float]
FILTERS = Image.Resampling


def encoded(image: Image.Image, **options: object) -> bytes:
    """The image as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    """As `decode_rgb` does without simplejpeg."""
    with patch("shards_spec.images.decode_jpeg", lambda image, data: None):
        return decode_rgb(data)


def least_ms(ways: dict[str, Callable[[int], object]], number: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time per image, the least of ``rounds`` turns."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.thread_time()
            for index in range(number):
                way(index)
            least[name] = min(least[name], 1000 * (time.thread_time() - start) / number)
    return least


def compare_decoders(photos: list[bytes], rounds: int) -> None:
    """Print both decoders' times for photos and for what `ingest` makes of them."""
    full = [decode_rgb(data) for data in photos]
    small = [image.resize(shrunk_size(image.size, 256), FILTERS.LANCZOS) for image in full]
    sets = {
        "photos": photos,
        "photos, progressive": [encoded(image, quality=85, progressive=True) for image in full],
        "256 px, quality 95": [encoded(image, quality=95) for image in small],
        "256 px, quality 80": [encoded(image, quality=80) for image in small],
        "256 px, quality 95, 4:4:4": [encoded(image, quality=95, subsampling=0) for image in small],
        "256 px, grey": [encoded(image.convert("L"), quality=90) for image in small],
    }
    for name, files in sets.items():
        assert all(decode_rgb(data).tobytes() == by_pillow(data).tobytes() for data in files)
        ways = {
            "simplejpeg": lambda index, files=files: decode_rgb(files[index]),
            "Pillow": lambda index, files=files: by_pillow(files[index]),
        }
        ours, theirs = least_ms(ways, len(files), rounds).values()
        print(f"{name:26} {ours:.3f} ms, Pillow {theirs:.3f}, ratio {ours / theirs:.2f}")


def drafted(data: bytes, size: Size) -> tuple[Image.Image, Box]:
    """At the half, quarter or eighth that is not smaller than ``size``, as `ingest` decodes; with what it shows."""
    image = Image.open(io.BytesIO(data))
    _, box = image.draft(None, size)
    return image.convert("RGB"), box


def eighths(data: bytes, size: Size) -> tuple[Image.Image, Box]:
    """At the least number of eighths that is not smaller than ``size``; with what it shows."""
    width, height = size
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height))
    whole = Image.open(io.BytesIO(data)).size
    part = math.floor(8 * max(image.width / whole[0], image.height / whole[1])) / 8
    return image, (0, 0, min(image.width, part * whole[0]), min(image.height, part * whole[1]))


def undrafted(data: bytes, size: Size) -> tuple[Image.Image, Box]:
    """All pixels."""
    image = decode_rgb(data)
    return image, (0, 0, *image.size)


def by_ingest(shown: tuple[Image.Image, Box], size: Size) -> Image.Image:
    """As `ingest` shrinks."""
    image, (_, _, width, height) = shown
    return shrink(image, size, (width, height))


def by_filter(filter: FILTERS, shown: tuple[Image.Image, Box], size: Size) -> Image.Image:
    """By a filter of Pillow."""
    image, box = shown
    return image.resize(size, filter, box=box)


DECODINGS: dict[str, Callable[[bytes, Size], tuple[Image.Image, Box]]] = {
    "halves": drafted,
    "eighths": eighths,
    "all": undrafted,
}
FILTERING: dict[str, Callable[[tuple[Image.Image, Box], Size], Image.Image]] = {
    "shrink": by_ingest,
    **{name: partial(by_filter, FILTERS[name]) for name in ("BOX", "HAMMING", "BICUBIC")},
}
SHRINKING: dict[str, Callable[[bytes, Size], Image.Image]] = {
    f"{decoding} and {name}": lambda data, size, decode=decode, shrunk=shrunk: shrunk(decode(data, size), size)
    for decoding, decode in DECODINGS.items()
    for name, shrunk in FILTERING.items()
}


def compare_shrinking(photos: list[bytes], rounds: int) -> None:
    """Print what each way of `SHRINKING` costs and how near it comes to Lanczos."""
    full = [decode_rgb(data) for data in photos]
    sizes = [shrunk_size(image.size, 256) for image in full]
    references = [
        np.asarray(image.resize(size, FILTERS.LANCZOS), float) for image, size in zip(full, sizes, strict=True)
    ]
    ways = {
        name: lambda index, shrunk=shrunk: shrunk(photos[index], sizes[index]) for name, shrunk in SHRINKING.items()
    }
    times = least_ms(ways, len(photos), rounds)
    for name, way in ways.items():
        errors = [np.mean((np.asarray(way(index), float) - one) ** 2) for index, one in enumerate(references)]
        decibels = 10 * np.log10(255**2 / np.array(errors))
        print(f"{name:28} {times[name]:.2f} ms, {decibels.mean():.1f} dB, at least {decibels.min():.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    photos = [path.read_bytes() for path in options.files] or [photo(seed) for seed in range(options.photos)]
    compare_decoders(photos, options.rounds)
    compare_shrinking(photos, options.rounds)


if __name__ == "__main__":
    main()
