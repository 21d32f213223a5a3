"""The second check of near-duplicates: images with near signatures are read from the raw tars and compared."""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np

from pipeline.core.image_match import SIDE, fingerprint, fingerprints_match
from pipeline.core.near_duplicates import INDEX_BITS, NO_ROW, confirm_duplicates
from pipeline.core.process_map import map_in_order
from pipeline.dedup.disk_columns import DiskColumn, DiskKeys
from shards_spec.files import DataError, read_buffer
from shards_spec.images import decode_rgb
from shards_spec.layout import raw_tar, remake_advice
from shards_spec.messages import counted
from shards_spec.tar import index_shard, read_sample

log = logging.getLogger(__name__)
FINGERPRINT_BYTES = 3 * SIDE * SIDE + 500  # of memory, for an image that is compared
MIN_IMAGES_FOR_PROCESSES = 2000  # fewer are not worth starting any


def verify_near_duplicates(
    root: str,
    shards: list[int],
    keys: DiskKeys,
    *,
    positions: DiskColumn,
    candidates: DiskColumn,
    near: DiskColumn,
    memory_bytes: int,
    workers: int,
) -> None:
    """Set ``near`` of every candidate that is a duplicate to the image that stays in its place.

    ``candidates`` has per image the first image of its group, NO_ROW for those that are no candidates; ``positions``
    the canonical position in the upper half. The groups are compared in as many passes as ``memory_bytes`` requires.
    An image that does not decode stays. Raises DataError for a broken tar.
    """
    number = sum(int((block != NO_ROW).sum()) for _, block in candidates.blocks())
    if not number:
        return
    passes = -(-2 * number * FINGERPRINT_BYTES // max(memory_bytes, 1))
    near_images = counted(number, "image with near signatures", "images with near signatures")
    log.info("dedup: comparing %s, in %s", near_images, counted(passes, "pass", "passes"))
    for number_of_pass in range(passes):
        images, firsts = _candidates_of_pass(candidates, passes, number_of_pass)
        if not len(images):
            continue
        compared = np.unique(np.concatenate([images, firsts]))
        canonical = (positions.take(compared) >> INDEX_BITS).tolist()
        prints = dict(_fingerprints(root, shards, keys, compared, workers))

        def same(one: int, other: int, prints: dict[int, np.ndarray] = prints) -> bool:
            return one in prints and other in prints and fingerprints_match(prints[one], prints[other])

        pairs = zip(images.tolist(), firsts.tolist(), strict=True)
        kept_for = confirm_duplicates(pairs, dict(zip(compared.tolist(), canonical, strict=True)), same)
        near.put(np.array(list(kept_for), np.int64), np.array(list(kept_for.values()), np.uint64))


def _candidates_of_pass(candidates: DiskColumn, passes: int, number_of_pass: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of one pass, whole groups of them: their indices, and the first of each one's group."""
    images = list[np.ndarray]()
    firsts = list[np.ndarray]()
    for start, block in candidates.blocks():
        selected = np.flatnonzero((block != NO_ROW) & (block % np.uint64(passes) == number_of_pass))
        images.append(start + selected)
        firsts.append(block[selected].astype(np.int64))
    return np.concatenate(images), np.concatenate(firsts)


def _fingerprints(
    root: str, shards: list[int], keys: DiskKeys, images: np.ndarray, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, fingerprint) of those that decode, from one raw shard after the other; ``images`` are ascending."""
    bounds = np.searchsorted(images, keys.starts).tolist()
    jobs = list[tuple[str, dict[str, int]]]()
    for shard, low, high in zip(shards, bounds[:-1], bounds[1:], strict=True):
        if high > low:
            jobs.append((raw_tar(root, shard), {keys[index]: index for index in images[low:high].tolist()}))
    processes = min(workers, len(jobs)) if len(images) >= MIN_IMAGES_FOR_PROCESSES else 1
    for prints in map_in_order(_fingerprints_of_shard, jobs, processes):
        yield from prints


def _fingerprints_of_shard(job: tuple[str, dict[str, int]]) -> list[tuple[int, np.ndarray]]:
    """(index, fingerprint) of the images of a tar that decode and whose keys are wanted: of (path, index by key)."""
    path, wanted = job
    prints = list[tuple[int, np.ndarray]]()
    try:
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                if key in wanted:
                    with contextlib.suppress(DataError):  # it does not decode, and pack leaves it out
                        image = decode_rgb(read_sample(buffer, key, members).image)
                        prints.append((wanted[key], fingerprint(image)))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; {remake_advice(path)}") from error
    return prints
