"""Replayable views: augmentation drawn from (seed, key, view index) and rendered at any size.

A view is a handful of integers from a counter-based generator (Philox keyed by a hash of the three). Everything in
it is relative to the picture, so that a teacher at 336 pixels and a student at 256 see the same crop with the same
operations. Rendering is Pillow's, hence bit-identical between machines that have the same Pillow.
"""

import io
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import PIL
from PIL import Image, ImageEnhance, ImageOps

from shards_spec.draws import uniform_draws
from shards_spec.files import DataError, UserError, sha256_json

RENDERING = 1  # raised whenever `apply_view` gives other pixels for the same view
BINS = 31  # torchvision.transforms.RandAugment(num_magnitude_bins=31)
_TRANSLATE = 150 / 331  # of the width, torchvision's RandAugment
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class ViewSpec:
    """How views are drawn. ``ops`` RandAugment operations of ``magnitude`` (0-30) follow crop and flip.

    Crop: RandomResizedCrop with area share in ``scale`` and aspect in ``ratio``; ``scale=None`` means no
    augmentation at all, the shorter side resized and the centre cropped.
    """

    seed: int = 0
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    ops: int = 0
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"views: scale {self.scale} must be 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"views: ratio {self.ratio} must be 0 < low <= high")
        if not 0 <= self.flip <= 1 or not 0 <= self.magnitude < BINS or self.ops < 0:
            raise UserError(f"views: flip {self.flip} in [0, 1], magnitude {self.magnitude} in [0, 30], ops >= 0")

    def as_json(self) -> dict[str, Any]:
        """The spec with what renders it: goes into every cache."""
        return {**asdict(self), "rendering": RENDERING, "pillow": PIL.__version__}

    @property
    def sha256(self) -> str:
        """Hash of the spec and of the rendering version: equal hashes give equal pixels."""
        return sha256_json(self.as_json())


@dataclass(frozen=True)
class View:
    """One drawn view. Crop numbers are shares in 1/65535; an operation is (index in OPS, signed bin)."""

    area: int
    aspect: int
    left: int
    top: int
    flip: bool
    ops: tuple[tuple[int, int], ...] = ()


def draw_view(spec: ViewSpec, key: str, view: int) -> View:
    """Draw view number ``view`` of sample ``key``: a pure function of its arguments."""
    numbers = uniform_draws(f"{spec.seed}/{key}/{view}", 5 + 2 * spec.ops).tolist()
    area, aspect, left, top = (round(u * 65535) for u in numbers[:4])
    ops = []
    for pick, sign in zip(numbers[5::2], numbers[6::2], strict=True):
        ops.append((int(pick * len(OPS)), spec.magnitude if sign < 0.5 else -spec.magnitude))
    return View(area, aspect, left, top, numbers[4] < spec.flip, tuple(ops))


def crop_box(spec: ViewSpec, view: View, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of a ``width`` x ``height`` picture.

    Area share uniform in ``scale``, aspect log-uniform in ``ratio`` (Inception crop, as torchvision's
    RandomResizedCrop); a box that does not fit is shrunk to fit along that side, which needs no second draw.
    """
    if spec.scale is None:
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    area = spec.scale[0] + (spec.scale[1] - spec.scale[0]) * view.area / 65535
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    aspect = math.exp(low + (high - low) * view.aspect / 65535)
    crop_width = min(math.sqrt(area * width * height * aspect), width)
    crop_height = min(math.sqrt(area * width * height / aspect), height)
    left = (width - crop_width) * view.left / 65535
    top = (height - crop_height) * view.top / 65535
    return left, top, left + crop_width, top + crop_height


def apply_view(image: Image.Image, spec: ViewSpec, view: View, size: int) -> Image.Image:
    """Render a view of an RGB picture at ``size`` x ``size`` pixels, bicubic, antialiased."""
    box = crop_box(spec, view, *image.size)
    rendered = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if spec.scale is None:
        return rendered
    if view.flip:
        rendered = ImageOps.mirror(rendered)
    for operation, level in view.ops:
        rendered = OPS[operation][1](rendered, level)
    return rendered


# RandAugment's 14 operations with torchvision's ranges for 31 bins; level is the signed bin.


def _affine(image: Image.Image, level: int, matrix: Any) -> Image.Image:
    coefficients = matrix(level / (BINS - 1), image.width, image.height)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=_BLACK)


def _enhance(image: Image.Image, level: int, kind: Any) -> Image.Image:
    enhanced: Image.Image = kind(image).enhance(1 + 0.9 * level / (BINS - 1))
    return enhanced


OPS: tuple[tuple[str, Any], ...] = (
    ("Identity", lambda image, level: image),
    ("ShearX", partial(_affine, matrix=lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0))),
    ("ShearY", partial(_affine, matrix=lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0))),
    ("TranslateX", partial(_affine, matrix=lambda s, w, h: (1, 0, _TRANSLATE * s * w, 0, 1, 0))),
    ("TranslateY", partial(_affine, matrix=lambda s, w, h: (1, 0, 0, 0, 1, _TRANSLATE * s * h))),
    ("Rotate", lambda image, level: image.rotate(30 * level / (BINS - 1), fillcolor=_BLACK)),
    ("Brightness", partial(_enhance, kind=ImageEnhance.Brightness)),
    ("Color", partial(_enhance, kind=ImageEnhance.Color)),
    ("Contrast", partial(_enhance, kind=ImageEnhance.Contrast)),
    ("Sharpness", partial(_enhance, kind=ImageEnhance.Sharpness)),
    ("Posterize", lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level) / (BINS - 1)))),
    ("Solarize", lambda image, level: ImageOps.solarize(image, 255 - round(255 * abs(level) / (BINS - 1)))),
    ("AutoContrast", lambda image, level: ImageOps.autocontrast(image)),
    ("Equalize", lambda image, level: ImageOps.equalize(image)),
)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a packed picture to RGB: the one decoding that captioner, teacher and student share.

    Raises DataError with the decoder's reason when the bytes are no whole picture.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"does not decode: {error}") from error
