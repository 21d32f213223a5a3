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


def finish(function: Function, config: Any, folder: str) -> tuple[Any, list[int]]:
    """The job after an array: what the stage returns, and the shards that are missing."""
    assignment = Finished(f"{config.root}/{folder}")
    return function(config, assignment), assignment.missing
