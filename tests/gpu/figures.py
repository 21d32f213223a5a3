"""What the measurements share: where they run, how a figure is reported, and the card's bf16 ceiling.

A measurement prints one JSON object per line, at once, so that a step which is stopped keeps what it has. The runner
hands over the device and a folder by the environment.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DEVICE = "CLIPMILL_GPU_DEVICE"  # cuda, or cpu in a dry run
WORK = "CLIPMILL_GPU_WORK"  # a folder that the steps of a run share
PREFIX = "figure: "
_START = time.perf_counter()
SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices whose product is the ceiling


@dataclass(frozen=True)
class Options:
    """Where a measurement runs: ``dry`` takes tiny sizes, ``work`` is a folder that the steps share."""

    dry: bool
    device: str
    work: Path


def options(description: str | None = None) -> Options:
    """The options of a measurement's command line and environment."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    dry = parser.parse_args().dry
    device = os.environ.get(DEVICE) or ("cpu" if dry else "cuda")
    work = Path(os.environ.get(WORK) or tempfile.mkdtemp(prefix="clipmill-gpu-"))
    work.mkdir(parents=True, exist_ok=True)
    return Options(dry, device, work)


def figure(name: str, value: float, unit: str, *, goal: str = "", rate: str = "", **facts: float | str) -> None:
    """Report a figure at once.

    Args:
        name: What was measured, as docs/benchmarks.md calls it.
        value: In ``unit``.
        unit: Such as "views/s".
        goal: What the project wants it to be, in words.
        rate: The key of this job in the table of operations of tests/bench/plan.py; ``value`` is samples per second.
        facts: What else belongs to the figure, such as its share of the ceiling.
    """
    at = round(time.perf_counter() - _START, 1)  # seconds since this process began to measure
    line = {"name": name, "value": value, "unit": unit, "goal": goal, "rate": rate, "facts": facts, "at": at}
    print(PREFIX + json.dumps({key: given for key, given in line.items() if given != ""}), flush=True)


def run_parts(*parts: Callable[[], None]) -> int:
    """Run the parts of a measurement, each whatever became of the others; the exit code, 1 when one failed.

    A card is at hand for minutes: one fault must not cost the figures of the other parts.
    """
    code = 0
    for part in parts:
        try:
            part()
        except Exception:
            traceback.print_exc()
            code = 1
        gc.collect()  # what a part had on the device
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return code


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: str, *, repeat: int = 5, warm_up: int = 1) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_ceiling(device: str) -> float:
    """Operations per second (multiply and add are two) of a large bf16 product of random matrices."""
    side = SIDE["cuda" if device.startswith("cuda") else "cpu"]
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    repeat = 10  # products per turn, so that the start of the first does not count

    def products() -> None:
        for _ in range(repeat):
            a @ b

    return 2 * side**3 * repeat / seconds_of(products, device)


def ceiling(device: str) -> float:
    """This run's bf16 ceiling in operations per second; measured by the first step that asks."""
    folder = os.environ.get(WORK)
    if not folder:
        return measure_ceiling(device)
    path = Path(folder, "ceiling")
    if not path.exists():
        path.write_text(repr(measure_ceiling(device)))
    return float(path.read_text())
