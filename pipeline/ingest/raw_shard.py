"""One shard of ROOT/raw, laid out as img2dataset 1.47 lays out its WebDataset output; SPEC.md lists the differences."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.core.runner import ShardResult
from pipeline.core.taken_down import TAKEN_DOWN
from pipeline.ingest.additional_columns import ALL_COLUMNS, json_value, kept_columns
from pipeline.ingest.images import RESIZE, EncodedImage, Outcome
from pipeline.ingest.rows import Row
from shards_spec.files import UserError, free_bytes
from shards_spec.layout import RAW, shard_name
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter

TAKEN_DOWN_ROW = Row(None, None, problem=TAKEN_DOWN)
ROW_GROUP = 100  # rows, as img2dataset writes them
SPARE_BYTES = 64 << 20  # left free on a disk, for other writers
BYTES_BESIDE_IMAGE = 8192  # of a sample: text, json, tar headers, its Parquet row
TEXT_COLUMNS = ("caption", "url", "key", "status", "error_message")
SIZE_COLUMNS = ("width", "height", "original_width", "original_height")
IMAGE_TEXT_COLUMNS = ("exif", "sha256", "phash")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXT_COLUMNS),
        *((name, pa.int32()) for name in SIZE_COLUMNS),
        *((name, pa.string()) for name in IMAGE_TEXT_COLUMNS),
    ]
)


@dataclass(frozen=True)
class RawShardInput:
    """The rows of a shard and their keys; for rows that are tried again ``retried`` counts their former reasons.

    ``column_types`` are those of the list's other columns, where it has types; ``kept_columns`` names the columns that
    the shard keeps.
    """

    keys: list[str]
    rows: list[Row]
    retried: dict[str, int] = field(default_factory=dict)
    column_types: dict[str, pa.DataType] = field(default_factory=dict)
    kept_columns: tuple[str, ...] = (ALL_COLUMNS,)


def sample_key(shard: int, index: int, shard_size: int) -> str:
    """Shard number, then index in the shard: ``000120042`` is input 42 of shard 12."""
    digits = max(4, math.ceil(math.log10(shard_size)))
    return f"{shard_name(shard)}{index:0{digits}d}"


def write_raw_shard(root: str, shard: int, shard_input: RawShardInput, outcomes: list[Outcome]) -> ShardResult:
    """Write the tar and the Parquet file of a shard: the images are in the tar, all rows in the Parquet file.

    Of a row that was taken down there is but its key and that reason. Raises UserError when the disk has no room for
    the shard, before anything is written.
    """
    rows = [
        TAKEN_DOWN_ROW if outcome == TAKEN_DOWN else row
        for row, outcome in zip(shard_input.rows, outcomes, strict=True)
    ]
    records = [_record(*row) for row in zip(shard_input.keys, rows, outcomes, strict=True)]
    other_columns = _labels(rows) | kept_columns(rows, shard_input.column_types, shard_input.kept_columns)
    _check_room(root, outcomes)
    files = ShardWriter(root, RAW, shard)
    files.write_tar(_samples(rows, _json_records(other_columns, records), outcomes))
    files.write_parquet(_table(other_columns, records), row_group_size=ROW_GROUP)
    counts = Counter[str]()
    notes = Counter[str]()
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, EncodedImage):
            counts["success"] += 1
            if row.note is not None:
                notes[row.note] += 1
        else:
            counts[outcome] += 1
    return ShardResult(dict(counts), files.outputs, retried=shard_input.retried, counters=dict(notes))


def _labels(rows: list[Row]) -> dict[str, pa.Array]:
    """The column of the classes' numbers, where rows have them."""
    labels = [row.label for row in rows]
    return {} if all(label is None for label in labels) else {"cls": pa.array(labels, pa.int32())}


def _check_room(root: str, outcomes: list[Outcome]) -> None:
    """Raise UserError when the images do not fit on the disk of ``root``."""
    sizes = [len(outcome.data) + BYTES_BESIDE_IMAGE for outcome in outcomes if isinstance(outcome, EncodedImage)]
    needed = sum(sizes) + SPARE_BYTES
    free = free_bytes(root)
    if free is not None and free < needed:
        raise UserError(
            f"the disk of {root} has {free >> 20} MiB left, the next shard needs {needed >> 20}: free some space and "
            "rerun the same command to resume"
        )


def _record(key: str, row: Row, outcome: Outcome) -> dict[str, Any]:
    """A row of the Parquet file, which is also the sample's json member."""
    image = outcome if isinstance(outcome, EncodedImage) else None
    reason = outcome if isinstance(outcome, str) else None
    return {
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": _status(reason),
        "error_message": reason or row.note,
        **{name: getattr(image, name, None) for name in (*SIZE_COLUMNS, *IMAGE_TEXT_COLUMNS)},
    }


def _status(reason: str | None) -> str:
    """How a row ended, in img2dataset's words."""
    if not reason:
        return "success"
    return "failed_to_resize" if reason.startswith(RESIZE) else "failed_to_download"


def _table(other_columns: dict[str, pa.Array], records: list[dict[str, Any]]) -> pa.Table:
    """The Parquet file's content: a list's other columns come first, as in img2dataset's."""
    table = pa.Table.from_pylist(records, SCHEMA)
    if not other_columns:
        return table
    return pa.table({**other_columns, **dict(zip(table.column_names, table.columns, strict=True))})


def _json_records(other_columns: dict[str, pa.Array], records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the json members hold, the list's other columns first."""
    cells = {name: array.to_pylist() for name, array in other_columns.items()}
    for index, record in enumerate(records):
        yield {**{name: json_value(column[index]) for name, column in cells.items()}, **record}


def _samples(rows: list[Row], records: Iterable[dict[str, Any]], outcomes: list[Outcome]) -> Iterator[Sample]:
    """The rows that have an image."""
    for row, record, outcome in zip(rows, records, outcomes, strict=True):
        if isinstance(outcome, EncodedImage):
            text = (record["caption"] or "").encode()
            members = {"jpg": outcome.data, "txt": text, "json": json.dumps(record, indent=4).encode()}
            if row.label is not None:
                members["cls"] = str(row.label).encode()
            yield Sample(record["key"], members)
