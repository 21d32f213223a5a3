"""``clipmill jobs``: what was submitted for a dataset or a run, how far it is, and why something failed."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.runner import Root
from shards_spec.files import UserError, join
from shards_spec.layout import shard_name
from shards_spec.manifest import finished_shards
from slurm.options import read_site
from slurm.scheduler import states
from slurm.submit import COMMANDS, Submission, jobs_folder, submissions

LOG_END = 200_000  # bytes
GONE = "GONE WITHOUT A RESULT"  # cancelled, killed, or lost with its node, and Slurm has forgotten it
FAILED = (GONE, "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
REASONS = (  # what Python says, else what Slurm says
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


def jobs(config: JobsConfig) -> str:
    """The page. Raises UserError when nothing was submitted."""
    place = jobs_folder(config.root, read_site(config.site, "jobs", COMMANDS))
    made = submissions(place)[-config.last :]
    if not made:
        raise UserError(f"nothing was submitted for {config.root} (no submission.json in {place})")
    found = states(job for one in made if one.cluster == "slurm" for job in (*one.arrays, one.last))
    silent = [] if found is not None else ["Slurm does not answer here: this is what the jobs' own files say"]
    folders = {join(one.root, one.folder) for one in made if one.folder is not None and one.shards is not None}
    done = {folder: frozenset(finished_shards(folder)) for folder in folders}  # once, though several fill one folder
    return "\n\n".join([*silent, *(_told(one, place / one.id, found, done, config) for one in made)])


def _told(
    one: Submission,
    folder: Path,
    found: dict[str, str] | None,
    done_of: dict[str, frozenset[int]],
    config: JobsConfig,
) -> str:
    lines = [f"{one.id}  {one.words}"]
    numbers = {*one.arrays, one.last}
    own = {job: state for job, state in (found or {}).items() if job.split("_")[0] in numbers}
    own = {**_by_results(folder, one), **own}
    if one.cluster == "slurm":
        for path in folder.glob("*_submitted.pkl"):
            own.setdefault(path.name.removesuffix("_submitted.pkl"), "NOT ENDED" if found is None else GONE)
    for name, jobs_of in (("array", one.arrays), ("then" if one.arrays else "job", [one.last])):
        counted = Counter(state.lower() for job, state in own.items() if job.split("_")[0] in jobs_of)
        if jobs_of:
            said = ", ".join(f"{number} {state}" for state, number in sorted(counted.items()))
            lines.append(f"  {name} {', '.join(jobs_of)}: {said or 'unknown'}")
    if one.folder is not None and one.shards is not None:
        done = done_of[join(one.root, one.folder)]
        missing = [shard for shard in range(one.shards) if shard not in done]
        some = ", ".join(map(shard_name, missing[:10])) + (" …" if len(missing) > 10 else "")
        lines.append(f"  {one.folder}: {len(done)} of {one.shards} shards" + (f", missing {some}" if missing else ""))
    failed = [job for job, state in sorted(own.items()) if state.startswith(FAILED)]
    for job in failed[: config.logs]:
        lines += [f"  {line}" for line in why(folder, job, own[job], config.tail)]
    if len(failed) > config.logs:
        lines.append(f"  and {len(failed) - config.logs} more: {' '.join(failed[config.logs : config.logs + 20])}")
    return "\n".join(lines)


def _by_results(folder: Path, one: Submission) -> dict[str, str]:
    """States by what jobs left, for where Slurm keeps no accounts: a result without an error in the log."""
    found = dict[str, str]()
    for path in sorted(folder.glob("*_result.pkl")):
        job = path.name.removesuffix("_result.pkl").rsplit("_", 1)[0]
        error = b"\x05error" in path.read_bytes()[:64]
        found[job] = "FAILED" if error or found.get(job) == "FAILED" else "COMPLETED"
    if one.cluster == "local" and one.last not in found:
        found[one.last] = "RUNNING" if os.path.exists(f"/proc/{one.last}") else "FAILED"
    return found


def why(folder: Path, job: str, state: str, tail: int) -> list[str]:
    """The reason that a job failed, then the end of its log."""
    logs = sorted(folder.glob(f"{job}_*_log.err"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return [f"{job} {state.lower()}: it left no log; scontrol show job {job}"]
    for reason, path in ((reason, path) for reason in REASONS for path in logs):
        text = path.read_bytes()[-LOG_END:].decode(errors="replace")
        found = [match.group() for match in reason.finditer(text)]
        if found:
            break
    lines = text.rstrip().splitlines()
    said = found[-1] if found else (lines or ["an empty log"])[-1]
    return [*f"{job} {state.lower()}: {said}".splitlines(), f"{path}:", *lines[-tail:]]
