"""What runs on a node: small picklable objects that import heavy modules when they are called.

submitit requeues a job that has ``checkpoint`` after a time-out or a preemption: with the same object, since shards
and checkpoints on disk say how far it is. One task alone calls ``checkpoint``, so nothing collective happens in it.
"""

import logging
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.core.no_success import explain_no_success
from pipeline.core.runner import ShardAssignment, ShardsFailed
from shards_spec.display import log_to_stderr
from shards_spec.files import DataError, UserError
from shards_spec.layout import STAGES, SUBMITTED, shard_name
from shards_spec.manifest import finished_shards
from shards_spec.messages import counted
from slurm.claims import Assigned, Claims, Failures, Finished, WorkStealing

log = logging.getLogger(__name__)
# a training that stopped on SIGUSR1 has saved and says so; killed by it, it had nothing to save yet
SAVED = (128 + signal.SIGUSR1, -signal.SIGUSR1)
TERMINATED_S = 900  # how long a task that got SIGTERM waits to be killed or requeued
Ranges = tuple[tuple[int, int], ...]  # of shards: (first, behind the last)


class JobFailedError(Exception):
    """The job ends as failed; the message says why."""


@dataclass(frozen=True)
class Job:
    """``max_requeue`` bounds all kinds of restarts; Slurm counts them."""

    max_requeue: int

    def __call__(self) -> None:
        """Run; submitit calls it on the node."""
        raise NotImplementedError

    def checkpoint(self, *_: Any) -> Any:
        """What is to run after the requeue; submitit calls it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def start(self) -> None:
        """Set up the log. Raises JobFailedError when the job was restarted too often."""
        log_to_stderr()
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts > self.max_requeue:
            raise JobFailedError(f"requeued {counted(restarts, 'time')}, --max-requeue is {self.max_requeue}")


@dataclass(frozen=True)
class StageFunction:
    """A stage's function by its name, ``package.module:function``: who submits it need not import the stage."""

    name: str

    def __call__(self, config: Any, *assignment: ShardAssignment) -> Any:
        """Import the stage and call it."""
        return pkgutil.resolve_name(self.name)(config, *assignment)


@dataclass(frozen=True)
class StageJob(Job):
    """A command of the pipeline, whole: one process per node makes what is missing."""

    command: str
    function: Callable[..., Any]
    config: Any

    def __call__(self) -> None:
        """Run the stage. Raises JobFailedError."""
        self.start()
        self.need_samples(self.run())

    def need_samples(self, outcome: Any) -> None:
        """Raise JobFailedError after a stage that made no sample, so that what follows does not start."""
        reason = explain_no_success(self.command, outcome.counts) if SUBMITTED[self.command].has_shards else None
        if reason:
            raise JobFailedError(reason)

    def run(self, *assignment: ShardAssignment) -> Any:
        """Call the stage. Errors of users and data become a JobFailedError, which has no traceback in the log."""
        try:
            return self.function(self.config, *assignment)
        except (UserError, DataError, ShardsFailed) as error:
            raise JobFailedError(str(error)) from None


@dataclass(frozen=True)
class ArrayJob(StageJob):
    """One task of an array over shards: those of its ``ranges`` first, then what others have not begun.

    ``claims`` is a folder that all tasks of the stage see, ``folder`` the one the stage fills, ``upstream`` the one
    whose shards it takes; None where only the stage itself knows how many there are. Another task may take over a
    shard whose owner gave no sign of life for ``claim_s`` seconds.
    """

    upstream: str | None
    ranges: Ranges
    folder: str
    claims: str
    submission: str
    claim_s: float

    def __call__(self) -> None:
        """Raises JobFailedError with the messages of all shards that failed, when the others are done."""
        self.start()
        shards = set(chain.from_iterable(range(start, stop) for start, stop in self.ranges))
        failures = Failures(self.claims, self.submission)
        messages = list[str]()
        with Claims(self.claims, task_owner(), self.claim_s) as claims:
            stealing = WorkStealing(claims, failures, self.folder)
            assignment: Assigned = Assigned(claims, failures, shards) if shards else stealing
            while True:
                upstream = self.upstream if assignment is stealing else None
                if upstream is not None and not stealing.wait(len(finished_shards(upstream))):
                    break  # without loading a model
                assignment.failed = False
                try:
                    made = self.run(assignment).made
                    log.info("%s: made %s", self.command, counted(made, "shard"))
                except JobFailedError as error:
                    if not assignment.failed:
                        raise
                    messages.append(str(error))
                    made = 1
                if assignment is stealing and (made == 0 or self.upstream is None):
                    break
                assignment = stealing
        if messages:
            raise JobFailedError("\n".join(messages))


@dataclass(frozen=True)
class FinishJob(StageJob):
    """After an array: writes the stage's totals when all shards are there; else fails, which holds the next stage.

    The tasks of ``arrays`` have ended, also those that were killed, so their claims are deleted.
    """

    folder: str
    claims: str
    submission: str
    arrays: tuple[str, ...]

    def __call__(self) -> None:
        """Write the totals. Raises JobFailedError naming the shards that are missing."""
        self.start()
        self._delete_claims()
        assignment = Finished(self.folder)
        outcome = self.run(assignment)
        if assignment.missing:
            some = ", ".join(map(shard_name, assignment.missing[:8])) + (" …" if len(assignment.missing) > 8 else "")
            raise JobFailedError(
                f"{self.command}: {counted(len(assignment.missing), 'shard')} missing ({some}); "
                f"submit it again{' to make only those' if self.command in STAGES else ''}"
            )
        self.need_samples(outcome)

    def _delete_claims(self) -> None:
        for path in Path(self.claims).glob("*"):
            if path.name.endswith(f".failed.{self.submission}") or self._ended(path):
                path.unlink(missing_ok=True)

    def _ended(self, claim: Path) -> bool:
        try:
            holder = claim.read_text()
        except FileNotFoundError:
            return False
        return any(re.fullmatch(rf"slurm-{array}(_\d+)?-\d+", holder) for array in self.arrays)


@dataclass(frozen=True)
class ChainJob(Job):
    """One job after the other, in one process."""

    jobs: tuple[Job, ...]

    def __call__(self) -> None:
        """Run the jobs in order; the first that raises ends the chain."""
        for job in self.jobs:
            job()


def task_owner() -> str:
    """The name under which this task claims shards; a requeued task has the same."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    return f"{environment.cluster}-{environment.job_id}-{environment.global_rank}"


@dataclass(frozen=True)
class TrainJob(Job):
    """One process of a training job: ``clipmill train`` with these words, as a child that this one can stop.

    SIGUSR2 (submitit's signal before a time-out or preemption) makes the child save, then the job is requeued. After
    SIGTERM alone it saves, too, and Slurm decides what follows.
    """

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Run the training as a child. Raises JobFailedError when it fails; requeues this job when it saved."""
        self.start()
        received = list[int]()
        requeue = signal.getsignal(signal.SIGUSR2)
        child: list[subprocess.Popen[bytes]] = []

        def save(number: int, frame: FrameType | None) -> None:
            if not received and child:
                child[0].send_signal(signal.SIGUSR1)
            received.append(number)

        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, save)
        # Slurm signals all processes of a step: the child gets one signal, from this process alone
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
        command = [sys.executable, "-u", "-m", "clipmill", "train", *self.words]
        child.append(subprocess.Popen(command, env={**os.environ, **torchrun_variables()}))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = child[0].wait()
        if code and not (received and code in SAVED):
            raise JobFailedError(f"clipmill train {' '.join(self.words)} ended with {describe_exit(code)}")
        if code and received:
            deadline = time.monotonic() + TERMINATED_S
            while signal.SIGUSR2 not in received and time.monotonic() < deadline:
                time.sleep(1)
            if signal.SIGUSR2 not in received or not callable(requeue):
                raise JobFailedError("stopped by SIGTERM after saving; submit it again to resume")
            requeue(signal.SIGUSR2, None)  # rank 0 requeues and exits


def torchrun_variables() -> dict[str, str]:
    """The environment variables that torchrun would set, for this task; one that sees a single GPU uses that."""
    from submitit import JobEnvironment

    task = JobEnvironment()
    job = int(os.environ.get("SLURM_JOB_ID", task.job_id))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    sees_one_gpu = re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "RANK": str(task.global_rank),
        "LOCAL_RANK": "0" if sees_one_gpu else str(task.local_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "MASTER_ADDR": task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20000 + (job + 7 * restarts) % 10000),  # another one after a restart: the old may be in use
    }


def describe_exit(code: int) -> str:
    """A process's exit code in words; negative ones are signals."""
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name
