"""What `dedup` compares of a raw shard: 64-bit hashes of each image's link, file and looks."""

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context

import numpy as np

from pipeline.core.near_duplicates import parse_hashes
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.core.workers import die_with_parent
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, sha256_bytes
from shards_spec.images import decode_rgb
from shards_spec.layout import raw_parquet, raw_tar, remake_advice, shard_name
from shards_spec.parquet import column_names, read_table
from shards_spec.tar import read_shard

COLUMNS = ("key", "status", "url", "sha256", "phash")  # those that are used, where a raw shard has them
SHARDS_PER_WORKER = 3  # read ahead
ADVICE = "run ingest again"


@dataclass(frozen=True)
class RawImages:
    """The images of one raw shard, in its rows' order; the hashes are uint64 [images], 0: none."""

    keys: list[str]
    url_hashes: np.ndarray
    file_hashes: np.ndarray
    signatures: np.ndarray


def read_all_images(root: str, shards: list[int], *, with_signatures: bool, workers: int) -> Iterator[RawImages]:
    """Every raw shard in order; in worker processes when images must be decoded. Raises DataError."""
    read = partial(read_raw_images, root, with_signatures)
    workers = min(workers, len(shards))
    must_decode = with_signatures and "phash" not in _columns(raw_parquet(root, shards[0]))
    if workers == 1 or not must_decode:
        yield from map(read, shards)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=die_with_parent) as pool:
        try:
            rest = iter(shards)
            running = [pool.submit(read, shard) for shard in islice(rest, SHARDS_PER_WORKER * workers)]
            while running:
                first: Future[RawImages] = running.pop(0)
                yield first.result()
                running += [pool.submit(read, shard) for shard in islice(rest, 1)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    must_decode = with_signatures and "phash" not in columns
    if "sha256" not in columns or must_decode:
        hashes = _hash_images(raw_tar(root, shard), must_decode)
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
