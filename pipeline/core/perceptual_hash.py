"""A 64-bit signature of an image's coarse structure, by which near-duplicates are found."""

import functools
import math

import numpy as np
from PIL import Image

SIDE = 32  # pixels, of the square grey thumbnail
LOW_FREQUENCIES = 8  # per axis; 8 x 8 coefficients make the 64 bits
FRACTION_BITS = 18  # of the cosines' whole numbers
MIN_STRUCTURE = (
    2.0  # grey levels (orthonormal DCT); where half of the coefficients are weaker, noise would set the bits
)


@functools.cache
def dct_matrix() -> np.ndarray:
    """The first rows of the orthonormal DCT-II matrix: float64 [LOW_FREQUENCIES, SIDE]."""
    angles = math.pi / SIDE * np.outer(np.arange(LOW_FREQUENCIES), np.arange(SIDE) + 0.5)
    scale = np.sqrt(np.where(np.arange(LOW_FREQUENCIES) == 0, 1, 2) / SIDE)
    dct: np.ndarray = scale[:, None] * np.cos(angles)
    return dct


@functools.cache
def _whole_dct_matrix() -> np.ndarray:
    """`dct_matrix` in units of 2**-FRACTION_BITS: whole numbers as float64 [LOW_FREQUENCIES, SIDE].

    Coefficients that symmetry makes equal are then equal. Of other float products the last bits would decide, which
    differ between processors; sums of whole numbers below 2**53 have the same bits in any order.
    """
    whole: np.ndarray = np.rint(dct_matrix() * 2**FRACTION_BITS)
    return whole


def perceptual_hash(image: Image.Image) -> str | None:
    """The DCT signature of an RGB image: 64 bits as 16 hexadecimal digits; None for a plain one.

    Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", the DCT based hash: 32 x 32 grey
    pixels, two-dimensional DCT-II, the 8 x 8 lowest frequencies; a bit says whether a coefficient is above the median.
    The constant term is left out of the median, and its bit is 0. Encoding, scaling and small changes of tone move few
    bits, an even number as 31 are set; colour plays no part. An image without structure in half of these frequencies
    (one colour, a gradient, stripes) has no signature: noise would decide it.
    """
    small = image.reduce(max(1, min(image.size) // (2 * SIDE)))  # never below twice the side: cheap, and flips nothing
    grey = small.convert("L").resize((SIDE, SIDE), Image.Resampling.HAMMING)  # half the flipped bits of BOX
    dct = _whole_dct_matrix()
    waves = (dct @ np.asarray(grey, float) @ dct.T) / 4**FRACTION_BITS  # exact: below 2**51, by a power of two
    bits = int(signatures(waves[None])[0])
    return f"{bits:016x}" if bits else None


def signatures(waves: np.ndarray) -> np.ndarray:
    """The bits of images by their lowest frequencies [n, LOW_FREQUENCIES, LOW_FREQUENCIES]: uint64 [n], 0 if plain."""
    flat = waves.reshape(len(waves), -1)
    middle = flat.shape[1] // 2 - 1  # of the 63 without the constant term
    strengths = np.sort(np.abs(flat[:, 1:]), axis=1)[:, middle]
    bits = flat > np.sort(flat[:, 1:], axis=1)[:, middle, None]
    bits[:, 0] = False
    numbers = np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()
    return np.where(strengths < MIN_STRUCTURE, np.uint64(0), numbers)
