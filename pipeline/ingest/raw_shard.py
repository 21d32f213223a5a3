"""One shard of ROOT/raw, laid out as img2dataset 1.47 lays out its WebDataset output; SPEC.md lists the differences."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.core.runner import Result
from pipeline.ingest.additional_columns import ALL_COLUMNS, json_value, kept_columns
from pipeline.ingest.images import RESIZE, EncodedImage, Outcome
from pipeline.ingest.rows import Row
from shards_spec.files import UserError, free_bytes
from shards_spec.layout import RAW, shard_name
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter

ROW_GROUP = 100  # img2dataset's
SPARE_BYTES = 64 << 20  # left free on a disk, for what else writes there
MEMBERS_BYTES = 8192  # of a sample beside its image: text, json, tar headers, its Parquet row
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256", "phash")),
    ]
)


@dataclass(frozen=True)
class Inputs:
    """The rows of a shard and their keys; ``retried`` counts their earlier reasons when they were tried before.

    ``types`` are those of the list's other columns where it has types, ``wanted`` names those that are kept.
    """

    keys: list[str]
    rows: list[Row]
    retried: dict[str, int]
    types: dict[str, pa.DataType] = field(default_factory=dict)
    wanted: tuple[str, ...] = (ALL_COLUMNS,)


def sample_key(shard: int, index: int, shard_size: int) -> str:
    """Shard number, then index in the shard: ``000120042`` is input 42 of shard 12."""
    digits = max(4, math.ceil(math.log10(shard_size)))
    return f"{shard_name(shard)}{index:0{digits}d}"


def write_raw_shard(root: str, shard: int, inputs: Inputs, outcomes: list[Outcome]) -> Result:
    """Write the tar and the Parquet file of a shard: every row stands in the Parquet, the images in the tar.

    Raises UserError when the disk has no room for it, before anything is written.
    """
    fields = [_fields(*row) for row in zip(inputs.keys, inputs.rows, outcomes, strict=True)]
    others = kept_columns(inputs.rows, inputs.types, inputs.wanted)
    _check_room(root, outcomes)
    files = ShardWriter(root, RAW, shard)
    files.write_tar(_samples(_with(others, fields), outcomes))
    files.write_parquet(_table(others, fields), row_group_size=ROW_GROUP)
    counts = Counter("success" if isinstance(outcome, EncodedImage) else outcome for outcome in outcomes)
    noted = zip(inputs.rows, outcomes, strict=True)
    notes = Counter(row.note for row, outcome in noted if row.note is not None and isinstance(outcome, EncodedImage))
    return Result(dict(counts), files.outputs, retried=inputs.retried, counters=dict(notes))


def _check_room(root: str, outcomes: list[Outcome]) -> None:
    size = sum(len(outcome.data) + MEMBERS_BYTES for outcome in outcomes if isinstance(outcome, EncodedImage))
    free = free_bytes(root)
    if free is not None and free < size + SPARE_BYTES:
        raise UserError(
            f"the disk of {root} has {free >> 20} MiB left, the next shard needs {(size + SPARE_BYTES) >> 20}: free "
            "some and run the same command again, it goes on"
        )


def _fields(key: str, row: Row, outcome: Outcome) -> dict[str, Any]:
    """A row of the Parquet file, which is also the sample's json member."""
    image = outcome if isinstance(outcome, EncodedImage) else None
    reason = outcome if isinstance(outcome, str) else None
    failed = "failed_to_resize" if reason and reason.startswith(RESIZE) else "failed_to_download"
    return {
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": failed if reason else "success",
        "error_message": reason or row.note,
        **{name: getattr(image, name, None) for name in SCHEMA.names[5:]},
    }


def _table(others: dict[str, pa.Array], fields: list[dict[str, Any]]) -> pa.Table:
    """The Parquet file's content: a list's other columns come first, as in img2dataset's."""
    own = pa.Table.from_pylist(fields, SCHEMA)
    return pa.table({**others, **dict(zip(own.column_names, own.columns, strict=True))}) if others else own


def _with(others: dict[str, pa.Array], fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields of the json members, the list's other columns first."""
    cells = zip(*(array.to_pylist() for array in others.values()), strict=True) if others else [()] * len(fields)
    more = (dict(zip(others, map(json_value, row), strict=True)) for row in cells)
    return [{**extra, **own} for extra, own in zip(more, fields, strict=True)]


def _samples(fields: list[dict[str, Any]], outcomes: list[Outcome]) -> Iterator[Sample]:
    for meta, outcome in zip(fields, outcomes, strict=True):
        if isinstance(outcome, EncodedImage):
            text = (meta["caption"] or "").encode()
            yield Sample(meta["key"], {"jpg": outcome.data, "txt": text, "json": json.dumps(meta, indent=4).encode()})
