"""Final shards of equal size: which samples stay is decided per raw shard first, then each final shard is a range.

Stage `plan` writes ``plan/NNNNN.parquet``, a row per sample of the raw shard: ``key``, ``reason`` (null: it stays),
``offset`` (the byte of the tar where it begins). Samples stay in the order of the raw shards. With N samples to a
shard, final shard j begins at the sample that is number j * N of those that stay (shard 0: at the very first sample)
and ends where the next one begins, so that every sample that is dropped is counted by exactly one final shard.

A sample that is taken down leaves a row with an empty key, so that no other final shard has to change: its reason is
`TAKEN_DOWN` when it had stayed, else the one it was dropped for.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.prefetch import prefetch_map
from pipeline.core.runner import LOOK_AHEAD, RunOptions, ShardResult, ShardTask, Stage, Summary, run_stage
from pipeline.core.taken_down import TAKEN_DOWN
from pipeline.pack.selection import SampleSelector, SelectionConfig, ShardRange
from shards_spec.files import DataError, exists, is_url, join, read_buffer
from shards_spec.layout import PLAN, parquet_path, raw_tar, remake_advice, shard_name
from shards_spec.manifest import file_hash, remove_shards, remove_stage
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import index_shard
from shards_spec.tar_members import BLOCK, Member

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)


def plan(
    root: str,
    shards: list[int],
    selection: SelectionConfig,
    *,
    config: dict[str, object],
    workers: int,
    overwrite: bool,
) -> Summary:
    """Run the stage; ``config`` is every setting that affects the decisions.

    Raises UserError and ShardsFailed: a broken raw shard leaves the ranges of all later ones unknown.
    """
    tasks = (ShardTask(shard, file_hashes_of(root, shard, selection)) for shard in shards)
    work = partial(plan_shard, selection=selection)
    stage = Stage("plan", PLAN, config)
    options = RunOptions(workers=min(workers, len(shards)), overwrite=overwrite, total=len(shards))
    return run_stage(root, stage, tasks, work, options)


def forget_plan(root: str) -> None:
    """Delete what an earlier `plan` left, before final shards are made without one."""
    if exists(join(root, PLAN)):
        remove_stage(root, "plan")
        remove_shards(join(root, PLAN), 0)


def file_hashes_of(root: str, shard: int, selection: SelectionConfig) -> dict[str, str]:
    """Path to hash of the files that belong to a raw shard."""
    return {path: file_hash(root, folder, shard, path) for folder, path in selection.inputs(shard)}


def plan_shard(root: str, task: ShardTask, *, selection: SelectionConfig) -> ShardResult:
    """Write the decisions on one raw shard; its images are not read. Raises DataError as `SampleSelector` does."""
    source = raw_tar(root, task.shard)
    selector = SampleSelector(root, ShardRange(task.shard), selection)
    keys = list[str]()
    reasons = list[str | None]()
    offsets = list[int]()
    try:
        with read_buffer(source) as buffer:
            for key, members, offset, _ in sample_offsets(buffer, source):
                texts = {
                    extension: member.read(buffer) if extension in ("txt", "json") else b""
                    for extension, member in members.items()
                }
                selected = selector.select(Sample(key, texts))
                keys.append(key)
                reasons.append(selected if isinstance(selected, str) else None)
                offsets.append(offset)
    except FileNotFoundError as error:
        raise DataError(f"{source}: is not there; {remake_advice(source)}") from error
    selector.finish()
    files = ShardWriter(root, PLAN, task.shard)
    files.write_parquet(pa.table([keys, reasons, offsets], SCHEMA))
    counts = Counter(reason or "success" for reason in reasons)
    return ShardResult(dict(counts), files.outputs)


def sample_offsets(buffer: memoryview, path: str) -> Iterator[tuple[str, Mapping[str, Member], int, int]]:
    """Key and members of each sample of a tar, the byte where it begins and the one where the next would.

    Raises DataError for a broken tar.
    """
    start = 0
    for key, members in index_shard(buffer, path):
        end = max(member.offset + member.size + -member.size % BLOCK for member in members.values())
        yield key, members, start, end
        start = end


def final_shard_tasks(root: str, shards: list[int], selection: SelectionConfig, size: int) -> Iterator[ShardTask]:
    """A task per final shard of ``size`` samples (the last one has what is left), with its `ShardRange`s as payload.

    Memory: the plans of a few raw shards.
    """

    def read_plan(shard: int) -> tuple[int, pa.Table, dict[str, str]]:
        path = parquet_path(PLAN, shard)
        table = read_table(join(root, path), fix=f"delete {PLAN}/ and run pack again")
        return shard, table, {**file_hashes_of(root, shard, selection), path: file_hash(root, PLAN, shard, path)}

    number = 0  # of the final shard that is filled
    filled = 0  # its samples so far
    ranges = list[ShardRange]()
    inputs = dict[str, str]()
    plans = prefetch_map(read_plan, shards, LOOK_AHEAD, 2 * LOOK_AHEAD) if is_url(root) else map(read_plan, shards)
    for shard, table, files in plans:
        reasons = table.column("reason")
        staying = np.flatnonzero(pc.fill_null(pc.equal(reasons, TAKEN_DOWN), True).to_numpy())
        start = 0  # the first row of this raw shard that is in no range yet
        used = 0  # the samples of ``staying`` before ``start``
        while len(staying) - used > size - filled:
            used += size - filled
            stop = int(staying[used])
            if stop > start:
                ranges.append(_shard_range(shard, table, start, stop))
                inputs |= files
            yield _task(number, ranges, inputs)
            number += 1
            filled = 0
            ranges = []
            inputs = {}
            start = stop
        filled += len(staying) - used
        if len(table) > start:
            ranges.append(_shard_range(shard, table, start, len(table)))
            inputs |= files
    yield _task(number, ranges, inputs)


def _shard_range(shard: int, table: pa.Table, start: int, stop: int) -> ShardRange:
    rows = table.slice(start, stop - start)
    keys = tuple(key for key in rows.column("key").to_pylist() if key)
    taken_down = sum(reason == TAKEN_DOWN for reason in rows.column("reason").to_pylist())
    return ShardRange(shard, start, stop, rows.column("offset")[0].as_py(), keys, taken_down)


def _task(number: int, ranges: list[ShardRange], inputs: dict[str, str]) -> ShardTask:
    samples = ", ".join(f"{shard_name(part.shard)}[{part.start}:{part.stop}]" for part in ranges)
    return ShardTask(number, {**inputs, "samples": samples}, tuple(ranges))
