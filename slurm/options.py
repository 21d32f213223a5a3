"""The options of a submission, and a cluster's settings for every job from one TOML file (see site.toml)."""

import os
import re
import shlex
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.unused_options import Unused

JOBS_ADVICE = 'name another folder for job files as jobs = "FOLDER" in the site file'
TIME = re.compile(r"(?:\d+-\d+(?::\d+){0,2}|\d+(?::\d+){0,2})", re.ASCII)
SAVE_S = 90  # before the limit
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # a line break in a value would be a line of the job's script


@dataclass(frozen=True)
class Options:
    """Where and when it runs."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: a process in the background of this machine; debug: here and now, as the plain command"""
    nodes: int = 1
    """train: nodes of one job"""
    gpus_per_node: int | None = None
    """GPUs of a node; train has a process for each"""
    tasks_per_node: int | None = None
    """train: processes of a node; by default one per GPU"""
    array: int = 32
    """a stage's tasks at most, each with a list of shards; finished ones help the others"""
    parallel: int | None = None
    """tasks that run at once at most; by default all"""
    time: str = "12:00:00"
    """limit for one task, as Slurm reads it: minutes, [H:]M:S or D-H[:M[:S]]; what is not finished by then is requeued
    and resumes"""
    save_s: int | None = None
    """seconds before the limit at which training saves and is requeued; by default 90, or half of a limit below 180"""
    after: tuple[str, ...] = ()
    """jobs that must have succeeded before"""
    incomplete: bool = False
    """start also when the jobs before failed"""
    max_requeue: int = 3
    """how often a job is requeued after a time-out, a preemption or a lost node"""
    recheck: bool = False
    """look at finished shards, too: those whose input or number of views changed are made again"""
    claim_s: float = 180.0
    """seconds without a sign of life after which another task may take over a shard"""
    partition: str | None = None
    """as in the site file"""
    site: str | None = None
    """site file; by default CLIPMILL_SITE, else slurm/site.toml"""
    wait: bool = False
    """wait for the end; the exit code tells how it went"""
    dry_run: bool = False
    """print the sbatch scripts and submit nothing"""

    def __post_init__(self) -> None:
        for name in ("nodes", "array"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("tasks_per_node", "parallel", "save_s"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        gpus = self.gpus_per_node
        require(gpus is None or gpus >= 0, "gpus_per_node", gpus, "0 or more")
        require(self.max_requeue >= 0, "max_requeue", self.max_requeue, "0 or more")
        require(self.claim_s > 0, "claim_s", self.claim_s, "above 0")
        limit_s = 60 * self.minutes
        if self.save_s is not None and self.save_s >= limit_s:
            raise UserError(
                f"--save-s {self.save_s}: must be less than the time limit, --time {self.time} is {limit_s} seconds"
            )
        if CONTROL.search(self.partition or ""):
            raise UserError(f"--partition {self.partition!r}: one line, without control characters")
        if bad := [job for job in self.after if not job.isdigit()]:
            raise UserError(f"--after {' '.join(bad)}: give the numbers that `clipmill submit` printed")

    def unused(self) -> Iterator[Unused]:
        """Yield the options of Slurm's queue where it runs on this machine, and what a dry run does not do."""
        if self.cluster != "slurm":
            alone = f"with --cluster {self.cluster}, which runs on this machine without a queue"
            yield Unused(("array", "parallel", "claim_s", "partition", "nodes"), alone)
            yield Unused(("after", "incomplete"), f"with --cluster {self.cluster}, which waits for no job")
            yield Unused(("dry_run",), f"with --cluster {self.cluster}, which has no scripts to print")

    @property
    def minutes(self) -> int:
        """The time limit, read as sbatch reads it; seconds count as a whole minute. Raises UserError."""
        allowed = (
            "minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]], above 0 and 59 at most behind a :"
        )
        require(bool(TIME.fullmatch(self.time)), "time", self.time, allowed)
        days, _, rest = self.time.rpartition("-")
        fields_given = [int(field) for field in rest.split(":")]
        if not days and len(fields_given) < 3:  # without hours
            fields_given.insert(0, 0)
        hours, minutes, seconds = [*fields_given, 0, 0][:3]
        limit = 1440 * int(days or 0) + 60 * hours + minutes + (seconds > 0)
        require(limit > 0 and max(map(int, rest.split(":")[1:]), default=0) < 60, "time", self.time, allowed)
        return limit

    @property
    def signal_s(self) -> int:
        """Seconds before the limit at which the tasks get a signal."""
        return self.save_s if self.save_s is not None else min(SAVE_S, 30 * self.minutes)

    @property
    def processes(self) -> int:
        """Training processes of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class Site:
    """A cluster's settings for one command."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    setup: list[str] = field(default_factory=list)
    container: str = ""
    scratch: list[str] = field(default_factory=list)
    jobs: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)

    def script_lines(self, snapshot: str) -> list[str]:
        """Lines of the job's script before Python starts; they make it import the snapshot, not the current folder."""
        lines = list(self.setup)
        if self.scratch:
            folders = " ".join(map(shlex.quote, self.scratch))
            lines.append(f'for s in {folders}; do [ -w "$s" ] && export TMPDIR="$s" && break; done')
        lines.append(f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(snapshot)}${{PYTHONPATH:+:$PYTHONPATH}}")
        return lines


def read_site(path: str | None, command: str, commands: Collection[str]) -> Site:
    """The site file's settings for a command. Raises UserError naming what is wrong with it."""
    file = Path(path or os.environ.get("CLIPMILL_SITE") or Path(__file__).with_name("site.toml"))
    try:
        settings = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"site file {file}: {error}") from error
    tables = {name: settings.pop(name) for name in list(settings) if name in commands}
    wanted = {**settings, **tables.get(command, {})}
    types: dict[str, Any] = {one.name: one.type for one in fields(Site)}
    for name, value in wanted.items():
        if name not in types:
            raise UserError(f"site file {file}: no key {name!r}; there are {', '.join(types)}, and tables per command")
        if not isinstance(value, getattr(types[name], "__origin__", types[name])):
            raise UserError(f"site file {file}: {name} = {value!r} must be {types[name]}")
        if bad := [text for text in _texts(value) if CONTROL.search(text)]:
            raise UserError(f"site file {file}: {name} has {bad[0]!r}: one line each, without control characters")
    return Site(**wanted)


def _texts(value: Any) -> list[str]:
    """All strings in a value of the site file, keys too."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return list(chain.from_iterable(map(_texts, value)))
    return [value] if isinstance(value, str) else []
