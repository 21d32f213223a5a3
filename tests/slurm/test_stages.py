"""Stages of a TinyCLIP training on a real Slurm: a job for each, which waits for the one before."""

import pytest
from small_slurm import clipmill, log_of, losses, submit
from small_tinyclip import write_tinyclip_root

from training.models.tinyclip_table import model_table
from training.runs.student import load_run

pytestmark = pytest.mark.integration


@pytest.fixture
def words(tmp_path) -> list[str]:
    """A training of two stages with masks."""
    root = write_tinyclip_root(tmp_path / "data")
    options = ["--teacher", "planted", "--workers", "0", "--batch-size", "4", "--steps", "5", "--log-every", "1"]
    masks = ["--stages", "1,0.7,0.4", "--prune-step", "3", "--mask-lr", "1.2", "--sparsity-ramp", "1"]
    teacher = ["--inherit", "auto", "--teacher-weights", f"local-dir:{root}/models/teacher"]
    return ["tinyclip", "--data", root, "--device", "cpu", "--precision", "fp32", *teacher, *masks, *options]


@pytest.mark.slow
def test_each_stage_is_a_job_after_the_one_before(slurm, words, tmp_path):
    run = tmp_path / "run"
    made = submit(slurm, "train", *words, "--out", str(run), "--time", "5")
    assert len(made) == 2
    for _, job in made:
        assert set(slurm.ended(job, 120).values()) == {"COMPLETED"}, log_of(str(run), job)
    plain = tmp_path / "plain"
    said = clipmill(slurm, "train", *words, "--out", str(plain))
    assert said.strip() == str(plain / "stage-2")
    for stage in ("stage-1", "stage-2"):
        assert losses(run / stage) == losses(plain / stage)
    first, second = (load_run(str(run / stage))[0].model for stage in ("stage-1", "stage-2"))
    assert model_table(first)["sparsity"] < model_table(second)["sparsity"]
    page = clipmill(slurm, "jobs", str(run))
    assert all(job in page for _, job in made)


@pytest.mark.slow
def test_a_stage_that_fails_holds_the_next(slurm, words, tmp_path):
    run = tmp_path / "run"
    made = submit(slurm, "train", *words, "--prune-step", "9", "--out", str(run), "--time", "5")
    (_, first), (_, second) = made
    assert set(slurm.ended(first, 120).values()) == {"FAILED"}
    assert "--prune-step 9: the run has 5 steps" in log_of(str(run), first)
    assert set(slurm.states(second).values()) <= {"PENDING", "CANCELLED"}
    slurm.run("scancel", second)
    assert not (run / "stage-2").exists()
