"""Training on imported caches: recorded views are shown with the features that they are of, what lacks is left out."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_data import write_final
from small_datacompdr import DIM, final_sample, reinforced, replay, write_reinforced
from small_training import read_metrics, tiny_clip, tiny_config, write_teacher

from pipeline.cache.config import CacheConfig, VectorSource
from pipeline.cache.stage import cache
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from shards_spec.files import DataError, UserError
from shards_spec.layout import final_parquet
from shards_spec.manifest import write_stage
from training.config import DataConfig, ModelConfig, TeacherCacheConfig
from training.data.batches import Skipped
from training.data.samples import Samples, open_samples
from training.runs.student import new_student
from training.trainer import train

VIEWS = 3
SIZES = (5, 4)
BOTH = ("ViT-L-14-openai", "ViT-L-14-datacomp_xl_s13b_b90k")
SAMPLES = [reinforced(number, "http://h") for number in range(sum(SIZES))]
LACKING = 6  # a sample whose vectors are damaged


def take(root: str, folder: str, name: str, pretrained: str) -> None:
    source = VectorSource((folder,))
    cache(
        CacheConfig(root, "ViT-L-14", pretrained, name=name, views=VIEWS, processes=1, dtype="float32", source=source)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """Two shards and both teachers' caches; ``other`` is of another source with the same uids."""
    folder = tmp_path_factory.mktemp("data")
    root = str(folder / "ds")
    samples = list(SAMPLES)
    samples[LACKING].members = {**samples[LACKING].members, "npz": b"damaged"}
    source = write_reinforced(folder / "dr", [samples])
    finals = [final_sample(number, sample, sample.captions) for number, sample in enumerate(SAMPLES)]
    write_final(root, [finals[: SIZES[0]], finals[SIZES[0] :]])
    for shard, samples_of_shard in enumerate((finals[: SIZES[0]], finals[SIZES[0] :])):
        size = {"width": 96, "height": 64}
        rows = [
            {"key": sample.key, "caption": "", "synthetic": sample.captions[1:], "synsets": [["n1"]] * 3, **size}
            for sample in samples_of_shard
        ]
        pq.write_table(pa.Table.from_pylist(rows), final_parquet(root, shard))
    block = {"config": {}, "shards": len(SIZES), "counts": {"success": sum(SIZES)}, "metrics": {}}
    write_stage(root, "pack", block)
    for name in BOTH:
        take(root, source, name, name.removeprefix("ViT-L-14-"))
    others = [reinforced(number, "http://h") for number in range(sum(SIZES))]
    for sample in others:
        sample.members["paug.json"] = SAMPLES[0].members["paug.json"]
    take(root, write_reinforced(folder / "other", [others]), "other", "openai")
    keys = [[sample.key for sample in shard] for shard in (finals[: SIZES[0]], finals[SIZES[0] :])]
    write_teacher(root, keys, "drawn")
    tiny_clip(folder / "ds" / "models" / "clip")
    return root


def opened(root: str, *names: str) -> Samples:
    student = new_student(ModelConfig(f"local-dir:{root}/models/clip"), 0)
    return open_samples(DataConfig(root), TeacherCacheConfig(names), student, seed=0)


def test_a_recorded_view_comes_with_its_features(root):
    samples = opened(root, *BOTH)
    shown = 0
    for position in range(3 * sum(SIZES)):
        item = samples[(position, 224)]
        if isinstance(item, Skipped):
            continue
        number, view = int(item["key"]), item["epoch"] % VIEWS
        sample = SAMPLES[number]
        expected = replay(Image.open(io.BytesIO(sample.image)).convert("RGB"), sample.parameters[view])
        np.testing.assert_array_equal(item["images"].numpy().transpose(1, 2, 0), expected)
        for field, part in (("teacher_image", 0), ("teacher_image_2", 1)):
            vector = sample.image_emb[view, part * DIM // 2 : (part + 1) * DIM // 2]
            torch.testing.assert_close(item[field], torch.from_numpy(vector), atol=1e-6, rtol=0)
        shown += 1
    assert shown == 3 * (sum(SIZES) - 1)


def test_a_sample_without_vectors_is_left_out_and_named(root):
    samples = opened(root, BOTH[0])
    skipped = [item for item in map(samples.__getitem__, range(sum(SIZES))) if isinstance(item, Skipped)]
    assert len(skipped) == 1
    assert f"key {LACKING:09d} has no view_0 in --from" in skipped[0].reason


def test_a_selection_leaves_out_what_has_no_vectors(root):
    rules = {"captions_where": ("cosine > -1",), "teacher": (BOTH[0],), "workers": 1}
    assert select(SelectConfig(root, "known", **rules)).counts["success"] == sum(SIZES) - 1
    student = new_student(ModelConfig(f"local-dir:{root}/models/clip"), 0)
    samples = open_samples(DataConfig(root, select="known"), TeacherCacheConfig(BOTH), student, seed=0)
    items = [samples[position] for position in range(4 * (sum(SIZES) - 1))]
    assert not [item for item in items if isinstance(item, Skipped | DataError | UserError)]
    assert f"{LACKING:09d}" not in {item["key"] for item in items}


def test_views_that_differ_are_refused(root):
    with pytest.raises(UserError, match="recorded ones of `clipmill cache --from`, and drawn ones"):
        opened(root, BOTH[0], "drawn")
    errors = [item for item in map(opened(root, BOTH[0], "other").__getitem__, range(3)) if isinstance(item, DataError)]
    assert errors
    assert "their sources differ" in str(errors[0])


@pytest.mark.integration
@pytest.mark.usefixtures("one_thread")
def test_a_student_learns_from_both_teachers(root, tmp_path):
    fields = {"inherit": "none", "teacher": BOTH, "teacher_weights": "", "steps": 3, "workers": 0, "device": "cpu"}
    run = train("tinyclip", tiny_config("tinyclip", root, str(tmp_path / "run"), **fields))
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses
    assert np.isfinite(losses).all()
