#!/usr/bin/env python3
"""What a tenth of troublesome links costs the good ones: `clipmill ingest` with and without, in pairs.

    python tests/bench/faults.py [--good 30000] [--pairs 5] [--timeout-s 1.5] [--shard-size 1000]

Good links are small images on sixteen hosts, so the network loop is what is measured, not the decoding; troubles are
all kinds of tests/support/fault_server.py in turn, at random places. Two rates of good images per second: `whole` from
the start of the command to its end, in which the last links' time-outs stand; `steady` until nine shards of ten are
done.
A good link that is `lost` ended as a time-out: the machine was too slow for --timeout-s.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from fault_server import MAX_BYTES, TIMEOUT_S, TROUBLES, FaultServer, ingest_apart, outcome, rows_of, serve_faults

SHARE = 0.1
LIMIT_S = 600


def mixed(server: FaultServer, good: int, share: float, seed: int = 0) -> list[str]:
    """``good`` links, and so many troubles among them that these are ``share`` of all."""
    names, number = list(TROUBLES), round(good * share / (1 - share))
    links = [server.good(n) for n in range(good)]
    links += [server.link(names[n % len(names)], n // len(names)) for n in range(number)]
    random.Random(seed).shuffle(links)
    return links


def rates(root: Path, links: list[str], good: int, timeout_s: float, shard_size: int) -> dict[str, float]:
    """Ingest; good images per second, and how many of the good links were lost."""
    shutil.rmtree(root, ignore_errors=True)
    options = {"timeout_s": timeout_s, "retries": 1, "max_bytes": MAX_BYTES, "shard_size": shard_size, "workers": 2}
    report = ingest_apart(root, links, LIMIT_S, **options)
    found = sum(outcome(row) == "success" for row in rows_of(root) if "/good/" in row["url"])
    stats = [json.loads(path.read_text()) for path in (root / "raw").glob("*_stats.json")]
    ends = sorted(entry["end_time"] for entry in stats)
    nine_tenths = ends[round(0.9 * (len(ends) - 1))] - min(entry["start_time"] for entry in stats)
    return {"whole": found / report["seconds"], "steady": 0.9 * found / nine_tenths, "lost": good - found}


def pair(server: FaultServer, folder: Path, good: int, *shape: float, seed: int = 0) -> dict[str, float]:
    """Rates with troubles by rates without; ``shape`` is the time-out and the shard size."""
    plain = rates(folder / "plain", mixed(server, good, 0.0, seed), good, *shape)
    trouble = rates(folder / "trouble", mixed(server, good, SHARE, seed), good, *shape)
    print("  without:", *(f"{key} {value:.0f}" for key, value in plain.items()), end="")
    print("; with:", *(f"{key} {value:.0f}" for key, value in trouble.items()), flush=True)
    return {key: trouble[key] / plain[key] for key in ("whole", "steady")}


def measure(
    good: int = 30_000, pairs: int = 5, timeout_s: float = TIMEOUT_S, shard_size: int = 1000
) -> dict[str, list[float]]:
    """Print the ratios of all pairs, and return them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve_faults(folder) as server:
            found = [pair(server, folder, good, timeout_s, shard_size, seed=seed) for seed in range(pairs)]
    ratios = {key: [ratios[key] for ratios in found] for key in found[0]}
    for key, values in ratios.items():
        print(f"ratio, {key}: min {min(values):.2f}, median {median(values):.2f}, max {max(values):.2f}")
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=int, default=30_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S)
    parser.add_argument("--shard-size", type=int, default=1000)
    options = parser.parse_args()
    measure(options.good, options.pairs, options.timeout_s, options.shard_size)
