"""What a view does to pixels after the crop: RandAugment's operations and colour jitter, on RGB images with Pillow.

An operation takes an image and a level: a signed integer on its set's scale, drawn with the view. Sets:

``torchvision``: torchvision.transforms.RandAugment, 14 operations, level = signed bin of 31 (-30 to 30), nearest
neighbour, black outside; its own pixels to the bit.

``timm``, ``timm-inc``, ``timm-3a``: timm.data.auto_augment's ``rand-mM-nN``, the same with ``-inc1`` (every operation
gets stronger with the magnitude) and with ``-t3a`` (3-Augment, DeiT III). Level = signed hundredths of timm's
magnitude (-1000 to 1000 for 0 to 10). Its own pixels for the same parameters, with the interpolation bicubic (there
bilinear or bicubic at random unless set), grey (128) outside, and: a blur's radius is relative to the image's side,
timm's at 224 pixels; Posterize to 0 bits is black, which newer Pillows refuse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from shards_spec.pixels import from_rgbx, rgbx

OpSet = Literal["torchvision", "timm", "timm-inc", "timm-3a"]
Operation = Callable[[Image.Image, int], Image.Image]

BINS = 31  # torchvision.transforms.RandAugment(num_magnitude_bins=31)
_LAST = BINS - 1
_TRANSLATE = 150 / 331  # of the width, torchvision's RandAugment
_BLACK = (0, 0, 0)
_GREY = (128, 128, 128)
_TIMM_SIDE = 224  # pixels at which timm's blur has timm's radius
_STRIP = 16  # rows at a time: their memory is used again, a whole image's is asked from the system


@dataclass(frozen=True)
class OperationSet:
    """``operations`` by name in drawing order; ``unit`` is the level of magnitude 1, ``most`` the highest magnitude."""

    operations: tuple[tuple[str, Operation], ...]
    unit: int
    most: int

    def apply(self, image: Image.Image, operation: int, level: int) -> Image.Image:
        """Operation number ``operation`` at a signed ``level``."""
        return self.operations[operation][1](image, level)


def _enhance(image: Image.Image, kind: Any, factor: float) -> Image.Image:
    enhanced: Image.Image = kind(image).enhance(factor)
    return enhanced


class _Sharpness(ImageEnhance.Sharpness):
    """Pillow's, whose filter sums up floats, four times as long: between the image and a smooth one."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.degenerate = _smooth(image)


def _smooth(image: Image.Image) -> Image.Image:
    """`ImageFilter.SMOOTH` to the bit: thirteenths of the nine pixels around, five of the middle one; borders stay."""
    samples = rgbx(image).copy()
    height, width, bands = samples.shape
    rows = samples.reshape(height, width * bands)  # in which a pixel's neighbour is ``bands`` further
    before = rows.copy()
    for top in range(1, height - 1, _STRIP):
        wide = before[top - 1 : top + _STRIP + 1].astype(np.uint16)  # sums are 13 * 255 at the most
        columns = wide[:-2] + wide[1:-1]
        columns += wide[2:]
        sums = columns[:, : -2 * bands] + columns[:, bands:-bands]
        sums += columns[:, 2 * bands :]
        sums += 4 * wide[1:-1, bands:-bands]
        sums += 6  # rounds: a whole number of thirteenths is never a half
        rows[top : top + len(sums), bands:-bands] = sums // 13
    return from_rgbx(samples)


def _magnitude(most: float, level: int) -> float:
    """Bin ``level`` of ``torch.linspace(0, most, 31)``, signed: float32, counted from the nearer end, rounded once."""
    end = np.float32(most)
    index = abs(level)
    step = float(end / np.float32(_LAST))
    size = np.float32(step * index if index < BINS // 2 else float(end) - step * (_LAST - index))
    return math.copysign(float(size), level)


def _shear(image: Image.Image, level: int, matrix: Any) -> Image.Image:
    slope = math.tan(math.radians(math.degrees(math.atan(_magnitude(0.3, level)))))  # +-0.3; an angle on its way
    return image.transform(image.size, Image.Transform.AFFINE, matrix(slope), fillcolor=_BLACK)


def _shift(image: Image.Image, level: int, side: int, matrix: Any) -> Image.Image:
    pixels = int(_magnitude(_TRANSLATE * image.size[side], level))  # +-150/331 of the side, cut to whole pixels
    return image.transform(image.size, Image.Transform.AFFINE, matrix(-pixels), fillcolor=_BLACK)


def _stronger(kind: Any) -> Operation:
    return lambda image, level: _enhance(image, kind, 1.0 + _magnitude(0.9, level))


def _solarize(image: Image.Image, level: int) -> Image.Image:
    threshold = 255.0 - 8.5 * abs(level)  # exact in float32: above 255 to 0
    return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)


_TORCHVISION: tuple[tuple[str, Operation], ...] = (  # ranges of RandAugment._augmentation_space
    ("Identity", lambda image, level: image),
    ("ShearX", partial(_shear, matrix=lambda slope: (1, slope, 0, 0, 1, 0))),
    ("ShearY", partial(_shear, matrix=lambda slope: (1, 0, 0, slope, 1, 0))),
    ("TranslateX", partial(_shift, side=0, matrix=lambda pixels: (1, 0, pixels, 0, 1, 0))),
    ("TranslateY", partial(_shift, side=1, matrix=lambda pixels: (1, 0, 0, 0, 1, pixels))),
    ("Rotate", lambda image, level: image.rotate(_magnitude(30.0, level), fillcolor=_BLACK)),  # +-30 degrees
    ("Brightness", _stronger(ImageEnhance.Brightness)),  # factor 1 +- 0.9
    ("Color", _stronger(ImageEnhance.Color)),
    ("Contrast", _stronger(ImageEnhance.Contrast)),
    ("Sharpness", _stronger(_Sharpness)),
    ("Posterize", lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level) / _LAST))),  # 8 to 4 bits
    ("Solarize", _solarize),
    ("AutoContrast", lambda image, level: ImageOps.autocontrast(image)),
    ("Equalize", lambda image, level: ImageOps.equalize(image)),
)


def _share(level: int) -> float:
    """The magnitude as a share of 10, without its sign: level / _LEVEL_DENOM in timm."""
    return abs(level) / 100 / 10


def _signed(level: int) -> float:
    """The magnitude as a signed share of 10."""
    return level / 100 / 10


def _timm_affine(image: Image.Image, level: int, matrix: Any) -> Image.Image:
    coefficients = matrix(_signed(level), image.width, image.height)
    bicubic = Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, bicubic, fillcolor=_GREY)


def _timm_rotate(image: Image.Image, level: int) -> Image.Image:
    return image.rotate(_signed(level) * 30.0, Image.Resampling.BICUBIC, fillcolor=_GREY)  # +-30 degrees


def _keep_bits(image: Image.Image, bits: int) -> Image.Image:
    return image.point([value & (0xFF00 >> bits & 0xFF) for value in range(256)] * 3)


def _solarize_add(image: Image.Image, level: int) -> Image.Image:
    add = min(128, int(_share(level) * 110))  # values below 128 get up to 110 more
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _timm_enhance(kind: Any) -> Operation:
    return lambda image, level: _enhance(image, kind, _share(level) * 1.8 + 0.1)  # factor 0.1 to 1.9


def _timm_increasing(kind: Any) -> Operation:
    return lambda image, level: _enhance(image, kind, max(0.1, 1.0 + _signed(level) * 0.9))  # factor 1 +- 0.9


def _desaturate(image: Image.Image, level: int) -> Image.Image:
    return _enhance(image, ImageEnhance.Color, min(1.0, max(0.0, 1.0 - (0.5 + 0.5 * _share(level)))))  # 0.5 to 0


def _blur(image: Image.Image, level: int) -> Image.Image:
    radius = 0.1 + (2.0 - 0.1) * _share(level)  # 0.1 to 2 pixels of 224
    return image.filter(ImageFilter.GaussianBlur(radius * image.width / _TIMM_SIDE))


_GEOMETRY: tuple[tuple[str, Operation], ...] = (
    ("ShearX", partial(_timm_affine, matrix=lambda s, w, h: (1, s * 0.3, 0, 0, 1, 0))),  # +-0.3
    ("ShearY", partial(_timm_affine, matrix=lambda s, w, h: (1, 0, 0, s * 0.3, 1, 0))),
    ("TranslateXRel", partial(_timm_affine, matrix=lambda s, w, h: (1, 0, s * 0.45 * w, 0, 1, 0))),  # +-0.45
    ("TranslateYRel", partial(_timm_affine, matrix=lambda s, w, h: (1, 0, 0, 0, 1, s * 0.45 * h))),
)
_TIMM_FIRST: tuple[tuple[str, Operation], ...] = (
    ("AutoContrast", lambda image, level: ImageOps.autocontrast(image)),
    ("Equalize", lambda image, level: ImageOps.equalize(image)),
    ("Invert", lambda image, level: ImageOps.invert(image)),
    ("Rotate", _timm_rotate),
)
_SOLARIZE_INCREASING: tuple[str, Operation] = (
    "SolarizeIncreasing",
    lambda image, level: ImageOps.solarize(image, 256 - min(256, int(_share(level) * 256))),  # above 256 down to 0
)
_TIMM: tuple[tuple[str, Operation], ...] = (  # auto_augment._RAND_TRANSFORMS
    *_TIMM_FIRST,
    ("Posterize", lambda image, level: _keep_bits(image, int(_share(level) * 4))),  # 0 to 4 bits stay
    ("Solarize", lambda image, level: ImageOps.solarize(image, min(256, int(_share(level) * 256)))),
    ("SolarizeAdd", _solarize_add),
    ("Color", _timm_enhance(ImageEnhance.Color)),
    ("Contrast", _timm_enhance(ImageEnhance.Contrast)),
    ("Brightness", _timm_enhance(ImageEnhance.Brightness)),
    ("Sharpness", _timm_enhance(_Sharpness)),
    *_GEOMETRY,
)
_TIMM_INCREASING: tuple[tuple[str, Operation], ...] = (  # auto_augment._RAND_INCREASING_TRANSFORMS
    *_TIMM_FIRST,
    ("PosterizeIncreasing", lambda image, level: _keep_bits(image, 4 - int(_share(level) * 4))),  # 4 to 0 bits stay
    _SOLARIZE_INCREASING,
    ("SolarizeAdd", _solarize_add),
    ("ColorIncreasing", _timm_increasing(ImageEnhance.Color)),
    ("ContrastIncreasing", _timm_increasing(ImageEnhance.Contrast)),
    ("BrightnessIncreasing", _timm_increasing(ImageEnhance.Brightness)),
    ("SharpnessIncreasing", _timm_increasing(_Sharpness)),
    *_GEOMETRY,
)
_TIMM_3A: tuple[tuple[str, Operation], ...] = (  # auto_augment._RAND_3A
    _SOLARIZE_INCREASING,
    ("Desaturate", _desaturate),
    ("GaussianBlur", _blur),
)

OP_SETS: dict[OpSet, OperationSet] = {
    "torchvision": OperationSet(_TORCHVISION, 1, _LAST),
    "timm": OperationSet(_TIMM, 100, 10),
    "timm-inc": OperationSet(_TIMM_INCREASING, 100, 10),
    "timm-3a": OperationSet(_TIMM_3A, 100, 10),
}

HUE = 3
ORDERS = tuple(permutations(range(4)))  # of brightness, contrast, saturation, hue
Strengths = tuple[float, float, float, float]


def jitter_factors(strengths: Strengths, drawn: tuple[int, ...]) -> list[float]:
    """Brightness, contrast, saturation in [max(0, 1 - s), 1 + s] and hue in [-s, s] of the circle.

    These are the ranges of torchvision.transforms.ColorJitter; ``drawn`` are shares of them in units of 1/65535.
    """
    lows = [*(max(0.0, 1 - strength) for strength in strengths[:3]), -strengths[3]]
    highs = [*(1 + strength for strength in strengths[:3]), strengths[3]]
    return [low + (high - low) * share / 65535 for low, high, share in zip(lows, highs, drawn, strict=True)]


def jitter(image: Image.Image, strengths: Strengths, order: int, drawn: tuple[int, ...]) -> Image.Image:
    """Colour jitter as torchvision's ColorJitter, in order number ``order`` of `ORDERS`; a strength of 0 does nothing.

    ``drawn`` are the four strengths as shares of their ranges, in units of 1/65535.
    """
    factors = jitter_factors(strengths, drawn)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in ORDERS[order]:
        if not strengths[index]:
            continue
        if index == HUE:
            image = _shift_hue(image, factors[HUE])
        else:
            image = _enhance(image, kinds[index], factors[index])
    return image


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """``shift`` is a share of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.array(int(shift * 255) % 256, np.uint8)  # wraps around, as uint8
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
