"""One shard of ROOT/raw, exactly as img2dataset 1.47 lays out its WebDataset output.

Two differences, both on purpose: rows and samples stand in the order of the list, not of completion, and the
stats carry clipmill's done-record.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images import Picture
from pipeline.sources import Row
from pipeline.stage import Result
from shards_spec.files import atomic_writer, join, sha256_file
from shards_spec.manifest import forget, shard_name
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

FOLDER = "raw"
ROW_GROUP = 100  # img2dataset's
RESIZE = "resize: "  # reasons that begin so are counted as failed_to_resize
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256")),
    ]
)

Outcome = Picture | str  # of a row: the picture, or the named reason why there is none


def sample_key(shard: int, index: int, shard_size: int) -> str:
    """Shard number, then index in the shard: ``000120042`` is input 42 of shard 12."""
    digits = max(4, math.ceil(math.log10(shard_size)))
    return f"{shard_name(shard)}{index:0{digits}d}"


def write_raw_shard(root: str, shard: int, rows: list[Row], outcomes: list[Outcome], shard_size: int) -> Result:
    """Write the tar and the Parquet file of a shard: every row stands in the Parquet, the pictures in the tar."""
    keys = [sample_key(shard, index, shard_size) for index in range(len(rows))]
    fields = [_fields(key, row, outcome) for key, row, outcome in zip(keys, rows, outcomes, strict=True)]
    name = join(FOLDER, shard_name(shard))
    forget(join(root, FOLDER), shard)
    _, tar_hash = write_shard(join(root, f"{name}.tar"), _samples(fields, outcomes))
    parquet = join(root, f"{name}.parquet")
    with atomic_writer(parquet) as file:
        pq.write_table(pa.Table.from_pylist(fields, SCHEMA), file, row_group_size=ROW_GROUP)
    counts = Counter("success" if isinstance(outcome, Picture) else outcome for outcome in outcomes)
    return Result(dict(counts), {f"{name}.tar": tar_hash, f"{name}.parquet": sha256_file(parquet)})


def _fields(key: str, row: Row, outcome: Outcome) -> dict[str, Any]:
    """A row of the Parquet file, which is also the sample's json member."""
    picture = outcome if isinstance(outcome, Picture) else None
    reason = outcome if isinstance(outcome, str) else None
    failed = "failed_to_resize" if reason and reason.startswith(RESIZE) else "failed_to_download"
    return {
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": failed if reason else "success",
        "error_message": reason,
        **{name: getattr(picture, name, None) for name in SCHEMA.names[5:]},
    }


def _samples(fields: list[dict[str, Any]], outcomes: list[Outcome]) -> Iterator[Sample]:
    for meta, outcome in zip(fields, outcomes, strict=True):
        if isinstance(outcome, Picture):
            text = (meta["caption"] or "").encode()
            yield Sample(meta["key"], {"jpg": outcome.data, "txt": text, "json": json.dumps(meta, indent=4).encode()})
