"""Steps whose loss or gradient is not finite: skipped, counted, kept, and too many of them."""

import math
import os
from pathlib import Path

import pytest
import torch
from small_training import (
    TINY_RESNET,
    assert_same_run,
    final_weights,
    steady_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
)

from shards_spec.files import UserError
from training.recipes.clip import ClipTask
from training.runs.checkpoint_files import load_checkpoint
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A packed dataset of 3 shards with a student models/clip."""
    return write_every_root(tmp_path_factory.mktemp("data"), broken=("000020001",))


@pytest.mark.parametrize("often", [1, 3])
def test_a_loss_that_is_not_finite_stops_after_some_in_a_row(root, tmp_path, often):
    fields = {"lr": 1e30, "warmup": 0, "checkpoint_steps": 1, "max_nonfinite": often}
    config = tiny_config("clip", root, str(tmp_path / "run"), **fields)
    with pytest.raises(UserError, match=r"not finite at step [2-9] \(contrastive nan; first keys \['0000") as error:
        train("clip", config)
    assert f"{often} in a row" in str(error.value)
    assert len(os.listdir(tmp_path / "run" / "nonfinite")) == often


def poison(monkeypatch, steps):
    """Losses of these steps are NaN."""
    losses = ClipTask.losses

    def poisoned(self, features, step):
        found = losses(self, features, step)
        return {name: value * math.nan for name, value in found.items()} if step + 1 in steps else found

    monkeypatch.setattr(ClipTask, "losses", poisoned)


def test_a_step_whose_loss_is_not_finite_is_skipped(root, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, (3, 4, 6, 7, 9, 10))
    model = tiny_clip(tmp_path / "resnet", vision=TINY_RESNET)
    fields = {"model": model, "checkpoint_steps": 1, "keep_checkpoints": 99}
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), **fields))
    states = {path.stem: load_checkpoint(path) for path in Path(out, "checkpoints").glob("*.pt")}
    for step, before in ((3, 2), (4, 2), (7, 5)):
        weights, others = (states[f"step_{number:06d}"]["task"] for number in (step, before))
        assert all(torch.equal(weights[name], others[name]) for name in weights), "running statistics, too"
    assert not torch.equal(states["step_000004"]["task"]["student.logit_scale"], weights["student.logit_scale"])
    run = steady_metrics(out)
    assert [line["nonfinite"] for line in run] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 6]
    assert [line["loss"] is None for line in run] == [line["grad_norm"] is None for line in run]
    kept = sorted(os.listdir(f"{out}/nonfinite"))
    assert kept == ["step_000007.pt", "step_000009.pt", "step_000010.pt"]
    state = torch.load(f"{out}/nonfinite/step_000009.pt")
    assert (state["step"], list(state["losses"]), len(state["batches"])) == (9, ["contrastive"], 1)
    assert state["batches"][0]["images"].shape[1:] == (3, 32, 32)
    assert len(state["batches"][0]["keys"]) == len(state["batches"][0]["tokens"])
    assert "not finite at step 9 (contrastive nan; first keys ['0000" in caplog.text


def test_a_gradient_that_is_not_finite_is_skipped_too(root, tmp_path, monkeypatch, caplog):
    losses = ClipTask.losses

    def steep(self, features, step):
        found = losses(self, features, step)
        return {"contrastive": found["contrastive"] + (features["image"].sum() * 0).sqrt()} if step == 2 else found

    monkeypatch.setattr(ClipTask, "losses", steep)
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), steps=4))
    assert [line["nonfinite"] for line in steady_metrics(out)] == [0, 0, 1, 1]
    assert "the gradient is not finite at step 3" in caplog.text
    assert all(value.isfinite().all() for value in final_weights(out).values())


@pytest.mark.parametrize("scale", [2.0**4, 0.5])
def test_fp16_goes_on_after_a_skipped_step(scale, root, tmp_path, monkeypatch):
    """A loss that is not finite leaves the scale as it is; a scale below 1 is not lowered further, the step counts."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *words, **more: scaler(*words, **more, init_scale=scale))
    poison(monkeypatch, (2, 4))
    run = steady_metrics(train("clip", tiny_config("clip", root, str(tmp_path / "run"), precision="fp16", steps=6)))
    assert [line["nonfinite"] for line in run] == [0, 1, 1, 2, 2, 2]
    assert {line["loss_scale"] for line in run} == {scale}
    assert run[-1]["grad_norm"] > 0


def test_a_scaled_loss_that_overflows_lowers_the_scale(root, tmp_path, monkeypatch):
    """Such a step is skipped and counts as a step, and the scale is part of a checkpoint."""
    fields = {"precision": "fp16", "checkpoint_steps": 4, "keep_checkpoints": 9}
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *words, **more: scaler(*words, **more, init_scale=2.0**40))
    whole = train("clip", tiny_config("clip", root, str(tmp_path / "whole"), **fields))
    run = steady_metrics(whole)
    assert [line["step"] for line in run] == list(range(1, 13))
    assert run[0]["grad_norm"] is None
    assert [line["loss_scale"] for line in run[:3]] == [2.0**39, 2.0**38, 2.0**37]
    assert {line["nonfinite"] for line in run} == {0}
    again = train("clip", tiny_config("clip", root, str(tmp_path / "again"), **fields))
    (Path(again) / "checkpoints" / "step_000012.pt").unlink()
    train("clip", tiny_config("clip", root, again, **fields))
    assert_same_run(whole, again)
