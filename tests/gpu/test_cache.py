"""The teacher cache on a device: bits that depend on nothing but the row, full memory, precisions, the whole stage."""

import shutil
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_only import only_on_cuda
from small_data import draw, timm_checkpoint, tiny_coca, tree, write_final

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.cache.teacher import Teacher
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import Summary
from shards_spec.files import join, json_bytes
from shards_spec.models import LoadedModel, load_model, load_teacher
from shards_spec.precision import dtype_of
from shards_spec.sample import Sample
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import ViewSpec

SHARDS = 2


@pytest.fixture(scope="module")
def coca(tmp_path_factory) -> str:
    return tiny_coca(tmp_path_factory.mktemp("models") / "coca")


@pytest.fixture(scope="module")
def clip(device, coca) -> LoadedModel:
    """A model whose products have the shapes of real ones, on the CPU; in the dry run a tiny one."""
    torch.manual_seed(0)
    return load_model("ViT-B-32" if device.startswith("cuda") else coca, random_weights=True)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return timm_checkpoint(tmp_path_factory.mktemp("timm"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_final(root, [[sample(shard, index, captions=1) for index in range(6)] for shard in range(SHARDS)])
    return root


@pytest.fixture
def root(packed, tmp_path) -> str:
    return shutil.copytree(packed, tmp_path / "ds").as_posix()


def sample(shard: int, index: int, captions: int) -> Sample:
    image, caption = draw(f"{shard}/{index}")
    texts = {f"syn_{number}": f"{caption} {number}" for number in range(captions)}
    return Sample(f"{shard:05d}{index:04d}", {"jpg": image, "txt": caption.encode(), "json": json_bytes(texts)})


def copied(loaded: LoadedModel, device: str, precision: str = "fp32") -> LoadedModel:
    """The same model on a device, in any precision."""
    return replace(loaded, model=deepcopy(loaded.model).to(device, dtype_of(precision)))


def images_for(loaded: LoadedModel, count: int) -> list[np.ndarray]:
    side = loaded.image_size
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def texts_for(count: int) -> list[str]:
    return [f"a {word} ball and {number} boxes" for number, word in enumerate(["red", "green", "blue"] * count)][:count]


def run(root: str, model: str, device: str, **changes) -> Summary:
    given = {"name": "tea", "views": 2, "spec": ViewSpec(ops=2), "device": device, "processes": 0}
    return cache(CacheConfig(root, model, **{**given, **changes}))


def columns(root: str, shard: int = 0, name: str = "tea") -> dict[str, np.ndarray]:
    cached = TeacherShard(root, name, shard)
    found = sorted(set().union(*(file.names for file in cached.files)))
    return {column: cached.file(column).vectors(column).as_floats() for column in found}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_rows_do_not_depend_on_neighbours_or_position(device, clip, precision):
    if precision != "bf16":
        only_on_cuda(device)
    loaded = copied(clip, device, precision)
    teacher = Teacher(loaded, batch_size=64)
    images = images_for(loaded, 2 * teacher.rows + 5)
    texts = texts_for(2 * teacher.text_rows + 5)
    seen = teacher.embed_images(images)
    read = teacher.embed_texts(texts)
    assert np.isfinite(seen).all()
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(teacher.embed_images(images), seen), "the same images again"
    assert np.array_equal(teacher.embed_texts(texts), read), "the same texts again"
    assert np.array_equal(teacher.embed_images(images[::-1])[::-1], seen), "images in other places"
    assert np.array_equal(teacher.embed_texts(texts[::-1])[::-1], read), "texts in other places"
    for row in (0, teacher.rows - 1, len(images) - 1):
        assert np.array_equal(teacher.embed_images(images[row : row + 1])[0], seen[row]), f"image {row} alone"
        assert np.array_equal(teacher.embed_texts(texts[row : row + 1])[0], read[row]), f"text {row} alone"


def test_precisions_agree(device, clip):
    loaded = copied(clip, device)
    images = images_for(loaded, 20)
    expected = Teacher(loaded).embed_images(images)
    on_cpu = Teacher(clip).embed_images(images)
    assert np.abs(expected - on_cpu).max() < 5e-3  # cuDNN's convolutions of float32 are TF32
    for precision, least in (("bf16", 0.99), ("fp16", 0.999)):
        if precision == "fp16":
            only_on_cuda(device)
        found = Teacher(copied(clip, device, precision)).embed_images(images)
        assert found.dtype == np.float32
        assert (found * expected).sum(axis=1).min() > least, precision


def test_a_pass_that_memory_does_not_suffice_for_is_halved(device, clip):
    only_on_cuda(device)
    loaded = copied(clip, device)
    images = images_for(loaded, 300)

    def peak(rows: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        Teacher(loaded, rows).embed_images(images[:rows])
        return torch.cuda.max_memory_reserved(device)

    few, many = peak(32), peak(256)
    assert many > few + 2**27
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((few + 0.75 * (many - few)) / total)
        teacher = Teacher(loaded, 256)
        found = teacher.embed_images(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 32 <= teacher.rows < 256
    assert np.array_equal(found, Teacher(loaded, teacher.rows).embed_images(images))


def test_a_timm_teacher(device, backbone):
    loaded = load_teacher("timm:test_vit", backbone, device=device)
    images = images_for(loaded, 20)
    teacher = Teacher(loaded, 16)
    found = teacher.embed_images(images)
    assert np.array_equal(teacher.embed_images(images[::-1])[::-1], found)
    on_cpu = Teacher(load_teacher("timm:test_vit", backbone)).embed_images(images)
    assert np.abs(found - on_cpu).max() < 5e-3


class Slow(torch.nn.Module):
    """An image encoder whose passes take the device ``cycles``, and its host next to nothing."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.cycles = cycles
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(self.cycles)
        return pixels.mean((2, 3)) + self.bias


def test_the_host_works_while_the_device_does(device):
    only_on_cuda(device)
    rows, passes = 4, 6
    model = Slow(200_000_000).to(device)  # about 0.1 s
    teacher = Teacher(LoadedModel(model, None, {}, 8, (0.5,) * 3, (0.5,) * 3), rows)
    images = images_for(teacher.loaded, rows * passes)

    def seconds(host: float) -> tuple[float, float]:
        """Of all, and of the device's waiting, when the host needs ``host`` for the images of a pass."""

        def items():
            for image in images:
                time.sleep(host / rows)
                yield image

        teacher.start_clock()
        start = time.perf_counter()
        teacher.embed_images(items())
        return time.perf_counter() - start, teacher.waited_s

    seconds(0)
    alone, waited = seconds(0)
    assert waited < 0.1 * alone
    beside, waited = seconds(0.7 * alone / passes)
    assert beside < 1.3 * alone, "else the one waits for the other"
    assert waited < 0.3 * alone
    slow, waited = seconds(3 * alone / passes)
    assert 0.5 * slow < waited < slow


def test_the_stage_makes_the_same_bytes_at_once_and_bit_by_bit(root, device, coca, tmp_path):
    changed = [[sample(shard, index, captions=3) for index in range(6)] for shard in range(SHARDS)]
    summary = run(root, coca, device)
    assert summary.measurements["new_image_vectors"] == 6 * SHARDS * 2
    assert 0 <= summary.measurements["waited_s"] <= summary.measurements["embedding_s"]
    first = tree(root)
    again = shutil.copytree(root, tmp_path / "again").as_posix()
    run(again, coca, device, overwrite=True)
    parquet = {path: digest for path, digest in first.items() if path.endswith(".parquet")}
    assert {path: tree(again)[path] for path in parquet} == parquet, "two runs"

    write_final(root, changed)
    summary = run(root, coca, device, views=4)  # two more views and two more captions of each
    assert summary.measurements["new_image_vectors"] == 6 * SHARDS * 2
    assert summary.measurements["new_text_vectors"] == 6 * SHARDS * 2
    write_final(again, changed)
    run(again, coca, device, views=4, overwrite=True)
    for shard in range(SHARDS):
        grown, made_at_once = columns(root, shard), columns(again, shard)
        assert sorted(grown) == sorted(made_at_once)
        for column, vectors in made_at_once.items():
            assert np.array_equal(grown[column], vectors), column
    assert [problem for problem in check(CheckConfig(root)) if "teacher/" in problem] == []


def test_the_stage_on_a_device_is_the_cpus_in_bf16(root, device, coca):
    only_on_cuda(device)
    run(root, coca, device, processes=2)
    run(root, coca, "cpu", name="cpu")
    for column, vectors in columns(root, name="cpu").items():
        similar = (columns(root)[column].astype(np.float32) * vectors).sum(axis=1)
        assert similar.min() > 0.99, column
    assert Path(join(root, "logs", "cache-tea.jsonl")).exists()
