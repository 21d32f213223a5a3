"""``clipmill submit`` on a real Slurm of two nodes on this host: what is promised when things go wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from small_data import tree, write_raw
from small_slurm import (
    SHARDS,
    TAGGED,
    at_step,
    clipmill,
    job_environments,
    log_of,
    losses,
    submit,
    training_words,
    undisturbed,
)

from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.manifest import finished_shards

pytestmark = pytest.mark.integration


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


def processes_of(here: Cluster, task: int) -> list[int]:
    """Of a running array task, Python only."""
    return [pid for pid, own in job_environments(here).items() if own.get("SLURM_ARRAY_TASK_ID") == str(task)]


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


@pytest.mark.slow
def test_stages_that_sum_up_parts_have_the_bytes_of_the_local_run(slurm, raw, tmp_path):
    """dedup, pack and vocab in a chain; submitted again, dedup finds its lists and vocab counts once more."""
    plain = shutil.copytree(raw, tmp_path / "plain" / "ds").as_posix()
    dedup(DedupConfig(plain, workers=1))
    pack(PackConfig(plain, ("none",), nouns_only=True, tagger="slow_tagger:tag", workers=1))
    vocab(VocabConfig(plain, min_count=1, workers=1))
    stages = ("--", "dedup", "--workers", "1", "--", "pack", *TAGGED, "--", "vocab", "--min-count", "1")
    for tasks in ([2, 2, 2], [0, 0, 2]):
        made = submit(slurm, "pipeline", raw, "--array", "2", "--time", "5", *stages)
        assert [sum(len(slurm.states(array)) for array in arrays) for arrays, _ in made] == tasks
        for arrays, last in made:
            assert set(slurm.ended(last, 120).values()) == {"COMPLETED"}, log_of(raw, last)
            assert all(set(slurm.states(array).values()) == {"COMPLETED"} for array in arrays)
        assert tree(raw) == tree(plain)
    told = clipmill(slurm, "jobs", raw)
    assert "vocab/.all: summed up and deleted" in told
    assert "missing" not in told


@pytest.mark.slow
def test_a_check_fails_where_it_finds_problems_and_jobs_tells_them(slurm, raw):
    """As the last step of a chain, which does not know how many shards there will be, and alone, as an array of 3."""
    stages = ("--", "pack", *TAGGED, "--", "check", "--workers", "1")
    _, (_, last) = submit(slurm, "pipeline", raw, "--array", "2", "--time", "5", *stages)
    assert set(slurm.ended(last, 120).values()) == {"COMPLETED"}, log_of(raw, last)
    assert "all promises hold" in log_of(raw, last)
    assert not Path(raw, ".check").exists()
    Path(raw, "shards/00003.tar").write_bytes(b"")
    Path(raw, "raw/00005.parquet").unlink()
    [(arrays, last)] = submit(slurm, "check", raw, "--array", "3", "--time", "5")
    assert set(slurm.ended(last, 120).values()) == {"FAILED"}
    assert [len(slurm.states(array)) for array in arrays] == [3]
    told = clipmill(slurm, "jobs", raw)
    plain = clipmill(slurm, "check", raw, code=1).splitlines()[:-1]
    assert len(plain) > 1
    for number, problem in enumerate(plain, 1):
        assert f"{number}: {problem}" in told, told
    assert not Path(raw, ".check").exists()


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
    assert "restarting" in log_of(raw, f"{arrays[0]}_0")
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


@contextlib.contextmanager
def power_cut(here: Cluster, job: str) -> Iterator[None]:
    """The node where a job runs is lost, and Slurm is told; afterwards it comes back."""
    node = here.run("squeue", "-h", "-t", "R", "-j", job, "-o", "%N").split()[0]
    here.kill_node(node)
    here.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        yield
    finally:
        here.start_node(node)
        until(lambda: node in here.run("sinfo", "-h", "-N", "-t", "idle,mix,alloc", "-o", "%N"), 30)


@pytest.mark.slow
def test_a_lost_node_costs_time_only(slurm, raw, packed):
    [(arrays, last)] = submit(slurm, "pack", raw, *TAGGED, "--array", "4", "--time", "5", slow_s=0.15)
    until(lambda: len(finished_shards(f"{raw}/shards")) >= 2, 30)
    with power_cut(slurm, arrays[0]):
        assert set(slurm.ended(last).values()) == {"COMPLETED"}
        assert tree(raw) == packed


@pytest.mark.slow
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
    assert f"pack: {SHARDS - len(there)} shards missing" in told
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


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Of a training that takes some seconds."""
    return training_words(tmp_path_factory.mktemp("train"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["time-out", "requeue"])
def test_neither_a_time_out_nor_a_requeue_loses_anything_of_a_training(slurm, words, tmp_path, how):
    run = tmp_path / "run"
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
def test_a_training_goes_on_from_the_last_checkpoint_after_its_node_is_lost(slurm, words, tmp_path):
    run = tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--checkpoint-steps", "5", "--time", "5")
    until(lambda: at_step(run, 12), 60)
    with power_cut(slurm, job):
        assert set(slurm.ended(job, 90).values()) == {"COMPLETED"}, log_of(str(run), job)
    assert "stopped by" not in log_of(str(run), job)
    [step] = re.findall(r"step (\d+) of 60, 32 samples", log_of(str(run), job))[-1:]
    assert int(step) >= 10
    assert losses(run) == undisturbed(words, tmp_path / "plain")


@pytest.mark.slow
def test_too_many_requeues_are_a_failure(slurm, words, tmp_path):
    run = tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--max-requeue", "0", "--time", "5")
    until(lambda: at_step(run, 5), 60)
    slurm.run("scontrol", "requeue", job)
    assert set(slurm.ended(job, 60).values()) == {"FAILED"}
    assert "requeued 1 time, --max-requeue is 0" in clipmill(slurm, "jobs", str(run))


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(slurm, words, tmp_path):
    words, run = [*words, "--steps", "12"], tmp_path / "run"
    [(_, job)] = submit(slurm, "train", *words, "--out", str(run), "--nodes", "2", "--time", "5")
    assert set(slurm.ended(job, 90).values()) == {"COMPLETED"}, log_of(str(run), job)
    assert "num_nodes" in log_of(str(run), job) or "node=1(2)" in log_of(str(run), job)
    for mine, theirs in zip(losses(run), undisturbed(words, tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "nodes"), [("SIGUSR2", 2), ("SIGTERM", 1)])
def test_a_training_preempted_by_priority_goes_on_exactly(slurm, words, tmp_path, sent, nodes):
    """A job of a partition above wants both nodes. Where the site sends no user signal first, SIGTERM says it."""
    run, settings = tmp_path / "run", slurm.conf.read_text()
    if sent == "SIGTERM":
        slurm.conf.write_text(settings.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
        slurm.run("scontrol", "reconfigure")
    try:
        low = ("--partition", "low", "--nodes", str(nodes), "--checkpoint-steps", "50", "--time", "5")
        [(_, job)] = submit(slurm, "train", *words, "--out", str(run), *low)
        until(lambda: at_step(run, 8), 60)
        above = slurm.run(
            "sbatch", "--parsable", "-p", "main", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
        ).strip()
        assert set(slurm.ended(above, 60).values()) == {"COMPLETED"}
        assert set(slurm.states(job).values()) == {"PENDING"}
        assert set(slurm.ended(job, 90).values()) == {"COMPLETED"}, log_of(str(run), job)
    finally:
        slurm.conf.write_text(settings)
        slurm.run("scontrol", "reconfigure")
    saved = re.search(r"stopped by SIGUSR1 after step (\d+) of 60", log_of(str(run), job))
    assert saved
    assert f"step {saved[1]} of 60, 32 samples" in log_of(str(run), job)
    plain = undisturbed(words, tmp_path / "plain")
    assert losses(run) == (plain if nodes == 1 else [pytest.approx(loss, rel=1e-4) for loss in plain])
