"""Replayable views: draws, packing, pixels against torchvision's and timm's own, golden hashes, refusals."""

import hashlib
import io
import itertools
import random
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, features
from small_data import draw
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms.autoaugment import _apply_op

from shards_spec import augment, views
from shards_spec.augment import OP_SETS
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.views import (
    RECORDED_BYTES,
    RecordedSpec,
    RecordedView,
    View,
    ViewSpec,
    apply_view,
    draw_view,
    render_views,
    unpack_recorded,
    unpack_view,
)

GOLDEN_PILLOW = "13.0.0"
JITTER = (0.4, 0.4, 0.2, 0.1)
FULL = ViewSpec(seed=3, ops=2, op_set="timm-inc", op_prob=0.5, magnitude_std=0.5, jitter=JITTER, jitter_prob=0.8)
TORCHVISION, TIMM_INC = dict(OP_SETS["torchvision"].operations), dict(OP_SETS["timm-inc"].operations)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Gradients and noise, 120 x 90: the same on every machine."""
    y, x = np.mgrid[:90, :120]
    noise = np.random.default_rng(0).integers(0, 40, (90, 120, 3))
    return Image.fromarray(np.clip(np.stack([x * 2, y * 2, x + y], -1) + noise - 20, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def square(image) -> Image.Image:
    return image.resize((224, 224))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def test_a_spec_without_new_options_is_what_it_was():
    """Caches of the rendering before stay readable: the same hash, the same numbers."""
    spec = ViewSpec(seed=3, ops=2, rendering=views.BY_PILLOW)
    assert views.parse_view_spec("f", spec.as_json()) == spec
    assert set(spec.as_json()) == {
        "seed",
        "scale",
        "ratio",
        "flip",
        "ops",
        "magnitude",
        "rendering",
        "pillow",
    }
    drawn = draw_view(spec, "000000001", 4)
    assert (len(drawn.boxes), drawn.boxes[:2]) == (10, ((25653, 48646), (11532, 21422)))
    assert (drawn.left, drawn.top, drawn.flip, drawn.ops) == (42583, 57479, False, ((5, -9), (7, 9)))
    if PIL.__version__ == GOLDEN_PILLOW:
        assert spec.sha256 == "495c352ac11110240efb971a2e2b275a43d9b9c60c1b4af5e010e11e50587496"


def test_new_options_leave_the_crops_alone():
    plain, more = ViewSpec(seed=3), FULL
    for view in range(20):
        one, other = draw_view(plain, "k", view), draw_view(more, "k", view)
        assert (one.boxes, one.left, one.top, one.flip) == (other.boxes, other.left, other.top, other.flip)


def test_draws_follow_their_probabilities():
    drawn = [draw_view(FULL, "k", view) for view in range(4000)]
    applied = list(itertools.chain.from_iterable(view.ops for view in drawn))
    assert abs(len(applied) / 8000 - 0.5) < 0.03
    assert {operation for operation, _ in applied} == set(range(15))
    levels = np.abs([level for _, level in applied])
    assert levels.max() <= 1000
    assert abs(levels.mean() - 894) < 10  # magnitude 9 +- 0.5, cut at 10
    assert abs(np.mean([level > 0 for _, level in applied]) - 0.5) < 0.05
    jittered = [view.jitter for view in drawn if view.jitter]
    assert abs(len(jittered) / 4000 - 0.8) < 0.03
    assert {order for order, *_ in jittered} == set(range(24))
    assert abs(np.mean([shares for _, *shares in jittered]) / 65535 - 0.5) < 0.02


@given(st.integers(0, 10_000), st.sampled_from([ViewSpec(ops=3), FULL, ViewSpec(jitter=JITTER)]))
def test_packed_views_come_back(number, spec):
    view = draw_view(spec, "key", number)
    packed = view.pack()
    assert unpack_view(packed) == view
    assert len(packed) == 46 + 3 * len(view.ops) + 9 * bool(view.jitter)


def test_many_views_at_once_are_the_same_pixels(image):
    for spec in (ViewSpec(ops=2), FULL, ViewSpec(scale=None)):
        batch = render_views(image, spec, "k", (0, 3, 5), 40)
        for rendered, view in zip(batch, (0, 3, 5), strict=True):
            assert same(Image.fromarray(rendered), apply_view(image, spec, draw_view(spec, "k", view), 40))


@pytest.mark.parametrize("side", [32, 97, 224])
def test_torchvisions_operations_give_torchvisions_pixels(image, side):
    """Every operation, bin and sign, by torchvision's own RandAugment: its float32 magnitudes, its pixels."""
    square, space = image.resize((side, side)), RandAugment()._augmentation_space(31, (side, side))
    assert list(TORCHVISION) == list(space)
    different, tried = [], 0
    for name, (magnitudes, signed) in space.items():
        for level, sign in itertools.product(range(31), (1, -1) if signed else (1,)):
            magnitude = sign * float(magnitudes[level]) if magnitudes.ndim else 0.0
            theirs = _apply_op(square, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=None)
            tried += 1
            if not same(TORCHVISION[name](square, sign * level), theirs):
                different.append((name, sign * level))
    assert different == []
    assert tried == 5 * 31 + 9 * 62


@pytest.mark.parametrize("op_set", ["timm", "timm-inc", "timm-3a"])
@pytest.mark.parametrize("magnitude", [3, 5, 9])
def test_timms_operations_give_timms_pixels(square, op_set, magnitude, monkeypatch):
    names = auto_augment.rand_augment_choices("3a" if op_set == "timm-3a" else "", increasing=op_set == "timm-inc")
    ours = OP_SETS[op_set].operations
    assert [name for name, _ in ours] == names
    hparams = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC, "translate_const": 250}
    for sign in (1, -1):
        monkeypatch.setattr(random, "random", lambda sign=sign: 0.4 if sign > 0 else 0.6)  # timm's coin
        for name, operation in ours:
            theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
            assert same(operation(square, sign * magnitude * 100), theirs(square)), name


@pytest.mark.parametrize("side", [1, 2, 3, 17, 18, 40])
def test_small_images_are_sharpened_as_by_pillow(side):
    noise = Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side + 1, 3), np.uint8))
    by_pillow = ImageEnhance.Sharpness(noise).enhance(1.9)
    assert same(TORCHVISION["Sharpness"](noise, 30), by_pillow)


def test_posterize_to_no_bits_is_black(square):
    assert TIMM_INC["PosterizeIncreasing"](square, 1000).getextrema() == ((0, 0),) * 3


def test_a_blur_is_relative_to_the_image(image):
    blur = dict(OP_SETS["timm-3a"].operations)["GaussianBlur"]
    small, large = (blur(image.resize((side, side)), 1000) for side in (112, 224))
    assert np.abs(np.asarray(small, float) - np.asarray(large.resize((112, 112), Image.Resampling.BOX))).mean() < 2


@given(st.integers(0, 23), st.tuples(*[st.integers(0, 65535)] * 4))
def test_jitter_is_torchvisions(order, shares):
    square = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8))
    factors = augment.jitter_factors(JITTER, shares)
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = square
    for kind in augment.ORDERS[order]:
        expected = steps[kind](expected, factors[kind])
    assert same(augment.jitter(square, JITTER, order, shares), expected)


def test_jitter_ranges_are_torchvisions():
    from torchvision.transforms import ColorJitter

    theirs = ColorJitter(1.5, 0.4, 0.2, 0.1)
    ranges = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
    for end, share in ((0, 0), (1, 65535)):
        factors = augment.jitter_factors((1.5, 0.4, 0.2, 0.1), (share,) * 4)
        assert factors == pytest.approx([low_high[end] for low_high in ranges])


BOXES = ((0, 0),) * 10


def test_crop_and_flip_are_torchvisions(image):
    whole = ViewSpec(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=1.0)
    expected = TF.hflip(TF.resized_crop(image, 0, 0, 90, 120, [48, 48], InterpolationMode.BICUBIC))
    by_pillow = replace(whole, rendering=views.BY_PILLOW)
    assert same(apply_view(image, by_pillow, View(BOXES, 0, 0, True), 48), expected)
    for number in range(20):
        spec, view = ViewSpec(flip=0.0), draw_view(ViewSpec(flip=0.0), "k", number)
        left, top, right, bottom = views.crop_box(spec, view, 120, 90)
        box = (top, left, bottom - top, right - left)
        theirs = TF.resized_crop(image, *box, [48, 48], InterpolationMode.BICUBIC)
        assert same(apply_view(image, replace(spec, rendering=views.BY_PILLOW), view, 48), theirs)
        difference = np.abs(np.asarray(theirs, int) - np.asarray(apply_view(image, spec, view, 48), int))
        assert difference.max() <= 1
        assert difference.mean() < 0.3  # of a scale of 2, where every other sum is a half


def test_the_first_box_that_fits_is_taken_and_else_torchvisions_centre_crop():
    spec = ViewSpec(scale=(0.5, 1.0), ratio=(0.5, 2.0))
    tall, small = (65535, 0), (0, 32768)  # the whole area twice as high as wide; half of the area, about square
    box = views.crop_box(spec, View((tall, small, *BOXES[2:]), 0, 65535, False), 400, 300)
    assert box == (0, 55, 245, 300)
    strict = ViewSpec(scale=(0.9, 1.0))
    for width, height, expected in (
        (300, 900, (0, 250, 300, 650)),
        (900, 300, (250, 0, 650, 300)),
        (1, 9, (0, 4, 1, 5)),
    ):
        theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [2.0, 2.0], [3 / 4, 4 / 3])  # never fits
        assert views.crop_box(strict, View(BOXES, 7, 7, False), width, height) == expected
        assert expected == (theirs[1], theirs[0], theirs[1] + theirs[3], theirs[0] + theirs[2])


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("size", [(300, 300), (450, 300), (300, 900), (7, 5)])
def test_crops_are_distributed_as_torchvisions(scale, size):
    """Corners, area and aspect: 2,000 crops each; every decile within five standard errors of a share of 0.1."""
    (width, height), spec = size, ViewSpec(seed=5, scale=scale)
    torch.manual_seed(0)
    empty = torch.empty(1, height, width)
    drawn = (RandomResizedCrop.get_params(empty, list(scale), [3 / 4, 4 / 3]) for _ in range(2000))
    theirs = np.array([(left, top, left + wide, top + tall) for top, left, tall, wide in drawn])
    ours = np.array([views.crop_box(spec, draw_view(spec, "k", number), width, height) for number in range(2000)])
    measures = (
        lambda box: box[0],
        lambda box: box[1],
        lambda box: box[2],
        lambda box: box[3],
        lambda box: (box[2] - box[0]) * (box[3] - box[1]),
        lambda box: (box[2] - box[0]) / (box[3] - box[1]),
    )
    for measure in measures:
        one, other = measure(ours.T), measure(theirs.T)
        for edge in np.quantile(other, np.arange(0.1, 1, 0.1)):
            assert abs((one <= edge).mean() - (other <= edge).mean()) < 5 * np.sqrt(2 * 0.25 / 2000)


@pytest.mark.parametrize(("size", "mean"), [((300, 300), 0.942), ((400, 300), 0.958), ((450, 300), 0.888)])
def test_large_crops_have_torchvisions_mean_area(size, mean):
    spec = ViewSpec(scale=(0.9, 1.0))
    boxes = np.array([views.crop_box(spec, draw_view(spec, "k", number), *size) for number in range(4000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (size[0] * size[1])
    assert areas.mean() == pytest.approx(mean, abs=0.002)


GOLDEN = {
    "torchvision": "2e38c2c7f99bcbee",
    "timm": "c546a9d43a3d9971",
    "timm-inc": "5b86d7c6405ddbc0",
    "timm-3a": "56c4acbaa22d43e9",
    "jitter": "a904efc5de2b710c",
    "views": "b89018eddcf09226",
}


def rendered_hashes(image: Image.Image) -> dict[str, str]:
    square, hashes = image.resize((64, 64)), {}
    for op_set, operations in OP_SETS.items():
        level = 9 * operations.unit
        everything = list[np.ndarray]()
        for _, operation in operations.operations:
            everything += [np.asarray(operation(square, level)), np.asarray(operation(square, -level))]
        hashes[op_set] = digest(Image.fromarray(np.concatenate(everything)))
    hashes["jitter"] = digest(augment.jitter(square, JITTER, 7, (60000, 4000, 50000, 9000)))
    specs = (ViewSpec(seed=3, ops=2), FULL, replace(FULL, op_set="timm-3a"), ViewSpec(scale=None))
    shown = [render_views(image, spec, "k", range(4), 48) for spec in specs]
    hashes["views"] = digest(Image.fromarray(np.concatenate(shown).reshape(-1, 48, 3)))
    return hashes


def test_pixels_are_the_golden_ones(image):
    if PIL.__version__ != GOLDEN_PILLOW:
        pytest.skip(f"pinned for Pillow {GOLDEN_PILLOW}")
    assert rendered_hashes(image) == GOLDEN, "other pixels: raise views.RENDERING and write down the new hashes"


def test_decoded_pixels_are_the_golden_ones():
    if (PIL.__version__, features.version("libjpeg_turbo")) != (GOLDEN_PILLOW, "3.2.0"):
        pytest.skip(f"pinned for the wheel of Pillow {GOLDEN_PILLOW}")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "JPEG", quality=80)
    assert digest(decode_rgb(file.getvalue())) == "4dac3c6ce008a3c2"


def test_recorded_views_are_read_back_by_any_version_and_refused_where_they_have_no_sense():
    assert views.parse_view_spec("f", RecordedSpec().as_json()) == RecordedSpec()
    view = RecordedView((120, 90), (3, 4, 100, 80), 6, True, ((5, -9), (10, 9), (13, 0), (0, 0)))
    packed = view.pack()
    assert len(packed) == RECORDED_BYTES == 27
    assert unpack_recorded(packed) == view
    for broken in (b"", packed[:-1], bytes(RECORDED_BYTES), b"\xff" * RECORDED_BYTES):
        with pytest.raises(DataError, match="a recorded view"):
            unpack_recorded(broken)
    for place, value in ((4, 30), (12, 0), (12, 9), (13, 2), (14, 5), (15, 14), (17, 99)):
        with pytest.raises(DataError, match="a recorded view that has no sense"):
            unpack_recorded(packed[:place] + bytes([value]) + packed[place + 1 :])


def test_another_rendering_is_refused_with_both_named():
    stored = ViewSpec(ops=1).as_json()
    assert views.parse_view_spec("f", stored) == ViewSpec(ops=1)
    assert views.parse_view_spec("f", FULL.as_json() | {"jitter": list(JITTER)}) == FULL
    with pytest.raises(DataError, match=rf"by Pillow {PIL.__version__} \(rendering 77\), here is .* \(rendering 3\)"):
        views.parse_view_spec("f", stored | {"rendering": 77})
    with pytest.raises(DataError, match=r"\(rendering 1\), here is [^:]*: delete the cache and run `clipmill cache`"):
        views.parse_view_spec("f", stored | {"rendering": 1})
    with pytest.raises(DataError, match=r"here is Pillow .*install pillow==9\.9"):
        views.parse_view_spec("f", stored | {"pillow": "9.9"})
    with pytest.raises(DataError, match=r"of another version.*delete it"):
        views.parse_view_spec("f", stored | {"swirl": 1})
    with pytest.raises(DataError, match=r"of another version \(--flip 7: must be in.*delete it"):
        views.parse_view_spec("f", stored | {"flip": 7})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op_set": "other"}, "--op-set 'other': must be one of torchvision, timm"),
        ({"op_set": "timm", "magnitude": 11}, r"--magnitude 11: must be 0 to 10 with --op-set timm"),
        ({"magnitude_std": 0.5}, "--magnitude-std 0.5"),
        ({"op_prob": 1.5}, "--op-prob 1.5"),
        ({"rendering": 1}, r"--rendering 1: must be one of \(2, 3\)"),
        ({"jitter": (0, 0, 0, 0.6)}, "hue at most 0.5"),
    ],
)
def test_bad_specs_name_field_and_value(change, named):
    with pytest.raises(UserError, match=named):
        ViewSpec(**change)


def test_no_augmentation_is_the_centre_crop_whatever_else_is_said():
    image = decode_rgb(draw("c", 64)[0])
    for spec in (ViewSpec(scale=None), ViewSpec(scale=None, ops=2, jitter=JITTER, flip=1.0)):
        left = (image.width - 64) / 2
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, 0, left + 64, 64))
        assert same(apply_view(image, spec, draw_view(spec, "k", 0), 32), expected)
