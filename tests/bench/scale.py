#!/usr/bin/env python3
"""A dataset of many shards: what listing, adding up, checking and opening it cost, at several sizes.

    python tests/bench/scale.py [--shards 1000 10000 100000] [--work FOLDER] [--only NAME ...]

makes the dataset (`scale_dataset.py`) in a folder that it removes at the end, and what a killed run left as well:
100,000 shards take 6 GB of disk. The table is that of docs/scale.md, whose figures are tests/bench/scale.json: --out
writes them, and `python docs/tables.py` puts them into the page.

Every line is a process of its own (`scale_measures.py`): seconds of CPU and of the clock after imports, largest
resident memory less that after the imports, and operations on files below ROOT per shard by strace where it is
installed, from a tenth of the smallest size to that: opened, looked up by name, pages of folder listings, flushed to
disk, renamed, linked or removed. What was just written is in the page cache, as far as that holds it: a network file
system adds its round trip to each operation.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scale_measures import KINDS, MEASURES, measure, operations
from scale_table import scale_table

PREFIX = "clipmill-scale-"  # of the folder of a run
LOCK = "lock"  # in it, held by its run
SIZES = (1_000, 10_000, 100_000)
LARGEST = 100_000  # with five digits


def main() -> None:
    """Make the datasets, measure, print."""
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with work_folder(options.work) as folder:
        report = run(str(folder / "ds"), options)
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    print(scale_table(report))


def parse() -> argparse.Namespace:
    """The options, as they can be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=list(SIZES), help="sizes of the dataset")
    parser.add_argument("--work", default=tempfile.gettempdir(), help="a folder for it; what is made is removed")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", help="a file for the figures, as JSON")
    options = parser.parse_args()
    options.shards = sorted(set(options.shards))
    if not 20 <= options.shards[0] <= options.shards[-1] <= LARGEST:
        parser.error(f"--shards: 20 to {LARGEST:,}")
    return options


@contextmanager
def work_folder(parent: str) -> Iterator[Path]:
    """A folder below ``parent`` for the block; those of killed runs are removed first."""
    for left in Path(parent).glob(f"{PREFIX}*"):
        remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder)


def remove_if_left(folder: Path) -> None:
    """Remove the folder of a run unless that run goes on."""
    try:
        with open(folder / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    print(f"# {folder}: left by a killed run, removed", file=sys.stderr)
    shutil.rmtree(folder)


def run(root: str, options: argparse.Namespace) -> dict[str, Any]:
    """Grow ROOT from size to size and measure at each; what `scale_table` takes."""
    from scale_dataset import BYTES_PER_SHARD, Copies, first_shard

    needed = options.shards[-1] * BYTES_PER_SHARD
    if (free := shutil.disk_usage(options.work).free) < needed:
        sys.exit(f"--work {options.work}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} are needed")
    maker = multiprocessing.get_context("spawn").Process(target=first_shard, args=(root,))  # it imports torch
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("the first shard was not made")
    copies = Copies(root)
    report: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "sizes": options.shards}
    report["rows"] = [{"name": name, "title": MEASURES[name][0], "measured": {}} for name in options.only]
    counts = (options.shards[0] // 10, options.shards[0])
    for size in sorted({*counts, *options.shards}):
        start = time.perf_counter()
        copies.grow(size)
        print(f"# {size} shards made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for row in report["rows"]:
            if size in options.shards:
                row["measured"][size] = measure(row["name"], root)
                print(f"# {size} {row['name']}: {row['measured'][size]}", file=sys.stderr)
            if size in counts and shutil.which("strace"):
                count(row, root, size, counts)
    return report | {"machine": machine()}


def count(row: dict[str, Any], root: str, size: int, counts: tuple[int, int]) -> None:
    """Put the operations per shard into a row, at the larger of two sizes; at the smaller one, those in all."""
    found = operations(row["name"], root)
    if size == counts[0]:
        row["operations"] = found
        return
    few = row["operations"]
    row["operations"] = {kind: (found[kind] - few[kind]) / (counts[1] - counts[0]) for kind in KINDS}


def machine() -> str:
    """Cores and name of the processor."""
    from training.evaluation.cost import cpu_name

    return f"{len(os.sched_getaffinity(0))} cores of an {cpu_name()}"


if __name__ == "__main__":
    main()
