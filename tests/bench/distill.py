#!/usr/bin/env python3
"""What a teacher costs a training step: (a) none, (b) read from its cache, (c) run beside the student; in one run.

    python tests/bench/distill.py [--student MobileCLIP-S0] [--teacher ViT-L-14] [--batch-size 16] [--steps 3]
                                  [--rounds 3] [--device cpu] [--precision fp32]

All three train the same student on the same shards through the reader with its worker: (a) the clip recipe's task, (b)
and (c) the TinyCLIP recipe's with the contrastive loss besides; (c) runs the teacher on the batch at its own size.
Weights are random (the time does not depend on them), the cache holds 10 views and 6 captions as wide as the teacher.
Prints seconds per step of the three (medians of turns one after the other), their ratios, what filling such a cache
costs per sample, and after how many epochs it has paid for itself.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reader import CAPTIONS, SCALE, VIEWS, write_dataset
from torch import Tensor, nn

from shards_spec.models import LoadedModel, load_model
from training.config import DataConfig, EnsembleConfig, ModelConfig, OptimConfig, TeacherCacheConfig, ViewConfig
from training.configs.teaching import ClipKdConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import open_samples
from training.engine.optim import build_optimizer
from training.models.teacher import FrozenTeacher, TeacherEnsemble
from training.recipes import clip, tinyclip
from training.recipes.clip_kd import ClipKd
from training.runs.student import new_student


class Live(nn.Module):
    """The TinyCLIP task whose teacher embeds each batch; the images are resized to its size on the device."""

    def __init__(self, task: tinyclip.TinyclipTask, teacher: LoadedModel) -> None:
        super().__init__()
        self.task, self.teacher = task, teacher

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the task's features, the teacher's computed here."""
        with torch.no_grad():
            size = self.teacher.image_size
            images = F.interpolate(batch["images"], (size, size), mode="bicubic", antialias=True)
            image = self.teacher.model.encode_image(images, normalize=True)
            text = self.teacher.model.encode_text(batch["tokens"], normalize=True)
        features: dict[str, Tensor] = self.task({**batch, "teacher_image": image, "teacher_text": text})
        return features

    def losses(self, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The task's."""
        return self.task.losses(features, step)


def seconds_per_step(task: Any, batches: Iterator[dict[str, Any]], options: argparse.Namespace) -> float:
    """Mean over the steps after the first one; reading included."""
    optimizer = build_optimizer(task, OptimConfig())
    start = 0.0
    for step in range(options.steps + 1):
        batch = next(batches)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            features = task(batch)
            loss = torch.stack(list(task.losses(features, step).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        start = start or time.perf_counter()
    return (time.perf_counter() - start) / options.steps


@torch.no_grad()
def seconds_to_embed(teacher: LoadedModel, options: argparse.Namespace) -> tuple[float, float]:
    """Of an image and of a text, in batches of the size of the steps."""
    number = options.batch_size
    size = teacher.image_size
    taken = []
    images = torch.randn(number, 3, size, size, device=options.device)
    tokens = teacher.tokenizer(["a photo of things beside each other on a beach"] * number).to(options.device)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: teacher.model.encode_image(images),
        lambda: teacher.model.encode_text(tokens),
    )
    with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
        for call in calls:
            call().sum().item()
            start = time.perf_counter()
            for _ in range(2):
                call().sum().item()
            taken.append((time.perf_counter() - start) / 2 / number)
    return taken[0], taken[1]


@dataclass(frozen=True)
class Costs:
    """Seconds per step by case and turn, and seconds that the teacher takes for an image and for a text."""

    taken: dict[str, list[float]]
    image: float
    text: float
    batch_size: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Cached teacher to none, live teacher to cached: medians of the turns."""
        turns = [[b / a, c / b] for a, b, c in zip(*self.taken.values(), strict=True)]
        cached, live = (statistics.median(turn) for turn in zip(*turns, strict=True))
        return cached, live

    @property
    def filling(self) -> float:
        """Seconds that a sample of the cache costs the teacher."""
        return VIEWS * self.image + CAPTIONS * self.text

    @property
    def saved(self) -> float:
        """Seconds that the cache saves a sample in each epoch."""
        _, cached, live = (statistics.median(values) for values in self.taken.values())
        return (live - cached) / self.batch_size

    @property
    def epochs(self) -> float:
        """Epochs after which the cache has paid for itself; inf where a live teacher was no slower."""
        return self.filling / self.saved if self.saved > 0 else math.inf


def measure(root: str, options: argparse.Namespace) -> Costs:
    """Measure the three cases by turns on a dataset of `write_dataset`, and the teacher alone."""
    teacher = load_model(options.teacher, device=options.device, random_weights=True)
    student = new_student(ModelConfig(options.student), 0)
    student.model.to(options.device).train()

    def batches(views: ViewConfig | TeacherCacheConfig) -> Iterator[dict[str, Any]]:
        samples = open_samples(DataConfig(data=root), views, student, 0)
        positions = batch_positions(0, 10**6, options.batch_size)
        return load_batches(samples, positions, workers=options.workers, device=options.device)

    drawn, cached = ViewConfig(scale=SCALE), TeacherCacheConfig(("wide",))
    weights = {"affinity": 1.0, "feature": 0.0, "contrastive": 1.0}
    width = student.config["embed_dim"]
    wide = TeacherEnsemble([FrozenTeacher("wide", width=width, logit_scale=100.0)], EnsembleConfig())
    clip_kd = ClipKd(ClipKdConfig(), width, wide, compares=False)
    taught = tinyclip.TinyclipTask(student.model, weights, None, clip_kd)
    cases: dict[str, tuple[Any, ViewConfig | TeacherCacheConfig]] = {
        "(a) no teacher": (clip.ClipTask(student.model), drawn),
        "(b) cached teacher": (taught, cached),
        "(c) live teacher": (Live(taught, teacher), drawn),
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (task, views) in cases.items():
            taken[name].append(seconds_per_step(task, batches(views), options))
    return Costs(taken, *seconds_to_embed(teacher, options), options.batch_size)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("student", "MobileCLIP-S0"),
        ("teacher", "ViT-L-14"),
        ("device", "cpu"),
        ("precision", "fp32"),
    ):
        parser.add_argument(f"--{name}", default=value)
    for name, number in (("batch-size", 16), ("steps", 3), ("rounds", 3), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    with tempfile.TemporaryDirectory() as root:
        write_dataset(root, max(256, options.batch_size), 2)
        costs = measure(root, options)
    for name, values in costs.taken.items():
        print(f"{name:20} {statistics.median(values):8.3f} s/step  ({min(values):.3f} to {max(values):.3f})")
    cached_ratio, live_ratio = costs.ratios
    print(f"(b)/(a) {cached_ratio:.3f}; (c)/(b) {live_ratio:.2f}: medians of {options.rounds} turns")
    print(f"an image costs the teacher {1e3 * costs.image:.1f} ms, a text {1e3 * costs.text:.1f} ms")
    print(
        f"a cache of {VIEWS} views and {CAPTIONS} texts costs {costs.filling:.3f} s a sample, an epoch saves "
        f"{costs.saved:.3f} s"
    )
    print(f"it has paid for itself after {costs.epochs:.1f} epochs (inf: never), and serves any number of students")


if __name__ == "__main__":
    main()
