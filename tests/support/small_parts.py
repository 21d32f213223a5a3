"""Stages that sum up parts, run in tasks as an array runs them, without a cluster; one task is killed."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.core.runner import ShardAssignment
from slurm.claims import Assigned, Claims, Failures, Finished
from slurm.division import divide
from slurm.jobs import Ranges
from slurm.options import Options
from slurm.step import Step

Function = Callable[[Any, ShardAssignment], Any]


class KilledAtFirst(Assigned):
    """The process is killed when its first shard is made."""

    def complete(self, shard: int, made: bool) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def run_task(function: Function, config: Any, shards: Iterable[int], kind: type[Assigned] = Assigned) -> Any:
    """One task of an array that has these shards; what the stage returns."""
    folder = f"{config.root}/logs/jobs/claims"
    with Claims(folder, f"task-{os.getpid()}", 60) as claims:
        return function(config, kind(claims, Failures(folder, "now"), shards))


def kill_task(function: Function, config: Any, shards: Iterable[int]) -> None:
    """A task in a process of its own, which is killed in the middle."""
    arguments = (function, config, list(shards), KilledAtFirst)
    child = multiprocessing.get_context("fork").Process(target=run_task, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def missing(command: str, config: Any) -> list[Ranges]:
    """The shards of each task of a submission of at most two tasks."""
    return divide(Step(command, Options(array=2), config=config), False, None, Path(config.root, "logs/jobs")).ranges


def copied(folder: Path, ending: str) -> None:
    """Put the part of shard 2 in the place of that of shard 1: its file, its record or both."""
    for path in folder.glob(f"00002*{ending}"):
        path.with_name(path.name.replace("00002", "00001", 1)).write_bytes(path.read_bytes())


def flipped(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# what may befall the part of shard 1 in the folder of a run that was killed
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the file": lambda folder: flipped(next(folder.glob("00001.*"))),
    "a number of the record": lambda folder: (folder / "00001_stats.json").write_text(
        (folder / "00001_stats.json").read_text().replace('"success": ', '"success": 7')
    ),
    "file of another": lambda folder: copied(folder, "t"),
    "record of another": lambda folder: copied(folder, "_stats.json"),
    "both of another": lambda folder: copied(folder, ""),
    "file is gone": lambda folder: next(folder.glob("00001.*")).unlink(),
    "empty file": lambda folder: next(folder.glob("00001.*")).write_bytes(b""),
    "empty record": lambda folder: (folder / "00001_stats.json").write_bytes(b""),
}


def finish(function: Function, config: Any, folder: str) -> tuple[Any, list[int]]:
    """The job after an array: what the stage returns, and the shards that are missing."""
    assignment = Finished(f"{config.root}/{folder}")
    return function(config, assignment), assignment.missing
