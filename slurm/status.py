"""``clipmill jobs``: what was submitted for a dataset or a run, how far it is, and why something failed."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.command_line import Root
from shards_spec.files import UserError, join
from shards_spec.layout import CHECK, STAGES, shard_name
from shards_spec.manifest import finished_shards
from shards_spec.messages import counted, require
from slurm.jobs import JobFailedError
from slurm.options import read_site
from slurm.scheduler import states
from slurm.step import COMMANDS
from slurm.submission import Submission, jobs_folder, submissions
from slurm.submitit_parts import error_logs, result_succeeded, results, submitted_jobs

LOG_END = 200_000  # bytes
GONE = "GONE WITHOUT A RESULT"  # cancelled, killed, or lost with its node, and Slurm no longer knows it
FAILED = (GONE, "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
OWN_ERROR = f"{JobFailedError.__module__}.{JobFailedError.__name__}: "  # what it says is meant for people
REASONS = (  # what Python reports, else what Slurm reports
    re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*(?:\n  \d+: .*)*", re.M),
    re.compile(r"^slurmstepd(?:-\S+)?: error: .*", re.M),
    re.compile(r"^srun: error: .*", re.M),
)


@dataclass(frozen=True)
class JobsConfig:
    """Show what was submitted for a dataset or a run."""

    root: Root
    """the dataset or the RUN folder"""
    last: int = 5
    """submissions to show, the newest ones"""
    tail: int = 15
    """lines of a failed job's log"""
    logs: int = 3
    """failed jobs of a submission whose log is shown"""
    site: str | None = None
    """site file; says where job files of a URL are"""

    def __post_init__(self) -> None:
        require(self.last >= 1, "last", self.last, "1 or more")
        require(self.tail >= 0, "tail", self.tail, "0 or more")
        require(self.logs >= 0, "logs", self.logs, "0 or more")


def jobs(config: JobsConfig) -> str:
    """The page. Raises UserError when nothing was submitted."""
    jobs_dir = jobs_folder(config.root, read_site(config.site, "jobs", COMMANDS))
    shown = submissions(jobs_dir)[-config.last :]
    if not shown:
        raise UserError(f"nothing was submitted for {config.root} (no submission.json in {jobs_dir})")
    numbers = list[str]()
    for submission in shown:
        if submission.cluster == "slurm":
            numbers += [*submission.arrays, submission.last]
    known = states(numbers)
    finished = {folder: frozenset(finished_shards(folder)) for folder in {*map(_array_folder, shown)} if folder}
    parts = [] if known is not None else ["Slurm does not answer here: this is what the jobs' own files say"]
    parts += [format_submission(one, jobs_dir / one.id, known, finished, config) for one in shown]
    return "\n\n".join(parts)


def _array_folder(submission: Submission) -> str | None:
    """The folder whose shards are counted for a submission."""
    if submission.folder is None or submission.shards is None:
        return None
    return join(submission.root, submission.folder)


def format_submission(
    submission: Submission,
    folder: Path,
    known: dict[str, str] | None,
    finished: dict[str, frozenset[int]],
    config: JobsConfig,
) -> str:
    """A submission's part of the page.

    ``folder`` holds its jobs' files, ``known`` are the states that Slurm tells (None: it does not answer), ``finished``
    the shards of each folder that an array fills.
    """
    lines = [f"{submission.id}  {submission.words}"]
    state_of = _states(submission, folder, known)
    lines += _format_states("array", submission.arrays, state_of)
    lines += _format_states("then" if submission.arrays else "job", [submission.last], state_of)
    array_folder = _array_folder(submission)
    done = finished.get(array_folder or "", frozenset())
    is_check, last = submission.command == CHECK.name, state_of.get(submission.last)
    has_parts = is_check or (submission.command in STAGES and bool(STAGES[submission.command].parts))
    if has_parts and array_folder is not None and last == "COMPLETED":
        lines.append(f"  {submission.folder}: summed up and deleted")
    elif is_check and last == "FAILED" and not done:
        pass  # it has found problems, which are the reason that it failed
    elif array_folder is not None and submission.shards is not None:
        missing = [shard for shard in range(submission.shards) if shard not in done]
        some = ", ".join(map(shard_name, missing[:10])) + (" …" if len(missing) > 10 else "")
        line = f"  {submission.folder}: {len(done)} of {counted(submission.shards, 'shard')}"
        lines.append(f"{line}, missing {some}" if missing else line)
    failed = [job for job, state in sorted(state_of.items()) if state.startswith(FAILED)]
    for job in failed[: config.logs]:
        lines += [f"  {line}" for line in failure_reason(folder, job, state_of[job], config.tail)]
    if len(failed) > config.logs:
        lines.append(f"  and {len(failed) - config.logs} more: {' '.join(failed[config.logs : config.logs + 20])}")
    return "\n".join(lines)


def _states(submission: Submission, folder: Path, known: dict[str, str] | None) -> dict[str, str]:
    """The state of each of a submission's jobs and array tasks: what Slurm says, else what their files say."""
    numbers = {*submission.arrays, submission.last}
    state_of = _states_by_results(submission, folder)
    for job, state in (known or {}).items():
        if job.split("_")[0] in numbers:
            state_of[job] = state
    if submission.cluster == "slurm":
        for job in submitted_jobs(folder):
            state_of.setdefault(job, "NOT ENDED" if known is None else GONE)
    return state_of


def _format_states(title: str, jobs: list[str], state_of: dict[str, str]) -> list[str]:
    """A line with the number of tasks in each state; none without jobs."""
    if not jobs:
        return []
    counted = Counter(state.lower() for job, state in state_of.items() if job.split("_")[0] in jobs)
    counts = ", ".join(f"{number} {state}" for state, number in sorted(counted.items()))
    return [f"  {title} {', '.join(jobs)}: {counts or 'unknown'}"]


def _states_by_results(submission: Submission, folder: Path) -> dict[str, str]:
    """States by the results that jobs stored, for where Slurm keeps no accounts; one failed task fails a job."""
    state_of = dict[str, str]()
    for job, path in results(folder):
        if not result_succeeded(path):
            state_of[job] = "FAILED"
        else:
            state_of.setdefault(job, "COMPLETED")
    if submission.cluster == "local" and submission.last not in state_of:
        state_of[submission.last] = "RUNNING" if os.path.exists(f"/proc/{submission.last}") else "FAILED"
    return state_of


def failure_reason(folder: Path, job: str, state: str, tail: int) -> list[str]:
    """The reason that a job failed, the path of its log and the last ``tail`` lines of it."""
    logs = error_logs(folder, job)
    if not logs:
        return [f"{job} {state.lower()}: it left no log; scontrol show job {job}"]
    texts = {path: path.read_bytes()[-LOG_END:].decode(errors="replace") for path in logs}
    reason, path = None, logs[-1]
    for pattern in REASONS:
        for log in logs:
            if reason is None and (found := [match.group() for match in pattern.finditer(texts[log])]):
                reason, path = found[-1].removeprefix(OWN_ERROR), log
    lines = texts[path].rstrip().splitlines()
    if reason is None:
        reason = (lines or ["an empty log"])[-1]
    return [*f"{job} {state.lower()}: {reason}".splitlines(), f"{path}:", *lines[-tail:]]
