#!/usr/bin/env python3
"""What TinyCLIP's masks do without the task's loss: sparsity, its target and the multipliers over the steps.

    python tests/bench/sparsity.py [--sparsity 0.25] [--ramp 1000] [--steps 3000] [--form one-sided]

The masks are those of a ViT-B/32 with its text tower, trained by the recipe's own groups (AdamW at 0.02, multipliers by
ascent) and clamped after each step. In a run the task's loss holds against it, so p is later there and multipliers are
larger. Half a minute of one core.
"""

import argparse
from itertools import chain

import torch

from training.losses.sparsity import SparsityConstraint, TowerSize, expected_sparsity, target_sparsity
from training.models.tinyclip_masks import TowerMasks
from training.recipes.tinyclip_masks import BETAS, EPS

TOWERS = (TowerSize(768, 12, 3072, 12), TowerSize(512, 8, 2048, 12))  # of image and text
SHOWN = (1, 10, 100, 250, 500, 750, 1000, 1250, 1500, 2000, 3000)  # steps


def main() -> None:
    """Print a line for some of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--ramp", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--form", choices=("one-sided", "two-sided"), default="one-sided")
    options = parser.parse_args()
    towers = [TowerMasks(size.width, [size.heads] * size.layers, [size.neurons] * size.layers, size) for size in TOWERS]
    constraint = SparsityConstraint(options.form == "two-sided")
    units = list(chain.from_iterable(masks.parameters() for masks in towers))
    optimizer = torch.optim.AdamW(
        [{"params": units}, {"params": list(constraint.parameters()), "maximize": True}],
        lr=0.02,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
    )
    print("step      q      p  lambda   beta")
    for step in range(options.steps):
        target = target_sparsity(step, 0.0, options.sparsity, options.ramp)
        sparsity = expected_sparsity([masks.expected_size() for masks in towers], TOWERS)
        optimizer.zero_grad()
        constraint(sparsity, target).backward()
        if step + 1 in SHOWN:
            multipliers = f"{constraint.linear.item():7.2f} {constraint.quadratic.item():6.2f}"
            print(f"{step + 1:4d}  {target:.3f}  {sparsity.item():.4f} {multipliers}")
        optimizer.step()
        for masks in towers:
            masks.clamp()


if __name__ == "__main__":
    main()
