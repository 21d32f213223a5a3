#!/usr/bin/env python3
"""How long `clipmill submit` takes, on a real Slurm of two nodes on this host.

    python tests/bench/submit.py [--array 300] [--runs 5]

A stage over --array shards with a task for each, and a training: seconds on the clock of the whole command, from the
start of Python to its end, and how they are spent: the interpreter and its site packages, imports and the reading of
the command line, the copy of the code (made by the first submission, compared with the files by the others), sbatch and
scontrol, and the rest, which is mostly the pickles of the tasks. CPU seconds are those of the command and of what it
starts: they say more than the clock where other processes run. Medians of the runs after a first one; jobs are held and
cancelled, so that none runs beside the next submission.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
PARTS = ("interpreter", "imports and options", "copy of the code", "sbatch and scontrol", "rest")


def submitted(here: Any, words: list[str], *before: str) -> tuple[float, float, str]:
    """Submit in a process of its own, then cancel what was; seconds on the clock and of CPU, and what it printed."""
    environment = {**here.environment, "PYTHONPATH": str(ROOT)}
    start, cpu = time.perf_counter(), children_cpu()
    done = subprocess.run([sys.executable, *before, *words], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"submit {' '.join(words)}:\n{done.stdout}{done.stderr}")
    cpu = children_cpu() - cpu
    here.run("scancel", f"--user={os.getuid()}")
    return seconds, cpu, done.stdout


def children_cpu() -> float:
    """CPU seconds of all processes that this one has waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parts_of(start: float, words: list[str]) -> None:
    """Submit in this process, which was started at ``start``; print the seconds of each part as JSON."""
    taken = {PARTS[0]: time.time() - start}
    begun = time.perf_counter()
    import clipmill
    from slurm import submit
    from slurm.step import parse_steps

    parse_steps(words)
    from submitit.core import utils

    taken[PARTS[1]] = time.perf_counter() - begun
    clock = Counter[str]()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            entered = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                clock[part] += time.perf_counter() - entered

        return call

    submit.snapshot = timed(PARTS[2], submit.snapshot)
    subprocess.run = timed(PARTS[3], subprocess.run)  # scontrol
    utils.CommandFunction.__call__ = timed(PARTS[3], utils.CommandFunction.__call__)  # sbatch
    submit.submit(words, clipmill._submit)
    whole = time.perf_counter() - begun - taken[PARTS[1]]
    taken |= {PARTS[2]: clock[PARTS[2]], PARTS[3]: clock[PARTS[3]]}
    taken[PARTS[4]] = whole - clock[PARTS[2]] - clock[PARTS[3]]
    print(json.dumps(taken))


def report(here: Any, name: str, words: list[str], runs: int) -> None:
    """Measure and print a line of the table."""
    seconds, cpu = list[float](), list[float]()
    parts = list[dict[str, float]]()
    for number in range(runs + 1):
        whole, used, _ = submitted(here, ["submit", *words], "-m", "clipmill")
        *_, printed = submitted(here, words, __file__, "--parts", repr(time.time()))
        if number:
            seconds.append(whole)
            cpu.append(used)
            parts.append(json.loads(printed.splitlines()[-1]))
        else:
            print(f"# {name}: {whole:.2f} s with the copy of the code", file=sys.stderr)
    clock = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    cells = [f"{median(part[one] for part in parts):.2f}" for one in PARTS]
    print(f"| {name} | {clock} | {median(cpu):.2f} | {' | '.join(cells)} |")


def main() -> None:
    """Start the cluster, measure, print."""
    if sys.argv[1:2] == ["--parts"]:
        return parts_of(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--array", type=int, default=300, help="shards, and tasks")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from slurm_cluster import cluster
    from small_data import write_raw

    with tempfile.TemporaryDirectory(prefix="clipmill-submit-") as folder, cluster(max_array=1001) as here:
        here.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # takes jobs and starts none
        root, run = f"{folder}/ds", f"{folder}/run"
        write_raw(root, shards=options.array, per_shard=1)
        caption = ["caption", root, "--model", "coca_ViT-L-14", "--array", str(options.array), "--time", "9"]
        train = ["train", "tinyclip", "--data", root, "--model", "ViT-M-32", "--out", run, "--nodes", "2"]
        print(f"| submit | seconds on the clock | CPU s | {' | '.join(PARTS)} |")
        print("|---" * (len(PARTS) + 3) + "|")
        report(here, f"caption, an array of {options.array}", caption, options.runs)
        report(here, "train tinyclip", train, options.runs)
    return None


if __name__ == "__main__":
    main()
