"""Samples of images as arrays."""

import numpy as np
import pytest
from PIL import Image

from shards_spec.pixels import from_rgbx, rgbx


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (2500, 2300)], ids=["one pixel", "small", "of several pieces"])
def test_samples_are_the_images_and_cannot_be_written(size):
    width, height = size
    colours = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(colours)
    samples = rgbx(image)
    assert samples.shape == (height, width, 4)
    np.testing.assert_array_equal(samples[..., :3], colours)
    assert not samples.flags.writeable
    copied = from_rgbx(samples.copy())
    assert copied.tobytes() == image.tobytes()


def test_samples_outlive_their_image():
    image = Image.new("RGB", (300, 200), (10, 20, 30))
    samples = rgbx(image)
    del image
    Image.new("RGB", (300, 200), (1, 1, 1))
    assert samples[..., :3].reshape(-1, 3).tolist() == [[10, 20, 30]] * 60_000
