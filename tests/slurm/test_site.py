"""What a site file and the GPUs asked for become in jobs on a real Slurm, and what is told of them afterwards."""

import json
from pathlib import Path

import pytest
from slurm_cluster import until
from small_data import write_raw
from small_slurm import ROOT, TAGGED, clipmill, job_environments, log_of, submit, training_words

pytestmark = pytest.mark.integration

NOTING = """
import json, os, sys, tempfile
def tag(words):
    kept = {"variables": dict(os.environ), "temporary": tempfile.gettempdir(), "command": sys.orig_argv}
    with open(f"{os.environ['NOTED']}.{os.getpid()}", "w") as file:
        json.dump(kept, file)
    os.replace(file.name, os.environ["NOTED"])
    return ["NN"] * len(words)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return training_words(tmp_path_factory.mktemp("train"))


def test_setup_lines_container_and_scratch_take_effect_in_a_job(slurm, tmp_path):
    """A stand-in for a container that is a command prefix as theirs is, with a word that the shell would split."""
    root, fast, noted = str(tmp_path / "ds"), tmp_path / "fast disk", tmp_path / "noted.json"
    write_raw(root, shards=2, per_shard=2)
    fast.mkdir()
    (tmp_path / "noting.py").write_text(NOTING)
    (tmp_path / "site.toml").write_text(
        'setup = ["export SET_UP=\\"a b\\""]\n'
        f'scratch = ["/nowhere", "{fast}"]\ncontainer = "env PREFIXED=\'c d\'"\ncpus_per_task = 3\nmem_gb = 1.5\n'
    )
    words = ("--captioner", "none", "--nouns-only", "--tagger", "noting:tag", "--workers", "1", "--array", "2")
    [(arrays, last)] = submit(
        slurm,
        "pack",
        root,
        *words,
        "--site",
        str(tmp_path / "site.toml"),
        "--time",
        "5",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
        NOTED=str(noted),
    )
    assert set(slurm.ended(last).values()) == {"COMPLETED"}, log_of(root, f"{arrays[0]}_0")
    there = json.loads(noted.read_text())
    assert there["variables"]["SET_UP"] == "a b"
    assert there["variables"]["PREFIXED"] == "c d"
    assert there["temporary"] == str(fast)
    assert there["variables"]["SLURM_CPUS_PER_TASK"] == "3"
    assert there["variables"]["PYTHONPATH"].startswith(f"{root}/logs/jobs/code/")
    assert slurm.run("squeue", "-h", "-t", "all", "-j", last, "-o", "%m %c").split() == ["1.50G", "3"]


@pytest.mark.parametrize(
    ("sbatch", "seen"), [("", ["0,1", "0,1"]), ('sbatch = {"gpus-per-task" = 1, "gpu-bind" = "single:1"}', ["0", "1"])]
)
def test_a_process_per_gpu(slurm, words, tmp_path, sbatch, seen):
    """Slurm hands out GPUs (of this cluster: files); each process knows which of those it sees is its own."""
    site, run = tmp_path / "site.toml", tmp_path / "run"
    site.write_text(sbatch)
    [(_, job)] = submit(
        slurm,
        "train",
        *words,
        "--out",
        str(run),
        "--gpus-per-node",
        "2",
        "--time",
        "5",
        "--site",
        str(site),
        "--steps",
        "5000",
    )

    def trainings() -> list[dict[str, str]]:
        own = [one for one in job_environments(slurm, job).values() if "RANK" in one]
        return sorted(own, key=lambda one: one["RANK"])

    try:
        until(lambda: len(trainings()) == 2 or set(slurm.states(job).values()) == {"FAILED"}, 60)
        assert "gpu:2" in slurm.run("scontrol", "show", "job", job)
        found = trainings()
    finally:
        slurm.run("scancel", job)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == seen, log_of(str(run), job)
    devices = [one["CUDA_VISIBLE_DEVICES"].split(",")[int(one["LOCAL_RANK"])] for one in found]
    assert devices == ["0", "1"]
    assert [one["WORLD_SIZE"] for one in found] == ["2", "2"]


def stand_in(folder: Path, **commands: str) -> str:
    """A folder for PATH with other commands in the place of Slurm's: lines of a shell script."""
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_what_became_of_jobs_is_told_with_and_without_slurm_and_accounting(slurm, tmp_path):
    """This cluster keeps no accounts; what it forgot, and what accounts say, is played by stand-ins."""
    root = str(tmp_path / "ds")
    write_raw(root, shards=2, per_shard=20)
    [(arrays, last)] = submit(slurm, "pack", root, *TAGGED, "--array", "2", "--time", "5", slow_s=1)
    until(lambda: log_of(root, f"{arrays[0]}_1"), 30)
    slurm.run("scancel", arrays[0])
    slurm.ended(last)
    told = clipmill(slurm, "jobs", root)  # sacct fails here: squeue remembers
    assert "2 cancelled" in told
    assert "1 failed" in told
    forgetful = stand_in(tmp_path, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    forgetful += ":/usr/bin:/bin"
    told = clipmill(slurm, "jobs", root, PATH=forgetful)
    assert f"array {arrays[0]}: 2 gone without a result" in told
    assert f"{last} failed: " in told
    assert "missing 00000, 00001" in told
    assert "CANCELLED" in told[told.index(f"{arrays[0]}_0 gone without a result: ") :].splitlines()[0]
    accounts = f"printf '{arrays[0]}_0|CANCELLED by 0\\n{arrays[0]}_1|OUT_OF_MEMORY\\n{last}|FAILED\\n'"
    (tmp_path / "accounts").mkdir()
    told = clipmill(slurm, "jobs", root, PATH=f"{stand_in(tmp_path / 'accounts', sacct=accounts)}:{forgetful}")
    assert "1 cancelled, 1 out_of_memory" in told
    told = clipmill(slurm, "jobs", root, PATH=str(tmp_path / "none"))
    assert told.startswith("Slurm does not answer here")
    assert f"array {arrays[0]}: 2 not ended" in told
    assert "1 failed" in told
