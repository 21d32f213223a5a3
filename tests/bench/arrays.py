#!/usr/bin/env python3
"""Stages that sum up parts, as an array of two tasks on a real Slurm of two nodes on this host: makespan and ideal.

    python tests/bench/arrays.py [--shards 1000] [--per-shard 40] [--rounds 5] [--only vocab dedup check]

The dataset is of drawn images, by the real stages. A line per stage and round, in seconds:

    parts, sum    CPU of both in one process here, after imports
    ideal         parts / 2 + sum: what two idle cores take
    start         clock of the same submission's jobs on a dataset of two shards: processes, imports, hardly any work
    makespan      clock of the jobs from the start of the first task to the end of the last job, less ``start`` and less
                  the time in which no job ran, which is Slurm's own. It includes waiting for the disk, to which each
                  part is flushed, and for other work on the machine
    start CPU, CPU  of the jobs' processes: of those of ``start``, and of all shards, less ``start CPU``. CPU less
                  parts and sum is what claims and listings cost, whatever else the machine does

and at the end the medians.
"""

import argparse
import contextlib
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from small_data import write_raw
from small_slurm import submit

from pipeline.check.config import CheckJobConfig
from pipeline.check.divided import check_array
from pipeline.core.runner import ShardAssignment
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack

TASKS = 2
SAID = re.compile(r"^submitit INFO \((\S+ \S+)\) - (Starting|Exiting|Job completed)", re.M)
# function, config of a ROOT, words of the submission, folder of what it makes
STAGES: dict[str, tuple[Callable[..., Any], Callable[[str], Any], tuple[str, ...], str]] = {
    "vocab": (
        vocab,
        lambda root: VocabConfig(root, min_count=0, workers=1),
        ("--min-count", "0", "--workers", "1"),
        "vocab",
    ),
    # equal files only: drawn images are so alike that comparing them would be all of it
    "dedup": (dedup, lambda root: DedupConfig(root, -1, workers=1), ("--near-bits", "-1", "--workers", "1"), "dedup"),
    "check": (check_array, lambda root: CheckJobConfig(root, 1).of_run("bench"), ("--workers", "1"), ".check"),
}


class PartsOf(ShardAssignment):
    """The shards of one of so many tasks, and no sum."""

    def __init__(self, task: int, tasks: int, shards: int) -> None:
        self._own = range(shards * task // tasks, shards * (task + 1) // tasks)

    def claim(self, shard: int) -> bool:
        return shard in self._own

    @property
    def is_complete(self) -> bool:
        return False


def made(folder: Path, shards: int, per_shard: int) -> str:
    """A packed dataset."""
    root = str(folder / f"{shards}" / "ds")
    write_raw(root, shards=shards, per_shard=per_shard)
    pack(PackConfig(root, ("none",), workers=TASKS))
    shutil.copy(Path(root, "dataset.json"), Path(root).parent)
    return root


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def spans(root: str, jobs: list[str]) -> list[tuple[float, float]]:
    """The clock at which the tasks of each job began and at which the last one of them had ended."""
    found = []
    for job in jobs:
        logs = [path.read_text() for path in Path(root, "logs", "jobs").glob(f"*/{job}_*log.out")]
        times = [datetime.strptime(said, "%Y-%m-%d %H:%M:%S,%f").timestamp() for said, _ in SAID.findall("".join(logs))]
        found.append((min(times), max(times)))
    return found


def seconds_on_slurm(cluster: Any, root: str, stage: str, words: tuple[str, ...]) -> tuple[float, float]:
    """The clock that the jobs of a submission took, without pauses between them, and the CPU of their processes."""
    [(arrays, last)] = submit(cluster, stage, root, *words, "--array", str(TASKS), "--time", "60")
    cpu = dict[int, float]()
    while "COMPLETED" not in (states := cluster.states(last)).values():
        assert not {"FAILED", "CANCELLED"} & {*states.values()}, states
        for _ in range(5):
            for pid in cluster.job_pids():
                with contextlib.suppress(OSError, IndexError):  # it has ended
                    cpu[pid] = own_cpu(pid)
            time.sleep(0.2)
    return sum(end - start for start, end in spans(root, [*arrays, last])), sum(cpu.values())


def own_cpu(pid: int) -> float:
    """Seconds of a process's own."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(cluster: Any, stage: str, root: str, tiny: str, shards: int) -> dict[str, float]:
    """The seconds of one stage, by the names above."""
    function, config, words, output = STAGES[stage]
    found = dict[str, float]()

    def forget(folder: str) -> None:
        shutil.rmtree(Path(folder, output), ignore_errors=True)
        shutil.copy(Path(folder).parent / "dataset.json", folder)

    forget(root)
    found["parts"] = cpu_seconds(lambda: function(config(root), PartsOf(0, 1, shards)))
    found["sum"] = cpu_seconds(lambda: function(config(root)))
    found["ideal"] = found["parts"] / TASKS + found["sum"]
    forget(root)
    forget(tiny)
    found["start"], found["start CPU"] = seconds_on_slurm(cluster, tiny, stage, words)
    seconds, cpu = seconds_on_slurm(cluster, root, stage, words)
    found["makespan"] = seconds - found["start"]
    found["CPU"] = cpu - found["start CPU"]
    forget(root)
    forget(tiny)
    print(f"{stage}: {described(found)}", flush=True)
    return found


def described(found: dict[str, float]) -> str:
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    work = found["parts"] + found["sum"]
    return f"{seconds}; makespan {found['makespan'] / found['ideal']:.2f} of ideal, CPU {found['CPU'] / work:.2f} of it"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--per-shard", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    from slurm_cluster import cluster

    with tempfile.TemporaryDirectory(prefix="clipmill-arrays-") as work, cluster() as here:
        root, tiny = (made(Path(work), shards, options.per_shard) for shards in (options.shards, TASKS))
        rounds: dict[str, list[dict[str, float]]] = {stage: [] for stage in options.only}
        for _ in range(options.rounds):
            for stage, own in rounds.items():
                own.append(measure(here, stage, root, tiny, options.shards))
        for stage, own in rounds.items():
            medians = {name: statistics.median(one[name] for one in own) for name in own[0]}
            print(f"median of {options.rounds}, {stage}: {described(medians)}")


if __name__ == "__main__":
    main()
