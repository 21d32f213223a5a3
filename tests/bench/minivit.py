#!/usr/bin/env python3
"""Tied models against untied ones of the same shape: parameters, multiplications, time and memory of a step.

    python tests/bench/minivit.py [--batch 2] [--rounds 9] [--models mini_swin_tiny_patch4_window7_224 ...]

Forward and backward pass in float32 on one thread. Time is CPU seconds, the two models in turn, the median without the
first round. Memory is what autograd keeps for the backward pass besides the weights, which no other work on the machine
changes. Multiplications are torch's count of products and convolutions on the meta device.
"""

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import training.models.minivit  # noqa: F401  registers the names

UNTIED = {"mini_deit": "deit", "mini_swin": "swin"}


def multiplications(name: str) -> float:
    """Of one image, in billions."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        image = torch.empty(1, *model.default_cfg["input_size"])
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """What the forward pass keeps for the backward pass, each storage once, without the weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    total = sum(kept.values())
    output.sum().backward()
    return total


def step_seconds(models: list[nn.Module], images: Tensor, rounds: int) -> list[float]:
    """CPU seconds of a step of each model, measured in turn."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, own in zip(models, times, strict=True):
            model.zero_grad()
            start = time.process_time()
            model(images).sum().backward()
            own.append(time.process_time() - start)
    return [statistics.median(own[1:]) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--models", nargs="+", default=["mini_swin_tiny_patch4_window7_224", "mini_deit_small_patch16_224"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tied in options.models:
        prefix = tied[: len("mini_deit")]
        names = [tied, tied.replace(prefix, UNTIED[prefix])]
        models = [timm.create_model(name, drop_path_rate=0.0).train() for name in names]
        images = torch.randn(options.batch, *models[0].default_cfg["input_size"])
        seconds = step_seconds(models, images, options.rounds)
        for name, model, own in zip(names, models, seconds, strict=True):
            parameters = sum(parameter.numel() for parameter in model.parameters())
            kept = kept_bytes(model, images) / options.batch / 2**20
            print(
                f"{name}: {parameters / 1e6:.1f} M parameters, {multiplications(name):.2f} G multiplications, "
                f"{own / options.batch:.3f} s and {kept:.0f} MiB per image"
            )
        print(f"  time {seconds[0] / seconds[1]:.2f} times", flush=True)


if __name__ == "__main__":
    main()
