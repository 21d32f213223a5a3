"""What runs on a node: small picklable objects that import what is heavy when they are called.

submitit requeues a job that has ``checkpoint`` after a time-out or a preemption: with the same object, since shards
and checkpoints on disk say how far it is. Nothing collective happens in it: one task alone calls it.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shards_spec.display import log_to_stderr
from shards_spec.files import DataError, UserError
from shards_spec.layout import STAGES, shard_name
from shards_spec.manifest import finished_shards
from slurm.claims import Assigned, Claims, Failures, Finished, WorkStealing

log = logging.getLogger(__name__)
# a training that stopped on SIGUSR1 has saved and says so; killed by it, it had nothing to save yet
SAVED = (128 + signal.SIGUSR1, -signal.SIGUSR1)
DOOMED_S = 900  # how long a task that got SIGTERM waits for its end


class JobFailedError(Exception):
    """The job ends as failed; the message says why."""


@dataclass(frozen=True)
class Job:
    """``max_requeue`` bounds all kinds of restarts; Slurm counts them."""

    max_requeue: int

    def __call__(self) -> None:
        raise NotImplementedError

    def checkpoint(self, *_: Any) -> Any:
        """submitit's: what is to run after the requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def begin(self) -> None:
        """Set up the log; raise when the job was restarted too often."""
        log_to_stderr()
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts > self.max_requeue:
            raise JobFailedError(f"requeued {restarts} times, --max-requeue is {self.max_requeue}")


@dataclass(frozen=True)
class StageJob(Job):
    """A command of the pipeline, whole: one process per node makes what is missing."""

    command: str
    function: Callable[..., Any]
    config: Any

    def __call__(self) -> None:
        self.begin()
        self.need_samples(self.run())

    def need_samples(self, outcome: Any) -> None:
        """Raise JobFailedError after a stage of which nothing came out, so that what follows does not begin."""
        from pipeline.core.no_success import explain_no_success

        if STAGES[self.command].has_shards and (nothing := explain_no_success(self.command, outcome.counts)):
            raise JobFailedError(nothing)

    def run(self, *assignment: Any) -> Any:
        """Call the stage. What users and data can be blamed for becomes a message without a traceback."""
        from pipeline.core.runner import ShardsFailed

        try:
            return self.function(self.config, *assignment)
        except (UserError, DataError, ShardsFailed) as error:
            raise JobFailedError(str(error)) from None


@dataclass(frozen=True)
class ArrayJob(StageJob):
    """One task of an array over shards: those of its ``ranges`` first, then what others have not begun.

    ``claims`` is a folder that all tasks of the stage see, ``folder`` the one the stage fills, ``upstream`` the one
    whose shards it takes; None where only the stage itself knows how many there are.
    """

    upstream: str | None
    ranges: tuple[tuple[int, int], ...]
    folder: str
    claims: str
    submission: str
    claim_s: float

    def __call__(self) -> None:
        self.begin()
        shards = {shard for start, stop in self.ranges for shard in range(start, stop)}
        failures, messages = Failures(self.claims, self.submission), []
        with Claims(self.claims, owner(), self.claim_s) as claims:
            stealing = WorkStealing(claims, failures, self.folder)
            assignment: Assigned = Assigned(claims, failures, shards) if shards else stealing
            while True:
                upstream = self.upstream if assignment is stealing else None
                if upstream is not None and not stealing.wait(len(finished_shards(upstream))):
                    break  # before a model is loaded for nothing
                assignment.failed = False
                try:
                    made = self.run(assignment).made
                    log.info("%s: made %d shards", self.command, made)
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
    """After an array: the stage's totals, when all shards are there; else the failure that holds the next stage.

    The tasks of ``arrays`` have ended, also those that were killed, so their claims go.
    """

    folder: str
    claims: str
    submission: str
    arrays: tuple[str, ...]

    def __call__(self) -> None:
        self.begin()
        self._clean()
        assignment = Finished(self.folder)
        outcome = self.run(assignment)
        if assignment.missing:
            some = ", ".join(map(shard_name, assignment.missing[:8])) + (" …" if len(assignment.missing) > 8 else "")
            raise JobFailedError(
                f"{self.command}: {len(assignment.missing)} shards are missing ({some}); "
                "submit it again, it does only what is missing"
            )
        self.need_samples(outcome)

    def _clean(self) -> None:
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
        for job in self.jobs:
            job()


def owner() -> str:
    """A name of this task that its restarts share."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    return f"{environment.cluster}-{environment.job_id}-{environment.global_rank}"


@dataclass(frozen=True)
class TrainJob(Job):
    """One process of a training job: ``clipmill train`` with these words, as a child that this one can stop.

    USR2 (submitit's signal ahead of a time-out or preemption) lets the child save, then the job is requeued. After
    SIGTERM alone it saves, too, and Slurm decides what follows.
    """

    words: tuple[str, ...]

    def __call__(self) -> None:
        self.begin()
        stop, requeue = list[int](), signal.getsignal(signal.SIGUSR2)

        def save(number: int, frame: FrameType | None) -> None:
            if not stop and child:
                child[0].send_signal(signal.SIGUSR1)
            stop.append(number)

        child: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, save)
        # Slurm signals all processes of a step: the child hears of it through this one alone, and once
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM))
        command = [sys.executable, "-u", "-m", "clipmill", "train", *self.words]
        child.append(subprocess.Popen(command, env={**os.environ, **distributed()}))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = child[0].wait()
        if code and not (stop and code in SAVED):
            raise JobFailedError(f"clipmill train {' '.join(self.words)} ended with {_said(code)}")
        if code and stop:
            doomed = time.monotonic() + DOOMED_S
            while signal.SIGUSR2 not in stop and time.monotonic() < doomed:
                time.sleep(1)
            if signal.SIGUSR2 not in stop or not callable(requeue):
                raise JobFailedError("stopped by SIGTERM after saving; submit it again to go on")
            requeue(signal.SIGUSR2, None)  # rank 0 requeues and exits


def distributed() -> dict[str, str]:
    """torchrun's variables, from submitit's of this task. A task that sees one GPU alone has that."""
    from submitit import JobEnvironment

    here = JobEnvironment()
    first = here.hostnames[0] if here.num_nodes > 1 else "127.0.0.1"
    number = int(os.environ.get("SLURM_JOB_ID", here.job_id)) + 7 * int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {
        "RANK": str(here.global_rank),
        "LOCAL_RANK": str(0 if re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", "")) else here.local_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20000 + number % 10000),
    }


def _said(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name
