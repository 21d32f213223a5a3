"""``clipmill submit`` on a real Slurm of two nodes on this host: what is promised when things go wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import skip_or_fail
from slurm_cluster import Cluster, NoClusterError, cluster, until
from small_data import draw, tiny_coca, tree, write_raw
from small_training import tiny_clip

import clipmill as command_line
from pipeline.pack import PackConfig, pack
from shards_spec.manifest import finished_shards

ROOT = Path(__file__).parents[1]
TAGGED = ("--captioner", "none", "--nouns-only", "--tagger", "slow_tagger:tag", "--workers", "1")
SHARDS = 12


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    try:
        with cluster() as here:
            yield here
    except NoClusterError as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, str]:
    """What a local run leaves of SHARDS shards."""
    root = str(tmp_path_factory.mktemp("local") / "ds")
    write_raw(root, shards=SHARDS, per_shard=4)
    pack(PackConfig(root, ("none",), nouns_only=True, tagger="slow_tagger:tag", workers=1))
    return tree(root)


@pytest.fixture
def raw(tmp_path) -> str:
    write_raw(str(tmp_path / "ds"), shards=SHARDS, per_shard=4)
    return str(tmp_path / "ds")


def clipmill(here: Cluster, *words: str, code: int = 0, slow_s: float = 0, **more: str) -> str:
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**here.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CLIPMILL_SLOW_S": str(slow_s)}
    done = subprocess.run(
        [sys.executable, "-m", "clipmill", *words], env={**environment, **more}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code == 2 else done.stdout


def submit(here: Cluster, *words: str, **more) -> list[tuple[list[str], str]]:
    """Per stage the array jobs and the job that adds up."""
    said = clipmill(here, "submit", *words, **more)
    found = []
    for line in said.splitlines():
        if match := re.match(r"\w+: (?:\d+ array tasks in job ([\d, ]+), then )?job (\d+);", line):
            found.append(((match[1] or "").replace(",", "").split(), match[2]))
    assert found, said
    return found


def log_of(root: str, job: str) -> str:
    return "".join(path.read_text() for path in sorted(Path(root, "logs", "jobs").glob(f"*/{job}_*log.*")))


def processes_of(here: Cluster, task: int) -> list[int]:
    """Of a running array task, Python only."""
    found = []
    for pid in here.job_pids():
        words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        name = Path(f"/proc/{pid}/comm").read_text()
        if f"SLURM_ARRAY_TASK_ID={task}" in words and name.startswith("python"):
            found.append(pid)
    return found


def test_a_stage_has_the_bytes_of_the_local_run_and_a_second_submission_finds_nothing_to_do(slurm, raw, packed):
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "3", "--time", "5")
    assert set(slurm.ended(last).values()) == {"COMPLETED"}
    assert len(slurm.states(arrays[0])) == 3
    assert tree(raw) == packed
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "3", "--time", "5", "--wait")
    assert arrays == []
    assert tree(raw) == packed
    told = clipmill(slurm, "jobs", raw)
    assert f"shards: {SHARDS} of {SHARDS} shards" in told
    assert "3 completed" in told


def test_a_wrong_partition_is_one_clear_line(slurm, raw):
    said = clipmill(slurm, "submit", "pack", raw, *TAGGED, "--partition", "nowhere", code=2)
    assert said.count("\n") == 1
    assert "Slurm refuses the job" in said
    assert "invalid partition specified: nowhere" in said


def test_a_frozen_and_woken_claimant_spoils_nothing(slurm, raw, packed):
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "2", "--time", "5", "--claim-s", "2", slow_s=0.1)
    until(lambda: len(finished_shards(f"{raw}/shards")) >= 2 and processes_of(slurm, 0), 30)
    frozen = processes_of(slurm, 0)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: len(finished_shards(f"{raw}/shards")) == SHARDS, 30)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert set(slurm.ended(last).values()) == {"COMPLETED"}
    assert set(slurm.states(arrays[0]).values()) == {"COMPLETED"}
    assert "starting anew" in log_of(raw, f"{arrays[0]}_0")
    assert tree(raw) == packed


@pytest.mark.slow
def test_a_task_that_times_out_goes_on(slurm, raw, packed):
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "2", "--time", "5", slow_s=0.15)
    until(lambda: len(finished_shards(f"{raw}/shards")) >= 2, 30)
    slurm.run("scancel", "--signal=USR2", f"{arrays[0]}_0")
    assert set(slurm.ended(last).values()) == {"COMPLETED"}
    assert set(slurm.states(arrays[0]).values()) == {"COMPLETED"}
    assert "Requeued job" in log_of(raw, f"{arrays[0]}_0")
    assert tree(raw) == packed


@pytest.mark.slow
def test_a_lost_node_costs_time_only(slurm, raw, packed):
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "4", "--time", "5", slow_s=0.15)
    until(lambda: len(finished_shards(f"{raw}/shards")) >= 2, 30)
    node = slurm.run("squeue", "-h", "-t", "R", "-j", arrays[0], "-o", "%N").split()[0]
    slurm.kill_node(node)
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        assert set(slurm.ended(last).values()) == {"COMPLETED"}
        assert tree(raw) == packed
    finally:
        slurm.start_node(node)
        until(lambda: node in slurm.run("sinfo", "-h", "-N", "-t", "idle,mix,alloc", "-o", "%N"), 30)


def test_a_cancelled_array_holds_the_next_stage_and_the_second_submission_does_the_rest(slurm, raw, packed):
    words = ("--array", "2", "--time", "5", "--claim-s", "10")
    chain = ("pipeline", raw, *words, "--", "pack", *TAGGED, "--", "vocab", "--min-count", "1")
    [(arrays, last), (_, vocab)] = submit(slurm, *chain, slow_s=0.6)
    until(lambda: len(finished_shards(f"{raw}/shards")) >= 2, 30)
    slurm.run("scancel", arrays[0])
    assert set(slurm.ended(last).values()) == {"FAILED"}
    assert set(slurm.ended(vocab).values()) == {"CANCELLED"}
    assert not os.path.exists(f"{raw}/vocab")
    assert "pack" not in json.loads(Path(raw, "dataset.json").read_text())["stages"]
    there = finished_shards(f"{raw}/shards")
    told = clipmill(slurm, "jobs", raw)
    assert f"pack: {SHARDS - len(there)} shards are missing" in told
    assert "2 cancelled" in told
    stamps = {shard: os.stat(f"{raw}/shards/{shard:05d}.tar").st_mtime_ns for shard in there}
    [(_, last)] = submit(slurm, "pack", raw, *TAGGED, *words)
    assert set(slurm.ended(last).values()) == {"COMPLETED"}
    assert tree(raw) == packed
    assert stamps == {shard: os.stat(f"{raw}/shards/{shard:05d}.tar").st_mtime_ns for shard in there}


def test_a_broken_shard_fails_alone_and_its_reason_is_on_top(slurm, raw):
    tar = Path(raw, "raw", "00005.tar")
    tar.write_bytes(tar.read_bytes()[:700])
    [(arrays, last)] = submit(
        slurm, "pack", raw, *TAGGED, "--array", "3", "--time", "5", "--claim-s", "9", "--wait", code=1
    )
    assert set(slurm.ended(last).values()) == {"FAILED"}
    assert sorted(slurm.states(arrays[0]).values()) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert finished_shards(f"{raw}/shards") == [shard for shard in range(SHARDS) if shard != 5]
    told = clipmill(slurm, "jobs", raw)
    assert "missing 00005" in told
    reason = told[told.index(" failed: ") :].splitlines()
    assert "shards failed" in reason[0]
    assert "00005: " in reason[1]


@pytest.mark.slow
def test_the_chain_has_the_bytes_of_the_local_commands(slurm, tmp_path):
    """Ingest to train in one call; then the same commands one by one."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(18):
        picture, caption = draw(str(number))
        (pictures / f"{number:03d}.jpg").write_bytes(picture)
        (pictures / f"{number:03d}.txt").write_text(caption)
    coca, student = tiny_coca(tmp_path / "coca"), tiny_clip(tmp_path / "clip")
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    stages = {
        "ingest": ["--source", str(pictures), "--shard-size", "6", "--image-size", "48", "--workers", "1"],
        "caption": ["--model", coca, "--name", "cap", "--num-captions", "2", "--max-tokens", "8", "--threads", "1"],
        "pack": ["--workers", "1"],
        "vocab": ["--min-count", "1"],
        "cache": ["--model", coca, "--name", "tea", "--views", "2", "--threads", "1"],
    }
    train = ["--model", student, "--steps", "4", "--batch-size", "6", "--workers", "0", "--log-every", "1"]
    chain = [word for stage, words in stages.items() for word in ("--", stage, *words)]
    made = submit(
        slurm, "pipeline", there, "--array", "2", "--time", "5", *chain,
        "--", "train", "clip", "--out", str(tmp_path / "run"), *train,
    )  # fmt: skip
    clipmill(
        slurm, "submit", "pipeline", here, "--cluster", "debug", *chain,
        "--", "train", "clip", "--out", str(tmp_path / "run-here"), *train,
    )  # fmt: skip
    for (_, last), stage in zip(made, [*stages, "train"], strict=True):
        states = slurm.ended(last, 120)
        assert set(states.values()) == {"COMPLETED"}, (stage, log_of(there, last))
    mine, theirs = ({path: d for path, d in tree(r).items() if not _timed(path)} for r in (here, there))
    assert mine == theirs
    assert len(mine) > 20
    assert losses(tmp_path / "run") == losses(tmp_path / "run-here")


def _timed(path: str) -> bool:
    return path == "dataset.json" or (path.startswith("raw/") and path.endswith("_stats.json"))


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, list[str]]:
    """A packed dataset and the words of a training on it that takes some seconds."""
    folder = tmp_path_factory.mktemp("train")
    root = str(folder / "ds")
    write_raw(root, shards=2, per_shard=20)
    pack(PackConfig(root, ("none",), workers=1))
    words = ["clip", "--data", root, "--model", tiny_clip(folder / "clip"), "--steps", "60", "--batch-size", "8"]
    return root, [*words, "--workers", "0", "--log-every", "1", "--warmup", "2", "--device", "cpu"]


def undisturbed(words: list[str], out: Path) -> list[tuple[int, float]]:
    """The same here and now."""
    torch.set_num_threads(1)
    assert command_line._train([*words, "--out", str(out)]) == 0
    return losses(out)


def at_step(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step


@pytest.mark.parametrize("how", ["time-out", pytest.param("requeue", marks=pytest.mark.slow)])
def test_neither_a_time_out_nor_a_requeue_loses_anything_of_a_training(slurm, data, tmp_path, how):
    words, run = data[1], tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--checkpoint-steps", "50", "--time", "5")
    until(lambda: at_step(run, 8), 60)
    if how == "time-out":
        slurm.run("scancel", "--signal=USR2", job)
        until(lambda: "Requeued job" in log_of(str(run), job), 30)
    else:
        slurm.run("scontrol", "requeue", job)
    assert set(slurm.ended(job, 90).values()) == {"COMPLETED"}, log_of(str(run), job)
    saved = re.search(r"stopped by SIGUSR1 after step (\d+) of 60", log_of(str(run), job))
    assert saved
    assert f"step {saved[1]} of 60, 32 samples" in log_of(str(run), job)
    assert losses(run) == undisturbed(words, tmp_path / "plain")


@pytest.mark.slow
def test_too_many_requeues_are_a_failure(slurm, data, tmp_path):
    words, run = data[1], tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--max-requeue", "0", "--time", "5")
    until(lambda: at_step(run, 5), 60)
    slurm.run("scontrol", "requeue", job)
    assert set(slurm.ended(job, 60).values()) == {"FAILED"}
    assert "requeued 1 times, --max-requeue is 0" in clipmill(slurm, "jobs", str(run))


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(slurm, data, tmp_path):
    words, run = [*data[1], "--steps", "12"], tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--nodes", "2", "--time", "5")
    assert set(slurm.ended(job, 90).values()) == {"COMPLETED"}, log_of(str(run), job)
    assert "num_nodes" in log_of(str(run), job) or "node=1(2)" in log_of(str(run), job)
    for mine, theirs in zip(losses(run), undisturbed(words, tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_more_tasks_than_shards_and_arrays_beyond_the_limit(slurm, tmp_path):
    """200 tasks over 50 shards; then 120 tasks where an array may have 100 (the test's cluster says so)."""
    for name, shards, array, count in (("few", 50, 200, 1), ("many", 120, 300, 2)):
        root, other = str(tmp_path / name), str(tmp_path / f"{name}-local")
        write_raw(root, shards=shards, per_shard=2)
        shutil.copytree(root, other)
        [(arrays, last)] = submit(slurm, "pack", root, *TAGGED, "--array", str(array), "--time", "9")
        assert len(arrays) == count
        assert set(slurm.ended(last, 600).values()) == {"COMPLETED"}
        pack(PackConfig(other, ("none",), nouns_only=True, tagger="slow_tagger:tag", workers=1))
        assert tree(root) == tree(other)


@pytest.mark.slow
def test_a_slow_node_costs_little(slurm, tmp_path):
    """One of eight tasks at a fifth of the speed: the makespan is near what the sum of the speeds allows."""
    root, shards, each = str(tmp_path / "ds"), 320, 0.2
    write_raw(root, shards=shards, per_shard=2)
    [(_, last)] = submit(
        slurm, "pack", root, *TAGGED, "--array", "8", "--time", "9", "--claim-s", "20", slow_s=each,
        CLIPMILL_SLOW_TASK="0",
    )  # fmt: skip
    assert set(slurm.ended(last, 300).values()) == {"COMPLETED"}
    ends = sorted(os.stat(f"{root}/shards/{shard:05d}_stats.json").st_mtime for shard in range(shards))
    makespan, ideal = ends[-1] - ends[0], shards * 2 * each / 7.2
    print(f"makespan {makespan:.1f} s, ideal {ideal:.1f} s, {time.strftime('%H:%M:%S')}")
    assert makespan < 1.15 * ideal
