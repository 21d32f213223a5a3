#!/usr/bin/env python3
"""What TinyMIM's step costs, in turns with the student's plain training step and with a plain implementation.

    python tests/bench/tinymim.py [--student timm:vit_small_patch16_224] [--teacher timm:vit_base_patch16_224]
                                  [--batch-size 8] [--rounds 3] [--device cpu] [--precision fp32]

"student" trains the student on classes. "plain" runs both models to their ends, takes the projections by hooks and the
loss of whole relation matrices by autograd. "ours" is the recipe's task. All start from the same random weights and
images. Prints seconds per step (medians of turns, no optimizer; on a CPU of the processor on one thread, whatever runs
beside it), operations per sample, bytes that a step's tensors hold at most besides the weights, and the loss alone, in
blocks and whole; "ours" and "plain" have the same loss.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.configs import default_config
from training.losses.relations import Pair, split_heads, token_relation_loss
from training.models.tinymim import set_drop_path, set_heads
from training.models.vit_teacher import VitTeacher, load_vit_teacher
from training.recipes import tinymim

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from allocation_meter import AllocationMeter

CLASSES = 1000
GB = 1e9


@dataclass(frozen=True)
class Case:
    """A way to take a step."""

    name: str
    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]


def plain_loss(student: Pair, teacher: Pair, heads: int) -> Tensor:
    """KL of whole relation matrices, as the formula says."""
    logits = []
    for pair in (student, teacher):
        rows, columns = (split_heads(tokens.float(), heads) for tokens in pair)
        logits.append((rows @ columns.mT * rows.shape[-1] ** -0.5).log_softmax(-1))
    return F.kl_div(logits[0], logits[1], reduction="none", log_target=True).sum(-1).mean()


def projections(model: Any, block: int, images: Tensor) -> list[Tensor]:
    """Queries, keys and values of a block, by a hook on a pass to the end."""
    kept = list[Tensor]()
    handle = model.blocks[block - 1].attn.qkv.register_forward_hook(lambda _, __, output: kept.append(output))
    model.forward_features(images)
    handle.remove()
    return list(kept[0].chunk(3, dim=-1))


def build_cases(options: argparse.Namespace) -> tuple[list[Case], tinymim.TinymimTask]:
    """Return the three ways, whose student is the same module, and the recipe's task."""
    config = replace(default_config("tinymim"), teacher=options.teacher, teacher_weights="random", drop_path=0.0)
    teacher: VitTeacher = load_vit_teacher(options.teacher, "random", 0)
    student, tower = tinymim.load_tinymim_student(replace(config.student, model=options.student), 0)
    blocks = tinymim.find_blocks(config, tower, teacher)
    heads = teacher.tower.heads(blocks[1])
    set_heads(tower, blocks[0], heads)
    set_drop_path(tower, 0.0, blocks[0])
    task = tinymim.TinymimTask(config, student.model, tower, teacher, blocks=blocks, fields=("images",))
    task.to(options.device).train()
    side = student.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch_size, 3, side, side, generator=generator).to(options.device)
    head = nn.Linear(tower.width, CLASSES).to(options.device)
    labels = torch.arange(options.batch_size, device=options.device)

    def ours() -> Tensor:
        return torch.stack(list(task.losses(task({"images": images}), 0).values())).sum()

    def plain() -> Tensor:
        with torch.no_grad():
            theirs = projections(teacher.tower.model, blocks[1], images)
        mine = projections(tower.model, blocks[0], images)
        qk = plain_loss(Pair(mine[0], mine[1]), Pair(theirs[0], theirs[1]), heads)
        return qk + plain_loss(Pair(mine[2], mine[2]), Pair(theirs[2], theirs[2]), heads)

    def classes() -> Tensor:
        return F.cross_entropy(head(tower.model.forward_features(images)[:, 0]).float(), labels)

    parameters = [value for value in tower.model.parameters() if value.requires_grad]
    named = {"student": classes, "plain": plain, "ours": ours}
    return [Case(name, loss, [*parameters, *head.parameters()]) for name, loss in named.items()], task


def take_step(case: Case, options: argparse.Namespace) -> float:
    """Return the loss of a step, whose gradients are dropped."""
    with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
        loss = case.loss()
    loss.backward()
    for parameter in case.parameters:
        parameter.grad = None
    return loss.item()  # waits for the device


def operations(case: Case, options: argparse.Namespace) -> float:
    """Return the operations of a step per sample, two for each multiplication, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        take_step(case, options)
    return counter.get_total_flops() / options.batch_size


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Return the bytes that a step's tensors hold at most, without what was there before."""
    if device == "cpu":
        with AllocationMeter() as meter:
            run()
        return meter.peak()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def seconds(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Return the median seconds of each, in turns after one that does not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(clock() - start)
    return {name: statistics.median(found[1:]) for name, found in taken.items()}


def loss_alone(task: tinymim.TinymimTask, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Return the QK loss of vectors that are there, with its backward pass, in blocks and whole."""
    generator = torch.Generator().manual_seed(0)
    tokens = task.tower.patches + task.tower.prefix

    def draw(width: int) -> Pair:
        pair = [torch.randn(options.batch_size, tokens, width, generator=generator).to(options.device) for _ in "qk"]
        return Pair(*pair)

    student = Pair(*(vectors.requires_grad_() for vectors in draw(task.tower.width)))
    teacher = draw(task.teacher_tower.width)

    def run(loss: Callable[[Pair, Pair, int], Tensor]) -> float:
        found = loss(student, teacher, task.heads).mean()
        torch.autograd.grad(found, list(student))
        return found.item()

    return {"in blocks": lambda: run(token_relation_loss), "whole": lambda: run(plain_loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="timm:vit_small_patch16_224")
    parser.add_argument("--teacher", default="timm:vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    cases, task = build_cases(options)
    losses = {case.name: take_step(case, options) for case in cases}
    print(f"block {task.block} of {options.student} from block {task.teacher_block} of {options.teacher}")
    print(f"loss: ours {losses['ours']:.6f}, plain {losses['plain']:.6f}")
    taken = seconds(
        {case.name: lambda case=case: take_step(case, options) for case in cases}, options.rounds, options.device
    )
    for case in cases:
        work = operations(case, options) / 1e9
        held = peak_bytes(lambda case=case: take_step(case, options), options.device) / GB
        print(f"{case.name:8} {taken[case.name]:7.3f} s  {work:7.1f} GFLOP/sample  {held:6.2f} GB")
    print(
        f"ours takes {taken['ours'] / taken['plain']:.2f} of plain, {taken['ours'] / taken['student']:.2f} of student"
    )
    runs = loss_alone(task, options)
    alone = seconds(dict(runs), options.rounds, options.device)
    for name, run in runs.items():
        print(f"loss alone, {name:9} {alone[name]:7.3f} s  {peak_bytes(run, options.device) / GB:6.3f} GB")


if __name__ == "__main__":
    main()
