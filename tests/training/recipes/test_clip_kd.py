"""CLIP-KD's losses in the recipes: what is computed, masked, kept in a checkpoint and left out of a student."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_dist import fork
from small_tinyclip import plain_config, write_tinyclip_root
from small_training import (
    TINY_VIT,
    final_weights,
    read_metrics,
    shard_keys,
    steady_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
    write_teacher,
)

from shards_spec.files import UserError
from training.config import ModelConfig
from training.configs.teaching import ClipKdConfig
from training.data.batches import load_batches
from training.losses.clip_kd import gradient_loss
from training.losses.distillation import element_feature_loss
from training.losses.similarity import Similarity
from training.models.masked_image import encode_kept_patches
from training.models.tinymim import tower_of
from training.recipes import siclip, tinyclip
from training.runs.run_folder import RunFolder
from training.runs.student import load_run, new_student
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
ALL = {"gd_weight": 1e3, "afd_weight": 1.0, "mfd_weight": 5.0, "mask_ratio": 0.5, "feature_weight": 1.0}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 160}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Caches planted (16 dimensions, as the student) and wide (24); students clip and many (16 patches)."""
    root = write_tinyclip_root(tmp_path_factory.mktemp("data"))
    write_teacher(root, shard_keys(), "wide", salt="wide/", dim=24)
    tiny_clip(Path(root, "models", "many"), vision={**TINY_VIT, "patch_size": 8})
    return root


def small(root, out="unused", **fields):
    return plain_config(root, out, "many", **fields)


def test_terms_are_weighted_functions_of_the_features(root):
    config = small(root, teacher=("planted", "wide"), **ALL)
    _, samples, task = tinyclip.prepare(config)
    features = task.train()(next(load_batches(samples, [range(8)])))
    losses = {name: value.item() for name, value in task.losses(features, 0).items()}
    assert list(losses) == ["affinity", "feature", "gradient", "augmented", "masked"]
    kd = task.clip_kd
    assert list(kd.projections) == ["1"]
    own = [(features["image"], features["text"]), kd.projections["1"](features["raw_image"], features["raw_text"])]
    taught = task.teacher.pairs(features)
    expected = {
        "gradient": [
            gradient_loss(Similarity(*a, 50.0), Similarity(*b, 50.0)) for a, b in zip(own, taught, strict=True)
        ],
        "augmented": [fuse(own[0], pair) for fuse, pair in zip(kd.fusions, taught, strict=True)],
    }
    masked = features["masked_image"]
    seen = [(F.normalize(masked, dim=-1), features["text"]), kd.projections["1"](masked, features["raw_text"])]
    expected["masked"] = [element_feature_loss(*a, *b) for a, b in zip(seen, taught, strict=True)]
    for name, weight in (("gradient", 1e3), ("augmented", 1.0), ("masked", 5.0)):
        assert losses[name] == pytest.approx(weight * sum(expected[name]).item() / 2, rel=1e-5)


@pytest.mark.parametrize("vision", [{**TINY_VIT, "patch_size": 8}, TIMM], ids=["open_clip", "timm"])
def test_masked_patches_are_not_seen(vision, root, tmp_path):
    config = small(root, model=tiny_clip(tmp_path / "model", vision=vision))
    student = new_student(config.student, 0)
    model, size = student.model.eval(), student.image_size
    tower = tower_of(model)
    side = size // tower.grid[0]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = torch.arange(tower.patches).expand(2, -1)
    keep = whole[:, 1::2]
    with torch.no_grad():
        every = encode_kept_patches(model.visual, tower, images, whole)
        assert torch.allclose(every, model.encode_image(images), atol=1e-6)
        part = encode_kept_patches(model.visual, tower, images, keep)
        changed = images.clone()
        changed[:, :, :side, :side] = 9.0  # patch 0
        assert torch.equal(encode_kept_patches(model.visual, tower, changed, keep), part)
        changed[:, :, :side, side : 2 * side] = 9.0  # patch 1
        assert not torch.allclose(encode_kept_patches(model.visual, tower, changed, keep), part, atol=1e-3)


def run_of_ranks(rank, root, out, fields):
    train("tinyclip", small(root, out, **fields))


def test_maps_are_resumed_and_left_out_of_the_student_and_ranks_agree(root, tmp_path, caplog):
    fields = {
        "teacher": ("planted", "wide"),
        "steps": 4,
        "checkpoint_steps": 2,
        "batch_size": 8,
        "chunk_size": 2,
        **ALL,
    }
    with caplog.at_level(logging.INFO):
        out = train("tinyclip", small(root, tmp_path / "run", **fields))
    assert "features have 16 numbers, those of teacher wide 24: linear maps are trained" in caplog.text
    before, lines = final_weights(out), steady_metrics(out)
    maps = [name for name in before if name.startswith("clip_kd.")]
    assert len(maps) == 4 + 2 * 5  # a linear map and its bias for image and text; fusions of two teachers with scales
    (tmp_path / "run" / "checkpoints" / "step_000004.pt").unlink()
    halfway = final_weights(out)
    assert not any(torch.equal(before[name], halfway[name]) for name in maps)
    train("tinyclip", small(root, tmp_path / "run", **fields))
    assert steady_metrics(out) == lines
    assert all(torch.equal(before[name], value) for name, value in final_weights(out).items())
    student, _ = load_run(out)
    assert not any("clip_kd" in name for name in student.model.state_dict())
    fork(2, run_of_ranks, root, str(tmp_path / "two"), fields)
    for mine, theirs in zip(lines, steady_metrics(tmp_path / "two"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_siclip_takes_teachers_of_other_widths(tmp_path):
    write_every_root(tmp_path)
    write_teacher(str(tmp_path), shard_keys(), "wide", dim=96)
    weights = {"gd_weight": 1.0, "gd_inverse_scale": True, "afd_weight": 1.0}
    out = str(tmp_path / "run")
    config = tiny_config("siclip", str(tmp_path), out, teacher_from="cache", teacher=("wide",), steps=2, **weights)
    assert set(read_metrics(train("siclip", config))[1]["losses"]) >= {
        "feature",
        "interactive",
        "gradient",
        "augmented",
    }
    assert "clip_kd.projections.0.image.weight" in final_weights(out)
    assert RunFolder(out).config()["afd_weight"] == 1.0
    config = dataclasses.replace(config, clip_kd=ClipKdConfig(mfd_weight=1.0, mask_ratio=0.5), inherit=False)
    vit = dataclasses.replace(config, student=ModelConfig(f"local-dir:{tmp_path}/models/clip"))
    _, samples, task = siclip.prepare(vit)
    batch = task.draw(next(load_batches(samples, [range(4)])))
    assert batch["keep"].shape == (4, 2)
    assert task.losses(task(batch), 0)["masked"] > 0
    with pytest.raises(UserError, match=r"--mfd-weight 1.0: --model '.*siclip' cannot leave patches out: it is a"):
        siclip.prepare(tiny_config("siclip", str(tmp_path), out, mfd_weight=1.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gd_weight": -1.0}, "--gd-weight -1.0: must be 0 or more"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: must be in (0, 1)"),
        ({"mfd_weight": 1.0, "mask_ratio": 0.95}, "--mask-ratio 0.95: leaves none of 16 patches"),
        ({"affinity_weight": 0.0}, "--affinity-weight 0.0: must be above 0 when the others are 0"),
        (
            {"mfd_weight": 1.0, "inherit": "auto", "model": "ViT-M-32"},
            "--mfd-weight: a student with learned masks cannot leave patches out",
        ),
    ],
)
def test_mistakes(fields, message, root):
    if fields.get("inherit") == "auto":
        fields = {"teacher_weights": f"local-dir:{root}/models/teacher", **fields}
    with pytest.raises(UserError) as error:
        tinyclip.prepare(small(root, **fields))
    assert message in str(error.value)
    assert tinyclip.prepare(small(root, affinity_weight=0.0, gd_weight=1.0)).task.clip_kd.config.is_used
