#!/usr/bin/env python3
"""What fused AdamW brings a training step, against torch's other AdamW, by turns in one run.

    python tests/bench/optimizer.py [--model ViT-M-32] [--batch-size 8] [--turns 5] [--device cpu]

The step is the clip recipe's on a batch that is held, fp32, random weights. Prints milliseconds of the optimizer alone
and of the whole step (medians of the turns), and the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from training.config import ModelConfig, OptimConfig
from training.engine.optim import build_optimizer
from training.recipes.clip import ClipTask
from training.runs.student import new_student

KINDS = {"fused": True, "plain": False}


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds of a call, the device's work included."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of the optimizer and of forward and backward pass, turn by turn, by kind of optimizer."""
    student = new_student(ModelConfig(options.model), 0)
    task = ClipTask(student.model).to(options.device).train()
    drawn = torch.Generator().manual_seed(0)
    size = student.image_size
    texts = ["a photo of things beside each other on a beach"] * options.batch_size
    batch = {
        "images": torch.randn(options.batch_size, 3, size, size, generator=drawn).to(options.device),
        "tokens": student.tokenizer(texts).to(options.device),
    }
    optimizers = {kind: build_optimizer(task, OptimConfig(lr=1e-6), fused=fused) for kind, fused in KINDS.items()}
    taken: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in KINDS}

    def compute() -> None:
        task.losses(task(batch), 0)["contrastive"].backward()

    for turn in range(options.turns + 1):  # the first one does not count: it makes the state
        for kind, optimizer in optimizers.items():
            computing = seconds_of(compute, options.device)
            updating = seconds_of(optimizer.step, options.device)
            optimizer.zero_grad(set_to_none=True)
            if turn:
                taken[kind][0].append(updating)
                taken[kind][1].append(computing)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-M-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    taken = measure(options)
    updating = {kind: statistics.median(own[0]) for kind, own in taken.items()}
    computing = statistics.median([*taken["fused"][1], *taken["plain"][1]])
    for kind, seconds in updating.items():
        whole = seconds + computing
        print(f"{kind:6} AdamW {1e3 * seconds:8.1f} ms, whole step {1e3 * whole:8.1f} ms")
    ratio = updating["plain"] / updating["fused"]
    whole_ratio = (updating["plain"] + computing) / (updating["fused"] + computing)
    print(f"plain over fused: the optimizer {ratio:.2f}, the whole step {whole_ratio:.3f}: medians of {options.turns}")


if __name__ == "__main__":
    main()
