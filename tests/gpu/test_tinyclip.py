"""TinyCLIP's masks on a device: trained, cut in mid-run, resumed around the cut, also on another device."""

from pathlib import Path

import pytest
from cuda_only import only_on_cuda
from small_tinyclip import config_of, write_tinyclip_root
from small_training import read_metrics

from training.runs.student import load_run
from training.trainer import train

CUT = 4
FIELDS = {"steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 9, "ema_decay": 0.6, "precision": "fp32"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_tinyclip_root(tmp_path_factory.mktemp("data"))


def drop_checkpoints(out: str, after: int) -> None:
    for step in range(after + 1, FIELDS["steps"] + 1):
        Path(out, "checkpoints", f"step_{step:06d}.pt").unlink()


def test_masks_are_trained_applied_and_resumed(root, device, tmp_path):
    """The random stream of the masks is the device's, and a checkpoint holds it."""
    config = config_of(root, tmp_path / "run", "auto", **FIELDS, device=device)
    out = train("tinyclip", config)
    expected = read_metrics(out)
    assert [set(line["losses"]) for line in expected] == [{"affinity", "sparsity"}] * CUT + [{"affinity"}] * 2
    for step in (CUT - 1, CUT) if device.startswith("cuda") else (CUT - 1,):
        drop_checkpoints(out, step)
        train("tinyclip", config)
        for line, other in zip(read_metrics(out), expected, strict=True):
            assert line["losses"] == pytest.approx(other["losses"], rel=1e-3, abs=1e-3)
            assert line["parameters"] == pytest.approx(other["parameters"], rel=0.02)
    assert load_run(out)[1] == FIELDS["steps"]


@pytest.mark.parametrize(
    "fields", [{"precision": "bf16"}, {"precision": "fp16"}, {"chunk_size": 2}, {"teacher_from": "live"}], ids=str
)
def test_every_way_to_compute_reaches_the_end(fields, root, device, tmp_path):
    only_on_cuda(device)
    config = config_of(root, tmp_path / "run", "auto", **{**FIELDS, **fields, "device": device})
    lines = read_metrics(train("tinyclip", config))
    assert len(lines) == FIELDS["steps"]
    assert lines[-1]["nonfinite"] == 0
    assert 0 < lines[-1]["sparsity"] < 1


def test_a_cut_student_moves_between_devices(root, device, tmp_path):
    only_on_cuda(device)
    out = train("tinyclip", config_of(root, tmp_path / "run", "auto", **FIELDS, device=device))
    expected = read_metrics(out)
    drop_checkpoints(out, CUT)
    train("tinyclip", config_of(root, tmp_path / "run", "auto", **FIELDS, device="cpu"))
    for line, other in zip(read_metrics(out), expected, strict=True):
        assert line["losses"] == pytest.approx(other["losses"], rel=0.01)
