"""Replayable views: augmentation drawn from (seed, key, view index) and rendered at any size.

A view is a handful of integers from a counter-based generator (Philox keyed by a hash of the three). Everything in
it is relative to the image, so that a teacher at 336 pixels and a student at 256 see the same crop with the same
operations. Rendering is Pillow's, hence bit-identical between machines that have the same Pillow.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from statistics import NormalDist
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

from shards_spec.augment import OP_SETS, ORDERS, OpSet, jitter
from shards_spec.counter_rng import uniform_draws
from shards_spec.files import DataError, UserError, sha256_json

RENDERING = 2  # raised whenever `apply_view` gives other pixels for the same view
_LATER = ("op_set", "op_prob", "magnitude_std", "jitter", "jitter_prob")  # not in the JSON while at their defaults
TRIES = 10  # boxes that torchvision's RandomResizedCrop draws until one fits
_HEAD = struct.Struct(f"<{2 * TRIES + 2}HBB")  # area, aspect, ... left, top, flip + 2 * jittered, number of operations
_OPERATION = struct.Struct("<Bh")  # index in the set, level
_JITTER = struct.Struct("<B4H")  # order, brightness, contrast, saturation, hue


@dataclass(frozen=True)
class ViewSpec:
    """How views are drawn: crop, flip, RandAugment, colour jitter, in this order.

    Crop: torchvision's RandomResizedCrop with area share in ``scale`` and aspect in ``ratio``; ``scale=None`` means
    no augmentation at all, the shorter side resized and the centre cropped.
    """

    seed: int = 0
    """seed of the views"""
    scale: tuple[float, float] | None = (0.08, 1.0)
    """share of the image that a crop covers, low and high; None is the plain centre crop without anything else"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """aspect of a crop, low and high"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    ops: int = 0
    """RandAugment operations per view (SiCLIP and MobileCLIP use 2)"""
    magnitude: int = 9
    """RandAugment magnitude: 0 to 30 in torchvision's set, 0 to 10 in timm's"""
    op_set: OpSet = "torchvision"
    """RandAugment's operations: torchvision's 14, timm's 15, timm's increasing 15, or timm's 3-Augment"""
    op_prob: float = 1.0
    """probability that an operation is applied (timm's own default is 0.5)"""
    magnitude_std: float = 0.0
    """timm's sets: standard deviation of the magnitude, drawn per operation (timm's mstd)"""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strength of brightness, contrast, saturation and hue jitter, as torchvision's ColorJitter takes them"""
    jitter_prob: float = 1.0
    """probability of the colour jitter"""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"views: scale {self.scale} must be 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"views: ratio {self.ratio} must be 0 < low <= high")
        if self.op_set not in OP_SETS:
            raise UserError(f"views: op_set {self.op_set!r} must be one of {', '.join(OP_SETS)}")
        most = OP_SETS[self.op_set].most
        if not 0 <= self.flip <= 1 or not 0 <= self.magnitude <= most or self.ops < 0:
            raise UserError(f"views: flip {self.flip} in [0, 1], magnitude {self.magnitude} in [0, {most}], ops >= 0")
        for name in ("op_prob", "jitter_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"views: {name} {getattr(self, name)} must be in [0, 1]")
        if self.magnitude_std < 0 or (self.magnitude_std and self.op_set == "torchvision"):
            raise UserError(f"views: magnitude_std {self.magnitude_std} must be 0, or more in a timm op_set")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(f"views: jitter {self.jitter} must be 0 or more each, hue at most 0.5")

    def as_json(self) -> dict[str, Any]:
        """The spec with what renders it: goes into every cache. Later options are there when they say something."""
        said = {name: value for name, value in asdict(self).items() if name not in _LATER or value != _DEFAULTS[name]}
        return {**said, "rendering": RENDERING, "pillow": PIL.__version__}

    @property
    def sha256(self) -> str:
        """Hash of the spec and of the rendering version: equal hashes give equal pixels."""
        return sha256_json(self.as_json())


_DEFAULTS = {field.name: field.default for field in fields(ViewSpec)}


def stored_spec(path: str, stored: dict[str, Any]) -> ViewSpec:
    """The ViewSpec that `ViewSpec.as_json` wrote into the file ``path``.

    Raises DataError naming both versions when this Pillow or rendering would give other pixels from it.
    """
    said = dict(stored)
    made_with = (said.pop("pillow", None), said.pop("rendering", None))
    if made_with != (PIL.__version__, RENDERING):
        install = f"install pillow=={made_with[0]}, or " if made_with[1] == RENDERING else ""
        raise DataError(
            f"{path}: its views were rendered by Pillow {made_with[0]} (rendering {made_with[1]}), here is Pillow "
            f"{PIL.__version__} (rendering {RENDERING}), which may give other pixels: {install}"
            "delete the cache and run `clipmill cache` again"
        )
    tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    try:
        return ViewSpec(**tuples)
    except TypeError as error:
        raise DataError(
            f"{path}: its view spec is of another version ({error}); delete it and run `clipmill cache` again"
        ) from error


@dataclass(frozen=True)
class View:
    """One drawn view. ``boxes`` are the tries of the crop in order, (area, aspect) each.

    They are shares in 1/65535, ``left`` and ``top`` in 1/65536; an operation is (index in its set, signed level).
    ``jitter`` is empty, or the order of the four (an index of `augment.ORDERS`) and their shares in 1/65535.
    """

    boxes: tuple[tuple[int, int], ...]
    left: int
    top: int
    flip: bool
    ops: tuple[tuple[int, int], ...] = ()
    jitter: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """All of it in 46 bytes, 3 more per operation and 9 for the jitter (SPEC.md section 4)."""
        numbers = [*chain.from_iterable(self.boxes), self.left, self.top]
        head = _HEAD.pack(*numbers, self.flip + 2 * bool(self.jitter), len(self.ops))
        tail = _JITTER.pack(*self.jitter) if self.jitter else b""
        return b"".join([head, *(_OPERATION.pack(*operation) for operation in self.ops), tail])


def unpack_view(data: bytes) -> View:
    """What `View.pack` wrote."""
    *crop, flags, count = _HEAD.unpack_from(data)
    places = range(_HEAD.size, _HEAD.size + count * _OPERATION.size, _OPERATION.size)
    operations = tuple(_OPERATION.unpack_from(data, place) for place in places)
    jittered = _JITTER.unpack_from(data, len(data) - _JITTER.size) if flags & 2 else ()
    *boxes, left, top = crop
    return View(tuple(zip(boxes[::2], boxes[1::2], strict=True)), left, top, bool(flags & 1), operations, jittered)


def draw_view(spec: ViewSpec, key: str, view: int) -> View:
    """Draw view number ``view`` of sample ``key``: a pure function of its arguments.

    The numbers in order: area and aspect of ten boxes, left, top, flip; a pick and a sign per operation; whether it is
    applied and its deviation per operation; whether to jitter, the order, and four strengths.
    """
    crop = 2 * TRIES + 2
    numbers = uniform_draws(f"{spec.seed}/{key}/{view}", crop + 1 + 4 * spec.ops + 6).tolist()
    *boxes, left, top = (int(u * 65536) for u in numbers[:crop])
    picks, signs, more = crop + 1, crop + 1 + 2 * spec.ops, crop + 1 + 4 * spec.ops
    last = numbers[more:]
    operations = OP_SETS[spec.op_set]
    ops = []
    for place, (applied, deviation) in enumerate(
        zip(numbers[signs:more:2], numbers[signs + 1 : more : 2], strict=True)
    ):
        pick, sign = numbers[picks + 2 * place : picks + 2 * place + 2]
        magnitude: float = spec.magnitude
        if spec.magnitude_std:
            wide = NormalDist(spec.magnitude, spec.magnitude_std).inv_cdf(max(deviation, 2.0**-53))
            magnitude = min(max(wide, 0.0), operations.most)
        if applied < spec.op_prob:
            level = round(magnitude * operations.unit)
            ops.append((int(pick * len(operations.operations)), level if sign < 0.5 else -level))
    jittered: tuple[int, ...] = ()
    if any(spec.jitter) and last[0] < spec.jitter_prob:
        jittered = (int(last[1] * len(ORDERS)), *(round(u * 65535) for u in last[2:]))
    pairs = tuple(zip(boxes[::2], boxes[1::2], strict=True))
    return View(pairs, left, top, numbers[crop] < spec.flip, tuple(ops), jittered)


def crop_box(spec: ViewSpec, view: View, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of a ``width`` x ``height`` image, whole ones but for the plain centre crop.

    torchvision.transforms.RandomResizedCrop: of ten boxes, area share uniform in ``scale`` and aspect log-uniform in
    ``ratio``, the first that fits; else the largest in the centre with its aspect clamped to ``ratio``.
    """
    if spec.scale is None:
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    (least, most), (low, high) = spec.scale, spec.ratio
    for drawn_area, drawn_aspect in view.boxes:
        area = (least + (most - least) * drawn_area / 65535) * width * height
        aspect = math.exp(math.log(low) + (math.log(high) - math.log(low)) * drawn_aspect / 65535)
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = view.left * (width - wide + 1) >> 16, view.top * (height - tall + 1) >> 16
            return left, top, left + wide, top + tall
    wide, tall = width, height
    if width < low * height:
        tall = max(1, round(width / low))
    elif width > high * height:
        wide = max(1, round(height * high))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def apply_view(image: Image.Image, spec: ViewSpec, view: View, size: int) -> Image.Image:
    """Render a view of an RGB image at ``size`` x ``size`` pixels, bicubic, antialiased."""
    box = crop_box(spec, view, *image.size)
    if spec.scale is None:
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    left, top, right, bottom = map(int, box)
    rendered = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
    if view.flip:
        rendered = ImageOps.mirror(rendered)
    for operation, level in view.ops:
        rendered = OP_SETS[spec.op_set].apply(rendered, operation, level)
    return jitter(rendered, spec.jitter, view.jitter[0], view.jitter[1:]) if view.jitter else rendered


def render_views(image: Image.Image, spec: ViewSpec, key: str, views: Sequence[int], size: int) -> np.ndarray:
    """(V, size, size, 3) uint8: the views of one sample, each as `apply_view` renders it."""
    rendered = np.empty((len(views), size, size, 3), np.uint8)
    for place, view in enumerate(views):
        rendered[place] = np.asarray(apply_view(image, spec, draw_view(spec, key, view), size))
    return rendered
