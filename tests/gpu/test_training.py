"""Training on a device: every way to compute gives the losses of fp32 on the whole batch, and runs change devices."""

import logging
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_only import only_on_cuda
from small_training import (
    TINY_RESNET,
    TINY_VIT,
    read_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
)

from shards_spec.models import load_model
from training.data.batches import load_batches
from training.engine.batch_fit import profiles
from training.engine.distributed import Ranks
from training.export import ExportConfig, export, largest_difference
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.runs.student import load_run
from training.trainer import Trainer, prepare, train

RECIPES = ("clip", "tinyclip", "siclip", "catlip")
STEPS = 4
FIELDS: dict[str, Any] = {"batch_size": 16, "steps": STEPS, "precision": "fp32"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A dataset with a teacher and labels, and tiny models."""
    return write_every_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def no_tf32():
    """Products of fp32 as the CPU has them: TF32's rounding would hide small faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", lambda kind: None)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def config_of(recipe: str, root: str, out: Path, device: str, **fields: Any) -> Any:
    """A tiny recipe on the device; CatLIP's without the noise, whose draws differ between chunks on a device."""
    if recipe == "catlip":
        fields = {"model": "timm:catlip_vit_tiny", "sides": (32, 48), "range_augment": False, **fields}
    return tiny_config(recipe, root, str(out), **{**FIELDS, "device": device, **fields})


@pytest.fixture(scope="module")
def usual(root, device, tmp_path_factory):
    """Metrics of a recipe's plain run in fp32, made once."""
    made = {}

    def of(recipe: str) -> list[dict[str, Any]]:
        if recipe not in made:
            out = tmp_path_factory.mktemp("usual") / recipe
            made[recipe] = read_metrics(train(recipe, config_of(recipe, root, out, device)))
        return made[recipe]

    return of


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    """Each step's losses are near the expected ones, and none was skipped."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert found[-1]["nonfinite"] == 0
    for line, other in zip(found, expected, strict=True):
        assert line["losses"] == pytest.approx(other["losses"], rel=rel, abs=rel), line["step"]


@pytest.fixture
def low_scale(monkeypatch):
    """The loss scale begins where no tiny model overflows, so that no step is skipped to find it."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *words, **more: scaler(*words, **more, init_scale=16.0))


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precisions_are_near_fp32(recipe, precision, root, device, usual, tmp_path):
    """A random SiCLIP's features hardly differ between images, and its BatchNorms magnify the roundings.

    After its first step it is only asked to stay finite: on an H200 its third relation loss was 0.41 off.
    """
    if (recipe, precision) != ("tinyclip", "bf16"):
        only_on_cuda(device)
    found = read_metrics(train(recipe, config_of(recipe, root, tmp_path / "run", device, precision=precision)))
    expected = usual(recipe)
    assert_close(found[:1], expected[:1], rel=0.3 if recipe == "siclip" else 0.02)
    assert_close(found, expected, rel=math.inf if recipe == "siclip" else 0.1)
    assert [line["grad_norm"] is None for line in found] == [False] * STEPS
    assert all("loss_scale" in line for line in found) == (precision == "fp16")


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("tinyclip", {"chunk_size": 5}),
        ("catlip", {"chunk_size": 5}),
        ("clip", {"chunk_size": 5, "checkpoint_activations": True, "channels_last": True, "workers": 2}),
        ("catlip", {"chunk_size": 5, "checkpoint_activations": True, "channels_last": True, "workers": 2}),
        ("siclip", {"channels_last": True, "workers": 1}),
        ("siclip", {"checkpoint_activations": True, "ema_decay": 0.9}),
        ("tinyclip", {"checkpoint_activations": True, "ema_decay": 0.9}),
    ],
    ids=str,
)
def test_ways_to_compute_the_same(recipe, fields, root, device, usual, tmp_path):
    """SiCLIP's BatchNorms normalise over a chunk, so its chunks are other mathematics."""
    if recipe != "tinyclip":
        only_on_cuda(device)
    found = read_metrics(train(recipe, config_of(recipe, root, tmp_path / "run", device, **fields)))
    assert_close(found, usual(recipe), rel=0.01)


@pytest.mark.usefixtures("low_scale")
def test_chunks_of_scaled_gradients(root, device, tmp_path):
    only_on_cuda(device)
    whole, chunks = (
        read_metrics(train("clip", config_of("clip", root, tmp_path / name, device, precision="fp16", **fields)))
        for name, fields in (("whole", {}), ("chunks", {"chunk_size": 5}))
    )
    assert [line["loss_scale"] for line in whole] == [line["loss_scale"] for line in chunks]
    assert_close(chunks, whole, rel=0.02)


@pytest.mark.parametrize("recipe", ["clip", "catlip"])
def test_resuming_on_the_device_is_one_go(recipe, root, device, tmp_path):
    """Patches are dropped, or noise is added, by the device's random stream, which a checkpoint holds."""
    fields: dict[str, Any] = {"checkpoint_steps": 2, "keep_checkpoints": 9, "ema_decay": 0.9}
    if recipe == "clip":
        fields["model"] = tiny_clip(tmp_path / "dropping", vision={**TINY_VIT, "patch_size": 4, "patch_dropout": 0.5})
    else:
        only_on_cuda(device)
        fields["range_augment"] = True
    whole = train(recipe, config_of(recipe, root, tmp_path / "whole", device, **fields))
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "checkpoints" / f"step_{STEPS:06d}.pt").unlink()
    train(recipe, config_of(recipe, root, again, device, **fields))
    found, expected = read_metrics(again), read_metrics(whole)
    assert_close(found, expected, rel=1e-3)
    assert found[-1]["grad_norm"] == pytest.approx(expected[-1]["grad_norm"], rel=0.02)


def test_a_run_moves_between_devices(root, device, tmp_path):
    """Begun on the CPU, on from step 2 on the device, from step 3 on the CPU again."""
    fields = {"checkpoint_steps": 1, "keep_checkpoints": 9, "precision": "fp32", "channels_last": True}
    fields["model"] = tiny_clip(tmp_path / "resnet", vision=TINY_RESNET)
    out = tmp_path / "run"
    train("clip", config_of("clip", root, out, "cpu", **fields))
    expected = read_metrics(out)
    for step, where, laid_out in ((2, device, False), (3, "cpu", True)):
        for later in range(step + 1, STEPS + 1):
            (out / "checkpoints" / f"step_{later:06d}.pt").unlink()
        train("clip", config_of("clip", root, out, where, **{**fields, "channels_last": laid_out}))
        assert_close(read_metrics(out), expected, rel=0.01)
        saved = load_checkpoint(RunFolder(str(out)).newest())
        assert {group["fused"] for group in saved["optimizer"]["param_groups"]} == {True}


def test_the_device_computes_what_the_cpu_does(root, device, usual, tmp_path):
    only_on_cuda(device)
    for recipe in RECIPES:
        out = train(recipe, config_of(recipe, root, tmp_path / recipe, "cpu"))
        assert_close(usual(recipe), read_metrics(out), rel=0.02)


def test_an_export_is_the_trained_student(root, device, tmp_path):
    out = train("tinyclip", config_of("tinyclip", root, tmp_path / "run", device, precision="auto", ema_decay=0.5))
    folder = tmp_path / "exported"
    export(ExportConfig(out, str(folder)))
    student, step = load_run(out)
    assert step == STEPS
    assert largest_difference(student, load_model(f"local-dir:{folder}")) == 0
    on_device = load_model(f"local-dir:{folder}", device=device)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = on_device.model.encode_image(pixels.to(device)).cpu()
        torch.testing.assert_close(found, student.model.encode_image(pixels), rtol=0.02, atol=0.02)


def test_full_memory_halves_the_chunk(root, device, tmp_path, monkeypatch, caplog):
    """With room for three quarters of what the whole batch takes, from the second step on."""
    only_on_cuda(device)
    vision = {**TINY_VIT, "layers": 8, "width": 256, "head_width": 64, "patch_size": 4}
    fields = {"batch_size": 256, "steps": 3, "model": tiny_clip(tmp_path / "wide", vision=vision), "fit": 1e3}
    whole = config_of("clip", root, tmp_path / "whole", device, **fields)
    expected = read_metrics(train("clip", whole))
    _, rows, task = prepare("clip", whole)
    [(one, size)] = profiles(whole, rows, task.to(device), device)
    del task
    half = one.at(size, chunk_size=size // 2, as_bytes=True).total
    assert one.at(size).total > half + 2**29
    step = Trainer.step
    total = torch.cuda.get_device_properties(device).total_memory

    def limited(self: Trainer, batch: dict[str, Any]) -> Any:
        if self.progress.step == 1:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(0.75 * one.at(size).total / total)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", limited)
    caplog.set_level(logging.WARNING)
    try:
        found = read_metrics(train("clip", config_of("clip", root, tmp_path / "limited", device, **fields)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 256 samples at a time" in caplog.text
    assert_close(found, expected, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_once(recipe, root, device, tmp_path):
    """What a step computes is on its way to the device before Python looks at any of it."""
    only_on_cuda(device)
    fields = {"range_augment": True} if recipe == "catlip" else {}
    config = config_of(recipe, root, tmp_path / "run", device, precision="bf16", ema_decay=0.9, **fields)
    prepared = prepare(recipe, config)
    prepared.task.to(device).train()
    trainer = Trainer(config, prepared, RunFolder(str(tmp_path / "run")), ranks=Ranks(), device=device)
    batches = trainer.batches()
    trainer.step(next(batches))
    batch = next(batches)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{wait.filename}:{wait.lineno}" for wait in waits if "called a synchronizing" in str(wait.message)]
    assert len(places) == 1, places


def test_batches_copied_ahead_are_those_that_are_not(root, device, tmp_path):
    """A step waits for the copy of its batch, and the next copy does not take its memory."""
    only_on_cuda(device)
    rows = prepare("tinyclip", config_of("tinyclip", root, tmp_path / "run", device)).rows
    ahead, plain = (
        load_batches(rows, rows.plan.positions(0, 0, 6), workers=2, device=device, prefetch=prefetch)
        for prefetch in (True, False)
    )
    for one, other in zip(ahead, plain, strict=True):
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(20):  # the step that the next copy runs beside
            busy = busy @ busy.T / 2048
        assert one["keys"] == other["keys"]
        for name, value in one.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, other[name]), name


def test_frozen_weights_in_bf16(root, device, usual, tmp_path):
    only_on_cuda(device)
    fields = {"precision": "bf16", "frozen_precision": "bf16", "ema_decay": 0.9}
    out = tmp_path / "run"
    found = read_metrics(train("siclip", config_of("siclip", root, out, device, **fields)))
    assert_close(found[:1], usual("siclip")[:1], rel=0.3)
    saved = load_checkpoint(RunFolder(str(out)).newest())
    for state in (saved["task"], saved["ema"]):
        assert not [name for name, value in state.items() if value.dtype == torch.bfloat16]


def test_compiled(root, device, usual, tmp_path):
    only_on_cuda(device)
    fields = {"compile": "on", "chunk_size": 5, "precision": "bf16"}
    found = read_metrics(train("clip", config_of("clip", root, tmp_path / "run", device, **fields)))
    assert_close(found, usual("clip"), rel=0.05)
