"""`ingest --retry-failed`: rows that failed for a temporary reason, tried again, into additional shards.

A retried row keeps its key. Its new outcome is in the additional shard, and the totals count it there alone. Every run
with `--retry-failed` is a pass, numbered from 1; the list's own shards are pass 0.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from pipeline.core.runner import ShardTask
from pipeline.ingest.http_client import TEMPORARY_REASONS
from pipeline.ingest.raw_shard import SCHEMA, RawShardInput
from pipeline.ingest.rows import Row
from shards_spec.files import UserError, join, remove, sha256_json
from shards_spec.layout import RAW, raw_parquet, shard_name
from shards_spec.manifest import Done, finished_shards, read_dataset, read_done
from shards_spec.parquet import read_table

RETRY_PASS = "retry pass"  # name of the input that marks an additional shard; its value is the number of the pass
COLUMNS = ["key", "url", "caption", "error_message"]
ENDINGS = ("_stats.json", ".tar", ".parquet")


@dataclass(frozen=True)
class _Attempt:
    """How one pass left a row: ``reason`` is why it failed, None when it did not."""

    key: str
    url: str | None
    caption: str | None
    reason: str | None
    retry_pass: int
    other_columns: dict[str, Any]
    column_types: dict[str, pa.DataType]


def additional_shards(root: str) -> dict[int, Done]:
    """Shards that earlier retries wrote, by number, which follow those of the list; empty before the first retry."""
    folder = join(root, RAW)
    additional = dict[int, Done]()
    for number in reversed(finished_shards(folder)):
        done = read_done(folder, number)
        if done is None or RETRY_PASS not in done.inputs:
            break
        additional[number] = done
    return dict(sorted(additional.items()))


def kept_tasks(root: str, first: int) -> Iterator[ShardTask]:
    """Additional shards as they are, from number ``first`` on.

    Those after a gap, which a killed retry left, are deleted: their rows will be tried again.
    """
    expected = first
    for number, done in additional_shards(root).items():
        if number == expected:
            yield ShardTask(number, done.inputs)
            expected += 1
        else:
            remove_shard(root, number)


def remove_shard(root: str, shard: int) -> None:
    """Delete a raw shard, its done-record first."""
    for ending in ENDINGS:
        remove(join(root, RAW, shard_name(shard) + ending))


def retry_tasks(root: str, shard_size: int) -> Iterator[ShardTask]:
    """Finished shards as they are, then new ones with the rows to try again.

    A pass that was interrupted resumes with the rows that it had not reached. Memory: a shard per pass. Raises
    UserError when the list itself has not been ingested to its end.
    """
    totals = read_dataset(root)["stages"].get("ingest")
    list_tasks = list(_list_tasks(root))
    if totals is None or totals.get("shards", 0) < len(list_tasks):
        raise UserError(f"ingest has not finished in {root}: run the same command without --retry-failed first")
    kept = list(kept_tasks(root, len(list_tasks)))
    yield from list_tasks
    yield from kept
    passes = [int(task.inputs[RETRY_PASS]) for task in kept]
    finished_pass = max(passes[: totals["shards"] - len(list_tasks)], default=0)  # totals are of finished passes alone
    failed = (
        attempt
        for attempt in _last_attempts(root, len(list_tasks), passes)
        if attempt.reason in TEMPORARY_REASONS and attempt.retry_pass <= finished_pass
    )
    number = len(list_tasks) + len(kept)
    while chunk := list(islice(failed, shard_size)):
        yield _task(number, finished_pass + 1, chunk)
        number += 1


def task_of_pass(root: str, shard: int, retry_pass: int, shard_size: int) -> ShardTask | None:
    """The task that an additional shard of a pass had, from the shards before that pass; None when it had none.

    The shard itself is not read. Raises DataError for a broken shard before it.
    """
    list_shards = 0
    passes = list[int]()
    for number in finished_shards(join(root, RAW)):
        done = read_done(join(root, RAW), number)
        if done is not None and RETRY_PASS in done.inputs:
            passes.append(int(done.inputs[RETRY_PASS]))
        elif number != shard:
            list_shards += 1
    before = [own for own in passes if own < retry_pass]
    attempts = (
        attempt
        for attempt in _last_attempts(root, list_shards, before)
        if attempt.reason in TEMPORARY_REASONS and attempt.retry_pass < retry_pass
    )
    index = shard - list_shards - len(before)
    chunk = list(islice(attempts, index * shard_size, (index + 1) * shard_size)) if index >= 0 else []
    return _task(shard, retry_pass, chunk) if chunk else None


def _list_tasks(root: str) -> Iterator[ShardTask]:
    """The list's own shards as they are."""
    number = 0
    while (done := read_done(join(root, RAW), number)) and RETRY_PASS not in done.inputs:
        yield ShardTask(number, done.inputs)
        number += 1


def _task(number: int, retry_pass: int, attempts: list[_Attempt]) -> ShardTask:
    """An additional shard of rows that failed."""
    column_types = dict[str, pa.DataType]()
    for attempt in attempts:
        column_types |= attempt.column_types
    shard_input = RawShardInput(
        keys=[attempt.key for attempt in attempts],
        rows=[Row(attempt.caption, attempt.url, extra=attempt.other_columns) for attempt in attempts],
        retried=dict(Counter(attempt.reason for attempt in attempts if attempt.reason is not None)),
        column_types=column_types,
    )
    digest = sha256_json([[attempt.key, attempt.url, attempt.caption] for attempt in attempts])
    return ShardTask(number, {RETRY_PASS: str(retry_pass), "rows": digest}, shard_input)


def _last_attempts(root: str, list_shards: int, passes: list[int]) -> Iterator[_Attempt]:
    """Each row once, in the order of the keys, as the last pass that tried it left it.

    ``list_shards`` is the number of the list's own shards, ``passes`` the pass of each additional shard.
    """
    shards_of_pass: dict[int, list[int]] = {0: list(range(list_shards))}
    for number, retry_pass in enumerate(passes, start=list_shards):
        shards_of_pass.setdefault(retry_pass, []).append(number)
    streams = [_attempts(root, numbers, retry_pass) for retry_pass, numbers in shards_of_pass.items()]
    # keys of one pass ascend, longer ones (of larger shard numbers) last
    merged = heapq.merge(*streams, key=lambda attempt: (len(attempt.key), attempt.key, attempt.retry_pass))
    for _, attempts in groupby(merged, key=lambda attempt: attempt.key):
        *_, last = attempts
        yield last


def _attempts(root: str, shards: list[int], retry_pass: int) -> Iterator[_Attempt]:
    """The rows of one pass."""
    for shard in shards:
        table = read_table(raw_parquet(root, shard), fix="run ingest again")
        others = table.drop_columns([name for name in table.column_names if name in SCHEMA.names])
        column_types = {field.name: field.type for field in others.schema}
        other_rows = others.to_pylist() if column_types else [{}] * len(table)
        for row, other_columns in zip(table.select(COLUMNS).to_pylist(), other_rows, strict=True):
            yield _Attempt(
                key=row["key"],
                url=row["url"],
                caption=row["caption"],
                reason=row["error_message"],
                retry_pass=retry_pass,
                other_columns=other_columns,
                column_types=column_types,
            )
