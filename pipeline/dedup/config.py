"""Options of `clipmill dedup`."""

import math
import os
from dataclasses import dataclass

from pipeline.core.command_line import Root
from pipeline.core.near_duplicates import MAX_NEAR_BITS
from shards_spec.messages import require

BYTES_PER_IMAGE = 150  # of memory, for each image that is compared at once


@dataclass(frozen=True)
class DedupConfig:
    """List the images of raw/ that repeat an earlier one; pack leaves them out of the final shards."""

    root: Root
    """the dataset; reads raw/, writes dedup/"""
    near_bits: int = 3
    """images whose signatures (64-bit DCT hash) differ in at most so many bits, and that look alike in colours and
    details, are one; -1: equal files only"""
    workers: int = os.cpu_count() or 1
    """processes that decode images: those with near signatures, all of raw shards without a phash column"""
    memory_gb: float = 0.6
    """memory for the comparison, 0.15 GB per million images; with less, all images are read several times"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        is_known = -1 <= self.near_bits <= MAX_NEAR_BITS
        require(is_known, "near_bits", self.near_bits, f"-1 (equal files only) to {MAX_NEAR_BITS}")
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        is_some = BYTES_PER_IMAGE <= self.memory_gb * 1e9 < math.inf  # written so that NaN is refused, too
        require(is_some, "memory_gb", self.memory_gb, "above 0")

    @property
    def images_in_memory(self) -> int:
        """How many images the memory allows to compare at once."""
        return int(self.memory_gb * 1e9 / BYTES_PER_IMAGE)
