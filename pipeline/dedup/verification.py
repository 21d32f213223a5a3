"""`dedup`'s second look: images whose signatures are near are read from the raw tars and compared themselves."""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from pipeline.core.near_duplicates import INDEX_BITS, NO_ROW, confirm_duplicates
from pipeline.core.workers import die_with_parent
from pipeline.dedup.disk_columns import Column, Keys
from pipeline.dedup.image_match import SIDE, alike, fingerprint
from shards_spec.files import DataError, read_buffer
from shards_spec.images import decode_rgb
from shards_spec.layout import raw_tar
from shards_spec.tar import index_shard, read_sample

log = logging.getLogger(__name__)
PRINT_BYTES = 3 * SIDE * SIDE + 500  # of memory, for an image that is compared
ENOUGH = 2000  # images that are worth starting processes for


def look_again(root: str, shards: list[int], keys: Keys, columns: dict[str, Column], memory: int, workers: int) -> None:
    """Set ``near`` of every row that goes to the row that stays in its place.

    ``columns["first"]``: per row the first of its group, NO_ROW for rows that are no candidates; ``values`` as in
    `dedup`. Groups are gone through in as many passes as ``memory`` (bytes) wants. An image that does not decode stays.
    Raises DataError for a broken tar.
    """
    number = sum(int((piece != NO_ROW).sum()) for _, piece in columns["first"].pieces())
    if not number:
        return
    passes = -(-2 * number * PRINT_BYTES // max(memory, 1))
    log.info("dedup: %d images with near signatures are looked at, in %d passes", number, passes)
    for turn in range(passes):
        rows, firsts = _group(columns["first"], passes, turn)
        if not len(rows):
            continue
        entries = np.unique(np.concatenate([rows, firsts]))
        places = dict(zip(entries.tolist(), (columns["values"].take(entries) >> INDEX_BITS).tolist(), strict=True))
        prints = dict(_fingerprints(root, shards, keys, entries, workers))

        def same(one: int, other: int, prints: dict[int, np.ndarray] = prints) -> bool:
            return one in prints and other in prints and alike(prints[one], prints[other])

        found = confirm_duplicates(zip(rows.tolist(), firsts.tolist(), strict=True), places, same)
        columns["near"].put(np.array(list(found), np.int64), np.array(list(found.values()), np.uint64))


def _group(column: Column, passes: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of every so manieth group: rows and the first of each one's group."""
    rows, firsts = list[np.ndarray](), list[np.ndarray]()
    for start, piece in column.pieces():
        chosen = np.flatnonzero((piece != NO_ROW) & (piece % np.uint64(passes) == turn))
        rows.append(start + chosen)
        firsts.append(piece[chosen].astype(np.int64))
    return np.concatenate(rows), np.concatenate(firsts)


def _fingerprints(
    root: str, shards: list[int], keys: Keys, entries: np.ndarray, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(entry, fingerprint) of those that decode, from one raw shard after the other."""
    bounds = np.searchsorted(entries, keys.starts)
    jobs = [
        (raw_tar(root, shard), {keys[entry]: entry for entry in entries[low:high].tolist()})
        for shard, low, high in zip(shards, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        if high > low
    ]
    if min(workers, len(jobs)) < 2 or len(entries) < ENOUGH:
        for path, wanted in jobs:
            yield from _of_shard(path, wanted)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=die_with_parent) as pool:
        for found in pool.map(_of_shard, *zip(*jobs, strict=True)):
            yield from found


def _of_shard(path: str, wanted: dict[str, int]) -> list[tuple[int, np.ndarray]]:
    """(number, fingerprint) of the wanted keys of a tar."""
    found = list[tuple[int, np.ndarray]]()
    try:
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                if key in wanted:
                    with contextlib.suppress(DataError):  # it does not decode, and pack drops it
                        found.append((wanted[key], fingerprint(decode_rgb(read_sample(buffer, key, members).image))))
    except FileNotFoundError as error:
        raise DataError(f"{path}: is not there; run ingest again") from error
    return found
