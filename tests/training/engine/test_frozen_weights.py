"""Frozen weights in bf16: the memory they take, what becomes of features, and that what is saved is exact."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from small_training import (
    TINY_VIT,
    assert_same_run,
    read_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
    write_retrieval,
)
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import load_model
from training.engine.frozen_weights import exact_weights, halve_frozen_weights
from training.engine.memory_estimate import bytes_of
from training.models.mobileclip import forward_shared
from training.models.teacher import FrozenTeacher
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.task import Task
from training.trainer import predict, prepare, train

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS = {"precision": "bf16", "steps": 3, "checkpoint_steps": 1, "keep_checkpoints": 9, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_every_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """RUN folders of SiCLIP with its frozen weights in fp32 and in bf16, which is measured too."""
    folder = tmp_path_factory.mktemp("runs")
    measured = {"eval_data": write_retrieval(folder / "eval", 4)}
    return {
        kind: train("siclip", siclip(root, folder / kind, frozen_precision=kind, **measured))
        for kind in ("fp32", "bf16")
    }


def siclip(root, out, **fields):
    return tiny_config("siclip", root, str(out), **{**FIELDS, **fields})


def taught(folder):
    """A task with a live teacher of four blocks, and pairs for it."""
    torch.manual_seed(0)
    vision = {**TINY_VIT, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
    loaded = load_model(tiny_clip(folder / "teacher", vision=vision), random_weights=True)
    task = Task(nn.Linear(2, 2))
    task.frozen = FrozenTeacher.live("teacher", loaded)
    batch = {"images": torch.randn(4, 3, 32, 32), "tokens": torch.randint(1, 100, (4, 16))}
    return task, batch


def features(task, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return [value.float() for value in task.frozen.features(batch).values()]


def test_a_live_teacher_takes_half_the_memory_and_teaches_the_same(tmp_path):
    task, batch = taught(tmp_path)
    before, whole = features(task, batch), bytes_of(task.frozen.tensors())
    halve_frozen_weights(task, "bf16")
    for found, expected in zip(features(task, batch), before, strict=True):
        assert F.cosine_similarity(found, expected).min() > 0.9999
    assert bytes_of(task.frozen.tensors()) < 0.52 * whole
    kept = {type(part).__name__ for part in task.frozen.model.modules() if has_fp32(part)}
    assert kept == {"LayerNorm", "CLIP", "VisionTransformer"}  # scales, positions, projections
    assert not task.exact_weights, "a teacher is not saved"
    assert task.student.weight.dtype == torch.float32, "what is trained stays as it is"


def has_fp32(part):
    return any(weight.dtype == torch.float32 for weight in part.parameters(recurse=False))


def test_checkpoints_and_averages_have_the_exact_values(runs):
    task, other = (load_checkpoint(RunFolder(run).newest()) for run in (runs["bf16"], runs["fp32"]))
    frozen = [name for name in task["task"] if name.startswith(("student.visual.trunk.stem.", "student.text.token_"))]
    assert len(frozen) > 5
    for name in frozen:
        assert torch.equal(task["task"][name], other["task"][name]), name
        own = name.removeprefix("student.")
        if own in task["ema"]:
            torch.testing.assert_close(task["ema"][own], other["task"][name], rtol=1e-6, atol=1e-7)
    for state in (task["task"], task["ema"]):
        assert not [name for name, value in state.items() if value.dtype == torch.bfloat16]
    assert list(task["task"]) == list(other["task"])
    assert set(task["ema"]) == set(other["ema"])


def test_a_run_is_near_the_one_in_fp32_and_is_measured_in_fp32(runs):
    near, usual = read_metrics(runs["bf16"]), read_metrics(runs["fp32"])
    for line, expected in zip(near, usual, strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=0.02)
    assert "image_retrieval_recall@1" in near[-1]["eval"]


def test_resuming_is_one_go(runs, root, tmp_path):
    out = shutil.copytree(runs["bf16"], tmp_path / "run")
    (out / "checkpoints" / "step_000003.pt").unlink()
    eval_data = RunFolder(str(out)).config()["eval_data"]
    train("siclip", siclip(root, out, frozen_precision="bf16", eval_data=eval_data))
    assert_same_run(out, runs["bf16"])


def test_within_exact_weights_the_student_is_as_it_was(root):
    config = siclip(root, "unused")
    usual = prepare("siclip", config).task
    before = usual.state_dict()
    run = dataclasses.replace(config.run, frozen_precision="bf16")
    task = prepare("siclip", dataclasses.replace(config, run=run)).task
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which rounds the same weights at each use
        assert torch.equal(*(forward_shared(one.base.model, pixels) for one in (usual, task)))
    frozen = set(task.exact_weights)
    assert {name for name, value in task.state_dict().items() if value.dtype == torch.bfloat16} == frozen
    with exact_weights(task):
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert task.state_dict()["student.text.token_embedding.weight"].dtype == torch.bfloat16


def test_the_prediction_counts_them(root):
    whole, halved = (predict("siclip", siclip(root, "unused", frozen_precision=kind))[""] for kind in ("fp32", "bf16"))
    assert halved.weights < 0.75 * whole.weights
    assert halved.average < 0.75 * whole.average


@pytest.mark.parametrize(
    ("recipe", "precision", "message"),
    [
        ("siclip", "fp32", "train with --precision bf16, or leave it out"),
        ("tinyclip", "bf16", "would not be used: this run trains all its weights and has no live teacher"),
    ],
)
def test_where_it_does_not_help_it_is_refused(recipe, precision, message, root):
    config = tiny_config(recipe, root, "unused", precision=precision, frozen_precision="bf16")
    with pytest.raises(UserError, match=message):
        prepare(recipe, config)
