#!/usr/bin/env python3
"""What cached soft labels cost and lose: a step beside a plain one and a live teacher's, and students of k labels.

    python tests/bench/soft_labels.py steps FOLDER [--batch 4] [--rounds 3]
    python tests/bench/soft_labels.py gap FOLDER [--seeds 2] [--steps 250] [--teacher-steps 1000]

FOLDER keeps what is made, so that a call goes on where another stopped. Both are on one thread and measure CPU seconds.
``steps``: Mini-DeiT-S by true labels, by cached ones and by a live RegNetY-16GF (random weights, 224 pixels): reading a
batch, forward and backward pass, in turns. ``gap``: 256 classes of drawn images of 32 pixels; a Mini-DeiT of four
blocks learns them, and is the teacher of the same model. Loss: that of a student of all labels on 512 training views,
against the live teacher's. Accuracy: on test images, of students that learnt from k labels for as many steps.
"""

import argparse
import io
import json
import statistics
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import exists
from shards_spec.soft_labels import format_of
from shards_spec.timm_classifiers import load_timm_classifier
from shards_spec.views import ViewSpec
from training.config import (
    LabelledImageConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SoftLabelConfig,
    ViewConfig,
)
from training.configs.minivit import DistillationConfig, MinivitConfig
from training.data.batches import first_batch
from training.export import to_timm
from training.export.config import ExportConfig
from training.losses.relations import soft_ce
from training.losses.soft_labels import target_cross_entropy
from training.models.classifier import new_classifier
from training.models.soft_targets import soft_targets
from training.recipes import minivit
from training.runs.student import load_run
from training.trainer import train

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black")
SHAPES = ("ball", "box", "cross", "ring")
TINY, SMALL = "timm:mini_deit_test", "timm:mini_deit_small_patch16_224"
LARGE = "timm:regnety_160"
VIEWS = ViewConfig(scale=(0.5, 1.0), flip=0.5)
KEPT = ("all", 100, 10, 1)
PER_CLASS = {"train": 4, "test": 2}  # images of `gap`
GROUNDS = ("gray", "navy", "olive", "teal", "pink", "brown", "orange", "purple")


def draw(shape: str, colour: str, ground: str, seed: int, size: int) -> bytes:
    """A JPEG of a shape at a place and of a size that the seed draws."""
    rng = np.random.default_rng([seed, size])
    image = Image.new("RGB", (size, size), ground)
    side = int(size * rng.uniform(0.4, 0.6))
    left, top = (int(place) for place in rng.integers(0, size - side, 2))
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(image)
    line = max(2, side // 5)
    if shape == "ball":
        pen.ellipse(box, colour)
    elif shape == "box":
        pen.rectangle(box, colour)
    elif shape == "ring":
        pen.ellipse(box, None, colour, line)
    else:
        pen.line(box, colour, line)
        pen.line((left, top + side, left + side, top), colour, line)
    noise = Image.effect_noise(image.size, 40).convert("RGB")
    file = io.BytesIO()
    Image.blend(image, noise, 0.25).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_images(folder: Path, grounds: tuple[str, ...], per_class: dict[str, int], size: int) -> str:
    """ROOTs train/ and test/ below the folder, train/ packed, of COLOURS x grounds x SHAPES."""
    for split, count in per_class.items():
        source, root = folder / "source" / split, str(folder / split)
        for shape, colour, ground in product(SHAPES, COLOURS, grounds):
            of_class = source / f"{colour}_{shape}_on_{ground}"
            of_class.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                seed = number if split == "train" else 1000 + number
                (of_class / f"{number}.jpg").write_bytes(draw(shape, colour, ground, seed, size))
        ingest(IngestConfig(root, (str(source),), format="classes", image_size=size, shard_size=256, workers=1))
    pack(PackConfig(str(folder / "train"), captioner=("none",), workers=1))
    return str(folder)


def recipe(data: str, model: str, **parts: object) -> MinivitConfig:
    """A run without mixing, of true labels unless ``parts`` say something else."""
    alone = DistillationConfig(teacher="none", label_weight=1.0, attention_weight=0.0, hidden_weight=0.0)
    given = {
        "data": LabelledImageConfig(data, batch_size=64, workers=0),
        "views": VIEWS,
        "mix": MixConfig(),
        "student": ModelConfig(model),
        "distillation": alone,
        "optim": OptimConfig(lr=3e-3, weight_decay=0.05, beta2=0.999, warmup=20, clip_norm=5.0),
        "run": RunConfig(device="cpu", precision="fp32"),
    }
    return MinivitConfig(**{**given, **parts})


def labels_alone(**fields: object) -> DistillationConfig:
    return DistillationConfig(attention_weight=0.0, hidden_weight=0.0, **fields)


def store(data: str, teacher: str, kept: int | str, views: int) -> str:
    """Name of a cache of the teacher's labels of the training images."""
    spec = ViewSpec(scale=VIEWS.scale, flip=VIEWS.flip)
    name = f"top-{kept}"
    cache(CacheConfig(f"{data}/train", teacher, name=name, views=views, spec=spec, device="cpu", soft_labels=kept))
    return name


def export(folder: Path, model: str, seed: int) -> str:
    """The name of an exported classifier with random weights, of 32 classes."""
    names = sorted(f"{colour}_{shape}_on_gray" for colour, shape in product(COLOURS, SHAPES))
    student = new_classifier(model, len(names), seed=seed)
    student.model.names = names
    to_timm.write(folder, student, ExportConfig("run", str(folder)))
    return f"timm:local-dir:{folder}"


def steps(folder: Path, batch: int, rounds: int) -> None:
    """Print CPU seconds of a step of the three."""
    data = str(folder)
    if not exists(f"{data}/train/shards/sizes.json"):
        make_images(folder, ("gray",), {"train": 1, "test": 1}, 256)
    name = store(data, export(folder / "small", TINY, 0), 10, 1)
    configs = {
        "true labels": recipe(data, SMALL),
        "cached labels": recipe(data, SMALL, soft=SoftLabelConfig(name), distillation=labels_alone()),
        "live teacher": recipe(data, SMALL, distillation=labels_alone(teacher=LARGE, teacher_weights="random")),
    }
    prepared = {what: minivit.prepare(config) for what, config in configs.items()}
    seconds: dict[str, list[float]] = {what: [] for what in prepared}
    for _ in range(rounds + 1):
        for what, (_, rows, task) in prepared.items():
            start = time.process_time()
            features = task.train()(task.draw(first_batch(rows, batch)))
            torch.stack([*task.losses(features, 0).values()]).sum().backward()
            task.zero_grad()
            seconds[what].append(time.process_time() - start)
    medians = {what: statistics.median(own[1:]) for what, own in seconds.items()}
    for what, own in medians.items():
        print(f"{what}: {own:.2f} s per step of {batch}, {own / medians['true labels']:.2f} times", flush=True)


def gap(folder: Path, seeds: int, count: int, teacher_steps: int) -> None:
    """Print what is lost with k labels, of ``seeds`` students of ``count`` steps."""
    data = str(folder)
    if not exists(f"{data}/train/shards/sizes.json"):
        make_images(folder, GROUNDS, PER_CLASS, 40)

    def run(out: str, seed: int, steps: int = count, **parts: object) -> str:
        config = RunConfig(str(folder / out), steps=steps, seed=seed, device="cpu", precision="fp32")
        return train("minivit", recipe(data, TINY, run=config, **parts))

    taught = load_run(run("teacher", 0, teacher_steps))[0]
    to_timm.write(folder / "exported", taught, ExportConfig(str(folder / "teacher"), str(folder / "exported")))
    teacher = f"timm:local-dir:{folder / 'exported'}"
    stored = {kept: SoftLabelConfig(store(data, teacher, kept, 4)) for kept in KEPT}
    rows = {kept: {"soft": own, "distillation": labels_alone()} for kept, own in stored.items()}
    accuracies = dict[int | str, list[float]]()
    for kept, own in rows.items():
        accuracies[kept] = [_accuracy(run(f"top-{kept}-{seed}", seed, **own)) for seed in range(1, seeds + 1)]
    true = [_accuracy(run(f"true-{seed}", seed)) for seed in range(1, seeds + 1)]
    print(f"teacher {100 * _accuracy(str(folder / 'teacher')):.1f}; true labels {_percent(true)}", flush=True)
    student = load_run(str(folder / "top-all-1"))[0].model.eval()
    live = load_timm_classifier(teacher).model
    for kept, soft in stored.items():
        prepared = minivit.prepare(recipe(data, TINY, soft=soft, distillation=labels_alone()))
        batch = first_batch(prepared.rows, 512)
        classes = taught.model.head.out_features
        with torch.no_grad():
            own, theirs = student(batch["images"]), live(batch["images"])
            expected = soft_ce(own, theirs)
            targets = soft_targets(batch, classes)
            loss = target_cross_entropy(own, targets)
            moved = (targets - theirs.softmax(1)).abs().sum(1).mean().item() / 2
        path = f"{data}/train/teacher/{soft.soft_labels}/00000.parquet"
        width = format_of(path, EmbeddingFile(path).meta).width
        print(
            f"{kept}: {width} bytes per view, loss {loss.mean() / expected.mean() - 1:+.2%} "
            f"(largest of a view {((loss - expected).abs() / expected).max():.2%}), probability moved {moved:.2%}, "
            f"accuracy {_percent(accuracies[kept])}",
            flush=True,
        )


def _accuracy(run: str) -> float:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    accuracy: float = [line["eval"]["acc1"] for line in lines if "eval" in line][-1]
    return accuracy


def _percent(values: list[float]) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "gap"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "steps":
        steps(options.folder, options.batch, options.rounds)
    else:
        gap(options.folder, options.seeds, options.steps, options.teacher_steps)


if __name__ == "__main__":
    main()
