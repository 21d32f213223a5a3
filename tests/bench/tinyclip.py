#!/usr/bin/env python3
"""A training step of a plain CLIP, of the same with TinyCLIP's masks, and of what is cut to them; in one run.

    python tests/bench/tinyclip.py [--model ViT-B-32] [--batch-size 16] [--rounds 5] [--sparsity 0.5] [--device cpu]
                                   [--precision fp32] [--compile]

A step is forward, contrastive loss, backward, clipping and AdamW; with masks also their sample, the sparsity loss and
the clamp. The three take the same batch in turns, and medians count. Weights are random, masks keep the share of units
that gives the sparsity. The third ratio to the first is compared with that of their multiplications: at best both are
equal. On one thread of a CPU it is the process's time that counts, which stands a machine with other things to do.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shards_spec.models import load_model
from training.losses.contrastive import clip_loss
from training.losses.sparsity import SparsityConstraint
from training.models.tinyclip_convert import from_open_clip
from training.models.tinyclip_pruning import (
    attach_masks,
    expected_model_sparsity,
    mask_parameters,
    masks_of,
    materialise,
)
from training.models.tinyclip_table import model_table


class Result(NamedTuple):
    """Seconds per step, and multiplications forward per sample."""

    plain: float
    masked: float
    cut: float
    masked_ratio: float
    """masked / plain, the median over the rounds"""
    cut_ratio: float
    """cut / plain, likewise"""
    macs_ratio: float
    """of the multiplications, cut / plain"""


def training_step(model: Any, batch: tuple[Tensor, Tensor], precision: str) -> Callable[[], None]:
    """Return a function that takes a step with a model, which may have masks."""
    images, tokens = batch
    mine = set(mask_parameters(model)) if hasattr(model, "text") else set()
    constraint = SparsityConstraint().to(images.device) if mine else None
    groups: list[dict[str, Any]] = [{"params": [own for own in model.parameters() if own not in mine]}]
    if constraint is not None:
        groups += [
            {"params": list(mine), "lr": 0.02, "weight_decay": 0.0},
            {"params": list(constraint.parameters()), "lr": 0.02, "weight_decay": 0.0, "maximize": True},
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    parameters = [own for group in optimizer.param_groups for own in group["params"]]

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = [model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)]
            loss = clip_loss(*features, model.logit_scale.exp())
            if constraint is not None:
                loss = loss + constraint(expected_model_sparsity(model), 0.25)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if constraint is not None:
            for masks in masks_of(model):
                masks.clamp()

    return step


def keep_share(model: Any, share: float) -> None:
    """Let masks keep a share of all units, the first ones of a random order."""
    generator = torch.Generator().manual_seed(0)
    for units in mask_parameters(model):
        order = torch.rand(len(units), generator=generator).argsort().argsort()
        units.data = torch.where(order < share * len(units), 4.6, -4.6).to(units.device)


def measure(
    name: str, *, batch_size: int, rounds: int, sparsity: float, device: str, precision: str, compiled: bool = False
) -> Result:
    """Measure the three steps in turns."""
    plain = load_model(name, random_weights=True)
    masked, masked_config = from_open_clip(plain.model, plain.config)
    attach_masks(masked, masked_config)
    cut, cut_config = from_open_clip(masked, masked_config)
    keep_share(cut, (1 - sparsity) ** 0.5)
    whole = model_table(cut)["macs"]
    materialise(cut, cut_config)
    macs_ratio = model_table(cut)["macs"] / whole
    images = torch.randn(batch_size, 3, plain.image_size, plain.image_size, device=device)
    tokens = plain.tokenizer(["a photo of things beside each other"] * batch_size).to(device)
    steps = []
    for model in (plain.model, masked, cut):
        model.to(device).train()
        if compiled:
            model.encode_image = torch.compile(model.encode_image)
            model.encode_text = torch.compile(model.encode_text)
        steps.append(training_step(model, (images, tokens), precision))
    seconds = in_turns(steps, rounds, device)
    ratios = [statistics.median(turn[which] / turn[0] for turn in seconds) for which in (1, 2)]
    medians = [statistics.median(turn[which] for turn in seconds) for which in range(3)]
    return Result(*medians, *ratios, macs_ratio)


def in_turns(steps: list[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each step in each round; each was taken twice before."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for turn in range(rounds + 2):
        taken = []
        for step in steps:
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            taken.append(clock() - start)
        if turn >= 2:
            seconds.append(taken)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    result = measure(
        options.model,
        batch_size=options.batch_size,
        rounds=options.rounds,
        sparsity=options.sparsity,
        device=options.device,
        precision=options.precision,
        compiled=options.compile,
    )
    print(f"seconds per step: plain {result.plain:.3f}, with masks {result.masked:.3f}, cut {result.cut:.3f}")
    print(f"with masks / plain: {result.masked_ratio:.3f}")
    print(
        f"cut / plain: {result.cut_ratio:.3f}; of their multiplications {result.macs_ratio:.3f}, so measured / ideal "
        f"{result.cut_ratio / result.macs_ratio:.3f}"
    )


if __name__ == "__main__":
    main()
