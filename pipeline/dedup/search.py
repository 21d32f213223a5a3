"""The comparison of all images of all raw shards, on columns in temporary files.

Images are numbered through all shards in order; an image's number is its index. Images that share a link (several
captions of one image) are not duplicates of each other: they share the canonical position of the first of them, and an
image is dropped when one like it has an earlier canonical position.
"""

import logging
import tempfile
from types import TracebackType

import numpy as np

from pipeline.core.near_duplicates import (
    EXACT_DUPLICATE,
    INDEX_BITS,
    INDEX_MASK,
    NEAR_DUPLICATE,
    NO_ROW,
    canonical_index,
)
from pipeline.dedup.config import BYTES_PER_IMAGE, DedupConfig
from pipeline.dedup.disk_columns import DiskColumn, DiskKeys
from pipeline.dedup.drop_list import DroppedSample
from pipeline.dedup.hash_buckets import HashBuckets, NearMinima
from pipeline.dedup.raw_images import read_signatures
from pipeline.dedup.verification import verify_near_duplicates
from shards_spec.files import UserError, join
from shards_spec.messages import counted

log = logging.getLogger(__name__)
MAX_IMAGES = 1 << 32  # an index has 32 bits


class DuplicateSearch:
    """Finds the images to leave out; use as ``with DuplicateSearch(...) as search``: it removes its files at the end.

    ``parts`` is the folder below ROOT of what is compared of each shard, ``images_in_memory`` is how many images are
    compared at once.
    """

    def __init__(self, config: DedupConfig, shards: list[int], parts: str, images_in_memory: int) -> None:
        self._config = config
        self._shards = shards
        self._parts = parts
        self._images_in_memory = images_in_memory

    def __enter__(self) -> "DuplicateSearch":
        self._folder = tempfile.TemporaryDirectory(prefix="clipmill-dedup-")
        self._keys = DiskKeys(join(self._folder.name, "keys"))
        # 64-bit hashes; 0: none
        self._url_hashes = self._new_column("url_hashes")
        self._file_hashes = self._new_column("file_hashes")
        self._signatures = self._new_column("signatures")
        # canonical position in the upper half, index in the lower
        self._positions = self._new_column("positions")
        # index of the earlier image with an equal file, or that looks alike; NO_ROW: none
        self._exact = self._new_column("exact")
        self._near = self._new_column("near")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keys.close()
        self._folder.cleanup()

    def _new_column(self, name: str) -> DiskColumn:
        return DiskColumn(join(self._folder.name, name), max(1, self._images_in_memory // 4))

    def run(self) -> None:
        """Compare all images. Raises DataError for a broken part or tar, UserError for too many images."""
        self._read_images()
        buckets = HashBuckets(max(1, -(-len(self._keys) // self._images_in_memory)), self._images_in_memory)
        self._set_canonical_positions(buckets)
        self._find_exact(buckets)
        if self._config.near_bits >= 0:
            self._find_near(buckets)
            self._verify_near()
        self._follow_to_kept()

    def dropped(self, shard: int) -> list[DroppedSample]:
        """The images of a shard that repeat another one, after `run`."""
        start, stop = self._keys.starts[shard : shard + 2]
        exact = self._exact.read(start, stop)
        near = self._near.read(start, stop)
        dropped = list[DroppedSample]()
        for offset in np.flatnonzero((exact != NO_ROW) | (near != NO_ROW)).tolist():
            is_exact = exact[offset] != NO_ROW
            kept = int(exact[offset] if is_exact else near[offset])
            reason = EXACT_DUPLICATE if is_exact else NEAR_DUPLICATE
            dropped.append(DroppedSample(self._keys[start + offset], reason, self._keys[kept]))
        return dropped

    def number_of_images(self, shard: int) -> int:
        """Of a raw shard, after `run`."""
        start, stop = self._keys.starts[shard : shard + 2]
        return stop - start

    def _read_images(self) -> None:
        config = self._config
        for shard in self._shards:
            images = read_signatures(config.root, self._parts, shard)
            self._keys.append(images.keys)
            self._url_hashes.append(images.url_hashes)
            self._file_hashes.append(images.file_hashes)
            self._signatures.append(images.signatures)
        images_found = counted(len(self._keys), "image")
        if len(self._keys) >= MAX_IMAGES:
            raise UserError(f"{config.root}: {images_found}; dedup compares less than {MAX_IMAGES}")
        log.info("dedup: comparing %s", images_found)

    def _set_canonical_positions(self, buckets: HashBuckets) -> None:
        """Give each image its own position, then those with a link the position of the first image with that link."""
        for start, block in self._url_hashes.blocks():
            index = np.arange(start, start + len(block), dtype=np.uint64)
            self._positions.append(index << INDEX_BITS | index)
        buckets.update(
            self._positions,
            _move_to_first,
            hashes=self._url_hashes,
            values=self._positions,
            minima_of=lambda bucket: buckets.minima(self._url_hashes, self._positions, bucket),
        )

    def _find_exact(self, buckets: HashBuckets) -> None:
        self._fill_with_no_row(self._exact)
        self._fill_with_no_row(self._near)
        buckets.update(
            self._exact,
            canonical_index,
            hashes=self._file_hashes,
            values=self._positions,
            minima_of=lambda bucket: buckets.minima(self._file_hashes, self._positions, bucket),
        )

    def _fill_with_no_row(self, column: DiskColumn) -> None:
        for _, block in self._url_hashes.blocks():
            column.append(np.full(len(block), NO_ROW))

    def _find_near(self, buckets: HashBuckets) -> None:
        near_minima = NearMinima(buckets, self._new_column)
        near_minima.find(self._signatures, self._positions, self._config.near_bits)
        log.info("dedup: compared %s", counted(len(near_minima), "different signature"))
        buckets.update(
            self._near,
            canonical_index,
            hashes=self._signatures,
            values=self._positions,
            minima_of=near_minima.minima,
        )

    def _verify_near(self) -> None:
        """Keep the near duplicates that the images themselves confirm, each for the first image that does."""
        exact = self._new_column("exact_alone")
        candidates = self._new_column("candidates")  # the first image of each one's group, which stays
        for _, block in self._exact.blocks():
            exact.append(block)
        self._follow_to_kept()  # by exact and near: now `near` leads to the first of the group
        for start, near in self._near.blocks():
            exact_block = exact.read(start, start + len(near))
            candidates.append(np.where(exact_block == NO_ROW, near, NO_ROW))
            self._near.write(start, np.full(len(near), NO_ROW))
            self._exact.write(start, exact_block)
        verify_near_duplicates(
            self._config.root,
            self._shards,
            self._keys,
            positions=self._positions,
            candidates=candidates,
            near=self._near,
            memory_bytes=self._images_in_memory * BYTES_PER_IMAGE,
            workers=self._config.workers,
        )

    def _follow_to_kept(self) -> None:
        """Replace an image that is itself left out by the one that stays for it, until all indices are of such."""
        changed = True
        while changed:
            exact_changed = self._follow_once(self._exact)
            near_changed = self._follow_once(self._near)
            changed = exact_changed or near_changed

    def _follow_once(self, column: DiskColumn) -> bool:
        """One step for all images of a column; whether there was one."""
        changed = False
        for start, block in column.blocks():
            gone = np.flatnonzero(block != NO_ROW)
            exact = self._exact.take(block[gone])
            near = self._near.take(block[gone])
            target = np.where(exact != NO_ROW, exact, near)
            moves = target != NO_ROW
            if moves.any():
                block[gone[moves]] = target[moves]
                column.write(start, block)
                changed = True
        return changed


def _move_to_first(positions: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Positions with the canonical position of the smallest one, and their own index."""
    return (minima & ~INDEX_MASK) | (positions & INDEX_MASK)
