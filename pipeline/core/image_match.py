"""Whether two images are one, for images whose 64-bit signatures say that they may be.

A signature has the coarsest shades of grey alone: objects on a plain ground, icons and pages share it, whatever their
colours and details. Here small copies in colour are laid over each other (a light crop is a shift and a stretch),
brightness, contrast and saturation are fitted, and the difference that is left must be small: in the details, in the
colours as a whole, and in every single block. The limits were set on photographs, icons, product shots and pages,
changed by encoding, scaling, crops of up to 5 % a side and tone (`tests/pipeline/core/test_image_match.py`).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

SIDE = 32  # pixels of the small copy
BLOCK = 4  # pixels of the blocks that are compared one by one
ROUNDS = 3  # of the alignment
MAX_MOVE = 0.12  # by which the alignment may move an edge, as a share of the side
DETAIL = slice(6, 20)  # frequencies that the signature does not have; the finest are the encoder's
SATURATION = (0.6, 1.7)  # of colours, that may be fitted (less is another image, a grey one say)
EXPLAINED = 1.5  # of what is left in a block, as a share of the contrast around it


@dataclass(frozen=True, kw_only=True)
class MatchLimits:
    """How far two images may differ that are one.

    Pairs are grey levels, and a share of the image's standard deviation; the larger of both counts.
    """

    gain: tuple[float, float]
    """of contrast, that may be fitted"""
    detail: tuple[float, float]
    """what may be left of the details: grey levels in any case, a share of the details themselves"""
    grey_block: tuple[float, float]
    """what may be left of grey in one block, as a mean"""
    colour: tuple[float, float]
    """what may be left of colours on average"""
    colour_block: tuple[float, float]
    """what may be left of colours in one block, as a mean"""
    alone: tuple[float, float] | None = None
    """what may be left in one block, as a root mean square, beyond what the contrast around it explains"""
    plain: float | None = None
    """grey levels (root mean square) in which images without details, such as two skies, may differ as they are"""


# of a listed image and one with a near signature
DUPLICATE = MatchLimits(
    gain=(0.5, 2.0),
    detail=(1.2, 0.28),
    grey_block=(16.0, 0.3),
    colour=(8.0, 0.2),
    colour_block=(10.0, 0.3),
)
# of an image and a copy that was cropped, scaled and encoded badly: more is left, but nowhere a thing of its own
COPY = MatchLimits(
    gain=(0.8, 1.3),
    detail=(1.5, 0.42),
    grey_block=(11.0, 0.2),
    colour=(10.0, 0.3),
    colour_block=(18.0, 0.4),
    alone=(3.0, 0.1),
    plain=4.0,
)


def fingerprint(image: Image.Image) -> np.ndarray:
    """A small copy of an RGB image: uint8 [SIDE, SIDE, 3], luma and two colours (YCbCr)."""
    small = image.reduce(max(1, min(image.size) // (2 * SIDE)))
    return np.asarray(small.convert("YCbCr").resize((SIDE, SIDE), Image.Resampling.HAMMING))


def fingerprints_match(one: np.ndarray, other: np.ndarray, limits: MatchLimits = DUPLICATE) -> bool:
    """Whether two fingerprints are of one image."""
    first = one.astype(np.float32)
    second = other.astype(np.float32)
    aligned, gain, grey_left = _align(first, second)
    if not limits.gain[0] <= gain <= limits.gain[1]:
        return False
    levels, share = limits.detail
    details = _detail(second[..., 0])
    if _detail(grey_left) > max(share * details, levels):
        return False
    if limits.plain is not None and details < levels and math.sqrt(((aligned - second) ** 2).mean()) > limits.plain:
        return False
    if np.abs(_block_means(grey_left)).max() > _limit(limits.grey_block, second[..., :1]):
        return False
    if limits.alone is not None:
        alone = _left_alone(grey_left, gain * aligned[..., 0], second[..., 0])
        if alone > _limit(limits.alone, second[..., :1]):
            return False
    return _colours_match(aligned[..., 1:] - 128, second[..., 1:] - 128, limits)


def _colours_match(one: np.ndarray, other: np.ndarray, limits: MatchLimits) -> bool:
    """Whether colours, [SIDE, SIDE, 2] around 0, are the same but for saturation."""
    energy = float((one**2).sum())
    fitted = float((other * one).sum()) / energy if energy > 1 else 1.0
    saturation = min(max(fitted, SATURATION[0]), SATURATION[1])
    left = other - saturation * one
    average = math.sqrt((left**2).sum(axis=2).mean())
    blocks = np.hypot(_block_means(left[..., 0]), _block_means(left[..., 1]))
    return average <= _limit(limits.colour, other) and bool(blocks.max() <= _limit(limits.colour_block, other))


def _limit(limit: tuple[float, float], channels: np.ndarray) -> float:
    """Levels that may be left, of channels [SIDE, SIDE, C]: the first, or the second times their standard deviation."""
    levels, share = limit
    return max(levels, share * math.sqrt(channels.var(axis=(0, 1)).sum()))


def _left_alone(left: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    """The most that is left in one block, beyond what the contrast explains that both images have around it.

    Encoding and scaling leave much beside edges. What is left where one image has none is a thing of the other's.
    """
    contrasts = np.minimum(_block_contrasts(one), _block_contrasts(other))
    around = sliding_window_view(np.pad(contrasts, 1, mode="edge"), (3, 3)).max(axis=(2, 3))
    return float((np.sqrt(_block_means(left**2)) - EXPLAINED * around).max())


def _block_contrasts(grey: np.ndarray) -> np.ndarray:
    """Standard deviation within each block and half a block around it."""
    half = BLOCK // 2
    windows = sliding_window_view(np.pad(grey, half, mode="edge"), (2 * BLOCK, 2 * BLOCK))
    contrasts: np.ndarray = windows[::BLOCK, ::BLOCK].std(axis=(2, 3))
    return contrasts


def _align(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """``one`` stretched and shifted so that a gain and an offset make its luma ``other``'s.

    Returns it, the gain, and the difference that is left, [SIDE, SIDE]. Least squares on the image and its slopes
    (Lucas and Kanade 1981), repeated.
    """
    luma = other[..., 0].ravel()
    across = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    warp = np.zeros(4)
    for round_ in range(ROUNDS + 1):
        aligned = _warp(one, warp)
        columns = [aligned[..., 0], np.ones((SIDE, SIDE))]
        is_last = round_ == ROUNDS  # it fits gain and offset alone
        if not is_last:
            down, right = (slope * SIDE for slope in np.gradient(aligned[..., 0]))
            columns += [right * across, right, down * across[:, None], down]
        matrix = np.stack([column.ravel() for column in columns], axis=1)
        fit = np.linalg.lstsq(matrix, luma, rcond=None)[0]
        if not is_last:
            gain = fit[0] if abs(fit[0]) > 0.2 else 1  # a flat image has none to divide by
            warp = np.clip(warp + fit[2:] / gain, -MAX_MOVE, MAX_MOVE)
    return aligned, float(fit[0]), (luma - matrix @ fit).reshape(SIDE, SIDE)


def _warp(image: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """The image stretched and shifted by shares of its side; edges are repeated.

    ``warp``: stretch and shift to the right, then down.
    """
    for axis, (stretch, shift) in enumerate(((warp[2], warp[3]), (warp[0], warp[1]))):
        middles = np.arange(SIDE) + 0.5
        at = np.clip(middles + stretch * (middles - SIDE / 2) + shift * SIDE - 0.5, 0, SIDE - 1)
        low = np.minimum(at.astype(int), SIDE - 2)
        weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        image = np.take(image, low, axis) * (1 - weight) + np.take(image, low + 1, axis) * weight
    return image


@functools.cache
def _dct_matrix() -> np.ndarray:
    """The orthonormal DCT-II matrix: float64 [SIDE, SIDE]."""
    waves = np.arange(SIDE)
    scale = np.sqrt(np.where(waves == 0, 1, 2) / SIDE)
    dct: np.ndarray = scale[:, None] * np.cos(math.pi / SIDE * np.outer(waves, waves + 0.5))
    return dct


def _detail(grey: np.ndarray) -> float:
    """Grey levels (root mean square of coefficients) in the frequencies of `DETAIL`, of the higher of both axes."""
    waves = _dct_matrix() @ grey @ _dct_matrix().T
    fine = waves[: DETAIL.stop, : DETAIL.stop].copy()
    fine[: DETAIL.start, : DETAIL.start] = 0
    return math.sqrt(float((fine**2).sum()) / (DETAIL.stop**2 - DETAIL.start**2))


def _block_means(grey: np.ndarray) -> np.ndarray:
    """Means of BLOCK x BLOCK pixels."""
    blocks = SIDE // BLOCK
    means: np.ndarray = grey.reshape(blocks, BLOCK, blocks, BLOCK).mean(axis=(1, 3))
    return means
