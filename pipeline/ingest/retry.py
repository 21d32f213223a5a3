"""`ingest --retry-failed`: rows whose reason may pass with time, tried again, into additional shards.

A retried row keeps its key; what it comes to stands in the additional shard, and the totals count it there alone.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from pipeline.core.runner import Task
from pipeline.ingest.http_client import TEMPORARY_REASONS
from pipeline.ingest.raw_shard import SCHEMA, Inputs
from pipeline.ingest.rows import Row
from shards_spec.files import UserError, join, remove, sha256_json
from shards_spec.layout import RAW, raw_parquet, shard_name
from shards_spec.manifest import Done, finished_shards, read_dataset, read_done
from shards_spec.parquet import read_table

PASS = "retry pass"  # name of the input that tells an additional shard; its value is the number of the pass
COLUMNS = ["key", "url", "caption", "error_message"]
ENDINGS = ("_stats.json", ".tar", ".parquet")


def additional_shards(root: str) -> dict[int, Done]:
    """Shards that earlier retries wrote, by number; empty on the first run. They stand after those of the list."""
    folder, found = join(root, RAW), dict[int, Done]()
    for number in reversed(finished_shards(folder)):
        done = read_done(folder, number)
        if done is None or PASS not in done.inputs:
            break
        found[number] = done
    return dict(sorted(found.items()))


def kept_tasks(root: str, base: int) -> Iterator[Task]:
    """Additional shards as they are, from number ``base`` on.

    Those that stand after a gap, which a killed retry left, are deleted: their rows will be tried again.
    """
    expected = base
    for number, done in additional_shards(root).items():
        if number == expected:
            yield Task(number, done.inputs)
            expected += 1
        else:
            remove_shard(root, number)


def remove_shard(root: str, shard: int) -> None:
    """Delete a raw shard, its done-record first."""
    for ending in ENDINGS:
        remove(join(root, RAW, shard_name(shard) + ending))


def retry_tasks(root: str, shard_size: int) -> Iterator[Task]:
    """Finished shards as they are, then new ones with the rows that may come this time.

    A pass that was interrupted goes on with the rows that it had not reached. Memory: a shard per pass. Raises
    UserError when the list itself has not been ingested to its end.
    """
    block = read_dataset(root)["stages"].get("ingest")
    base = list(_base_tasks(root))
    if block is None or block["shards"] < len(base):
        raise UserError(f"ingest has not finished in {root}: run the same command without --retry-failed first")
    additional = list(kept_tasks(root, len(base)))
    yield from base
    yield from additional
    passes = [int(task.inputs[PASS]) for task in additional]
    finished = max(passes[: block["shards"] - len(base)], default=0)
    failed = (row for row in _latest(root, len(base), passes) if row["error_message"] in TEMPORARY_REASONS)
    rows = (row for row in failed if row["pass"] <= finished)
    number = len(base) + len(additional)
    while chunk := list(islice(rows, shard_size)):
        yield _task(number, finished + 1, chunk)
        number += 1


def _base_tasks(root: str) -> Iterator[Task]:
    """Shards of the list, as they are."""
    number = 0
    while (done := read_done(join(root, RAW), number)) and PASS not in done.inputs:
        yield Task(number, done.inputs)
        number += 1


def _task(number: int, retry_pass: int, chunk: list[dict[str, Any]]) -> Task:
    inputs = Inputs(
        [row["key"] for row in chunk],
        [Row(row["caption"], row["url"], extra=row["extra"]) for row in chunk],
        dict(Counter(row["error_message"] for row in chunk)),
        {name: kind for row in chunk for name, kind in row["types"].items()},
    )
    digest = sha256_json([[row["key"], row["url"], row["caption"]] for row in chunk])
    return Task(number, {PASS: str(retry_pass), "rows": digest}, inputs)


def _latest(root: str, base: int, passes: list[int]) -> Iterator[dict[str, Any]]:
    """Each input once, in the order of the keys, as the last pass that tried it left it."""
    shards: dict[int, list[int]] = {0: list(range(base))}
    for number, retry_pass in enumerate(passes, start=base):
        shards.setdefault(retry_pass, []).append(number)
    streams = [_rows(root, numbers, retry_pass) for retry_pass, numbers in shards.items()]
    merged = heapq.merge(*streams, key=lambda row: (len(row["key"]), row["key"], row["pass"]))
    for _, versions in groupby(merged, key=lambda row: row["key"]):
        *_, last = versions
        yield last


def _rows(root: str, numbers: list[int], retry_pass: int) -> Iterator[dict[str, Any]]:
    for number in numbers:
        table = read_table(raw_parquet(root, number), fix="run ingest again")
        others = table.drop_columns([name for name in table.column_names if name in SCHEMA.names])
        types = {field.name: field.type for field in others.schema}
        extras = others.to_pylist() if types else [{}] * len(table)
        for row, extra in zip(table.select(COLUMNS).to_pylist(), extras, strict=True):
            yield {**row, "pass": retry_pass, "extra": extra, "types": types}
