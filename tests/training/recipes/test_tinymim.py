"""TinyMIM's recipe through the trainer: targets, resume, processes, precisions, what is refused."""

import pytest
from small_training import assert_same_run, read_metrics, steady_metrics, tiny_config

from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

TINY = {
    "model": "timm:test_vit",
    "teacher": "timm:test_vit2",
    "teacher_weights": "random",
    "precision": "fp32",
    "batch_size": 8,
    "steps": 4,
}


def tiny(root, out, **fields):
    return tiny_config("tinymim", root, str(out), **{**TINY, **fields})


def test_a_run_resumes_to_the_bit(clip_root, tmp_path):
    whole = train("tinymim", tiny(clip_root, tmp_path / "whole"))
    lines = read_metrics(whole)
    assert [set(line["losses"]) for line in lines] == [{"qk", "vv"}] * 4
    config = tiny(clip_root, tmp_path / "parts", checkpoint_steps=2)
    train("tinymim", config)
    (tmp_path / "parts" / "checkpoints" / "step_000004.pt").unlink()
    train("tinymim", config)
    assert_same_run(whole, tmp_path / "parts")
    assert steady_metrics(whole)[0]["losses"]["qk"] > 0
