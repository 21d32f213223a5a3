"""The one loop over shards: what is missing, worker processes, done-records, failures, totals, progress.

A stage is a function ``work(root, task) -> Result`` from one shard to one shard that writes its files atomically.
The runner publishes the done-record last, so a killed stage is run again and does only what is missing.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.core.prefetch import prefetch_map
from pipeline.core.workers import die_with_parent
from shards_spec.files import DataError, UserError, is_url, join, read_bytes, remove_stale, sha256_json, write_bytes
from shards_spec.layout import shard_name, stage_log, tar_path
from shards_spec.manifest import (
    Done,
    file_hash,
    read_dataset,
    read_done,
    remove_shards,
    shard_ids,
    write_stage,
)

log = logging.getLogger(__name__)
LOOK_AHEAD = 16  # done-records asked for at a time from an object store
VERSIONED = ("clipmill", "numpy", "pillow", "pyarrow")


@dataclass(frozen=True)
class Stage:
    """``name`` is the key in dataset.json, ``folder`` lies below ROOT, ``config`` is all that shapes the bytes.

    Numbers of it that ``grows`` names may be larger than those of finished shards: those are made again, by ``work``
    that adds to what is there.
    """

    name: str
    folder: str
    config: dict[str, Any]
    grows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))  # as a done-record gives it back


@dataclass(frozen=True)
class Task:
    """One shard's work: ``inputs`` maps paths (or names) to hashes, ``payload`` is what ``work`` needs besides.

    A finished shard stands too when its inputs are ``former``: those that an earlier version wrote down for the same.
    """

    shard: int
    inputs: dict[str, str]
    payload: Any = None
    former: dict[str, str] | None = None


@dataclass(frozen=True)
class Result:
    """``counts``: status to number of inputs; ``outputs``: paths below ROOT to sha256; the rest is for `Done`, but
    ``measured``, which is summed into the run's line of the log and kept nowhere else."""

    counts: dict[str, int]
    outputs: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What one run of a stage did; ``counts`` and ``facts`` are the totals over all its shards, also those made
    earlier, ``measured`` only over those it made."""

    shards: int
    made: int
    counts: dict[str, int]
    facts: dict[str, int]
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)


class ShardsFailed(Exception):
    """Some shards could not be made; the others are done. The message lists them."""


class ShardAssignment:
    """Which shards this process makes of a stage: all of them. `slurm` has shares of several processes.

    `claim` is asked as late as possible, just before a shard is begun, and may be asked again for the same one.
    """

    @property
    def is_complete(self) -> bool:
        """Whether all shards are there at the end, so that the stage's totals can be written."""
        return True

    def claim(self, shard: int) -> bool:
        """Whether to make the shard, unless it is done."""
        return True

    def complete(self, shard: int, made: bool) -> None:
        """The shard is there, or it failed."""


ALL = ShardAssignment()
Work = Callable[[str, Task], Result]
Root = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]  # a config's first field


def run_stage(
    root: str,
    stage: Stage,
    tasks: Iterable[Task],
    work: Work,
    *,
    total: int | None = None,
    workers: int = 1,
    threads: int = 0,
    overwrite: bool = False,
    source: str | None = None,
    live: Callable[[], str] | None = None,
    begin: Callable[[], None] | None = None,
    surplus: Callable[[str, int], None] = remove_shards,
    assignment: ShardAssignment = ALL,
) -> Summary:
    """Run ``work`` over the assignment's tasks whose done-record is missing or stale, then write the stage's totals.

    With ``workers`` > 1 shards go to spawned processes, each of which calls ``begin`` first, a few in flight; with
    ``threads`` > 0 that many run at once in threads. ``live`` gives the progress line more to say. Before a whole
    ``assignment``'s totals are written ``surplus`` deletes the folder's shards from their number on, or raises. Raises
    UserError for finished shards of another config (unless ``overwrite``), ShardsFailed for broken data.
    """
    start, folder = time.monotonic(), join(root, stage.folder)
    remove_stale(folder)
    failures, made, there, counts, facts = dict[int, str](), 0, 0, Counter[str](), Counter[str]()
    measured = dict[str, float]()

    def missing() -> Iterator[Task]:
        nonlocal there
        for task, done in _with_done(tasks, folder, stage, overwrite, assignment):
            if done:
                there += 1
                assignment.complete(task.shard, True)
                _count(counts, facts, done)
            else:
                yield task

    with _progress(stage.name, total, live) as advance:
        waiting = workers + 1 if assignment is ALL else 0  # what waits for a worker here could be made elsewhere
        for ended in _outcomes(missing(), partial(work, root), workers, threads, waiting, begin):
            if ended is not None:
                task, outcome = ended
                if isinstance(outcome, DataError):
                    failures[task.shard] = str(outcome)
                    log.error("shard %s failed: %s", shard_name(task.shard), outcome)
                else:
                    _count(counts, facts, _publish(folder, stage, task, outcome))
                    measured.update({what: measured.get(what, 0) + own for what, own in outcome.measured.items()})
                    made += 1
                assignment.complete(task.shard, not isinstance(outcome, DataError))
            advance(there + made + len(failures))
    remove_stale(folder)  # of workers that outlived a killed run for a moment
    _raise_failures(stage, failures, there + made + len(failures))
    totals = {reason: number for reason, number in sorted(counts.items()) if number}
    summary = Summary(there + made, made, totals, dict(sorted(facts.items())), time.monotonic() - start, measured)
    if assignment.is_complete:
        surplus(folder, summary.shards)
        _write_totals(root, stage, summary, source)
    return summary


def _raise_failures(stage: Stage, failures: dict[int, str], shards: int) -> None:
    lines = [f"  {shard_name(shard)}: {reason}" for shard, reason in sorted(failures.items())]
    if lines:
        raise ShardsFailed("\n".join([f"{stage.name}: {len(failures)} of {shards} shards failed", *lines]))


def _with_done(
    tasks: Iterable[Task], folder: str, stage: Stage, overwrite: bool, assignment: ShardAssignment
) -> Iterator[tuple[Task, Done | None]]:
    """Each task of the assignment with the done-record that makes it unnecessary.

    A process that does all of them asks an object store for many at a time.
    """

    def look(task: Task) -> tuple[Task, Done | None]:
        return task, None if overwrite else _done_before(folder, stage, task)

    taken = (task for task in tasks if assignment.claim(task.shard))
    return (
        prefetch_map(look, taken, LOOK_AHEAD, 2 * LOOK_AHEAD)
        if is_url(folder) and assignment is ALL
        else map(look, taken)
    )


def _count(counts: Counter[str], facts: Counter[str], done: Done) -> None:
    facts.update(done.facts)
    counts.update(done.counts)
    counts.subtract(done.retried)


def _done_before(folder: str, stage: Stage, task: Task) -> Done | None:
    done = same_config(folder, stage, task.shard)
    grown = done is not None and done.config != stage.config
    return done if done is not None and not grown and done.inputs in (task.inputs, task.former) else None


def same_config(folder: str, stage: Stage, shard: int) -> Done | None:
    """The shard's done-record, if any. Raises UserError when it was made under another config, but for numbers that
    may grow."""
    done = read_done(folder, shard)
    if done is None:
        return None
    changed = {key for key in {*done.config, *stage.config} if done.config.get(key) != stage.config.get(key)}
    grown = {key for key in changed if key in stage.grows and done.config.get(key, 0) < stage.config[key]}
    if changed - grown:
        named = [
            f"{key}: {done.config.get(key)!r} there, {stage.config.get(key)!r} asked" for key in sorted(changed - grown)
        ]
        raise UserError(
            f"{folder}/{shard_name(shard)} was made with another config ({'; '.join(named)}); "
            "ask for the same, use another ROOT, or make it again with --overwrite"
        )
    return done


def _publish(folder: str, stage: Stage, task: Task, result: Result) -> Done:
    done = Done(
        stage.name, task.shard, stage.config, result.counts, task.inputs, result.outputs, result.extra,
        result.retried, result.facts,
    )  # fmt: skip
    done.write(folder)
    return done


Ended = tuple[Task, Result | DataError] | None  # None: nothing new, once a second


def _outcomes(
    tasks: Iterator[Task],
    work: Callable[[Task], Result],
    workers: int,
    threads: int,
    waiting: int,
    begin: Callable[[], None] | None,
) -> Iterator[Ended]:
    """Results as they come. Only DataError is caught: a bug stops at once."""
    if workers <= 1 and not threads:
        for task in tasks:
            yield task, _guarded(work, task)
        return
    context = multiprocessing.get_context("spawn")
    pool: Executor = (
        ThreadPoolExecutor(threads)
        if threads
        else ProcessPoolExecutor(workers, context, initializer=_begin_process, initargs=(begin,))
    )
    limit, running = threads or workers + waiting, dict[Future[Result | DataError], Task]()
    try:
        for task in tasks:
            running[pool.submit(_guarded, work, task)] = task
            while len(running) >= limit:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_process(begin: Callable[[], None] | None) -> None:
    die_with_parent()
    if begin:
        begin()


def _finished(running: dict["Future[Result | DataError]", Task]) -> Iterator[Ended]:
    done = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
    yield from ((running.pop(future), future.result()) for future in done)
    if not done:
        yield None


def _guarded(work: Callable[[Task], Result], task: Task) -> Result | DataError:
    try:
        return work(task)
    except DataError as error:
        return error


def _write_totals(root: str, stage: Stage, summary: Summary, source: str | None) -> None:
    block = {
        "config": stage.config,
        "config_sha256": sha256_json(stage.config),
        "shards": summary.shards,
        "counts": summary.counts,
        **({"facts": summary.facts} if summary.facts else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
    }
    write_stage(root, stage.name, block, source)
    _log_run(root, stage, summary)


def _log_run(root: str, stage: Stage, summary: Summary) -> None:
    """Append to logs/STAGE.jsonl: times live there, so that the dataset's own files do not depend on them."""
    path = stage_log(root, stage.name)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shards": summary.shards,
        "made": summary.made,
        "samples": summary.counts.get("success", 0),
        "seconds": round(summary.seconds, 3),
        "cpus": os.cpu_count(),
        **{what: round(own, 3) for what, own in summary.measured.items()},
    }
    try:
        earlier = read_bytes(path)
    except FileNotFoundError:
        earlier = b""
    write_bytes(path, earlier + json.dumps(entry).encode() + b"\n")


def upstream_shards(root: str, folder: str, stage: str) -> list[int]:
    """Shard ids that an earlier stage left in ``root/folder``.

    Raises UserError when there are none or that stage has not finished. Shards of a foreign img2dataset folder
    (no done-record of ours) are taken as they are.
    """
    shards = shard_ids(join(root, folder))
    if not shards:
        raise UserError(
            f"{join(root, folder)} has no finished shards: run `clipmill {stage.split('/')[0]} {root}` first"
        )
    ours = read_done(join(root, folder), shards[-1]) is not None
    block = read_dataset(root)["stages"].get(stage)
    if ours and (block is None or block["shards"] != len(shards)):
        raise UserError(f"{stage} has not finished in {root}: run `clipmill {stage.split('/')[0]}` again, it goes on")
    return shards


def tar_tasks(root: str, folder: str, shards: list[int], assignment: ShardAssignment = ALL) -> Iterator[Task]:
    """A task per shard of the assignment, whose input is the shard's tar in ``root/folder``."""
    for shard in filter(assignment.claim, shards):
        path = tar_path(folder, shard)
        yield Task(shard, {path: file_hash(root, folder, shard, path)})


@contextlib.contextmanager
def _progress(name: str, total: int | None, live: Callable[[], str] | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a plain line every ten seconds in a log."""
    console, say = Console(stderr=True), live or (lambda: "")
    if console.is_terminal:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("shards {task.fields[more]}"))
        with Progress(*columns, *([] if live else [TimeRemainingColumn()]), console=console, transient=True) as bar:
            task = bar.add_task(name, total=total, more="")
            yield lambda done: bar.update(task, completed=done, more=say())
        return
    last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            log.info("%s: %d of %s shards %s", name, done, total or "?", say())

    yield line
