"""A short training, or the whole demo, on a quiet machine and beside processes that never wait.

    python tests/bench/busy.py [--load 4] [--runs 3]
    python tests/bench/busy.py --demo [--load 4]            once each: some five minutes, then three times that

The first prints medians for OpenMP's threads as this package sets them (passive) and as libgomp has them by default,
the second the seconds of every step of `make demo`. Ratios of one run: busy against quiet. With T threads on T cores
beside L busy processes a fair share alone is (T + L) / T.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

DEMO = Path(__file__).parents[2] / "demo" / "demo.sh"

STEPS = """
import time, torch
from torch import nn
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(192, 3, 768, batch_first=True)
optimizer, tokens = torch.optim.AdamW(layer.parameters()), torch.randn(32, 50, 192)
def step():
    optimizer.zero_grad()
    layer(tokens).square().mean().backward()
    optimizer.step()
for _ in range(5):
    step()
start = time.perf_counter()
for _ in range(40):
    step()
print(time.perf_counter() - start)
"""


def seconds(policy: str | None) -> float:
    """Seconds of forty steps of one transformer layer with torch's own number of threads."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    env |= {"OMP_WAIT_POLICY": policy} if policy else {}
    return float(subprocess.run([sys.executable, "-c", STEPS], env=env, capture_output=True, check=True).stdout)


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Beside so many processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    time.sleep(1)
    try:
        yield
    finally:
        for process in running:
            process.kill()


def demo_seconds() -> Counter[str]:
    """Seconds of each step of the demo, made anew; `python` and `clipmill` are those of this environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "RUN": folder, "PATH": path}
        subprocess.run(["bash", str(DEMO)], env=env, stdout=subprocess.DEVNULL, check=True)
        found = Counter[str]()
        for line in Path(folder, "seconds.tsv").read_text().splitlines():
            name, taken = line.split("\t")
            found[name] += float(taken)
    return found


def compare_demo(processes: int) -> None:
    """Print a line for every step, and for all of them."""
    quiet = demo_seconds()
    with load(processes):
        busy = demo_seconds()
    rows = [*((name, quiet[name], busy[name]) for name in quiet), ("in all", quiet.total(), busy.total())]
    for name, before, after in rows:
        print(
            f"{name:10} quiet {before:6.1f} s, beside {processes} busy processes {after:6.1f} s: {after / before:.1f} x"
        )


def compare_steps(processes: int, runs: int) -> None:
    """Print a line for each waiting policy."""
    policies = {"passive": "PASSIVE", "libgomp's default": None}
    found = {case: list[float]() for case in product(policies, (False, True))}
    for busy in (False, True):
        with load(processes * busy):
            for _ in range(runs):
                for name, policy in policies.items():
                    found[name, busy].append(seconds(policy))
    for name in policies:
        before, after = (statistics.median(found[name, busy]) for busy in (False, True))
        print(
            f"{name:18} quiet {before:6.2f} s, beside {processes} busy processes {after:6.2f} s: {after / before:.1f} x"
        )


def main() -> None:
    """Measure turn by turn, quiet first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, default=4, help="busy processes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--demo", action="store_true", help="the whole demo instead of a few steps")
    options = parser.parse_args()
    if options.demo:
        compare_demo(options.load)
    else:
        compare_steps(options.load, options.runs)


if __name__ == "__main__":
    main()
