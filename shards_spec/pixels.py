"""Whatever Pillow decodes, as eight-bit RGB: other depths by their range, transparency on white.

A file seldom says what its black and white are when its samples have more than eight bits. They are, in this order:
what a TIFF declares (BitsPerSample, MinSampleValue, MaxSampleValue), the smallest usual depth that holds the largest
sample (8, 10, 12, 14, 16 bits; 1.0, 255 or 65535 of floats), the file's smallest and largest sample.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from shards_spec.files import DataError

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
DECLARED = ((280, 281), (340, 341))  # MinSampleValue and MaxSampleValue, the same for signed samples and floats
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2
DEPTHS, FLOATS = (255, 1023, 4095, 16383, 65535), (1.0, 255.0, 65535.0)  # usual values of white
BLOCK = 1 << 20  # samples that become float64 at a time: large images are not copied at eight bytes a sample


class BadImage(DataError):
    """The bytes are no image we can use; the message is a short, stable reason fit for counting."""


def to_rgb(image: Image.Image, raw_mode: str) -> Image.Image:
    """A decoded image as RGB; ``raw_mode`` is Pillow's name of the samples in the file. Raises BadImage."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode == "F" or image.mode.startswith("I") or (image.mode == "L" and _first(tags, SAMPLE_FORMAT) == SIGNED):
        return _to_grey(image, tags).convert("RGB")
    dark = ";16" in raw_mode and max(_maxima(image)) <= 16  # of 255: Pillow keeps the upper byte of colours
    if dark and not _is_unseen(image):
        raise BadImage("16 bits hardly used")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        if "transparency" in image.info:
            image.info["transparency"] = _at_eight_bits(image.info["transparency"], raw_mode)
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _first(tags: Mapping[int, Any], tag: int) -> Any:
    value = tags.get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def _is_unseen(image: Image.Image) -> bool:
    """Whether all of it is transparent: white, whatever its colours are."""
    return "A" in image.getbands() and image.getchannel("A").getextrema()[1] == 0


def _maxima(image: Image.Image) -> list[float]:
    """The largest sample of each colour band."""
    bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)).tolist(), strict=True)
    return [high for band, (_, high) in bands if band != "A"]


def _at_eight_bits(transparent: Any, raw_mode: str) -> Any:
    """PNG's transparent colour, which Pillow leaves at the file's depth, like the pixels that it scales."""
    if ";16" in raw_mode and isinstance(transparent, tuple):
        return tuple(sample >> 8 for sample in transparent)
    factor = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    return transparent * factor if isinstance(transparent, int) else transparent


def _to_grey(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """One band of integers or floats as eight bits, without a copy of more than four bytes a sample."""
    samples, limits = _samples(image, tags)
    black, white = _range(*_extremes(samples), limits, tags)
    grey, transparent = np.empty(samples.shape, np.uint8), image.info.get("transparency")
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
    """(H, W) with the type that the file's samples have, and what white usually is in it, ascending."""
    samples = np.asarray(image)
    if image.mode == "F":
        return samples, FLOATS
    bits, form = _first(tags, BITS_PER_SAMPLE) or 16, _first(tags, SAMPLE_FORMAT) or UNSIGNED
    most = 2 ** (bits - (form == SIGNED)) - 1
    if image.mode == "L":
        samples = samples.view(np.int8)
    elif image.mode == "I" and bits == 32 and form == UNSIGNED:
        samples = samples.view(np.uint32)
    depths = (most,) if bits == 12 else (*(depth for depth in DEPTHS if depth < most), most)
    return samples, depths


def _blocks(samples: np.ndarray) -> Iterator[slice]:
    rows = max(1, BLOCK // samples.shape[1])
    return (slice(start, start + rows) for start in range(0, len(samples), rows))


def _extremes(samples: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest finite sample. Raises BadImage when there is none."""
    blocks = (samples[rows] for rows in _blocks(samples))
    finite = [found for block in blocks if (found := block[np.isfinite(block)]).size]
    if not finite:
        raise BadImage("no finite samples")
    return float(min(found.min() for found in finite)), float(max(found.max() for found in finite))


def _range(low: float, high: float, limits: tuple[float, ...], tags: Mapping[int, Any]) -> tuple[float, float]:
    """What becomes black and what becomes white of samples from ``low`` to ``high``."""
    for least, most in ((_first(tags, one), _first(tags, other)) for one, other in DECLARED):
        if most is not None and most != limits[-1] and high <= most < 16 * high:  # else it is the type's, or wrong
            return least if least is not None and least <= low else min(low, 0), float(most)
    plain = low == high
    if low < 0:
        return (-limits[-1] - 1, limits[-1]) if plain else (low, high)
    if plain and high > limits[-1] / 16:  # says nothing of its depth, and is not black by its type
        return 0, limits[-1]
    for limit in limits:
        if high <= limit and (plain or high > limit / 4):
            return 0, limit
    return low, high
