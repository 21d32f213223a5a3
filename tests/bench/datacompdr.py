#!/usr/bin/env python3
"""What DataCompDR's tars cost to list and to import, per core, at the size of the 12M's samples.

    python tests/bench/datacompdr.py FOLDER [--samples 500]

Made up by the dataset's description: 30 augmentations, five captions, 1536 numbers, as npz (float32) and as pth.gz
(bfloat16). Of both: CPU seconds of listing the tar, and of importing one teacher's half of a final shard (one process,
views 30, float16); medians of five.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from small_data import write_final
from small_datacompdr import final_sample, reinforced, write_reinforced

from pipeline.cache.config import CacheConfig, VectorSource
from pipeline.cache.stage import cache
from pipeline.ingest.url_lists import list_rows
from shards_spec.layout import teacher_folder

SHAPE = {"views": 30, "captions": 5, "dim": 1536}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call, the median of five."""
    taken = []
    for _ in range(5):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def measure(folder: Path, form: str, count: int) -> None:
    """Print the rates of one form of vectors."""
    samples = [reinforced(number, "http://h", form=form, **SHAPE) for number in range(count)]
    source = write_reinforced(folder / form, [samples])
    tar_bytes = (folder / form / "00000000.tar").stat().st_size
    listing = seconds(lambda: list(list_rows(source, "datacompdr")))
    root = str(folder / f"{form}-dataset")
    write_final(root, [[final_sample(number, sample, sample.captions) for number, sample in enumerate(samples)]])
    vectors = VectorSource((source,))
    config = CacheConfig(root, "ViT-L-14", "openai", views=30, processes=1, overwrite=True, source=vectors)
    cache(config)  # imports torch
    importing = seconds(lambda: cache(config))
    files = Path(root, teacher_folder(config.label)).glob("*.parquet")
    written = sum(file.stat().st_size for file in files)
    print(
        f"{form}: {tar_bytes / count:,.0f} bytes a sample in the tar, {written / count:,.0f} of one teacher in the "
        f"cache; listed {count / listing:,.0f}/s, imported {count / importing:,.0f}/s per core"
    )


def main() -> None:
    """Measure both forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=500)
    args = parser.parse_args()
    for form in ("npz", "pth.gz"):
        measure(args.folder, form, args.samples)


if __name__ == "__main__":
    main()
