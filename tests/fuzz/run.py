#!/usr/bin/env python3
"""Fuzzes every reader of the product with wrong and made-up inputs (`tests/fuzz/targets.py`).

    make fuzz                                   ten minutes over all targets
    python tests/fuzz/run.py --seconds 60 tar   one target
    python tests/fuzz/run.py --first 17 --last 18 tar     one input again
    python tests/fuzz/run.py --replay           what is kept below tests/fuzz/found/

Each target runs in a process of its own, which ends at its first finding: a traceback, a hang, a crash, more than 1 GB.
The input is kept in tests/fuzz/found/TARGET-NUMBER/ (the file, under its name, and finding.txt); the next process goes
on behind it. Exit 1 when anything was found.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FOUND = HERE / "found"
NAMES = (
    "tar",
    "reinforced",
    "list",
    "parquet",
    "folder",
    "image",
    "dataset",
    "run",
    "img2dataset",
    "labelled",
    "checkpoint",
    "json",
)
MOST = 20  # findings of a target, after which it is given up


def fuzz(name: str, first: int, last: int | None, seconds: float, folder: Path, keep: Path) -> list[str]:
    """What was found in one target."""
    found, end, place = list[str](), time.monotonic() + seconds, folder / name
    while (left := end - time.monotonic()) > 0 and len(found) < MOST and (last is None or first < last):
        place.mkdir(parents=True, exist_ok=True)
        for left_over in ("next", "current", "finding.txt"):
            (place / left_over).unlink(missing_ok=True)
        command = [sys.executable, HERE / "worker.py", name, first, left, folder, *([last] if last is not None else [])]
        with open(place / "stderr", "wb") as stderr:  # decoders in C write there as they like
            done = subprocess.run(
                list(map(str, command)), stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
            )
        if done.returncode == 0:
            break
        finding = place / "finding.txt"
        if not (place / "next").exists():
            return [f"{name}: the fuzzer itself fails:\n{(place / 'stderr').read_text(errors='replace')[-3000:]}"]
        text = finding.read_text() if finding.exists() else ""
        if not text:
            text = f"ended with {done.returncode}\n{(place / 'stderr').read_text(errors='replace')[-3000:]}"
        number = int((place / "next").read_text()) - 1
        path, _, data = (place / "current").read_bytes().partition(b"\n")
        kept = keep / f"{name}-{number}" / path.decode()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
        (keep / f"{name}-{number}" / "finding.txt").write_text(text)
        last_line = text.strip().splitlines()[-1][:200]
        print(f"{name} {number} ({path.decode()}): {last_line}", flush=True)
        found.append(f"{name} {number}")
        first = number + 1
    return found


def replay(folder: Path) -> list[str]:
    """Kept inputs that are still taken badly."""
    command = [sys.executable, HERE / "worker.py", "replay", "0", "600", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    print(done.stdout, end="")
    return [] if done.returncode == 0 else [done.stdout + done.stderr[-3000:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*NAMES, []], help="all by default")
    parser.add_argument("--seconds", type=float, default=600, help="in all")
    parser.add_argument("--first", type=int, help="number of the first input; by default by the clock")
    parser.add_argument("--last", type=int, help="number behind the last input")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, default=FOUND, help="where findings go")
    parser.add_argument("--replay", action="store_true", help="only the kept inputs")
    config = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if config.replay:
            found = replay(Path(scratch))
        else:
            names = config.targets or list(NAMES)
            first = random.randrange(1 << 40) if config.first is None else config.first
            print(f"inputs from {first} on", flush=True)
            each = config.seconds * min(config.processes, len(names)) / len(names)
            with ThreadPoolExecutor(config.processes) as pool:
                runs = [pool.submit(fuzz, n, first, config.last, each, Path(scratch), config.keep) for n in names]
                found = [line for run in runs for line in run.result()]
    print(f"{len(found)} findings" + "".join(f"\n  {line}" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
