#!/usr/bin/env python3
"""What a loss over all pairs of a batch costs one process of several, on a CPU.

    python tests/bench/pair_losses.py [--pairs 32768] [--processes 1 8] [--width 64] [--whole]

The loss is TinyCLIP's affinity mimicking with one teacher of the same width, on features of a whole batch that are
there, as they are after a gather. One process of each number is simulated: it computes its rows alone, and what the
others would add to the sum is left out. Prints the bytes that both passes hold at most besides the features, and CPU
seconds of one thread, whatever runs beside it. Large matrices are computed in blocks of rows, as in training; --whole
computes them at once, so the bytes are those of N / W rows of N logits.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from training.losses import similarity
from training.losses.distillation import ensemble_affinity_loss
from training.losses.similarity import RowShare, Similarity

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from allocation_meter import AllocationMeter

GB = 1e9


def measure(pairs: int, width: int, share: RowShare) -> tuple[float, int]:
    """Return CPU seconds and the most bytes of a loss's two passes."""
    drawn = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(pairs, width, generator=drawn), dim=-1) for _ in range(4)]
    student = [value.requires_grad_() for value in features[:2]]

    def both_passes() -> None:
        loss = ensemble_affinity_loss(Similarity(*student, 50.0), [Similarity(*features[2:], 50.0)], share=share)
        torch.autograd.grad(loss, student)

    start = time.process_time()
    both_passes()
    seconds = time.process_time() - start
    with AllocationMeter() as meter:
        both_passes()
    return seconds, meter.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32768)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.whole:
        similarity.MAX_WHOLE = options.pairs
    for processes in options.processes:
        share = RowShare(0, processes)
        own = share.rows(options.pairs)
        seconds, held = measure(options.pairs, options.width, share)
        matrix = (own.stop - own.start) * options.pairs * 4 / GB
        how = "whole" if similarity.is_whole(own.stop - own.start, options.pairs) else "in blocks"
        print(
            f"{options.pairs:,} pairs, one of {processes} processes, {how}: at most {held / GB:.2f} GB, "
            f"{seconds:.1f} CPU seconds; a matrix of its logits has {matrix:.2f} GB"
        )


if __name__ == "__main__":
    main()
