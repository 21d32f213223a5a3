"""The one decoding: pixels of every kind, formats, limits, reasons, and that every stage decodes by it."""

import ast
import io
import json
import os
import subprocess
import sys
import time
import zlib
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import draw, tiny_coca, write_raw
from small_images import EPS, encoded, jpeg2000, png, png_chunk, ramp, slow_jpeg, tiff
from small_training import tiny_clip

from pipeline.caption.captioner import Captioner
from pipeline.caption.config import CaptionConfig
from pipeline.caption.decoding import Decoding
from pipeline.caption.stage import caption
from pipeline.core.render_pool import RenderJob, render
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.images import BadImage, ImageRules, convert
from pipeline.report.samples import draw_samples
from shards_spec.decode_cost import jpeg2000_blocks
from shards_spec.files import DataError, join
from shards_spec.images import crop_extreme_aspect, decode_rgb
from shards_spec.models import load_model
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from shards_spec.views import ViewSpec, render_views
from training.config import DataConfig, ViewConfig
from training.data.batches import Skipped
from training.data.labelled_images import FolderImages
from training.data.labelled_rows import LabelledImageRows
from training.data.order import BatchPlan
from training.data.samples import open_samples
from training.evaluation.zero_shot import Encoder

ROOT = Path(__file__).parents[2]
BLACK_TO_WHITE = (0, 130, 255)  # of a ramp, at its ends and in its middle


def levels(data: bytes) -> tuple[int, int, int]:
    """Grey levels at the left, in the middle and at the right; `ingest` must see the same."""
    image, made = decode_rgb(data), Image.open(io.BytesIO(convert(data, ImageRules(16)).data))
    assert (image.mode, image.size) == ("RGB", made.size)
    assert np.abs(np.asarray(image, int) - np.asarray(made, int)).mean() < 4  # written as JPEG
    pixels = np.asarray(image)
    assert np.ptp(pixels.astype(int), axis=2).max() <= 1
    return tuple(int(pixels[4, place, 0]) for place in (0, 32, -1))


@pytest.mark.parametrize("highest", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize(
    "write",
    [
        lambda samples: encoded(Image.fromarray(samples), "PNG"),
        lambda samples: encoded(Image.fromarray(samples), "TIFF", compression="tiff_lzw"),
        tiff,
        lambda samples: tiff(samples, order=">"),
    ],
)
def test_integers_of_any_depth_in_16_bits_reach_from_black_to_white(highest, write):
    assert np.abs(np.subtract(levels(write(ramp(0, highest, "u2"))), BLACK_TO_WHITE)).max() <= 1


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-128, 127, "i1"),
        (0, 127, "i1"),
        (-(2**15), 2**15 - 1, "i2"),
        (0, 2**15 - 1, "i2"),
        (-1024, 3071, "i2"),
        (-(2**31), 2**31 - 1, "i4"),
        (0, 2**31 - 1, "i4"),
        (0, 255, "i4"),
        (0, 65535, "i4"),
        (0, 10**6, "i4"),
        (-500, 500, "i4"),
        (0, 1, "f4"),
        (0, 255, "f4"),
        (0, 65535, "f4"),
        (-1, 1, "f4"),
        (0, 3.7, "f4"),
        (0, 0.01, "f4"),
        (1000, 1200, "f4"),
        (-1e30, 1e30, "f4"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_wide_and_float_samples_reach_from_black_to_white(low, high, dtype, order):
    assert np.abs(np.subtract(levels(tiff(ramp(low, high, dtype), order=order)), BLACK_TO_WHITE)).max() <= 2


@pytest.mark.parametrize("highest", [255, 65535, 10**8, 2**32 - 1])
def test_unsigned_32_bits_reach_from_black_to_white(highest):
    assert np.abs(np.subtract(levels(tiff(ramp(0, highest, "u4"))), BLACK_TO_WHITE)).max() <= 2


@pytest.mark.parametrize(
    ("data", "middle"),
    [
        (b"P5 64 8 4095\n" + ramp(0, 4095, ">u2").tobytes(), 130),
        (b"P5 64 8 100\n" + ramp(0, 100, "u1").tobytes(), 128),
        (b"P6 64 8 1023\n" + np.stack([ramp(0, 1023, "u2")] * 3, -1).astype(">u2").tobytes(), 129),
        (b"Pf\n64 8\n-1.0\n" + ramp(0, 1, "<f4").tobytes(), 130),
        (encoded(Image.fromarray(ramp(0, 4095, "u2")), "JPEG2000"), 130),
    ],
)
def test_other_formats_with_many_bits_reach_from_black_to_white(data, middle):
    assert levels(data) == (0, middle, 255)


def test_what_pillow_decodes_in_python_is_limited():
    with pytest.raises(DataError, match="too many pixels"):
        decode_rgb(b"P5 10000 10000 254\n" + bytes(10**8))
    with pytest.raises(DataError, match="too many pixels"):
        decode_rgb(b"P2 10000 10000 255\n")
    assert decode_rgb(b"P5 10000 2000 255\n" + bytes(2 * 10**7)).size == (10_000, 2000)


def test_what_a_tiff_declares_comes_first():
    assert levels(tiff(ramp(0, 1000, "u2"), t281=[4095]))[2] == 62
    assert levels(tiff(ramp(0, 1000, "u2"), t281=[1000]))[2] == 255
    assert levels(tiff(ramp(500, 1000, "u2"), t280=[500], t281=[1000])) == (0, 129, 255)
    assert levels(tiff(ramp(0, 60_000, "u2"), t281=[4095]))[2] == 234  # declared wrongly
    packed = np.linspace(0, 4000, 64).astype(int).reshape(-1, 2) @ [1 << 12, 1]  # 12 bits each
    rows = np.frombuffer(b"".join(int(pair).to_bytes(3, "big") for pair in packed), np.uint8)[None].repeat(8, 0)
    assert levels(tiff(rows, t256=[64], t258=[12]))[2] == 4000 >> 4


@pytest.mark.parametrize("samples", [ramp(0, 65535, "u2"), ramp(0, 1, "f4"), ramp(0, 255, "u1")])
def test_white_may_be_zero(samples):
    assert np.abs(np.subtract(levels(tiff(samples, photometric=0)), (255, 125, 0))).max() <= 1


@pytest.mark.parametrize(("value", "level"), [(0, 0), (30_000, 117), (65_535, 255), (2000, 125), (8000, 31)])
def test_a_plain_image_keeps_its_level(value, level):
    """By the type; by a smaller depth where that would be nearly black."""
    assert levels(encoded(Image.fromarray(np.full((8, 64), value, np.uint16)), "PNG")) == (level,) * 3
    assert levels(tiff(np.full((8, 64), value, np.uint16))) == (level,) * 3


def test_samples_that_are_no_numbers_are_black_and_an_image_of_nothing_else_is_refused():
    samples = ramp(0, 1, "f4")
    samples[:, 0], samples[:, 1] = np.nan, np.inf
    assert levels(tiff(samples)) == (0, 130, 255)
    with pytest.raises(DataError, match=r"^does not decode: no finite samples$"):
        decode_rgb(tiff(np.full((8, 8), np.nan, np.float32)))


@pytest.mark.parametrize(
    "data",
    [
        png(np.stack([ramp(0, 4095, "u2")] * 3, -1), 16, 2),
        png(np.stack([ramp(0, 4095, "u2")] * 2, -1), 16, 4),
        b"P6 64 8 65535\n" + np.stack([ramp(0, 4095, "u2")] * 3, -1).astype(">u2").tobytes(),
        tiff(np.stack([ramp(0, 4095, "u2")] * 3, -1), 2),
        tiff(np.stack([ramp(0, 4095, "u2")] * 4, -1), 5),
    ],
)
def test_16_bit_colours_of_an_unknown_depth_are_refused(data):
    with pytest.raises(DataError, match=r"^does not decode: 16 bits hardly used$"):
        decode_rgb(data)


@pytest.mark.parametrize("kind", [4, 6])  # grey and colours, with alpha
def test_16_bits_that_nobody_sees_are_white(kind):
    data = png(np.zeros((8, 8, {4: 2, 6: 4}[kind]), np.uint16), 16, kind)
    assert np.all(np.asarray(decode_rgb(data)) == 255)


PALETTE = png_chunk(b"PLTE", b"\0\0\0\x09\x09\x09")


@pytest.mark.parametrize(
    "data",
    [
        tiff(ramp(0, 1, "f8")),
        tiff(ramp(0, 1, "f2")),
        tiff(np.full((8, 8, 3), 0.5, np.float32), 2),
        tiff(np.full((8, 8, 2), 9, np.uint16), t338=[2]),
        tiff(ramp(0, 255, "u8")),
    ],
)
def test_tiffs_of_samples_that_pillow_has_no_mode_for_are_named(data):
    with pytest.raises(DataError, match=r"^does not decode: unsupported TIFF$"):
        decode_rgb(data)


def grey_key(value: int) -> bytes:
    return png_chunk(b"tRNS", value.to_bytes(2, "big"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(ramp(0, 65535, "u2"), 16, 0, grey_key(0)), (255, 130, 255)),
        (png(ramp(0, 4095, "u2"), 16, 0, grey_key(0)), (255, 130, 255)),
        (png(np.stack([ramp(0, 65535, "u2")] * 3, -1), 16, 2, png_chunk(b"tRNS", bytes(6))), (255, 130, 255)),
        (png(ramp(0, 255, "u1"), 8, 0, grey_key(255)), (0, 129, 255)),
        (png(ramp(0, 255, "u1"), 8, 0, grey_key(0)), (255, 129, 255)),
        (png(ramp(0, 15, "u1"), 4, 0, grey_key(7)), (0, 255, 255)),
        (png(ramp(0, 3, "u1"), 2, 0, grey_key(1)), (0, 255, 255)),
        (png(ramp(0, 1, "u1"), 1, 0, grey_key(0)), (255, 255, 255)),
        (png(ramp(0, 1, "u1"), 1, 0), (0, 0, 255)),
        (png(ramp(0, 1, "u1"), 1, 3, PALETTE + png_chunk(b"tRNS", b"\x80")), (127, 127, 9)),
        (png(ramp(0, 1, "u1"), 8, 3, PALETTE + png_chunk(b"tRNS", b"\xff\0")), (0, 0, 255)),
        (tiff(np.full((8, 64, 2), (64, 128), np.uint8), t338=[1]), (191,) * 3),
        (tiff(np.full((8, 64, 2), (64, 128), np.uint8), t338=[2]), (159,) * 3),
        (tiff(np.full((8, 64, 4), (64, 64, 64, 128), np.uint8), 2, t338=[1]), (191,) * 3),
        (tiff(np.full((8, 64, 4), (64, 64, 64, 128), np.uint8), 2, t338=[0]), (64,) * 3),
        (tiff(np.full((8, 64, 4), (0, 0, 0, 155), np.uint8), 5), (100,) * 3),
        (tiff(np.full((8, 64, 4), (0, 0, 0, 155 << 8), np.uint16), 5), (100,) * 3),
        (tiff(np.full((8, 64, 3), (100, 128, 128), np.uint8), 6), (100,) * 3),
        (tiff(np.full((8, 64, 3), (255, 0, 0), np.uint8), 8), (255,) * 3),
        (encoded(Image.new("LA", (64, 8), (0, 0)), "PNG"), (255,) * 3),
        (encoded(Image.new("RGBA", (64, 8), (0, 0, 0, 0)), "WEBP", lossless=True), (255,) * 3),
    ],
)
def test_transparency_is_white_and_colour_spaces_become_rgb(data, expected):
    assert np.abs(np.subtract(levels(data), expected)).max() <= 1


PACKED = zlib.compress(bytes(10**7))


@pytest.mark.parametrize(
    "chunks",
    [
        png_chunk(b"iCCP", b"profile\0\0" + PACKED),
        png_chunk(b"zTXt", b"comment\0\0" + PACKED),
        png_chunk(b"iTXt", b"comment\0\1\0\0\0" + PACKED),
        png_chunk(b"tEXt", b"comment\0" + b"x" * 10**7) * 8,
        png_chunk(b"tEXt", b"transparency\0yes"),
        png_chunk(b"tEXt", b"comment\0x")[:-4] + bytes(4),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + PACKED),
        png_chunk(b"iCCP", b"profile\0\7none"),
    ],
)
def test_texts_and_profiles_of_a_png_do_not_spoil_it(chunks):
    assert levels(png(ramp(0, 255, "u1"), 8, 0, before=chunks)) == (0, 129, 255)
    assert levels(png(ramp(0, 255, "u1"), 8, 0, after=chunks)) == (0, 129, 255)


def corner(size: tuple[int, int] = (64, 40)) -> Image.Image:
    """Black, its upper left quarter white."""
    image = Image.new("RGB", size)
    image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    return image


EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED = [
    *(
        encoded(corner(), form, exif=EXIF, lossless=True, quality=95)
        for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
    ),
    encoded(corner(), "TIFF", tiffinfo={274: 6}, compression="tiff_lzw"),
    encoded(corner(), "JPEG", quality=95, xmp=XMP),
    *(
        png(np.asarray(corner()), 8, 2, before=png_chunk(kind, b"XML:com.adobe.xmp\0" + head + text))
        for kind, head, text in ((b"iTXt", bytes(4), XMP), (b"iTXt", b"\1\0\0\0", zlib.compress(XMP)))
    ),
]


@pytest.mark.parametrize("data", TURNED)
def test_images_are_upright(data):
    shown = np.asarray(decode_rgb(data), int)
    assert np.abs(shown - np.asarray(corner().transpose(Image.Transpose.ROTATE_270), int)).mean() < 8
    made = convert(data, ImageRules(32))
    assert (made.width, made.height, made.original_width, made.original_height) == (32, 51, 40, 64)
    assert np.abs(np.asarray(Image.open(io.BytesIO(made.data)).resize((40, 64)), int) - shown).mean() < 12


ODD = {
    "16 bits": encoded(Image.fromarray(ramp(0, 65535, "u2")), "PNG"),
    "float": tiff(ramp(0, 1, "f4")),
    "alpha": encoded(Image.new("RGBA", (64, 8), (200, 0, 0, 0)), "PNG"),
    "turned": TURNED[0],
    "CMYK": encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"),
    "palette": encoded(Image.new("RGB", (32, 32), (0, 200, 0)).quantize(4), "GIF", transparency=0),
    "plain": draw("x")[0],
}


@pytest.mark.parametrize("name", ODD)
def test_evaluation_sees_what_clip_benchmark_sees(name):
    """webdataset's handler for "pil" images, which CLIP_benchmark reads with."""
    from webdataset.autodecode import ImageHandler

    theirs = ImageHandler("pil", extensions=["png"])("png", ODD[name])
    ours = decode_rgb(ODD[name], as_benchmark=True)
    assert (ours.mode, ours.size, ours.tobytes()) == ("RGB", theirs.size, theirs.convert("RGB").tobytes())


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_model(tiny_clip(tmp_path_factory.mktemp("student") / "model"), random_weights=True)


@pytest.mark.parametrize("name", ODD)
def test_every_stage_sees_the_same_pixels(name, tmp_path, student):
    data, spec = ODD[name], ViewSpec(scale=None)
    expected = decode_rgb(data)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(data)
    side, rows = student.image_size, FolderImages(tmp_path)
    crop = (min(expected.size),) * 2
    left, top = ((whole - part) / 2 for whole, part in zip(expected.size, crop, strict=True))
    square = expected.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop[0], top + crop[1]))
    slots = np.empty((1, 1, side, side, 3), np.uint8)
    assert render(slots, 0, RenderJob(data, partial(render_views, spec=spec, key="k", views=(0,), size=side))) == 1
    assert (slots[0, 0] == np.asarray(square)).all()
    rows.labels, chosen = rows.labels[:1], np.arange(1)
    item = LabelledImageRows(rows, student, BatchPlan(1), spec, chosen)[0]
    assert (item["images"].permute(1, 2, 0).numpy() == np.asarray(square)).all()
    write_shard(
        str(tmp_path / "shards" / "00000.tar"), [Sample("000000000", {"jpg": data, "txt": b"x", "json": b"{}"})]
    )
    (tmp_path / "shards" / "sizes.json").write_text('{"00000.tar": 1}')
    config = DataConfig(data=str(tmp_path), batch_size=1, workers=0, streams=1)
    item = open_samples(config, ViewConfig(scale=None), student, seed=0)[0]
    assert (item["images"].permute(1, 2, 0).numpy() == np.asarray(square)).all()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def broken_avif() -> bytes:
    """An AVIF of which Pillow's decoder raises RuntimeError."""
    good = encoded(NOISE, "AVIF")
    for place in range(len(good) - 1, 0, -1):
        data = good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]
        try:
            Image.open(io.BytesIO(data)).load()
        except RuntimeError:
            return data
        except Exception:
            continue
    raise AssertionError("no flip makes Pillow raise RuntimeError")


HOSTILE = {
    "EPS": (EPS, "not an image"),
    "AVIF": (broken_avif(), "broken image"),
    "scans": (slow_jpeg(6000, 4000), "too many scans"),
    "blocks": (jpeg2000(3000, precincts=0x11), "too many code-blocks"),
    "nothing": (b"", "not an image"),
    "cut": (encoded(NOISE, "JPEG")[:-400], "truncated image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_have_their_reason_everywhere(name):
    data, reason = HOSTILE[name]
    for as_benchmark in (False, True):
        with pytest.raises(DataError, match=f"^does not decode: {reason}$"):
            decode_rgb(data, as_benchmark=as_benchmark)
    with pytest.raises(BadImage, match=f"^{reason}$"):
        convert(data, ImageRules(48))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    """A ROOT as img2dataset leaves it; its shard holds the hostile bytes beside three good images."""
    root = str(tmp_path_factory.mktemp("hostile"))
    write_raw(root, shards=1, per_shard=10)
    path = join(root, "raw", "00000.tar")
    samples = list(read_shard(path))
    for sample, (data, _) in zip(samples, HOSTILE.values(), strict=False):
        sample.members["jpg"] = data
    write_shard(path, samples)
    stats = Path(root, "raw", "00000_stats.json")
    stats.write_text(
        json.dumps({name: value for name, value in json.loads(stats.read_text()).items() if name != "clipmill"})
    )
    return root


def test_stages_name_hostile_bytes_and_keep_the_rest(hostile, student, tmp_path, caplog):
    path, model = join(hostile, "raw", "00000.tar"), tiny_coca(tmp_path / "coca")
    samples = list(read_shard(path))
    named = [
        f"{sample.key}: does not decode: {reason}"
        for sample, (_, reason) in zip(samples, HOSTILE.values(), strict=False)
    ]
    good, started = len(samples) - len(HOSTILE), time.monotonic()
    assert dedup(DedupConfig(hostile, near_bits=3)).counts["success"] == len(samples)
    settings = Decoding(method="greedy", min_tokens=1, max_tokens=4)
    counts = caption(CaptionConfig(hostile, model, num_captions=1, decoding=settings)).counts
    assert counts == {"picture does not decode": len(HOSTILE), "success": good}
    assert [line for line in named if line.replace(":", "", 1) not in caplog.text] == []
    caplog.clear()
    batches = Encoder(load_model(model), 4, "cpu").images((path, sample) for sample in samples)
    read = chain.from_iterable(batch for batch, _ in batches)
    kept = [sample.key for _, sample in read]
    assert kept == [sample.key for sample in samples[len(HOSTILE) :]]
    assert [line for line in named if line not in caplog.text] == []
    problems = list[str]()
    shown = draw_samples(hostile, len(samples), problems)
    assert sum(one.image is None for one in shown) == len(problems) == len(HOSTILE)
    config = DataConfig(data=hostile, folder="raw", batch_size=2, workers=0, streams=1)
    rows = open_samples(config, ViewConfig(), student, seed=0)
    assert sum(isinstance(rows[place], Skipped) for place in range(len(samples))) == len(HOSTILE)
    assert time.monotonic() - started < 60  # one of them alone takes Pillow minutes


def test_a_very_long_image_is_cut_before_its_shorter_side_is_enlarged(tmp_path):
    """A line of pixels: the middle of it is what the centre crop shows, the rest is never enlarged."""
    line = np.zeros((1, 65_000, 3), np.uint8)
    line[:, 32_480:32_520] = 200
    for data in (encoded(Image.fromarray(line), "PNG"), encoded(Image.fromarray(line.transpose(1, 0, 2)), "PNG")):
        captioner = Captioner(load_model(tiny_coca(tmp_path / "coca")), Decoding(), 1, batch_size=1)
        shown = captioner.preprocess(decode_rgb(data))
        assert shown.shape == (1, 32, 32, 3)
        assert np.unique(shown).tolist() == [200]  # within the bright pixels
    assert crop_extreme_aspect(corner((300, 3))).size == (300, 3)


def test_no_foreign_image_starts_a_program(tmp_path):
    """A Ghostscript that leaves a mark: Pillow's own reader runs it, no stage does."""
    program, mark = tmp_path / "gs", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    (tmp_path / "x.jpg").write_bytes(EPS)
    for code, runs in (
        ("from PIL import Image\nImage.open('x.jpg').load()", True),
        ("from shards_spec.images import decode_rgb\ndecode_rgb(open('x.jpg', 'rb').read())", False),
    ):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode != 0  # there is no image in it
        assert mark.exists() == runs
        mark.unlink(missing_ok=True)


def test_images_are_opened_in_one_place():
    openers = set()
    for floor in ("shards_spec", "pipeline", "training", "slurm"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                is_open = isinstance(node, ast.Attribute) and node.attr == "open"
                if is_open and ast.unparse(node.value) in ("Image", "PIL.Image"):
                    openers.add(path.relative_to(ROOT).as_posix())
    assert openers == {"shards_spec/images.py"}


@pytest.mark.parametrize(("side", "scans", "allowed"), [(300, 1000, True), (6000, 15, True), (6000, 60, False)])
def test_scans_times_pixels_are_limited(side, scans, allowed):
    data = slow_jpeg(side, scans)
    if allowed:
        assert decode_rgb(data).size == (side, side)
    else:
        with pytest.raises(DataError, match="too many scans"):
            decode_rgb(data)


@pytest.mark.parametrize(
    ("data", "blocks"),
    [
        (jpeg2000(1000), 250),
        (jpeg2000(1000, tile_size=(256, 256)), 20),
        (jpeg2000(1000, codeblock_size=(4, 4)), 62_500),
        (jpeg2000(1000, 0x22), 4 * 62_500),
        (jpeg2000(1000, 0x22, in_tile=True), 4 * 62_500),
        (encoded(Image.new("RGB", (1000, 1000)), "JPEG2000", codeblock_size=(4, 4)), 3 * 62_500),
    ],
)
def test_code_blocks_of_a_jpeg_2000_are_counted_before_it_is_decoded(data, blocks):
    assert blocks <= jpeg2000_blocks(data) <= 1.35 * blocks + 100
    assert Image.open(io.BytesIO(data)).size == (1000, 1000)


def test_scans_of_what_is_not_the_image_do_not_count():
    """A preview in the EXIF, bytes that a telephone puts behind the image, a marker in a comment."""
    data = draw("x")[0]
    comment = b"\xff\xfe" + (2 + 20_000).to_bytes(2, "big") + b"\xff\xda" * 10_000
    assert decode_rgb(data[:2] + comment + data[2:] + b"\xff\xda" * 10**6).tobytes() == decode_rgb(data).tobytes()


def test_large_16_bit_images_are_not_copied_at_eight_bytes_a_sample():
    """Peak memory of 36 million samples, in a process of its own: Pillow's 2 bytes twice, 1 and 4 of the result."""
    code = """
import io, resource, sys
from PIL import Image
import numpy as np
from shards_spec.images import decode_rgb
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = decode_rgb(data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, image.getpixel((0, 5999)))
"""
    samples = np.zeros((6000, 6000), np.uint16)
    samples[3000:] = 65535
    data = encoded(Image.fromarray(samples), "PNG", compress_level=1)
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=ROOT, check=True)
    grown, *pixel = done.stdout.decode().split(maxsplit=1)
    assert pixel == ["(255, 255, 255)\n"]
    assert int(grown) * 1024 < 10 * samples.size  # as int64 alone it would be 8 more
