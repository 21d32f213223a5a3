"""All that Pillow decodes as eight-bit RGB: other depths scaled by their range, transparency on white; as arrays, too.

A file seldom declares its black and white when its samples have more than eight bits. They are, in this order: what a
TIFF declares (BitsPerSample, MinSampleValue, MaxSampleValue), the smallest usual depth that holds the largest
sample (8, 10, 12, 14, 16 bits; 1.0, 255 or 65535 of floats), the file's smallest and largest sample.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from shards_spec.files import DataError

# TIFF tags
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
SAMPLE_FORMAT = 339
DECLARED_RANGES = ((280, 281), (340, 341))  # MinSampleValue and MaxSampleValue, the same for signed samples and floats
# values of PHOTOMETRIC and SAMPLE_FORMAT
WHITE_IS_ZERO = 0
UNSIGNED = 1
SIGNED = 2
# usual values of white
INTEGER_WHITES = (255, 1023, 4095, 16383, 65535)
FLOAT_WHITES = (1.0, 255.0, 65535.0)
BLOCK_SAMPLES = 1 << 20  # converted to float64 at a time: large images are not copied at eight bytes a sample


class BadImage(DataError):
    """The bytes are no usable image; the message is a short, stable reason that can be counted."""


def from_rgbx(samples: np.ndarray) -> Image.Image:
    """(H, W, 4) uint8, contiguous, as the RGB image that has this memory: Pillow keeps a fourth sample, unused."""
    height, width, _ = samples.shape
    flat = pa.Array.from_buffers(pa.uint8(), samples.size, [None, pa.py_buffer(samples)])
    return Image.fromarrow(flat, "RGB", (width, height))


def rgbx(image: Image.Image) -> np.ndarray:
    """An RGB image's samples as Pillow keeps them, (H, W, 4) uint8, read only: no copy of an image in one piece."""
    try:
        samples = np.frombuffer(pa.array(image).buffers()[-1], np.uint8)
    except ValueError:  # rows of a large image lie in several pieces
        samples = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return samples.reshape(image.height, image.width, 4)


def to_rgb(image: Image.Image, raw_mode: str) -> Image.Image:
    """A decoded image as RGB; ``raw_mode`` is Pillow's name of the samples in the file. Raises BadImage."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    is_signed = image.mode == "L" and _first(tags, SAMPLE_FORMAT) == SIGNED
    if image.mode == "F" or image.mode.startswith("I") or is_signed:
        return _to_grey(image, tags).convert("RGB")
    is_dark = ";16" in raw_mode and max(_maxima(image)) <= 16  # of 255: Pillow keeps the upper byte of colours
    if is_dark and not _is_transparent(image):
        raise BadImage("16 bits hardly used")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        if "transparency" in image.info:
            image.info["transparency"] = _at_eight_bits(image.info["transparency"], raw_mode)
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _first(tags: Mapping[int, Any], tag: int) -> Any:
    """A tag's value, the first where there is one per band; None without it."""
    value = tags.get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def _is_transparent(image: Image.Image) -> bool:
    """Whether all of it is transparent, so that it will be white whatever its colours are."""
    return "A" in image.getbands() and image.getchannel("A").getextrema()[1] == 0


def _maxima(image: Image.Image) -> list[float]:
    """The largest sample of each colour band."""
    maxima = np.reshape(image.getextrema(), (-1, 2))[:, 1].tolist()
    return [high for band, high in zip(image.getbands(), maxima, strict=True) if band != "A"]


def _at_eight_bits(transparent: Any, raw_mode: str) -> Any:
    """PNG's transparent colour scaled as Pillow scales the pixels; Pillow leaves it at the file's depth."""
    if ";16" in raw_mode and isinstance(transparent, tuple):
        return tuple(sample >> 8 for sample in transparent)
    factor = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    return transparent * factor if isinstance(transparent, int) else transparent


def _to_grey(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """One band of integers or floats as eight bits, without a copy of more than four bytes a sample."""
    samples, usual_whites = _samples(image, tags)
    low, high = _extremes(samples)
    black, white = _black_and_white(low, high, usual_whites, tags)
    transparent = image.info.get("transparency")
    grey = np.empty(samples.shape, np.uint8)
    for rows in _blocks(samples):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            block = np.nan_to_num(samples[rows].astype(np.float64), nan=black, posinf=white, neginf=black)
        if samples.dtype.kind == "f":
            shares = np.rint((block - black) * (255 / (white - black)))
        else:
            shares = np.floor((block - black) * (256 / (white - black + 1)))  # the upper bits of whole depths
        grey[rows] = shares.clip(0, 255)
        if _first(tags, PHOTOMETRIC) == WHITE_IS_ZERO:
            grey[rows] = 255 - grey[rows]
        if isinstance(transparent, int):
            grey[rows][samples[rows] == transparent] = 255
    return Image.fromarray(grey)


def _samples(image: Image.Image, tags: Mapping[int, Any]) -> tuple[np.ndarray, tuple[float, ...]]:
    """(H, W) with the type that the file's samples have, and the usual values of white in it, ascending."""
    samples = np.asarray(image)
    if image.mode == "F":
        return samples, FLOAT_WHITES
    bits = _first(tags, BITS_PER_SAMPLE) or 16
    sample_format = _first(tags, SAMPLE_FORMAT) or UNSIGNED
    most = 2 ** (bits - (sample_format == SIGNED)) - 1
    if image.mode == "L":
        samples = samples.view(np.int8)
    elif image.mode == "I" and bits == 32 and sample_format == UNSIGNED:
        samples = samples.view(np.uint32)
    smaller = () if bits == 12 else tuple(white for white in INTEGER_WHITES if white < most)
    return samples, (*smaller, most)


def _blocks(samples: np.ndarray) -> Iterator[slice]:
    """Slices of rows, of about `BLOCK_SAMPLES` samples each."""
    rows = max(1, BLOCK_SAMPLES // samples.shape[1])
    return (slice(start, start + rows) for start in range(0, len(samples), rows))


def _extremes(samples: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest finite sample. Raises BadImage when there is none."""
    minima = list[float]()
    maxima = list[float]()
    for rows in _blocks(samples):
        block = samples[rows]
        finite = block[np.isfinite(block)]
        if finite.size:
            minima.append(float(finite.min()))
            maxima.append(float(finite.max()))
    if not minima:
        raise BadImage("no finite samples")
    return min(minima), max(maxima)


def _black_and_white(
    low: float, high: float, usual_whites: tuple[float, ...], tags: Mapping[int, Any]
) -> tuple[float, float]:
    """The values that become black and white, of samples from ``low`` to ``high``."""
    type_white = usual_whites[-1]
    for min_tag, max_tag in DECLARED_RANGES:
        least = _first(tags, min_tag)
        most = _first(tags, max_tag)
        if most is not None and most != type_white and high <= most < 16 * high:  # else it is the type's, or wrong
            return least if least is not None and least <= low else min(low, 0), float(most)
    is_plain = low == high
    if low < 0:
        return (-type_white - 1, type_white) if is_plain else (low, high)
    if is_plain and high > type_white / 16:  # its only value says nothing of its depth, and is not black by its type
        return 0, type_white
    for white in usual_whites:
        if high <= white and (is_plain or high > white / 4):
            return 0, white
    return low, high
