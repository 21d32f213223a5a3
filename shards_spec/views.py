"""Replayable views: augmentation drawn from (seed, key, view index) and rendered at any size.

A view is a handful of integers from a counter-based generator (Philox keyed by a hash of the three). Everything in
it is relative to the image, so that a teacher at 336 pixels and a student at 256 see the same crop with the same
operations. A crop is resized by `resize_bicubic`, the rest is Pillow's, hence bit-identical between machines that have
the same Pillow.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from statistics import NormalDist
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

from shards_spec.augment import OP_SETS, ORDERS, OpSet, jitter
from shards_spec.bicubic import resize_bicubic
from shards_spec.counter_rng import uniform_draws
from shards_spec.files import DataError, UserError, sha256_json
from shards_spec.images import UPRIGHT
from shards_spec.messages import require
from shards_spec.pixels import from_rgbx, rgbx
from shards_spec.unused_options import Unused, asking

RENDERING = 3  # raised whenever `apply_view` gives other pixels for the same view
BY_PILLOW = 2  # the rendering before: Pillow resizes crops; caches of it are read on
RENDERINGS = (BY_PILLOW, RENDERING)
# options added later: absent from the JSON while at their defaults, so that older specs keep their hashes
_LATER = ("op_set", "op_prob", "magnitude_std", "jitter", "jitter_prob")
TRIES = 10  # boxes that torchvision's RandomResizedCrop draws until one fits
_HEAD = struct.Struct(f"<{2 * TRIES + 2}HBB")  # area, aspect, ... left, top, flip + 2 * jittered, number of operations
_OPERATION = struct.Struct("<Bh")  # index in the set, level
_JITTER = struct.Struct("<B4H")  # order, brightness, contrast, saturation, hue
_RECORDED = struct.Struct("<6H3B")  # width, height; left, top, width, height; turn, flip, number of operations
MOST_RECORDED_OPS = 4  # of a recorded view
RECORDED_BYTES = _RECORDED.size + MOST_RECORDED_OPS * _OPERATION.size
_UNDO = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class ViewOptions:
    """What a view may be: crop, flip, RandAugment, colour jitter, in this order.

    Crop: torchvision's RandomResizedCrop with area share in ``scale`` and aspect in ``ratio``; ``scale=None`` means
    no augmentation at all, the shorter side resized and the centre cropped.
    """

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
        is_share = self.scale is None or 0 < self.scale[0] <= self.scale[1] <= 1
        require(is_share, "scale", self.scale, "0 < low <= high <= 1")
        require(0 < self.ratio[0] <= self.ratio[1] < math.inf, "ratio", self.ratio, "0 < low <= high")
        require(self.op_set in OP_SETS, "op_set", self.op_set, f"one of {', '.join(OP_SETS)}")
        most = OP_SETS[self.op_set].most
        in_set = f"0 to {most} with --op-set {self.op_set}"
        require(0 <= self.magnitude <= most, "magnitude", self.magnitude, in_set)
        require(self.ops >= 0, "ops", self.ops, "0 or more")
        for name in ("flip", "op_prob", "jitter_prob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        is_drawn = self.magnitude_std == 0 or (0 < self.magnitude_std < math.inf and self.op_set != "torchvision")
        require(is_drawn, "magnitude_std", self.magnitude_std, "0, or more with one of timm's --op-set")
        is_strength = all(0 <= strength < math.inf for strength in self.jitter) and self.jitter[3] <= 0.5
        require(is_strength, "jitter", self.jitter, "0 or more each, hue at most 0.5")

    def unused(self) -> Iterator[Unused]:
        """Yield the options of what is not drawn."""
        operations = ("magnitude", "op_set", "op_prob", "magnitude_std")
        if self.scale is None:
            names = ("ratio", "flip", "ops", *operations, "jitter", "jitter_prob")
            yield Unused(asking(self, names), "with --scale None, the plain centre crop")
        if not self.ops:
            yield Unused(operations, "with --ops 0")
        if not any(self.jitter):
            yield Unused(("jitter_prob",), "with --jitter 0 0 0 0")


@dataclass(frozen=True)
class ViewSpec(ViewOptions):
    """Options and the seed from which views are drawn, and the rendering of their pixels."""

    seed: int = 0
    """seed of the views"""
    rendering: int = RENDERING
    """how crops are resized; 2, by Pillow, goes on with a cache of an older clipmill"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rendering in RENDERINGS, "rendering", self.rendering, f"one of {RENDERINGS}")

    def as_json(self) -> dict[str, Any]:
        """The spec and the versions that render it, as every cache stores them.

        Options that were added later are left out while they have their default values.
        """
        options = {"seed": self.seed} | asdict(self)  # first, as stored specs have it
        for name in _LATER:
            if options[name] == _DEFAULTS[name]:
                del options[name]
        return {**options, "rendering": self.rendering, "pillow": PIL.__version__}

    @property
    def sha256(self) -> str:
        """Hash of the spec and of the versions that render it: equal hashes give equal pixels."""
        return sha256_json(self.as_json())


_DEFAULTS = {option.name: option.default for option in fields(ViewSpec)}
RECORDED = "recorded"


@dataclass(frozen=True)
class RecordedSpec(ViewSpec):
    """Stands for views that another program drew: a cache has them, one by one, as columns ``view_0`` ….

    Their operations are torchvision's. Nothing can be drawn from it.
    """

    def as_json(self) -> dict[str, Any]:
        """As a cache stores it. No version: what rendered the teacher's views is not known, and was not this Pillow."""
        return {RECORDED: True}


def parse_view_spec(path: str, stored: dict[str, Any]) -> ViewSpec:
    """The ViewSpec that `ViewSpec.as_json` wrote into the file ``path``.

    Raises DataError naming both versions when this Pillow or rendering would give other pixels from it.
    """
    if stored.get(RECORDED) is True:
        return RecordedSpec()
    options = dict(stored)
    pillow = options.pop("pillow", None)
    rendering = options.get("rendering")
    is_known = rendering in RENDERINGS
    if pillow != PIL.__version__ or not is_known:
        install = f"install pillow=={pillow}, or " if is_known else ""
        raise DataError(
            f"{path}: its views were rendered by Pillow {pillow} (rendering {rendering}), here is Pillow "
            f"{PIL.__version__} (rendering {RENDERING}), which may give other pixels: {install}"
            "delete the cache and run `clipmill cache` again"
        )
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = tuple(value)
    try:
        return ViewSpec(**options)
    except (TypeError, ValueError, IndexError, UserError) as error:
        raise DataError(
            f"{path}: its view spec is of another version ({error}); delete it and run `clipmill cache` again"
        ) from error


@dataclass(frozen=True)
class View:
    """One drawn view.

    ``boxes`` are the tries of the crop in order, (area, aspect) each, in units of 1/65535 of their ranges; ``left`` and
    ``top`` are in units of 1/65536. An operation of ``ops`` is (index in its set, signed level). ``jitter`` is empty,
    or the order of the four (an index of `augment.ORDERS`) and their strengths in units of 1/65535.
    """

    boxes: tuple[tuple[int, int], ...]
    left: int
    top: int
    flip: bool
    ops: tuple[tuple[int, int], ...] = ()
    jitter: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """The view as 46 bytes, 3 more per operation and 9 for the jitter (SPEC.md section 4)."""
        numbers = [*chain.from_iterable(self.boxes), self.left, self.top]
        flags = self.flip + 2 * bool(self.jitter)
        packed = _HEAD.pack(*numbers, flags, len(self.ops))
        for operation in self.ops:
            packed += _OPERATION.pack(*operation)
        if self.jitter:
            packed += _JITTER.pack(*self.jitter)
        return packed


@dataclass(frozen=True)
class RecordedView:
    """One view as another program applied it to an image, by its own pixels.

    Attributes:
        frame: Width and height of the image that the program had.
        box: Left, top, width and height of the crop in it.
        turn: EXIF orientation of the file, which the program ignored; 1 is upright.
        flip: Whether the crop was mirrored.
        ops: As in `View`, of torchvision's set.
    """

    frame: tuple[int, int]
    box: tuple[int, int, int, int]
    turn: int = 1
    flip: bool = False
    ops: tuple[tuple[int, int], ...] = ()
    jitter: tuple[int, ...] = ()  # as `View` has it; none is recorded

    def pack(self) -> bytes:
        """The view as `RECORDED_BYTES` bytes (SPEC.md section 4)."""
        packed = _RECORDED.pack(*self.frame, *self.box, self.turn, self.flip, len(self.ops))
        for operation in self.ops:
            packed += _OPERATION.pack(*operation)
        return packed.ljust(RECORDED_BYTES, b"\0")

    def crop(self, image: Image.Image, size: int) -> Image.Image:
        """The crop of an upright RGB image, resized to ``size`` x ``size`` pixels.

        An image of another size than the frame is the same one, enlarged or reduced: the box is scaled with it.
        """
        if self.turn in UPRIGHT:
            image = image.transpose(_UNDO.get(UPRIGHT[self.turn], UPRIGHT[self.turn]))  # the others undo themselves
        left, top, width, height = self.box
        right, bottom = left + width, top + height
        if image.size == self.frame:
            return image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
        x_scale = image.width / self.frame[0]
        y_scale = image.height / self.frame[1]
        right_edge = min(right * x_scale, image.width)
        bottom_edge = min(bottom * y_scale, image.height)
        box = (left * x_scale, top * y_scale, right_edge, bottom_edge)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def unpack_recorded(data: bytes) -> RecordedView:
    """The view that `RecordedView.pack` packed. Raises DataError for bytes that are none."""
    if len(data) != RECORDED_BYTES:
        raise DataError(f"a recorded view of {len(data)} bytes, not {RECORDED_BYTES}")
    width, height, left, top, crop_width, crop_height, turn, flip, count = _RECORDED.unpack_from(data)
    fits = 0 < crop_width <= width - left and 0 < crop_height <= height - top
    if not fits or turn not in range(1, 9) or flip > 1 or count > MOST_RECORDED_OPS:
        raise DataError("a recorded view that has no sense")
    starts = range(_RECORDED.size, _RECORDED.size + count * _OPERATION.size, _OPERATION.size)
    ops = tuple(_OPERATION.unpack_from(data, start) for start in starts)
    most = OP_SETS["torchvision"]
    if any(index >= len(most.operations) or abs(level) > most.most for index, level in ops):
        raise DataError("a recorded view that has no sense")
    return RecordedView((width, height), (left, top, crop_width, crop_height), turn, bool(flip), ops)


def unpack_view(data: bytes) -> View:
    """The view that `View.pack` packed."""
    *boxes, left, top, flags, count = _HEAD.unpack_from(data)
    starts = range(_HEAD.size, _HEAD.size + count * _OPERATION.size, _OPERATION.size)
    ops = tuple(_OPERATION.unpack_from(data, start) for start in starts)
    jitter_values = _JITTER.unpack_from(data, len(data) - _JITTER.size) if flags & 2 else ()
    return View(tuple(zip(boxes[::2], boxes[1::2], strict=True)), left, top, bool(flags & 1), ops, jitter_values)


def draw_view(spec: ViewSpec, key: str, view: int) -> View:
    """Draw view number ``view`` of sample ``key``: a pure function of its arguments.

    The numbers in order: area and aspect of ten boxes, left, top, flip; a pick and a sign per operation; whether it is
    applied and its deviation per operation; whether to jitter, the order, and four strengths.
    """
    count = 2 * TRIES + 3 + 4 * spec.ops + 6
    draws = iter(uniform_draws(f"{spec.seed}/{key}/{view}", count).tolist())

    def pairs(number: int) -> list[tuple[float, float]]:
        return [(next(draws), next(draws)) for _ in range(number)]

    boxes = tuple((int(area * 65536), int(aspect * 65536)) for area, aspect in pairs(TRIES))
    left = int(next(draws) * 65536)
    top = int(next(draws) * 65536)
    flip = next(draws) < spec.flip
    ops = tuple(_draw_operations(spec, choices=pairs(spec.ops), strengths=pairs(spec.ops)))
    jitter_draw, order_draw, *strengths = draws
    jitter_values: tuple[int, ...] = ()
    if any(spec.jitter) and jitter_draw < spec.jitter_prob:
        jitter_values = (int(order_draw * len(ORDERS)), *(round(strength * 65535) for strength in strengths))
    return View(boxes, left, top, flip, ops, jitter_values)


def _draw_operations(
    spec: ViewSpec, *, choices: list[tuple[float, float]], strengths: list[tuple[float, float]]
) -> Iterator[tuple[int, int]]:
    """(index in the set, signed level) of each operation that is applied.

    ``choices`` are the draws of operation and sign, ``strengths`` those of whether it is applied and of its deviation.
    """
    operation_set = OP_SETS[spec.op_set]
    for (pick, sign), (applied, deviation) in zip(choices, strengths, strict=True):
        magnitude: float = spec.magnitude
        if spec.magnitude_std:
            drawn = NormalDist(spec.magnitude, spec.magnitude_std).inv_cdf(max(deviation, 2.0**-53))
            magnitude = min(max(drawn, 0.0), operation_set.most)
        if applied < spec.op_prob:
            level = round(magnitude * operation_set.unit)
            yield int(pick * len(operation_set.operations)), level if sign < 0.5 else -level


def crop_box(spec: ViewSpec, view: View, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of a ``width`` x ``height`` image, whole ones but for the plain centre crop.

    torchvision.transforms.RandomResizedCrop: of ten boxes, area share uniform in ``scale`` and aspect log-uniform in
    ``ratio``, the first that fits; else the largest in the centre with its aspect clamped to ``ratio``.
    """
    if spec.scale is None:
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    min_area, max_area = spec.scale
    min_aspect, max_aspect = spec.ratio
    for drawn_area, drawn_aspect in view.boxes:
        area = (min_area + (max_area - min_area) * drawn_area / 65535) * width * height
        log_range = math.log(max_aspect) - math.log(min_aspect)
        aspect = math.exp(math.log(min_aspect) + log_range * drawn_aspect / 65535)
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = view.left * (width - crop_width + 1) >> 16
            top = view.top * (height - crop_height + 1) >> 16
            return left, top, left + crop_width, top + crop_height
    crop_width = width
    crop_height = height
    if width < min_aspect * height:
        crop_height = max(1, round(width / min_aspect))
    elif width > max_aspect * height:
        crop_width = max(1, round(height * max_aspect))
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def apply_view(image: Image.Image, spec: ViewSpec, view: View | RecordedView, size: int) -> Image.Image:
    """Render a view of an RGB image at ``size`` x ``size`` pixels, bicubic, antialiased."""
    if isinstance(view, RecordedView):
        rendered = view.crop(image, size)
    elif spec.scale is None:  # its box may begin between two pixels
        return image.resize((size, size), Image.Resampling.BICUBIC, box=crop_box(spec, view, *image.size))
    else:
        left, top, right, bottom = map(int, crop_box(spec, view, *image.size))
        if spec.rendering == BY_PILLOW:
            rendered = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
        else:
            rendered = from_rgbx(resize_bicubic(rgbx(image)[top:bottom, left:right].copy(), size))
    if view.flip:
        rendered = ImageOps.mirror(rendered)
    for operation, level in view.ops:
        rendered = OP_SETS[spec.op_set].apply(rendered, operation, level)
    if view.jitter:
        rendered = jitter(rendered, spec.jitter, view.jitter[0], view.jitter[1:])
    return rendered


def render_views(image: Image.Image, spec: ViewSpec, key: str, views: Sequence[int], size: int) -> np.ndarray:
    """(V, size, size, 3) uint8: the views of one sample, each as `apply_view` renders it."""
    rendered = np.empty((len(views), size, size, 3), np.uint8)
    for index, view in enumerate(views):
        rendered[index] = np.asarray(apply_view(image, spec, draw_view(spec, key, view), size))
    return rendered
