"""Final shards of equal size: which samples stay is decided per raw shard first, then each final shard is a range.

Stage `plan` writes ``plan/NNNNN.parquet``, a row per sample of the raw shard: ``key``, ``reason`` (null: it stays),
``offset`` (the byte of the tar where it begins). Samples stay in the order of the raw shards; with N to a shard, final
shard j begins with survivor j * N (shard 0: with the first sample) and ends where the next one begins, so that every
sample that is dropped is counted by exactly one final shard.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.prefetch import prefetch_map
from pipeline.core.runner import LOOK_AHEAD, Result, RunOptions, Stage, Summary, Task, run_stage
from pipeline.pack.final_shard import Choice, Chooser, Part
from shards_spec.files import DataError, exists, is_url, join, read_buffer
from shards_spec.layout import PLAN, parquet_path, raw_tar, shard_name
from shards_spec.manifest import file_hash, remove_shards, remove_stage
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import index_shard
from shards_spec.tar_members import BLOCK

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)


def plan(root: str, shards: list[int], choice: Choice, config: dict[str, object], workers: int, over: bool) -> Summary:
    """Run the stage: ``config`` is what shapes the decisions, ``over`` makes finished shards again.

    Raises UserError, ShardsFailed: a raw shard that is broken leaves the ranges of all later ones open.
    """
    tasks = (Task(shard, inputs_of(root, shard, choice)) for shard in shards)
    work = partial(plan_shard, choice=choice)
    stage = Stage("plan", PLAN, config)
    options = RunOptions(workers=min(workers, len(shards)), overwrite=over, total=len(shards))
    return run_stage(root, stage, tasks, work, options)


def forget_plan(root: str) -> None:
    """Delete what an earlier `plan` left, before final shards are made without one."""
    if exists(join(root, PLAN)):
        remove_stage(root, "plan")
        remove_shards(join(root, PLAN), 0)


def inputs_of(root: str, shard: int, choice: Choice) -> dict[str, str]:
    """Path to hash of the files that belong to a raw shard."""
    return {path: file_hash(root, folder, shard, path) for folder, path in choice.inputs(shard)}


def plan_shard(root: str, task: Task, *, choice: Choice) -> Result:
    """One raw shard's rows; its images are not read. Raises DataError as `Chooser` does."""
    source, chooser = raw_tar(root, task.shard), Chooser(root, Part(task.shard), choice)
    keys, reasons, offsets, end = list[str](), list[str | None](), list[int](), 0
    try:
        with read_buffer(source) as buffer:
            for key, members in index_shard(buffer, source):
                texts = {ext: m.read(buffer) if ext in ("txt", "json") else b"" for ext, m in members.items()}
                decided = chooser.decide(Sample(key, texts))
                keys.append(key)
                reasons.append(decided if isinstance(decided, str) else None)
                offsets.append(end)
                end = max(m.offset + m.size + -m.size % BLOCK for m in members.values())
    except FileNotFoundError as error:
        raise DataError(f"{source}: is not there; make the shard again") from error
    chooser.end()
    files = ShardWriter(root, PLAN, task.shard)
    files.write_parquet(pa.table([keys, reasons, offsets], SCHEMA))
    counts = Counter(reason or "success" for reason in reasons)
    return Result(dict(counts), files.outputs)


def ranges(root: str, shards: list[int], choice: Choice, size: int) -> Iterator[Task]:
    """A task per final shard of ``size`` samples (the last one has what is left), with its parts as payload.

    Memory: the plans of a few raw shards.
    """

    def read(shard: int) -> tuple[int, pa.Table, dict[str, str]]:
        path = parquet_path(PLAN, shard)
        table = read_table(join(root, path), fix=f"delete {PLAN}/ and run pack again")
        return shard, table, {**inputs_of(root, shard, choice), path: file_hash(root, PLAN, shard, path)}

    parts, inputs, taken, number = list[Part](), dict[str, str](), 0, 0
    plans = prefetch_map(read, shards, LOOK_AHEAD, 2 * LOOK_AHEAD) if is_url(root) else map(read, shards)
    for shard, table, files in plans:
        survivors, start, used = np.flatnonzero(pc.is_null(table.column("reason")).to_numpy()), 0, 0
        while len(survivors) - used > size - taken:
            used += size - taken
            stop = int(survivors[used])
            if stop > start:
                parts.append(_part(shard, table, start, stop))
                inputs |= files
            yield _task(number, parts, inputs)
            parts, inputs, taken, number, start = [], {}, 0, number + 1, stop
        taken += len(survivors) - used
        if len(table) > start:
            parts.append(_part(shard, table, start, len(table)))
            inputs |= files
    yield _task(number, parts, inputs)


def _part(shard: int, table: pa.Table, start: int, stop: int) -> Part:
    keys = tuple(table.column("key")[start:stop].to_pylist())
    return Part(shard, start, stop, table.column("offset")[start].as_py(), keys)


def _task(number: int, parts: list[Part], inputs: dict[str, str]) -> Task:
    samples = ", ".join(f"{shard_name(part.shard)}[{part.start}:{part.stop}]" for part in parts)
    return Task(number, {**inputs, "samples": samples}, tuple(parts))
