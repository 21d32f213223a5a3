"""Bytes to bytes: every mode, orientation and size; damaged and hostile files."""

import io
import json
import random
import zlib

import numpy as np
import pytest
from bench.photos import photo
from cykooz_resizer import CpuExtensions, Resizer
from PIL import Image
from web_server import make_image

from pipeline.ingest import images
from pipeline.ingest.images import BadImage, ImageRules, _decode, convert, shrink, shrunk_size


def test_small_upright_rgb_jpegs_keep_their_bytes():
    data = make_image(1, (90, 48))
    result = convert(data, ImageRules(48))
    assert (result.data, result.width, result.height, result.exif) == (data, 90, 48, "{}")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 64), (72, 48)),
        ((64, 96), (48, 72)),
        ((1600, 800), (96, 48)),
        ((4000, 60), (3200, 48)),
        ((40, 200), (40, 200)),
    ],
)
def test_the_shorter_side_is_shrunk(size, expected):
    result = convert(make_image(1, size), ImageRules(48))
    assert (result.width, result.height, result.original_width, result.original_height) == (*expected, *size)
    assert Image.open(io.BytesIO(result.data)).size == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 24), (160, 96)])
def test_orientation_is_applied(orientation, size):
    upright = Image.new("RGB", size, "red")
    upright.paste("blue", (0, 0, size[0] // 2, size[1]))
    upright.paste("green", (0, 0, size[0] // 4, size[1] // 2))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the camera's image
    camera = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = orientation, "Acme"
    camera.save(file, "JPEG", quality=95, exif=exif)
    result = convert(file.getvalue(), ImageRules(48))
    shown = Image.open(io.BytesIO(result.data)).resize(size)
    assert (result.original_width, result.original_height) == size
    assert json.loads(result.exif) == {"Image Orientation": str(orientation), "Image Make": "Acme"}
    assert np.abs(np.asarray(shown, int) - np.asarray(upright, int)).mean() < 12


def pixel(data: bytes) -> tuple[int, ...]:
    result = Image.open(io.BytesIO(convert(data, ImageRules(16)).data))
    assert (result.format, result.mode) == ("JPEG", "RGB")
    return result.getpixel((8, 8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 127)), "WEBP", lossless=True), (128, 128, 128)),
        (encoded(Image.new("LA", (32, 32), (0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("L", (32, 32), 100), "JPEG"), (100, 100, 100)),
        (encoded(Image.new("1", (32, 32), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGB", (32, 32), (0, 200, 0)).quantize(4), "PNG"), (0, 200, 0)),
        (encoded(Image.new("RGB", (32, 32), (0, 200, 0)).quantize(4), "GIF", transparency=0), (255, 255, 255)),
        (encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95), (254, 0, 0)),
        (encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "TIFF"), (254, 0, 0)),
        (encoded(Image.fromarray(np.full((32, 32), 30_000, np.uint16)), "PNG"), (117, 117, 117)),
        (encoded(Image.fromarray(np.full((32, 32), 30_000, np.uint16)), "TIFF"), (117, 117, 117)),
        (encoded(Image.new("RGB", (32, 32), (10, 20, 200)), "BMP"), (10, 20, 200)),
    ],
)
def test_every_mode_becomes_rgb_on_white(data, expected):
    assert np.abs(np.subtract(pixel(data), expected)).max() <= 4


def bomb() -> bytes:
    """A PNG header that announces 30,000 x 30,000 pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (make_image(1, (300, 300))[:1500], "truncated image"),
        (make_image(1, (300, 300), progressive=True)[:1500], "truncated image"),
        (make_image(1, (300, 300), "PNG")[:600], "truncated image"),
        (bomb(), "too many pixels"),
    ],
)
def test_bytes_that_are_no_image(data, reason):
    with pytest.raises(BadImage, match=f"^{reason}$"):
        convert(data, ImageRules(48))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_damaged_bytes_give_a_image_or_a_named_reason(form):
    data, rng = make_image(3, (80, 60), form), random.Random(form)
    reasons = set()
    for _ in range(60):
        broken = bytearray(data[: rng.randrange(1, len(data) + 1)])
        for _ in range(rng.randrange(6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            convert(bytes(broken), ImageRules(32))
        except BadImage as error:
            reasons.add(str(error))
    assert reasons <= {"not an image", "unsupported TIFF", "truncated image", "broken image", "too many pixels"}


def test_exif_is_text_that_json_can_hold():
    exif = Image.Exif()
    exif[0x010F] = "Ac\x00me"
    exif[0x9286] = b"ASCII\0\0\0\xff\xfe"
    exif[0x927C] = b"x" * 5000
    exif.get_ifd(0x8769)[0x829A] = 1 / 60
    result = convert(make_image(1, exif=exif), ImageRules(48))
    assert all(isinstance(value, str) and len(value) <= 1000 for value in json.loads(result.exif).values())
    assert "EXIF ExposureTime" in json.loads(result.exif)


def area_resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Each new pixel is the mean of what it covers, fractions counted: the filter img2dataset shrinks with."""

    def matrix(old: int, new: int) -> np.ndarray:
        edges = np.arange(new + 1) * old / new
        left, right = edges[:-1, None], edges[1:, None]
        cover = np.minimum(right, np.arange(old) + 1) - np.maximum(left, np.arange(old))
        return np.clip(cover, 0, None) * new / old

    rows = np.tensordot(matrix(pixels.shape[0], height), pixels, 1)
    return np.einsum("xw,ywc->yxc", matrix(pixels.shape[1], width), rows, optimize=True)


def fidelity(one: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - reference) ** 2)))


def scaled_and_shrunk(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The pixels that `convert` encodes."""
    pixels, extent = _decode(Image.open(io.BytesIO(data)), data, size)
    return np.asarray(shrink(pixels, size, extent or pixels.size))


def test_scaled_decoding_is_near_to_lanczos():
    """Photos of 300 to 1300 pixels, against a full decode and Pillow's Lanczos; no second JPEG encoding in between."""
    ours, theirs = [], []
    for seed in range(24):
        data = photo(seed)
        full = Image.open(io.BytesIO(data))
        size = shrunk_size(full.size, 256)
        reference = np.asarray(full.resize(size, Image.Resampling.LANCZOS), float)
        ours.append(fidelity(scaled_and_shrunk(data, size), reference))
        theirs.append(fidelity(area_resized(np.asarray(full, float), *size), reference))
    print(f"scaled decode and shrink {np.mean(ours):.1f} dB, full decode and area filter {np.mean(theirs):.1f} dB")
    assert np.mean(ours) > 43
    assert min(ours) > 38


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1025, 1025), (2049, 2049), (1023, 683), (640, 427), (4097, 4097), (6000, 3501)])
def test_sizes_that_do_not_divide_are_not_stretched(format, size):
    """The last column and row of a half or a mean of whole pixels show less than the others."""
    image = Image.open(io.BytesIO(photo(3))).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format, **({"quality": 95} if format == "JPEG" else {"compress_level": 1}))
    full = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    for image_size in (256, 200, 100):
        small = shrunk_size(size, image_size)
        reference = np.asarray(full.resize(small, Image.Resampling.BICUBIC), float)
        assert fidelity(scaled_and_shrunk(file.getvalue(), small), reference) > 40


@pytest.mark.parametrize("seed", range(4))
def test_shrinking_is_nearly_pillows_bicubic(seed):
    image = Image.open(io.BytesIO(photo(seed))).convert("RGB")
    for size in (shrunk_size(image.size, 256), (64, image.height), (image.width - 1, 17)):
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC), int)
        apart = np.abs(np.asarray(shrink(image, size, image.size), int) - expected)
        assert apart.max() <= 3
        assert apart.mean() < 0.5


@pytest.mark.parametrize("size", [(256, 256), (341, 255), (1, 300), (17, 511)])
def test_shrinking_is_the_same_on_every_processor(size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 517, 3), dtype=np.uint8))
    shrunk = shrink(image, size, image.size).tobytes()
    for extensions in (CpuExtensions.none, CpuExtensions.sse4_1, CpuExtensions.avx2):

        class OfProcessor(Resizer):
            def __init__(self, extensions=extensions):
                super().__init__()
                self.cpu_extensions = extensions

        monkeypatch.setattr(images, "Resizer", OfProcessor)
        assert shrink(image, size, image.size).tobytes() == shrunk


def test_a_much_larger_image_is_reduced_first():
    """By a mean of whole pixels, which leaves so many that the filter after it hardly differs."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    image = smooth.resize((3500, 2000), Image.Resampling.BICUBIC)
    reference = np.asarray(image.resize((175, 100), Image.Resampling.BICUBIC), float)
    assert fidelity(np.asarray(shrink(image, (175, 100), image.size)), reference) > 45
