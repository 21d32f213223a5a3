"""The second opinion on near-duplicates: whether two images are one, when their 64-bit signatures say that they may be.

A signature has the coarsest shades of grey alone: objects on a plain ground, icons and pages share it, whatever their
colours and details. Here small copies in colour are laid over each other (a light crop is a shift and a stretch),
brightness, contrast and saturation are fitted, and what is then left must be little: in the details, in the colours as
a whole, and in every single place. The limits were set on photographs, icons, product shots and pages, changed by
encoding, scaling, crops of up to 5 % a side and tone (`tests/pipeline/dedup/test_image_match.py`).
"""

import functools
import math

import numpy as np
from PIL import Image

SIDE, BLOCK = 32, 4  # pixels of the small copy; of the places that are looked at one by one
ROUNDS, MOST_MOVED = 3, 0.12  # of the alignment; share of the side by which an edge may move
DETAIL = slice(6, 20)  # frequencies that the signature does not have; the finest are the encoder's
DETAIL_LEFT, NOISE = 0.28, 1.2  # share of the details that may be left; grey levels that are nothing
# what may be left of colours on average and in one place, of grey in one place: levels, or a share of the contrast
COLOUR_LEFT, COLOUR_SPOT, GREY_SPOT = (8.0, 0.2), (10.0, 0.3), (16.0, 0.3)
GAIN, SATURATION = (0.5, 2.0), (0.6, 1.7)  # of contrast; of colours (less is another image, grey say)


def fingerprint(image: Image.Image) -> np.ndarray:
    """A small copy of an RGB image: uint8 [SIDE, SIDE, 3], luma and two colours (YCbCr)."""
    small = image.reduce(max(1, min(image.size) // (2 * SIDE)))
    return np.asarray(small.convert("YCbCr").resize((SIDE, SIDE), Image.Resampling.HAMMING))


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two fingerprints are of one image."""
    first, second = one.astype(np.float32), other.astype(np.float32)
    aligned, gain, left = _aligned(first, second)
    detail, rest = (_detail(grey) for grey in (second[..., 0], left))
    if not GAIN[0] <= gain <= GAIN[1] or rest > max(DETAIL_LEFT * detail, NOISE):
        return False
    if np.abs(_places(left)).max() > _limit(GREY_SPOT, second[..., :1]):
        return False
    wanted, colours = (image[..., 1:] - 128 for image in (second, aligned))
    energy = float((colours**2).sum())
    fitted = float((wanted * colours).sum()) / energy if energy > 1 else 1.0
    left = wanted - min(max(fitted, SATURATION[0]), SATURATION[1]) * colours
    spots, average = np.hypot(_places(left[..., 0]), _places(left[..., 1])), math.sqrt((left**2).sum(axis=2).mean())
    return average <= _limit(COLOUR_LEFT, wanted) and bool(spots.max() <= _limit(COLOUR_SPOT, wanted))


def _limit(least: tuple[float, float], channels: np.ndarray) -> float:
    """Levels that may be left, of channels [SIDE, SIDE, C]: the first, or the second times their standard deviation."""
    return max(least[0], least[1] * math.sqrt(channels.var(axis=(0, 1)).sum()))


def _aligned(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """``one`` stretched and shifted so that a gain and an offset make its luma ``other``'s: it, the gain, what is left.

    Least squares on the image and its slopes (Lucas and Kanade 1981), repeated.
    """
    moved, luma, across = np.zeros(4), other[..., 0].ravel(), (np.arange(SIDE) + 0.5) / SIDE - 0.5
    for round_ in range(ROUNDS + 1):
        aligned = _moved(one, moved)
        down, right = (slope * SIDE for slope in np.gradient(aligned[..., 0]))
        slopes = [right * across, right, down * across[:, None], down] if round_ < ROUNDS else []
        columns = [aligned[..., 0], np.ones((SIDE, SIDE)), *slopes]
        matrix = np.stack([column.ravel() for column in columns], axis=1)
        found = np.linalg.lstsq(matrix, luma, rcond=None)[0]
        if slopes:
            moved = np.clip(moved + found[2:] / (found[0] if abs(found[0]) > 0.2 else 1), -MOST_MOVED, MOST_MOVED)
    return aligned, float(found[0]), (luma - matrix @ found).reshape(SIDE, SIDE)


def _moved(image: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Stretched and shifted across, then down, by shares of the side; edges are repeated."""
    for axis, (stretch, shift) in enumerate(((moved[2], moved[3]), (moved[0], moved[1]))):
        middles = np.arange(SIDE) + 0.5
        at = np.clip(middles + stretch * (middles - SIDE / 2) + shift * SIDE - 0.5, 0, SIDE - 1)
        low = np.minimum(at.astype(int), SIDE - 2)
        weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        image = np.take(image, low, axis) * (1 - weight) + np.take(image, low + 1, axis) * weight
    return image


@functools.cache
def _cosines() -> np.ndarray:
    """The orthonormal DCT-II matrix: float64 [SIDE, SIDE]."""
    waves = np.arange(SIDE)
    scale = np.sqrt(np.where(waves == 0, 1, 2) / SIDE)
    cosines: np.ndarray = scale[:, None] * np.cos(math.pi / SIDE * np.outer(waves, waves + 0.5))
    return cosines


def _detail(grey: np.ndarray) -> float:
    """Grey levels (root mean square of coefficients) in the frequencies of `DETAIL`, of the higher of both axes."""
    waves = _cosines() @ grey @ _cosines().T
    fine = waves[: DETAIL.stop, : DETAIL.stop].copy()
    fine[: DETAIL.start, : DETAIL.start] = 0
    return math.sqrt(float((fine**2).sum()) / (DETAIL.stop**2 - DETAIL.start**2))


def _places(grey: np.ndarray) -> np.ndarray:
    """Means of BLOCK x BLOCK pixels."""
    parts = SIDE // BLOCK
    means: np.ndarray = grey.reshape(parts, BLOCK, parts, BLOCK).mean(axis=(1, 3))
    return means
