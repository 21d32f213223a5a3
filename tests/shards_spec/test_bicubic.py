"""Resizing in whole numbers: the definition against PyTorch on every kind of processor and against Pillow."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards_spec import bicubic
from shards_spec.bicubic import resize_bicubic, resize_exactly


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """As Pillow keeps RGB: four samples a pixel."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 256), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pytorch_gives_the_defined_pixels(height, width, size, seed):
    pixels = noise(height, width, seed)
    np.testing.assert_array_equal(bicubic._resize_by_torch(pixels, size), resize_exactly(pixels, size))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (9000, 2), (224, 224)])
def test_extreme_shapes(shape):
    pixels = noise(*shape)
    resized = resize_bicubic(pixels, 224)
    np.testing.assert_array_equal(resized, resize_exactly(pixels, 224))
    if shape == (224, 224):
        np.testing.assert_array_equal(resized, pixels)


def test_flat_colours_stay_what_they_are():
    for level in (0, 1, 127, 254, 255):
        pixels = np.full((37, 91, 3), level, np.uint8)
        assert (resize_bicubic(pixels, 64) == level).all()
        assert (resize_bicubic(pixels, 16) == level).all()


def test_pillow_is_hardly_another():
    gradient = np.add.outer(np.arange(90) * 2, np.arange(120))[..., None].repeat(3, 2).clip(0, 255)
    for pixels in (noise(90, 120)[..., :3].copy(), gradient.astype(np.uint8)):
        for size in (32, 64, 224):
            by_pillow = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), int)
            difference = np.abs(by_pillow - resize_bicubic(pixels, size))
            assert difference.max() <= 2
            assert (difference > 0).mean() < 0.02


def test_without_vector_instructions_pytorch_gives_the_same_pixels():
    """Each kind of processor has a kernel of its own; the plainest one is to be had everywhere."""
    code = "from shards_spec.bicubic import _torch_agrees; print(_torch_agrees())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def test_a_pytorch_with_other_pixels_does_not_serve(monkeypatch, caplog):
    monkeypatch.setattr(bicubic, "_resize_by_torch", lambda pixels, size: resize_exactly(pixels, size) ^ 1)
    bicubic._torch_agrees.cache_clear()
    pixels = noise(20, 30)
    try:
        np.testing.assert_array_equal(resize_bicubic(pixels, 16), resize_exactly(pixels, 16))
        assert "resizes a test image to other pixels" in caplog.text
        assert len(caplog.records) == 1
    finally:
        bicubic._torch_agrees.cache_clear()


def test_one_thread_resizes():
    """Several would wait for each other, which on a busy machine takes many times as long."""
    torch = pytest.importorskip("torch")
    pixels = noise(250, 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            resized = bicubic._resize_by_torch(pixels, 224)
    finally:
        torch.set_num_threads(threads)
    used = {event.key for event in profile.key_averages()}
    assert "aten::_upsample_bicubic2d_aa" in used
    assert resized.flags.c_contiguous  # else the next step would gather it sample by sample
    assert not used & {"aten::copy_", "aten::contiguous", "aten::clone"}
