"""ROOT/dedup: for each raw shard a Parquet list of the samples that `pack` leaves out, and the ones kept instead."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from shards_spec.files import UserError, join, sha256_json
from shards_spec.layout import DEDUP, RAW, parquet_path, shard_name, stats_path, tar_path
from shards_spec.manifest import file_hashes, finished_shards, read_done
from shards_spec.messages import counted
from shards_spec.parquet import read_table
from shards_spec.shard_writer import ShardWriter

SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("key", "reason", "kept")])


class DroppedSample(NamedTuple):
    """One row of a list: ``kept`` is the key of the sample that stays in its place, empty when it was taken down."""

    key: str
    reason: str
    kept: str


def write_drop_list(root: str, shard: int, dropped: Sequence[DroppedSample]) -> dict[str, str]:
    """Write one shard's list; returns its path below ROOT and its sha256."""
    writer = ShardWriter(root, DEDUP, shard)
    writer.write_parquet(pa.Table.from_pylist([sample._asdict() for sample in dropped], SCHEMA))
    return writer.outputs


def read_drop_list(path: str) -> dict[str, str]:
    """Key to reason of one shard's list. Raises DataError for a file that is no such list."""
    table = read_table(path, ["key", "reason"], fix="run dedup again")
    return dict(zip(table.column("key").to_pylist(), table.column("reason").to_pylist(), strict=True))


def hash_raw_shards(root: str, shards: list[int], renewed: Mapping[str, str] | None = None) -> str:
    """One hash of all raw shards: each list depends on all of them, as an image may repeat one of any shard.

    ``renewed`` maps hashes of files to those of the files that are about to take their place.
    """
    hashes = list[str]()
    for shard in shards:
        hashes += file_hashes(root, RAW, shard, [parquet_path(RAW, shard), tar_path(RAW, shard)])
    return sha256_json([(renewed or {}).get(digest, digest) for digest in hashes])


def check_fresh(root: str, shards: list[int]) -> None:
    """Raise UserError unless ROOT/dedup is complete and was made from the present raw ``shards``."""
    listed = finished_shards(join(root, DEDUP))
    if listed != shards:
        raise UserError(
            f"{join(root, DEDUP)} has {counted(len(listed), 'shard')}, raw/ has {len(shards)}: "
            f"run `clipmill dedup {root}` again, or delete dedup/ to keep every image"
        )
    expected = {"raw": hash_raw_shards(root, shards)}
    for shard in shards:
        done = read_done(join(root, DEDUP), shard)
        if done is None:
            path = stats_path(join(root, DEDUP), shard)
            raise UserError(f"{path}: no done-record in it; delete it and run `clipmill dedup {root}` again")
        if done.inputs != expected:
            name = join(root, DEDUP, shard_name(shard))
            raise UserError(f"{name} was made from other raw shards: run `clipmill dedup {root}` again")
