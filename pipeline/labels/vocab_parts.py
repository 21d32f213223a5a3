"""What `vocab` counts in one final shard, as a small table, and the sums over the tables of all shards.

A row of a table is one synset in one batch of samples, with the samples that have it. So the coverage of a vocabulary,
which is known only when all shards have been counted, needs these tables alone and not the final shards again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.distinct import distinct
from pipeline.core.runner import ShardResult, ShardTask
from shards_spec.files import join
from shards_spec.layout import final_parquet, parquet_path
from shards_spec.parquet import open_parquet, read_table
from shards_spec.shard_writer import ShardWriter

SCHEMA = pa.schema(
    [
        pa.field("wnid", pa.string()),
        pa.field("occurrences", pa.int64()),
        pa.field("documents", pa.int64()),  # captions that have it
        pa.field("samples", pa.list_(pa.int32())),  # those that have it, by their row in the final shard
    ]
)
COUNT_COLUMNS = ["wnid", "occurrences", "documents"]
COVERAGE_COLUMNS = ["wnid", "samples"]
ROWS_AT_ONCE = 1 << 20  # that are summed up together: 30 MB
TABLES_AT_ONCE = 1_000  # an open table takes 5 kB, however few its rows are
CAPTIONS = "captions"  # the counter of a part's record: captions that count


@dataclass(frozen=True, kw_only=True)
class ShardLabels:
    """The labels of a final shard: ``table`` as `SCHEMA` has it, the number of its samples and of captions counted."""

    table: pa.Table
    samples: int
    captions: int


def count_labels(root: str, shard: int, source: str) -> ShardLabels:
    """Count the synsets in the captions of ``source`` (original, all or synthetic). Memory: a batch and the table.

    Raises DataError when the final shard's Parquet file is not there or broken.
    """
    tables = list[pa.Table]()
    samples = 0
    captions = 0
    with open_parquet(final_parquet(root, shard), fix="run pack again") as file:
        for batch in file.iter_batches(columns=["synsets"]):
            table, chosen = _count_batch(batch.column(0), source, first=samples)
            tables.append(table)
            samples += len(batch)
            captions += chosen
    return ShardLabels(table=pa.concat_tables([SCHEMA.empty_table(), *tables]), samples=samples, captions=captions)


def _count_batch(column: pa.Array, source: str, first: int) -> tuple[pa.Table, int]:
    """The table of some samples, the first of which is the shard's row ``first``, and the number of their captions.

    ``column`` is a list of the synsets of each caption of each sample.
    """
    captions = pc.list_flatten(column)
    sample_of_caption = pc.list_parent_indices(column).to_numpy().astype(np.int64)
    # the first caption of a sample is the original one, SPEC.md §3
    is_original = np.append(True, sample_of_caption[1:] != sample_of_caption[:-1])[: len(sample_of_caption)]
    chosen = {"all": np.ones_like(is_original), "original": is_original, "synthetic": ~is_original}[source]
    wnids = pc.list_flatten(captions).dictionary_encode()
    caption = pc.list_parent_indices(captions).to_numpy().astype(np.int64)
    kept = chosen[caption]
    code = wnids.indices.to_numpy()[kept].astype(np.int64)
    caption = caption[kept]
    present = np.bincount(code, minlength=len(wnids.dictionary)) > 0
    samples_of_code = distinct(code * len(column) + sample_of_caption[caption])
    captions_of_code = distinct(code * len(captions) + caption)
    sizes = np.bincount(samples_of_code // max(len(column), 1), minlength=len(present))[present]
    ends = np.append(0, np.cumsum(sizes)).astype(np.int32)
    table = pa.table(
        [
            wnids.dictionary.filter(pa.array(present)),
            np.bincount(code, minlength=len(present))[present],
            np.bincount(captions_of_code // max(len(captions), 1), minlength=len(present))[present],
            pa.ListArray.from_arrays(ends, (samples_of_code % max(len(column), 1) + first).astype(np.int32)),
        ],
        schema=SCHEMA,
    )
    return table, int(chosen.sum())


def write_part(root: str, task: ShardTask, *, folder: str, source: str) -> ShardResult:
    """Count a final shard and write its part into ``folder`` below ROOT. Raises DataError."""
    labels = count_labels(root, task.shard, source)
    writer = ShardWriter(root, folder, task.shard)
    writer.write_parquet(labels.table, use_dictionary=False, compression="zstd")  # read ten times as fast
    return ShardResult({"success": labels.samples}, writer.outputs, counters={CAPTIONS: labels.captions})


def read_parts(root: str, folder: str, shards: list[int], columns: list[str]) -> Iterator[pa.Table]:
    """These columns of every part. Raises DataError for one that is gone or broken."""
    for shard in shards:
        advice = f"delete {join(root, folder)} and run `clipmill vocab` again"
        yield read_table(join(root, parquet_path(folder, shard)), columns, fix=advice)


def sum_counts(parts: Iterable[pa.Table]) -> pa.Table:
    """Columns ``wnid``, ``occurrences`` and ``documents`` of all parts, a row for each synset."""
    empty = SCHEMA.empty_table().select(COUNT_COLUMNS)
    waiting = [empty]
    rows = 0
    for part in parts:
        waiting.append(part)
        rows += len(part)
        if rows > ROWS_AT_ONCE or len(waiting) > TABLES_AT_ONCE:
            waiting = [_sum_rows(waiting)]
            rows = 0
    return _sum_rows(waiting)


def _sum_rows(tables: list[pa.Table]) -> pa.Table:
    sums = pa.concat_tables(tables).group_by("wnid").aggregate([("occurrences", "sum"), ("documents", "sum")])
    return sums.select(["wnid", "occurrences_sum", "documents_sum"]).rename_columns(COUNT_COLUMNS)


def sum_coverage(parts: Iterable[pa.Table], wnids: Iterable[str]) -> tuple[int, int]:
    """Samples that have one of the synsets at least, and the sum of the synsets of each sample.

    ``parts`` have the columns ``wnid`` and ``samples``, and one shard each.
    """
    known = pa.array(wnids, pa.string())
    covered = 0
    labels = 0
    for part in parts:
        lists = part.filter(pc.is_in(part.column("wnid"), value_set=known)).column("samples")
        samples = pc.list_flatten(lists).to_numpy()
        labels += len(samples)
        has_label = np.zeros(samples.max(initial=-1) + 1, bool)
        has_label[samples] = True
        covered += int(has_label.sum())
    return covered, labels
