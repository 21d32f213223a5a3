"""The loop over the shards of a stage: which are missing, worker processes, done-records, failures, totals.

A stage is a function ``work(root, task) -> ShardResult`` from one input shard to one output shard that writes its files
atomically. The runner writes the done-record last, so a stage that was killed does only what is missing when it runs
again.
"""

import json
import logging
import os
import pkgutil
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

from pipeline.core.prefetch import prefetch_map
from pipeline.core.progress import show_progress
from pipeline.core.workers import die_with_parent, spawn_context
from shards_spec.files import (
    DataError,
    UserError,
    exists,
    is_url,
    join,
    read_bytes,
    remove_stale,
    sha256_json,
    write_bytes,
)
from shards_spec.layout import STAGES, shard_name, stage_log, stats_path, tar_path
from shards_spec.manifest import (
    Done,
    check_no_takedown,
    file_hash,
    read_dataset,
    read_done,
    read_intact,
    remove_shards,
    shard_ids,
    write_stage,
)
from shards_spec.messages import counted, flag

log = logging.getLogger(__name__)
LOOK_AHEAD = 16  # done-records that are asked for at a time from an object store
RENAMED = {  # settings with an option of another name
    "num_views": "views",
    "other_columns": "save_additional_columns",
    "from": "from_",
}
VERSIONED_PACKAGES = ("clipmill", "numpy", "pillow", "pyarrow")  # whose versions dataset.json records


@dataclass(frozen=True)
class Stage:
    """A stage as its records name it.

    ``name`` is the key in dataset.json, ``folder`` the path below ROOT, ``config`` every setting that affects the
    output. Finished shards must have been made with the same config, except that the numbers named by ``extendable``
    may have been smaller: such shards are made again, by ``work`` that adds to what is there.
    """

    name: str
    folder: str
    config: dict[str, Any]
    extendable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))  # equal to what a done-record gives


@dataclass(frozen=True)
class ShardTask:
    """One shard's work.

    ``inputs`` maps paths (or names) to hashes, ``payload`` is what ``work`` needs besides. A finished shard is valid
    when it was made from the same inputs, or from ``former``, the names of an earlier version for them.
    """

    shard: int
    inputs: dict[str, str]
    payload: Any = None
    former: dict[str, str] | None = None


@dataclass(frozen=True)
class ShardResult:
    """What ``work`` made of one shard; all but ``measurements`` goes into its done-record (see `Done`).

    ``counts`` maps a status (``success`` or a reason) to the number of inputs, ``outputs`` paths below ROOT to sha256.
    ``inputs`` are those that only the work finds out, beside the task's.
    ``measurements`` (seconds, say) are summed over a run for its line in the stage's log.
    """

    counts: dict[str, int]
    outputs: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    measurements: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What one run of a stage did.

    ``shards``, ``counts`` and ``counters`` are totals over all finished shards, ``made`` and ``measurements`` only
    over those that this run made.
    """

    shards: int
    made: int
    counts: dict[str, int]
    counters: dict[str, int]
    seconds: float
    measurements: dict[str, float] = field(default_factory=dict)


class ShardsFailed(Exception):
    """Some shards could not be made; the others are done. The message lists them."""


class ShardAssignment:
    """The shards of a stage that this process makes: all of them. `slurm` divides them between processes.

    `claim` is called as late as possible, just before a shard is begun, and maybe again for the same shard.
    """

    @property
    def is_complete(self) -> bool:
        """Whether all shards exist at the end of the run, so that the stage's totals can be written."""
        return True

    def claim(self, shard: int) -> bool:
        """Whether this process may make the shard, unless it is finished."""
        return True

    def complete(self, shard: int, made: bool) -> None:
        """Called when a claimed shard exists (``made``) or has failed."""


ALL = ShardAssignment()
Work = Callable[[str, ShardTask], ShardResult]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a stage is run; the files of its shards do not depend on it."""

    workers: int = 1
    """spawned processes that make shards, if more than one"""
    threads: int = 0
    """threads that make shards instead, if any"""
    worker_init: Callable[[], None] | None = None
    """what each worker process calls first"""
    assignment: ShardAssignment = ALL
    """the shards that this process makes"""
    overwrite: bool = False
    """make finished shards again"""
    total: int | None = None
    """number of shards, if known, for the progress line"""
    status_text: Callable[[], str] | None = None
    """more text for the progress line"""
    remove_surplus: Callable[[str, int], None] = remove_shards
    """called with a folder and its number of shards before totals are written; deletes shards beyond it, or raises"""
    source: str | None = None
    """where the dataset comes from, for dataset.json"""
    totals: bool = True
    """whether totals are written, and surplus shards removed; not for the parts that a stage sums up itself. What is
    there of these is taken only if its bytes are those that its record names"""


def run_stage(
    root: str, stage: Stage, tasks: Iterable[ShardTask], work: Work, options: RunOptions = RunOptions()
) -> Summary:
    """Run ``work`` over the assignment's tasks whose done-record is missing or stale, then write the stage's totals.

    Raises UserError for finished shards of another config (unless ``overwrite``), ShardsFailed for broken data after
    all other shards are done.
    """
    run = _StageRun(root, stage, options)
    remove_stale(run.folder)
    with show_progress(stage.name, options.total, options.status_text) as show:
        for ended in _outcomes(run.missing(tasks), partial(work, root), options):
            if ended is not None:
                run.record(*ended)
            show(run.shards)
    remove_stale(run.folder)  # files of workers that outlived a killed run for a moment
    run.raise_failures()
    summary = run.summary()
    if options.totals and options.assignment.is_complete:
        options.remove_surplus(run.folder, summary.shards)
        _write_totals(root, stage, summary, options.source)
    return summary


class _StageRun:
    """The shards of one run of a stage: finished before, made now, failed."""

    def __init__(self, root: str, stage: Stage, options: RunOptions) -> None:
        self._root = root
        self.folder = join(root, stage.folder)
        self._stage = stage
        self._options = options
        self._started = time.monotonic()
        self._finished_before = 0
        self._made = 0
        self._failures = dict[int, str]()
        self._counts = Counter[str]()
        self._counters = Counter[str]()
        self._measurements = dict[str, float]()

    @property
    def shards(self) -> int:
        """Number of shards that are finished or failed."""
        return self._finished_before + self._made + len(self._failures)

    def missing(self, tasks: Iterable[ShardTask]) -> Iterator[ShardTask]:
        """Yield the assignment's tasks that have to be done; finished shards are counted meanwhile."""
        for task, done in self._with_valid_record(tasks):
            if done is None:
                yield task
            else:
                self._finished_before += 1
                self._options.assignment.complete(task.shard, True)
                self._add(done)

    def _with_valid_record(self, tasks: Iterable[ShardTask]) -> Iterator[tuple[ShardTask, Done | None]]:
        """Each task of the assignment with the done-record that makes it unnecessary."""
        assignment, root = self._options.assignment, self._root

        def look_up(task: ShardTask) -> tuple[ShardTask, Done | None]:
            if self._options.overwrite:
                return task, None
            if self._options.totals:
                return task, _valid_record(self.folder, self._stage, task)
            return task, _valid_part(root, self._stage, task)

        claimed = (task for task in tasks if assignment.claim(task.shard))
        if is_url(self.folder) and assignment is ALL:  # no other process waits for what is claimed early
            return prefetch_map(look_up, claimed, LOOK_AHEAD, 2 * LOOK_AHEAD)
        return map(look_up, claimed)

    def record(self, task: ShardTask, outcome: ShardResult | DataError) -> None:
        """Write the done-record of a shard that was made, or note its failure."""
        if isinstance(outcome, DataError):
            self._failures[task.shard] = str(outcome)
            log.error("shard %s failed: %s", shard_name(task.shard), outcome)
        else:
            self._add(_publish(self.folder, self._stage, task, outcome))
            for name, value in outcome.measurements.items():
                self._measurements[name] = self._measurements.get(name, 0) + value
            self._made += 1
        self._options.assignment.complete(task.shard, not isinstance(outcome, DataError))

    def _add(self, done: Done) -> None:
        self._counters.update(done.counters)
        self._counts.update(done.counts)
        self._counts.subtract(done.retried)

    def raise_failures(self) -> None:
        """Raise ShardsFailed if there are any."""
        if self._failures:
            lines = [f"  {shard_name(shard)}: {reason}" for shard, reason in sorted(self._failures.items())]
            failed = f"{self._stage.name}: {len(lines)} of {counted(self.shards, 'shard')} failed"
            raise ShardsFailed("\n".join([failed, *lines]))

    def summary(self) -> Summary:
        """Totals so far."""
        return Summary(
            shards=self.shards,
            made=self._made,
            counts={reason: number for reason, number in sorted(self._counts.items()) if number},
            counters=dict(sorted(self._counters.items())),
            seconds=time.monotonic() - self._started,
            measurements=self._measurements,
        )


def _valid_record(folder: str, stage: Stage, task: ShardTask) -> Done | None:
    done = read_compatible_record(folder, stage, task.shard)
    if done is None or done.config != stage.config:  # to be extended
        return None
    return done if done.inputs in (task.inputs, task.former) else None


def _valid_part(root: str, stage: Stage, task: ShardTask) -> Done | None:
    """The record of a part, whose bytes are compared too: it is cheap to make, and nobody checks or repairs it."""
    done = read_intact(root, stage.folder, task.shard)
    if done is not None:
        is_same = (done.stage, done.config, done.inputs) == (stage.name, stage.config, task.inputs)
        return done if is_same else None
    path = stats_path(join(root, stage.folder), task.shard)
    if exists(path):
        log.warning("%s: the part that it records is damaged; it is made again", path)
    return None


def read_compatible_record(folder: str, stage: Stage, shard: int) -> Done | None:
    """The shard's done-record, if any.

    Raises UserError when it was made under another config, except for smaller numbers that are extendable.
    """
    done = read_done(folder, shard)
    if done is None:
        return None
    names = {*done.config, *stage.config}
    changed = {name for name in names if done.config.get(name) != stage.config.get(name)}
    extended = {name for name in changed if name in stage.extendable and done.config.get(name, 0) < stage.config[name]}
    if changed - extended:
        different = changed - extended
        before = {name: done.config.get(name) for name in different}
        now = {name: stage.config.get(name) for name in different}
        flags = _flags_of_settings(stage.name)
        differences = "; ".join(_differences(before, now, flags))
        other_name = ", another --name" if "name" in flags else ""
        raise UserError(
            f"{folder}/{shard_name(shard)} was made with another config ({differences}); "
            f"use the same config{other_name} or another ROOT, or make it again with --overwrite"
        )
    return done


def _differences(before: dict[str, Any], now: dict[str, Any], flags: dict[str, str], option: str = "") -> Iterator[str]:
    """What differs in two configs, by the names of settings, or the ``flags`` that set them.

    ``option`` is the flag that sets a setting of several parts; their names follow it.
    """
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, flags, flags.get(name, ""))
        elif old != new:
            part = f"{option} {name}".lstrip()
            yield f"{flags.get(name, part)}: {old!r} before, {new!r} now"


def _flags_of_settings(stage: str) -> dict[str, str]:
    """Settings in a stage's done-records to the flags that set them; some settings have none."""
    info = STAGES.get(stage.split("/")[0])
    if info is None or not info.config:
        return {}
    from pipeline.core.command_line import option_names

    options = option_names(pkgutil.resolve_name(info.config))
    same = {name: flag(name) for name in options if name not in RENAMED.values()}
    return same | {name: flag(option) for name, option in RENAMED.items() if option in options}


def _publish(folder: str, stage: Stage, task: ShardTask, result: ShardResult) -> Done:
    done = Done(
        stage=stage.name,
        shard=task.shard,
        config=stage.config,
        counts=result.counts,
        inputs=task.inputs | result.inputs,
        outputs=result.outputs,
        extra=result.extra,
        retried=result.retried,
        counters=result.counters,
    )
    done.write(folder)
    return done


# a shard and what came of it; None: no news for a second, so that the progress line moves on
Ended = tuple[ShardTask, ShardResult | DataError] | None


def _outcomes(
    tasks: Iterator[ShardTask], work: Callable[[ShardTask], ShardResult], options: RunOptions
) -> Iterator[Ended]:
    """Run the tasks and yield results as they come. Only DataError is caught: a bug stops the run at once."""
    if options.threads:
        yield from _outcomes_of_pool(ThreadPoolExecutor(options.threads), options.threads, tasks, work)
    elif options.workers > 1:
        pool = ProcessPoolExecutor(
            options.workers, spawn_context(), initializer=_init_worker, initargs=(options.worker_init,)
        )
        # a shard that is claimed and waits here for a worker could meanwhile be made by another process
        waiting = options.workers + 1 if options.assignment is ALL else 0
        yield from _outcomes_of_pool(pool, options.workers + waiting, tasks, work)
    else:
        for task in tasks:
            yield task, _guarded(work, task)


def _init_worker(worker_init: Callable[[], None] | None) -> None:
    die_with_parent()
    if worker_init:
        worker_init()


def _outcomes_of_pool(
    pool: Executor, max_submitted: int, tasks: Iterator[ShardTask], work: Callable[[ShardTask], ShardResult]
) -> Iterator[Ended]:
    running = dict[Future[ShardResult | DataError], ShardTask]()
    try:
        for task in tasks:
            running[pool.submit(_guarded, work, task)] = task
            while len(running) >= max_submitted:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _finished(running: dict[Future[ShardResult | DataError], ShardTask]) -> Iterator[Ended]:
    done = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
    yield from ((running.pop(future), future.result()) for future in done)
    if not done:
        yield None


def _guarded(work: Callable[[ShardTask], ShardResult], task: ShardTask) -> ShardResult | DataError:
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
        **({"facts": summary.counters} if summary.counters else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED_PACKAGES}},
    }
    write_stage(root, stage.name, block, source)
    _log_run(root, stage, summary)


def _log_run(root: str, stage: Stage, summary: Summary) -> None:
    """Append to logs/STAGE.jsonl: times are kept there, so that the dataset's own files do not depend on them."""
    path = stage_log(root, stage.name)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shards": summary.shards,
        "made": summary.made,
        "samples": summary.counts.get("success", 0),
        "seconds": round(summary.seconds, 3),
        "cpus": os.cpu_count(),
        **{name: round(value, 3) for name, value in summary.measurements.items()},
    }
    try:
        earlier = read_bytes(path)
    except FileNotFoundError:
        earlier = b""
    write_bytes(path, earlier + json.dumps(entry).encode() + b"\n")


def upstream_shards(root: str, folder: str, stage: str) -> list[int]:
    """Shard ids that an earlier stage left in ``root/folder``.

    Raises UserError when there are none or that stage has not finished. Shards of a foreign img2dataset folder, which
    have no done-record of ours, are used as they are.
    """
    check_no_takedown(root)
    shards = shard_ids(join(root, folder))
    command = stage.split("/")[0]
    if not shards:
        raise UserError(f"{join(root, folder)} has no finished shards: run `clipmill {command} {root}` first")
    ours = read_done(join(root, folder), shards[-1]) is not None
    block = read_dataset(root)["stages"].get(stage)
    if ours and (block is None or block.get("shards") != len(shards)):
        raise UserError(f"{stage} has not finished in {root}: run the same `clipmill {command}` again to resume")
    return shards


def tar_tasks(root: str, folder: str, shards: list[int], assignment: ShardAssignment = ALL) -> Iterator[ShardTask]:
    """A task per shard of the assignment, whose input is the shard's tar in ``root/folder``."""
    for shard in filter(assignment.claim, shards):
        path = tar_path(folder, shard)
        yield ShardTask(shard, {path: file_hash(root, folder, shard, path)})
