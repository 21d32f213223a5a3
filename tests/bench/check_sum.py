#!/usr/bin/env python3
"""What the sum of a check costs beside its parts: seconds, memory and bytes of scratch per key and per part.

    python tests/bench/check_sum.py [--parts 100] [--keys 18000]

Made-up parts, as those of a dataset with raw shards, lists of duplicates, captions, final shards and one teacher cache
have them: a tenth of the samples are duplicates. They are written as an array's tasks write them, then summed up as its
last job does. CPU seconds of this process after imports; memory is the most that came on top of them.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.check.parts import Part, ShardFindings, key_tables, part_path, read_part
from pipeline.check.total import Total
from pipeline.check.validators import shard_folder_of

FOLDERS = tuple(map(shard_folder_of, ("ingest", "dedup", "caption/coca", "pack", "cache/clip")))
CONFIG = {f"setting_{number}": "a value of some length" for number in range(20)}


def made_up_part(shard: int, keys: int) -> Part:
    """A part of ``keys`` samples, a tenth of which are duplicates of others."""
    ids = np.random.default_rng(shard).integers(1, 1 << 64, keys, np.uint64)
    dropped, kept = ids[: keys // 10], ids[keys // 10 :]
    findings = {}
    for place, (folder, _, _) in enumerate(FOLDERS):
        record = {
            "shard": shard,
            "config": CONFIG,
            "counts": {"success": keys},
            "retried": {},
            "counters": {"captions": 5 * keys},
        }
        width = (f"{folder}/{shard:05d}.parquet", 768) if place == len(FOLDERS) - 1 else None
        findings[folder] = ShardFindings(record=record, width=width, is_valid=True)
    of_folders = {0: ids, 1: dropped, 2: ids, 3: kept, 4: kept}
    return Part(shard, findings, key_tables(of_folders, len(FOLDERS)), kept[: len(dropped)])


def memory_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=100)
    parser.add_argument(
        "--keys", type=int, default=18_000, help="of a part; DataComp-1B's shards of 20,000 rows have so many"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-check-sum-") as folder:
        for shard in range(options.parts):
            Path(part_path(folder, shard)).write_bytes(made_up_part(shard, options.keys).to_bytes())
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        before, start = memory_mb(), time.process_time()
        total = Total(FOLDERS, str(scratch))
        for shard in range(options.parts):
            total.add(read_part(folder, shard))
        added = time.process_time()
        total.compare_keys(ignore_none=False)
        ended = time.process_time()
        spilled = sum(path.stat().st_size for path in scratch.iterdir())
    keys = options.parts * options.keys
    assert not any(total.repeated), total.repeated
    print(f"{options.parts} parts, {keys:,} keys")
    print(f"parts          {size / keys:8.1f} bytes a key on disk")
    print(f"scratch        {spilled / keys:8.1f} bytes a key, 0 where all fit into memory")
    print(f"reading parts  {1e6 * (added - start) / keys:8.3f} µs a key")
    print(f"comparing keys {1e6 * (ended - added) / keys:8.3f} µs a key")
    print(f"memory         {memory_mb() - before:8.0f} MiB")


if __name__ == "__main__":
    main()
