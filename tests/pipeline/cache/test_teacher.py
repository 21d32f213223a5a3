"""The teacher: rows that depend on nothing else, passes that memory suffices for, storage that keeps affinities."""

import logging
import time

import numpy as np
import pytest
import torch
from small_data import tiny_coca

from pipeline.cache.teacher import CPU_ROWS, Teacher
from shards_spec.embeddings import encode_vectors
from shards_spec.files import UserError
from shards_spec.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_coca(tmp_path_factory.mktemp("models") / "coca")


def test_rows_do_not_depend_on_batches(model):
    """Bit for bit: any batch size, any neighbours, any place in the batch."""
    loaded = load_model(model)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (CPU_ROWS + 5, 32, 32, 3), np.uint8))
    texts = [f"a {word} ball on a wall" for word in ["red", "green", "blue", "yellow"]] * 6
    features, words = Teacher(loaded).embed_images(images), Teacher(loaded).embed_texts(texts)
    assert np.array_equal(Teacher(loaded).embed_images(images[::-1])[::-1], features)
    for size in (1, 2, 7, CPU_ROWS, len(images)):
        teacher = Teacher(loaded, batch_size=size)
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        assert np.array_equal(teacher.embed_images(images), features)
        assert np.array_equal(np.concatenate([teacher.embed_images(part) for part in parts]), features), size
        assert np.array_equal(np.concatenate([teacher.embed_texts([text]) for text in texts[:4]]), words[:4])


class Narrow(torch.nn.Module):
    """An image encoder on a device with memory for ``most`` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.seen = []
        self.linear = torch.nn.Linear(3 * 64, 8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return self.linear(pixels.flatten(1))


def test_out_of_memory_halves_the_batch(caplog):
    model = Narrow(5)
    teacher = Teacher(LoadedModel(model, None, {}, 8, (0.5,) * 3, (0.5,) * 3))
    images = list(np.random.default_rng(0).integers(0, 256, (18, 8, 8, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        found = teacher.embed_images(images)
    assert model.seen == [16, 8, 4, 4, 4, 4, 4]
    assert "out of memory with 16 rows; continuing with 8 at a time" in caplog.text
    pixels = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = torch.nn.functional.normalize(model.linear(pixels.flatten(1)), dim=-1).detach().numpy()
    assert np.abs(found - expected).max() < 1e-6
    with pytest.raises(UserError, match="out of memory with one row at a time"):
        Teacher(LoadedModel(Narrow(0), None, {}, 8, (0.5,) * 3, (0.5,) * 3)).embed_images(images)


def test_every_step_of_a_pass_has_all_its_rows(monkeypatch):
    """CUDA sums up a row in an order that depends on the number of rows: copies are dropped last of all."""
    normalised = []
    normalize = torch.nn.functional.normalize
    monkeypatch.setattr(
        torch.nn.functional, "normalize", lambda rows, dim: normalised.append(len(rows)) or normalize(rows, dim=dim)
    )
    model = Narrow(99)
    teacher = Teacher(LoadedModel(model, None, {}, 8, (0.5,) * 3, (0.5,) * 3))
    assert len(teacher.embed_images(np.zeros((CPU_ROWS + 3, 8, 8, 3), np.uint8))) == CPU_ROWS + 3
    assert normalised == model.seen == [CPU_ROWS, CPU_ROWS]


def test_an_image_may_be_overwritten_after_the_next_one():
    teacher = Teacher(LoadedModel(Narrow(99), None, {}, 8, (0.5,) * 3, (0.5,) * 3))
    images = np.random.default_rng(0).integers(0, 256, (2 * CPU_ROWS + 3, 8, 8, 3), np.uint8)
    place = np.empty_like(images[0])

    def in_one_place():
        for image in images:
            place[:] = image
            yield place

    assert np.array_equal(teacher.embed_images(in_one_place()), teacher.embed_images(images))


def test_what_the_teacher_waits_for_is_its_input():
    def slowly(images):
        for image in images:
            time.sleep(0.01)
            yield image

    images = np.zeros((CPU_ROWS + 4, 8, 8, 3), np.uint8)
    teacher = Teacher(LoadedModel(Narrow(99), None, {}, 8, (0.5,) * 3, (0.5,) * 3))
    start = time.monotonic()
    teacher.embed_images(slowly(images))
    assert 0.01 * len(images) <= teacher.waited_s <= time.monotonic() - start
    teacher.start_clock()
    assert teacher.waited_s == 0


@pytest.mark.parametrize(("dtype", "most", "mean"), [("float16", 0.005, 1e-5), ("int8", 0.05, 1e-4)])
def test_what_storage_does_to_affinities(dtype, most, mean):
    """Row-softmax at scale 100 of 1024 pairs with 768 numbers; cosines are 0.25 of pairs, 0.12 of others, +- 0.035."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1024, 768)) + rng.normal(size=(1, 768))
    text = 0.15 * image + 0.8 * rng.normal(size=image.shape)
    image, text = (own / np.linalg.norm(own, axis=1, keepdims=True) for own in (image, text))

    def affinities(image: np.ndarray, text: np.ndarray) -> np.ndarray:
        logits = 100 * image.astype(np.float64) @ text.astype(np.float64).T
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    stored = [encode_vectors(own, dtype).as_floats() for own in (image, text)]
    error = np.abs(affinities(*stored) - affinities(image, text))
    print(f"{dtype}: max {error.max():.2e}, mean {error.mean():.2e}, per row {error.sum(axis=1).mean():.2e}")
    assert error.max() < most
    assert error.mean() < mean
