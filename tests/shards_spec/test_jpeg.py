"""simplejpeg gives Pillow's pixels and reasons: every usual kind, every scale, damage of all sorts."""

import io
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from jpegs import damaged, jpegs, outcome, outcome_of_pillow, textured
from PIL import Image
from small_images import encoded

from shards_spec import jpeg
from shards_spec.decode_cost import jpeg_frame
from shards_spec.images import decode_rgb, open_image
from shards_spec.jpeg import decode_jpeg

ROOT = Path(__file__).parents[2]
JPEGS = dict(jpegs())


def is_taken(data: bytes) -> bool:
    """Whether simplejpeg decodes it, and not Pillow."""
    return decode_jpeg(open_image(data), data) is not None


@pytest.mark.parametrize("name", JPEGS)
def test_usual_jpegs_have_pillows_pixels_at_every_scale(name):
    data = JPEGS[name]
    assert is_taken(data)
    assert outcome(data) == outcome_of_pillow(data)
    assert outcome(data, as_benchmark=True) == outcome_of_pillow(data, as_benchmark=True)
    for shorter_side in (6, 10, 20, 47):  # an eighth, a quarter, a half, the whole
        assert outcome(data, shorter_side=shorter_side) == outcome_of_pillow(data, shorter_side=shorter_side)


@pytest.mark.parametrize("size", [(16, 1), (1, 16), (16, 16), (17, 33), (640, 3), (1201, 907)])
def test_any_size_has_pillows_pixels(size):
    data = encoded(textured(*size), "JPEG", quality=90)
    assert is_taken(data)
    for shorter_side in (None, 1, 1 + size[0] // 3, 1 + size[1] // 2):
        assert outcome(data, shorter_side=shorter_side) == outcome_of_pillow(data, shorter_side=shorter_side)


PHOTO = textured(90, 70)
BASELINE = encoded(PHOTO, "JPEG")
AT_FRAME = BASELINE.index(b"\xff\xc0") + 1
RARE = {
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "two images": encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(PHOTO), colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(np.asarray(PHOTO), colorsubsampling="411"),
    "tiny": encoded(textured(3, 3), "JPEG"),  # its half and five eighths of it have the same size
    "lossless": BASELINE[:AT_FRAME] + b"\xc3" + BASELINE[AT_FRAME + 1 :],
    "arithmetic": BASELINE[:AT_FRAME] + b"\xc9" + BASELINE[AT_FRAME + 1 :],
    "no end": BASELINE[:-2],
    "cut": BASELINE[:-300],
    "between segments": BASELINE[:20] + b"junk" + BASELINE[20:],
    "PNG": encoded(PHOTO, "PNG"),
}


@pytest.mark.parametrize("name", RARE)
def test_what_is_rare_or_warned_of_is_left_to_pillow(name):
    assert not is_taken(RARE[name])
    for shorter_side in (None, 1):
        assert outcome(RARE[name], shorter_side=shorter_side) == outcome_of_pillow(
            RARE[name], shorter_side=shorter_side
        )


@pytest.mark.parametrize(
    "data",
    [
        encoded(PHOTO, "JPEG", keep_rgb=True),  # not as YCbCr, by components named R, G and B
        encoded(PHOTO, "JPEG", icc_profile=b"x" * 70_000, comment=b"\xff\xda" * 50, dpi=(300, 300)),
        BASELINE + b"\xff\xd8\xff\xe1 what a telephone puts behind an image" * 100,
        BASELINE[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + BASELINE[2:],  # Adobe's transform 0: RGB
        BASELINE[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1" + BASELINE[2:],  # 1: YCbCr
        BASELINE[:2] + BASELINE[20:],  # no JFIF
    ],
)
def test_headers_of_all_sorts_have_pillows_pixels(data):
    assert is_taken(data)
    assert outcome(data) == outcome_of_pillow(data)


def test_damage_has_pillows_pixels_or_its_reason():
    """Many are taken: a flipped bit is often a JPEG again."""
    rng = random.Random(0)
    files = list(JPEGS.values())
    taken = reasons = 0
    for _ in range(1500):
        data = damaged(rng.choice(files), rng)
        shorter_side = rng.choice([None, None, 10, 20])
        found = outcome(data, shorter_side=shorter_side)
        assert found == outcome_of_pillow(data, shorter_side=shorter_side)
        if isinstance(found, str):
            reasons += 1
        else:
            taken += is_taken(data)
    assert taken > 100
    assert reasons > 100


def test_an_image_that_was_decoded_can_be_used_like_any_other():
    image = decode_rgb(BASELINE)
    copy = image.copy()
    assert (image.mode, image.size) == ("RGB", PHOTO.size)
    image.paste((0, 0, 0), (0, 0, 50, 50))
    assert image.getpixel((9, 9)) == (0, 0, 0)
    assert copy.tobytes() == decode_rgb(BASELINE).tobytes() == np.asarray(copy).tobytes()
    assert copy.resize((20, 20)).tobytes() == Image.open(io.BytesIO(BASELINE)).resize((20, 20)).tobytes()


def test_threads_decode_side_by_side():
    data = JPEGS["progressive 4:2:0"]
    expected = outcome(data)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(outcome, [data] * 100))


@pytest.fixture
def unchecked():
    """The test images have not been decoded yet; nor are they afterwards."""
    jpeg._agrees_with_pillow.cache_clear()
    yield
    jpeg._agrees_with_pillow.cache_clear()


def test_where_a_test_image_differs_pillow_decodes_and_one_line_says_so(unchecked, monkeypatch, caplog):
    original = simplejpeg.decode_jpeg

    def one_bit_off(*args, **options):
        pixels = original(*args, **options)
        pixels[-1, -1, 0] ^= 1
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", one_bit_off)
    for _ in range(3):
        assert not is_taken(BASELINE)
        assert outcome(BASELINE) == outcome_of_pillow(BASELINE)
    assert len(caplog.records) == 1
    assert "decode a test image differently: Pillow decodes all JPEGs" in caplog.text


def test_without_simplejpeg_pillow_decodes():
    code = """
import io, sys
sys.modules["simplejpeg"] = None
from shards_spec.images import decode_rgb
sys.stdout.buffer.write(decode_rgb(sys.stdin.buffer.read()).tobytes())
"""
    done = subprocess.run([sys.executable, "-c", code], input=BASELINE, capture_output=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == (decode_rgb(BASELINE).tobytes(), b"")


def test_the_test_images_take_milliseconds(unchecked):
    jpeg._agrees_with_pillow()  # what is loaded once
    times = []
    for _ in range(5):
        jpeg._agrees_with_pillow.cache_clear()
        started = time.thread_time()
        assert jpeg._agrees_with_pillow()
        times.append(time.thread_time() - started)
    assert min(times) < 0.02  # 3 ms on a quiet machine


def test_the_kind_of_frame_is_the_files_own():
    """Not that of a preview in its EXIF or of a comment."""
    preview = encoded(textured(32, 32), "JPEG", progressive=True)
    segment = b"\xff\xe1" + (2 + len(preview)).to_bytes(2, "big") + preview
    assert jpeg_frame(BASELINE[:2] + segment + BASELINE[2:]) == b"\xc0"
    assert jpeg_frame(preview) == b"\xc2"
    assert jpeg_frame(b"") is None
