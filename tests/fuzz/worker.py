"""A process that tries inputs of one target one after the other, and tells the first finding.

    python tests/fuzz/worker.py TARGET FIRST SECONDS FOLDER [LAST]
    python tests/fuzz/worker.py all 0 SECONDS FOLDER LAST        the kept inputs, then all targets one after the other

Input NUMBER of a target is a function of the two. Before each one it is written to FOLDER/TARGET/current, so that it is
known when the process dies. Exit 0: time is up or LAST is done; 1: a finding, FOLDER/TARGET/finding.txt says which;
anything else: it died. FOLDER/TARGET/next has the number of the next input.

A finding is an exception other than UserError and DataError, more than LIMIT_S of processor time, or more than LIMIT_MB
above what the process had. After HANG_S on the clock the process ends itself with the stack on stderr.
"""

import faulthandler
import gc
import logging
import random
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS), str(TESTS.parent)]

FOUND = Path(__file__).parent / "found"
LIMIT_S, HANG_S, LIMIT_MB = 20, 120, 1000
MACHINE_MB = 4000  # beyond what the process has: a bomb ends in MemoryError and not in another process's death


def peak_mb() -> float:
    """The largest resident memory since `reset_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak() -> float:
    """What the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (MACHINE_MB << 20), resource.RLIM_INFINITY))


def complaint(target, data: bytes, name: str, folder: Path) -> str | None:
    """What is wrong with how an input was taken; None when nothing is."""
    from pipeline.core.runner import ShardsFailed
    from shards_spec.files import DataError, UserError

    faulthandler.dump_traceback_later(HANG_S, exit=True)
    before, start = reset_peak(), time.process_time()
    found = None
    try:
        target.run(folder, name, data)
    except (UserError, DataError, ShardsFailed) as error:
        if len(str(error)) > 4000:
            found = f"a message of {len(str(error))} characters"
    except BaseException:
        found = traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - start, peak_mb() - before
    if found is None and seconds > LIMIT_S:
        found = f"{seconds:.0f} s of processor time"
    if found is None and grown > LIMIT_MB:
        found = f"{grown:.0f} MB"
    return found


def main(name: str, first: int, seconds: float, folder: Path, last: int | None) -> int:
    """Tries inputs until one is found, ``last`` is reached or time is up; the exit status."""
    from fuzz.targets import TARGETS

    logging.disable()
    warnings.simplefilter("ignore")
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    work = place / "work"
    target = TARGETS[name](place / "valid")
    number, end = first, time.monotonic() + seconds
    limit_memory()
    while time.monotonic() < end and (last is None or number < last):
        own, data = target.input(random.Random(f"{name}/{number}"))
        (place / "current").write_bytes(own.encode() + b"\n" + data)
        (place / "next").write_text(str(number + 1))
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if found := complaint(target, data, own, work):
            (place / "finding.txt").write_text(f"{name} {number} {own}\n{found}\n")
            print(f"{name} {number} {own}\n{found}")
            return 1
        number += 1
        if number % 50 == 0:
            gc.collect()
    print(f"{name}: {number - first} inputs", flush=True)
    return 0


def replay(folder: Path) -> int:
    """Every kept input again; exit 1 when one is still taken badly."""
    from fuzz.targets import TARGETS

    logging.disable()
    warnings.simplefilter("ignore")
    targets, wrong, kept = dict[str, object](), 0, sorted(FOUND.glob("*-*"))
    for place in kept:
        name = place.name.partition("-")[0]
        target = targets.setdefault(name, TARGETS[name](folder / name / "valid"))
        for file in sorted(path for path in place.rglob("*") if path.is_file() and path.name != "finding.txt"):
            work = folder / name / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            limit_memory()
            if found := complaint(target, file.read_bytes(), str(file.relative_to(place)), work):
                wrong += 1
                print(f"{place.name}: {found}")
    print(f"{len(kept)} kept inputs, {wrong} still taken badly")
    return int(wrong > 0)


if __name__ == "__main__":
    name, first, seconds, folder = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    until = int(sys.argv[5]) if len(sys.argv) > 5 else None
    if name in ("all", "replay") and replay(folder):
        sys.exit(1)
    if name == "all":
        from fuzz.targets import TARGETS

        sys.exit(max(main(each, first, seconds, folder, until) for each in TARGETS))
    sys.exit(main(name, first, seconds, folder, until) if name != "replay" else 0)
