"""Bicubic, antialiased resizing of eight-bit images, in whole numbers (SPEC.md section 4): the same on every machine.

PyTorch resizes uint8 images this way, two to four times as fast as Pillow, whose weights have more bits: the two differ
by one level, rarely two, in a few of a thousand samples, and in up to a third where halves are rounded, as at a scale
of exactly 2. What the pixels are is said by `resize_exactly`, in NumPy; PyTorch serves where it agrees with that on
test images.
"""

import logging
from functools import cache, lru_cache
from itertools import product

import numpy as np

log = logging.getLogger(__name__)

REACH = 2.0  # of the cubic filter, in pixels of the larger image
SHARPNESS = -0.5  # the filter's parameter: Catmull-Rom's, as Pillow and PyTorch have it
MOST_BITS = 22  # of a weight's fraction
LARGEST_WEIGHT = 1 << 15  # a weight has 16 bits, one of which is its sign


def resize_bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) uint8, contiguous and writable, as (size, size, C) uint8, contiguous."""
    return _resize_by_torch(pixels, size) if _torch_agrees() else resize_exactly(pixels, size)


def _resize_by_torch(pixels: np.ndarray, size: int) -> np.ndarray:
    import torch  # here: most of what imports this module renders nothing
    from torch.nn.functional import interpolate

    # Channels innermost: so is the result, and nothing is copied, least of all by several threads, which wait for each
    # other. The new axis is PyTorch's, since NumPy's has a stride of 0, in which PyTorch does not see such an image.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = interpolate(image, size=(size, size), mode="bicubic", antialias=True)
    rows: np.ndarray = resized[0].permute(1, 2, 0).numpy()
    return rows


def resize_exactly(pixels: np.ndarray, size: int) -> np.ndarray:
    """As `resize_bicubic`, by definition: rows first, then columns, each rounded to eight bits."""
    _, width, _ = pixels.shape
    rows = _weighted(pixels.astype(np.int64).transpose(1, 0, 2), width, size).transpose(1, 0, 2)
    return np.ascontiguousarray(_weighted(rows, len(pixels), size), np.uint8)


def _weighted(samples: np.ndarray, length: int, size: int) -> np.ndarray:
    """(length, other, C) int64 as (size, other, C): each place the weighted sum of those that it covers."""
    starts, weights, bits = _weights(length, size)
    resized = np.full((size, *samples.shape[1:]), 1 << (bits - 1), np.int64)
    for tap in range(weights.shape[1]):
        covered = np.minimum(starts + tap, length - 1)  # beyond the end the weight is 0
        resized += weights[:, tap, None, None] * samples[covered]
    return (resized >> bits).clip(0, 255)


@lru_cache(64)
def _weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each of ``size`` places the first sample that it covers, and the weights from there, int64 [size, taps].

    The third value is the bits of their fraction: as many as leave the largest weight below `LARGEST_WEIGHT`.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centres = scale * (np.arange(size) + 0.5)
    starts = np.maximum((centres - REACH * stretch + 0.5).astype(np.int64), 0)
    stops = np.minimum((centres + REACH * stretch + 0.5).astype(np.int64), length)
    places = starts[:, None] + np.arange((stops - starts).max())
    distances = np.abs((places - centres[:, None] + 0.5) / stretch)
    shares = np.where(places < stops[:, None], _cubic(distances), 0.0)
    shares /= np.cumsum(shares, 1)[:, -1:]  # summed one after the other, as PyTorch does
    largest = float(shares.max())
    bits = next(bits for bits in range(MOST_BITS + 1) if bits == MOST_BITS or _exceeds(largest, bits + 1))
    fractions = shares * (1 << bits)
    return starts, np.trunc(fractions + np.copysign(0.5, fractions)).astype(np.int64), bits


def _exceeds(weight: float, bits: int) -> bool:
    return int(0.5 + weight * (1 << bits)) >= LARGEST_WEIGHT


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic filter of distances that are not negative."""
    a = SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


@cache
def _torch_agrees() -> bool:
    """Whether PyTorch is installed and gives the pixels of `resize_exactly` for test images, reduced and enlarged."""
    try:
        from torch import __version__
    except ImportError:
        return False
    noise = np.random.Generator(np.random.Philox(7)).integers(0, 256, (61, 83, 4), np.uint8)
    for (height, width), size in product([(61, 83), (40, 17), (3, 29)], [16, 35, 48]):
        pixels = noise[:height, :width].copy()
        if not np.array_equal(_resize_by_torch(pixels, size), resize_exactly(pixels, size)):
            log.warning(
                "PyTorch %s resizes a test image to other pixels than the views of this clipmill have: NumPy resizes, "
                "which takes many times as long",
                __version__,
            )
            return False
    return True
