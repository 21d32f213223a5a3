#!/usr/bin/env python3
"""A CatLIP step against a CLIP step, same image tower (ViT-B/16), same images, in one run.

    python tests/bench/catlip.py [--model catlip_vit_base_patch16_224] [--batch-size 8] [--steps 2] [--rounds 3]
                                 [--classes 24320] [--labels 10] [--size 224] [--text-width 512]
                                 [--text-layers 12] [--device cpu] [--precision fp32] [--fit] [--cpu-time]

CLIP has a text tower of 12 layers of width 512 besides, CatLIP a head of 24,320 classes and, without --no-augment,
RangeAugment. Reading is left out: the batch is there. Prints seconds per step of the two (medians of turns one after
the other) with forward, backward and optimizer apart, their ratio beside the paper's 2.7 (which counts gathers over 256
GPUs and its larger batches, too), the text tower's share, and what labels and loss take of a CatLIP step. --fit doubles
the batch, from --batch-size on, as long as both fit the device. --cpu-time counts seconds of all cores together that
these processes really had, for a machine that others use, too.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shards_spec.models import TIMM, LoadedModel
from training.config import OptimConfig
from training.configs.catlip import CatlipConfig
from training.engine.optim import build_optimizer
from training.losses.multilabel import pad_labels, sigmoid_loss
from training.models.classifier import new_classifier
from training.models.range_augment import RangeAugment
from training.recipes import catlip, clip

TEXT = {"context_length": 77, "vocab_size": 49408}
HEAD = 64  # numbers of an attention head of the text tower
WARMING = 1


def clip_task(options: argparse.Namespace) -> Any:
    """CLIP with the image tower in question."""
    vision = {"timm_model_name": options.model, "timm_pool": "token", "timm_proj": "linear", "image_size": options.size}
    width = options.text_width
    text = {**TEXT, "width": width, "heads": width // HEAD, "layers": options.text_layers}
    return clip.ClipTask(open_clip.model.CLIP(512, vision, text)).to(options.device).train()


def catlip_task(options: argparse.Namespace) -> Any:
    """CatLIP's, with as many classes as it published."""
    student: LoadedModel = new_classifier(f"{TIMM}{options.model}", options.classes)
    config = CatlipConfig(range_augment=options.augment)
    return catlip.CatlipTask(config, student, 1000).to(options.device).train()


def draw_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Images, texts of 77 tokens and some ten labels each."""
    drawn, number = torch.Generator().manual_seed(0), options.batch_size
    labels = [torch.randperm(options.classes, generator=drawn)[: options.labels].tolist() for _ in range(number)]
    tokens = torch.randint(1, 49_000, (number, 77), generator=drawn)
    tokens[:, -1] = 49_407  # the end of text, where open_clip looks
    batch = {
        "images": torch.rand(number, 3, options.size, options.size, generator=drawn),
        "tokens": tokens,
        "labels": pad_labels(labels),
    }
    return {name: value.to(options.device) for name, value in batch.items()}


class Stopwatch:
    """Seconds since the last look, when the device is through."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.last = options.device, 0.0
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.look()

    def look(self) -> float:
        """Return the seconds since the last call."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = self.clock()
        taken, self.last = now - self.last, now
        return taken


def seconds_per_step(task: Any, options: argparse.Namespace) -> list[float]:
    """Forward with loss, backward, optimizer: medians over the steps after the first one."""
    optimizer = build_optimizer(task, OptimConfig())
    batch = draw_batch(options)
    taken: list[list[float]] = []
    for step in range(WARMING + options.steps):
        watch = Stopwatch(options)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            losses = task.losses(task(batch), step)
        total = torch.stack(list(losses.values())).sum()
        parts = [watch.look()]
        total.backward()
        parts.append(watch.look())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        parts.append(watch.look())
        taken.append(parts)
    return [statistics.median(part) for part in zip(*taken[WARMING:], strict=True)]


def seconds_of(call: Callable[[], Tensor], options: argparse.Namespace) -> float:
    """Forward and backward of a part, median over five turns after the first."""
    taken = []
    for _ in range(6):
        watch = Stopwatch(options)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            outcome = call()
        outcome.sum().backward()
        taken.append(watch.look())
    return statistics.median(taken[1:])


def measure_parts(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the text tower, of labels and loss, and of RangeAugment."""
    batch, both = draw_batch(options), clip_task(options)
    text = seconds_of(lambda: both.student.encode_text(batch["tokens"]), options)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    logits = torch.randn(options.batch_size, options.classes, device=options.device, dtype=dtype, requires_grad=True)
    labels = batch["labels"].cpu()
    loss = seconds_of(lambda: sigmoid_loss(logits, labels.to(options.device)).mean(), options)
    parts = {"text tower": text, "labels and loss": loss}
    if options.augment:
        augment = RangeAugment((0.0,) * 3, (1.0,) * 3).to(options.device)
        parts["RangeAugment"] = seconds_of(lambda: augment(batch["images"])[1], options)
    return parts


def largest_batch(options: argparse.Namespace) -> int:
    """The largest batch that both fit, doubling."""
    fits = options.batch_size
    steps = options.steps
    options.steps = 0
    while True:
        try:
            for build in (catlip_task, clip_task):
                seconds_per_step(build(options), argparse.Namespace(**{**vars(options), "steps": 1}))
                torch.cuda.empty_cache()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            options.steps = steps
            return fits
        fits, options.batch_size = options.batch_size, 2 * options.batch_size


def operations(task: Any, options: argparse.Namespace) -> float:
    """Of a sample's step: three times the student's forward pass, as tests/bench/plan.py counts."""
    batch = draw_batch(argparse.Namespace(**{**vars(options), "device": "meta", "batch_size": 2}))
    student = copy.deepcopy(task.student).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(task, clip.ClipTask):
            student.encode_text(batch["tokens"])
            student.encode_image(batch["images"])
        else:
            student(batch["images"])
    return 3 * counter.get_total_flops() / 2


def measure_rounds(tasks: dict[str, Any], options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Seconds of forward, backward and optimizer by task and round; the tasks take turns."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in tasks}
    for _ in range(options.rounds):
        for name, task in tasks.items():
            rounds[name].append(seconds_per_step(task, options))
    return rounds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, word in (("model", "catlip_vit_base_patch16_224"), ("device", "cpu"), ("precision", "fp32")):
        parser.add_argument(f"--{name}", default=word)
    for name, number in (
        ("batch-size", 8),
        ("steps", 2),
        ("rounds", 3),
        ("classes", 24_320),
        ("labels", 10),
        ("size", 224),
        ("text-width", 512),
        ("text-layers", 12),
    ):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--no-augment", dest="augment", action="store_false")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.fit:
        options.batch_size = largest_batch(options)
    rounds = measure_rounds({"CatLIP": catlip_task(options), "CLIP": clip_task(options)}, options)
    print(f"{options.model}, batch {options.batch_size}, {options.precision} on {options.device}")
    whole = {}
    for name, taken in rounds.items():
        parts = [statistics.median(part) for part in zip(*taken, strict=True)]
        sums = [sum(one) for one in taken]
        whole[name] = statistics.median(sums)
        said = ", ".join(f"{part} {t:.4f}" for part, t in zip(("forward", "backward", "optimizer"), parts, strict=True))
        print(f"{name:8} {whole[name]:8.4f} s/step ({min(sums):.4f} to {max(sums):.4f}): {said}")
    print(f"CLIP / CatLIP {whole['CLIP'] / whole['CatLIP']:.2f} (the paper: 2.7, of GPU hours per epoch)")
    for name, seconds in measure_parts(options).items():
        step = whole["CLIP" if name == "text tower" else "CatLIP"]
        print(f"{name}: {1e3 * seconds:.2f} ms, {100 * seconds / step:.2f} % of its step")


if __name__ == "__main__":
    main()
