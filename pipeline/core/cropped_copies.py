"""An image as its copies may show it: cropped a little, mirrored, small. What finds them, and what confirms them.

Of each image a small copy is kept. From it come the perceptual hashes of a few crops and of their mirror images, by
which copies are looked up, and the finer crops with which a copy that was found is compared.
"""

import functools

import numpy as np
from PIL import Image

from pipeline.core.image_match import COPY, SIDE, fingerprints_match
from pipeline.core.perceptual_hash import LOW_FREQUENCIES, dct_matrix, signatures

COPY_SIDE = 48  # pixels of the small copy
NEAR_BITS = 10  # of 64, in which a copy's hash may differ from that of the crop nearest to it
# what a crop keeps of one axis; the edges of every crop of 10 % or less are within 3.5 % of those of one of each list
HASHED_CROPS = ((0.0, 1.0), (0.03, 1.0), (0.0, 0.97), (0.065, 1.0), (0.0, 0.935))
COMPARED_CROPS = ((0.0, 1.0), (0.025, 1.0), (0.0, 0.975), (0.06, 1.0), (0.0, 0.94), (0.03, 0.97))
MIN_CORRELATION = 0.5  # of grey, with the crop that fits best
MAX_ALIGNED = 3  # crops from which the alignment starts, those that fit best
FLIP = np.where(np.arange(LOW_FREQUENCIES) % 2, -1.0, 1.0)  # of horizontal frequencies, in a mirror image


def small_copy(image: Image.Image) -> np.ndarray:
    """An RGB image made small: uint8 [COPY_SIDE, COPY_SIDE, 3], luma and two colours (YCbCr)."""
    reduced = image.reduce(max(1, min(image.size) // (2 * COPY_SIDE)))
    return np.asarray(reduced.convert("YCbCr").resize((COPY_SIDE, COPY_SIDE), Image.Resampling.HAMMING))


def crop_hashes(copy: np.ndarray) -> np.ndarray:
    """The perceptual hashes of the `HASHED_CROPS` of a small copy and of their mirror images, each once: uint64 [n].

    None for an image without structure.
    """
    waves = _on_both_axes(_wave_matrices(), copy[..., 0]).reshape(-1, LOW_FREQUENCIES, LOW_FREQUENCIES)
    hashes = np.unique(signatures(np.concatenate([waves, waves * FLIP])))
    present: np.ndarray = hashes[hashes != 0]
    return present


def is_copy(image: np.ndarray, other: np.ndarray) -> bool:
    """Whether a `fingerprint` is of a copy of the image of which a `small_copy` is given."""
    return any(fingerprints_match(crop, other, COPY) for crop in _likeliest_crops(image, other))


def _likeliest_crops(image: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """The crops of a small copy that are most like a fingerprint, best first, at its size."""
    crops = _on_both_axes(_crop_matrices(), image[..., 0]).reshape(-1, SIDE, SIDE)
    both = np.concatenate([crops, crops[..., ::-1]]).reshape(-1, SIDE * SIDE)
    both = both - both.mean(axis=1, keepdims=True)
    luma = other[..., 0].astype(np.float32).ravel()
    luma = luma - luma.mean()
    norms = np.linalg.norm(both, axis=1) * np.linalg.norm(luma)
    correlations = both @ luma / np.maximum(norms, 1e-6)
    best = np.argsort(-correlations, kind="stable")[:MAX_ALIGNED]
    return [_crop(image, int(number)) for number in best if correlations[number] >= MIN_CORRELATION]


def _crop(image: np.ndarray, number: int) -> np.ndarray:
    """One of the `COMPARED_CROPS` by its number, of all three channels: float32 [SIDE, SIDE, 3]."""
    mirrored, place = divmod(number, len(COMPARED_CROPS) ** 2)
    down, right = divmod(place, len(COMPARED_CROPS))
    matrices = _crop_matrices()
    channels = [matrices[down] @ image[..., channel] @ matrices[right].T for channel in range(3)]
    crop = np.stack(channels, axis=-1)
    return crop[:, ::-1] if mirrored else crop


def _on_both_axes(matrices: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Each of the matrices [n, k, COPY_SIDE] on each axis of an image: float32 [n, n, k, k], the vertical one first."""
    count, side, _ = matrices.shape
    whole = matrices.reshape(count * side, -1)
    product = whole @ grey.astype(np.float32) @ whole.T
    by_crop: np.ndarray = product.reshape(count, side, count, side).transpose(0, 2, 1, 3)
    return by_crop


@functools.cache
def _crop_matrices() -> np.ndarray:
    """What makes the `COMPARED_CROPS` of one axis: float32 [crops, SIDE, COPY_SIDE]."""
    return np.stack([_resampling(low, high) for low, high in COMPARED_CROPS])


@functools.cache
def _wave_matrices() -> np.ndarray:
    """What makes the lowest frequencies of the `HASHED_CROPS`: float32 [crops, LOW_FREQUENCIES, COPY_SIDE]."""
    dct = dct_matrix().astype(np.float32)
    return np.stack([dct @ _resampling(low, high) for low, high in HASHED_CROPS])


def _resampling(low: float, high: float) -> np.ndarray:
    """Pillow's resampling of a part of COPY_SIDE pixels to SIDE, as a matrix: float32 [SIDE, COPY_SIDE]."""
    identity = Image.fromarray(np.eye(COPY_SIDE, dtype=np.float32))
    box = (0, low * COPY_SIDE, COPY_SIDE, high * COPY_SIDE)
    return np.asarray(identity.resize((COPY_SIDE, SIDE), Image.Resampling.HAMMING, box=box))
