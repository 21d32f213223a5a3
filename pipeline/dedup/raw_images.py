"""What `dedup` compares of a raw shard, its part: 64-bit hashes of each image's link, file and looks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.core.near_duplicates import parse_hashes
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.core.runner import ShardResult, ShardTask
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, join, sha256_bytes
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, parquet_path, raw_parquet, raw_tar, remake_advice, shard_name, tar_path
from shards_spec.manifest import file_hashes
from shards_spec.parquet import column_names, read_table
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import read_shard

COLUMNS = ("key", "status", "url", "sha256", "phash")  # those that are used, where a raw shard has them
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("url_hash", pa.uint64()),
        pa.field("file_hash", pa.uint64()),
        pa.field("signature", pa.uint64()),
    ]
)
ADVICE = "run ingest again"


@dataclass(frozen=True)
class RawImages:
    """The images of one raw shard, in its rows' order; the hashes are uint64 [images], 0: none."""

    keys: list[str]
    url_hashes: np.ndarray
    file_hashes: np.ndarray
    signatures: np.ndarray


def read_raw_images(root: str, with_signatures: bool, shard: int) -> RawImages:
    """One raw shard; decodes its images when ``with_signatures`` and it has no phash column.

    Raises DataError naming file and key.
    """
    path = raw_parquet(root, shard)
    present = _columns(path)
    columns = [name for name in COLUMNS if name in present]
    if not {"key", "status"} <= set(columns):
        raise DataError(f"{path}: no columns key and status; {remake_advice(path, ADVICE)}")
    rows = [row for row in read_table(path, columns, fix=ADVICE).to_pylist() if row["status"] == "success"]
    decode = with_signatures and "phash" not in columns
    if "sha256" not in columns or decode:
        hashes = _hash_images(raw_tar(root, shard), decode)
        for row in rows:
            if row["key"] not in hashes:
                raise DataError(
                    f"{path}: key {row['key']} is not in {shard_name(shard)}.tar; {remake_advice(path, ADVICE)}"
                )
        rows = [hashes[row["key"]] | row for row in rows]  # the Parquet file's own columns count
    try:
        signatures = parse_hashes([row["phash"] if with_signatures else None for row in rows])
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: its column phash has no 64-bit hashes ({error}); {remake_advice(path, ADVICE)}"
        ) from error
    return RawImages(
        keys=[row["key"] for row in rows],
        url_hashes=content_ids([row.get("url") for row in rows]),
        file_hashes=content_ids([row.get("sha256") for row in rows]),
        signatures=signatures,
    )


def must_decode(root: str, shard: int, with_signatures: bool) -> bool:
    """Whether images of a raw shard have to be decoded: signatures are wanted, and it has no phash column."""
    return with_signatures and "phash" not in _columns(raw_parquet(root, shard))


def signature_tasks(root: str, shards: Iterable[int], *, with_signatures: bool) -> Iterator[ShardTask]:
    """A task per raw shard, whose inputs are its files, and whether signatures are wanted."""
    for shard in shards:
        paths = [parquet_path(RAW, shard), tar_path(RAW, shard)]
        files = zip(paths, file_hashes(root, RAW, shard, paths), strict=True)
        yield ShardTask(shard, {**dict(files), "signatures": "of all images" if with_signatures else "none"})


def write_signatures(root: str, task: ShardTask, *, folder: str, with_signatures: bool) -> ShardResult:
    """Write the part of one raw shard into ``folder`` below ROOT: `RawImages` as a table. Raises DataError."""
    images = read_raw_images(root, with_signatures, task.shard)
    columns = [images.keys, images.url_hashes, images.file_hashes, images.signatures]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    writer = ShardWriter(root, folder, task.shard)
    writer.write_parquet(pa.table(arrays, schema=SCHEMA), use_dictionary=False)  # nearly every value is another
    return ShardResult({"success": len(images.keys)}, writer.outputs)


def read_signatures(root: str, folder: str, shard: int) -> RawImages:
    """The part of one raw shard. Raises DataError when it is gone or broken."""
    advice = f"delete {join(root, folder)} and run `clipmill dedup` again"
    table = read_table(join(root, parquet_path(folder, shard)), SCHEMA.names, fix=advice)
    keys, *hashes = (column.combine_chunks() for column in table.columns)
    return RawImages(keys.to_pylist(), *(column.to_numpy(zero_copy_only=False) for column in hashes))


def _columns(path: str) -> list[str]:
    return column_names(path, fix=ADVICE)


def _hash_images(path: str, with_signatures: bool) -> dict[str, dict[str, str | None]]:
    """Key to sha256 of the image's bytes and phash (None when plain, undecodable or not asked for) of a tar."""
    hashes = dict[str, dict[str, str | None]]()
    for sample in read_shard(path):
        try:
            data = sample.image
        except DataError as error:
            raise DataError(f"{path}: {error}; {remake_advice(path, ADVICE)}") from error
        hashes[sample.key] = {"sha256": sha256_bytes(data), "phash": _signature(data) if with_signatures else None}
    return hashes


def _signature(data: bytes) -> str | None:
    try:
        return perceptual_hash(decode_rgb(data))
    except DataError:
        return None  # pack leaves the sample out anyway
