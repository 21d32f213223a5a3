"""SIGKILL at random moments: a killed stage and its rerun leave the bytes of an undisturbed run."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small_data import run_stage, tree, write_raw

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check

pytestmark = pytest.mark.integration

KILLS = 5
MANY_KILLS = 20
FOLDERS = {"caption": ["captions"], "pack": ["shards"], "vocab": ["vocab"], "cache": ["teacher"]}
EQUAL = {"equal": ["plan", "shards"]}  # pack with a shard size
BLOCKS = {"equal": {"plan", "pack"}}  # of dataset.json, where they are not named as the stage is


@pytest.fixture(scope="module")
def built(tmp_path_factory, model) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, shards=4, per_shard=10)
    for stage in FOLDERS:  # with the thread count of the runs that follow: float sums depend on it
        child = forked(stage, root, model)
        child.join()
        assert child.exitcode == 0, stage
    return root


@pytest.fixture(scope="module")
def equal(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, shards=4, per_shard=10)
    run("equal", root, "", 1)
    return root


def run(stage: str, root: str, model: str, workers: int) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    if stage == "equal":
        run_stage("pack", root, workers=workers, shard_size=7)
    else:
        run_stage(stage, root, model, workers=workers)


def forked(stage: str, root: str, model: str, workers: int = 1) -> multiprocessing.Process:
    """The stage in a child that has everything imported already, so that kills hit the work."""
    child = multiprocessing.get_context("fork").Process(target=run, args=(stage, root, model, workers))
    child.start()
    return child


def before(stage: str, built: str, to: Path) -> str:
    """A copy of the dataset as it was before the stage ran."""
    import json

    gone, blocks = {**FOLDERS, **EQUAL}[stage], BLOCKS.get(stage, {stage})
    root = shutil.copytree(built, to / "ds", ignore=lambda folder, names: gone if folder == built else [])
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["stages"] = {name: block for name, block in dataset["stages"].items() if name.split("/")[0] not in blocks}
    (root / "dataset.json").write_text(json.dumps(dataset, indent=2, ensure_ascii=False) + "\n")
    return str(root)


@pytest.mark.parametrize(("stage", "workers", "kills"), [*((s, 1, KILLS) for s in FOLDERS), ("pack", 2, 3)])
def test_killed_stage_and_rerun_equal_an_undisturbed_run(stage, workers, kills, built, model, tmp_path):
    kill_and_run_again(stage, workers, kills, built, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", FOLDERS)
def test_stages_killed_twenty_times(stage, built, model, tmp_path):
    kill_and_run_again(stage, 1, MANY_KILLS, built, model, tmp_path)


@pytest.mark.slow
def test_packing_to_equal_sizes_killed_twenty_times(equal, tmp_path):
    kill_and_run_again("equal", 1, MANY_KILLS, equal, "", tmp_path)


@pytest.mark.parametrize(("workers", "kills"), [(1, KILLS), (2, 3)])
def test_killed_packing_to_equal_sizes_and_rerun_equal_an_undisturbed_run(workers, kills, equal, tmp_path):
    kill_and_run_again("equal", workers, kills, equal, "", tmp_path)


def kill_and_run_again(stage: str, workers: int, kills: int, built: str, model: str, tmp_path: Path) -> None:
    rng = random.Random(stage)
    landed = 0
    tries = 0
    timing = before(stage, built, tmp_path / "timing")
    start = time.monotonic()
    child = forked(stage, timing, model, workers)
    child.join()
    duration = time.monotonic() - start
    while landed < kills:
        root = before(stage, built, tmp_path / str(tries))
        child = forked(stage, root, model, workers)
        time.sleep(rng.uniform(0, duration))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode == -signal.SIGKILL:
            landed += 1
        else:  # it had finished: aim earlier
            duration *= 0.9
        again = forked(stage, root, model, workers)
        again.join()
        assert again.exitcode == 0
        assert tree(root) == tree(built), f"kill {landed}"
        shutil.rmtree(root)
        tries += 1
        assert tries < 5 * kills, "the kills come too late to mean anything"


def test_what_a_kill_leaves_is_whole(built, model, tmp_path):
    """Between kill and rerun: whatever stands under a final name already proves right."""
    rng = random.Random(5)
    for trial in range(5):
        root = before("pack", built, tmp_path / str(trial))
        child = forked("pack", root, model)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        made = tree(root)
        assert all(
            made[path] == digest for path, digest in tree(built).items() if path in made and path != "dataset.json"
        )
    assert check(CheckConfig(built)) == []
