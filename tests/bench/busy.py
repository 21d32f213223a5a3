"""A short training on a quiet and on a busy machine: seconds of the same steps, beside processes that never wait.

    python tests/bench/busy.py [--load 4] [--runs 3]

Prints medians for OpenMP's threads as this package sets them (passive) and as libgomp has them by default. Ratios of
one run: busy against quiet. With T threads on T cores beside L busy processes a fair share alone is (T + L) / T.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from itertools import product

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


def main() -> None:
    """Measure turn by turn, quiet first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=int, default=4, help="busy processes")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    policies = {"passive": "PASSIVE", "libgomp's default": None}
    found = {case: list[float]() for case in product(policies, (False, True))}
    for busy in (False, True):
        load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load * busy)]
        time.sleep(1)
        try:
            for _ in range(options.runs):
                for name, policy in policies.items():
                    found[name, busy].append(seconds(policy))
        finally:
            for process in load:
                process.kill()
    for name in policies:
        quiet, busy = (statistics.median(found[name, state]) for state in (False, True))
        print(
            f"{name:18} quiet {quiet:6.2f} s, beside {options.load} busy processes {busy:6.2f} s: {busy / quiet:.1f} x"
        )


if __name__ == "__main__":
    main()
