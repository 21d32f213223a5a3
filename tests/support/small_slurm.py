"""What the tests on a real Slurm share: commands against the test's cluster, its logs, small data to work on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from slurm_cluster import Cluster
from small_data import write_raw
from small_training import tiny_clip

ROOT = Path(__file__).parents[2]
TAGGED = ("--captioner", "none", "--nouns-only", "--tagger", "slow_tagger:tag", "--workers", "1")
SHARDS = 12


def clipmill(here: Cluster, *words: str, code: int = 0, slow_s: float = 0, **more: str) -> str:
    """What the command says, in a process of its own."""
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    environment = {**os.environ, **here.own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CLIPMILL_SLOW_S": str(slow_s)}
    done = subprocess.run(
        [sys.executable, "-m", "clipmill", *words],
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code == 2 else done.stdout


def submit(here: Cluster, *words: str, **more) -> list[tuple[list[str], str]]:
    """Per stage the array jobs and the job that adds up."""
    said = clipmill(here, "submit", *words, **more)
    found = []
    for line in said.splitlines():
        if match := re.match(r"\w+: (?:\d+ array tasks? in job ([\d, ]+), then )?job (\d+);", line):
            found.append(((match[1] or "").replace(",", "").split(), match[2]))
    assert found, said
    return found


def log_of(root: str, job: str) -> str:
    return "".join(path.read_text() for path in sorted(Path(root, "logs", "jobs").glob(f"*/{job}_*log.*")))


def job_environments(here: Cluster, job: str | None = None) -> dict[int, dict[str, str]]:
    """Of the Python processes of running jobs, by pid."""
    found = {}
    for pid in here.job_pids(job=job):
        words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        if Path(f"/proc/{pid}/comm").read_text().startswith("python"):
            found[pid] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def training_words(folder: Path) -> list[str]:
    """A small packed dataset in a folder, and the words of a training on it that takes some seconds."""
    from pipeline.pack.config import PackConfig
    from pipeline.pack.stage import pack

    root = str(folder / "ds")
    write_raw(root, shards=2, per_shard=20)
    pack(PackConfig(root, ("none",), workers=1))
    words = ["clip", "--data", root, "--model", tiny_clip(folder / "clip"), "--steps", "60", "--batch-size", "8"]
    return [*words, "--workers", "0", "--log-every", "1", "--warmup", "2", "--device", "cpu"]


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def undisturbed(words: list[str], out: Path) -> list[tuple[int, float]]:
    """The losses of the same training here and now."""
    import torch

    import clipmill as command_line

    torch.set_num_threads(1)
    assert command_line._train([*words, "--out", str(out)]) == 0
    return losses(out)


def at_step(run: Path, step: int) -> bool:
    return os.path.exists(run / "metrics.jsonl") and len((run / "metrics.jsonl").read_text().splitlines()) >= step
