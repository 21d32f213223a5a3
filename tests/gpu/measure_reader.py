"""Whether the reader keeps up with the card: the share of a step in which the card waits for it, by workers.

ViT-M-32 is taught from a cache, batch 1024 in bf16, on shards of JPEGs with a shorter side of 256 pixels. The share is
what a step takes longer than one on a batch that is held. Then what a cached teacher costs a step beside a live one, by
tests/bench/distill.py.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import distill
import numpy as np
from figures import Options, figure, options, run_parts, seconds_of, synchronize
from photos import small_photo
from PIL import Image
from reader import write_dataset

from training.config import ModelConfig, TeacherCacheConfig
from training.configs import default_config
from training.data.batches import load_batches
from training.engine.distributed import Ranks
from training.engine.updater import Updater
from training.recipes import tinyclip
from training.task import Prepared

PHOTOS = 64  # different ones; a dataset repeats them, since making one takes as long as reading it twenty times
TOTAL = 10**6  # steps of the run that these would be the first of
STEPS = 12
SECONDS = 2.0  # of a measurement, after which it stops with fewer steps


@lru_cache(maxsize=PHOTOS)
def one_of_few(number: int) -> bytes:
    """A photo of `PHOTOS`."""
    return small_photo(number)


def repeated_photo(number: int) -> bytes:
    """The JPEG of a sample."""
    return one_of_few(number % PHOTOS)


def tiny_image(number: int) -> bytes:
    """The JPEG of a sample of a dry run."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def dataset(where: Options) -> str:
    """ROOT of shards with a cache of 10 views and 6 captions, made once."""
    root = where.work / "reader"
    if not Path(root, "shards", "sizes.json").exists():
        if where.dry:
            write_dataset(str(root), 32, 2, tiny_image)
        else:
            write_dataset(str(root), 16_384, 16, repeated_photo)
    return str(root)


class Training:
    """The TinyCLIP recipe on a dataset, from batches that come to the device."""

    def __init__(self, root: str, where: Options) -> None:
        self.where = where
        config = default_config("tinyclip")
        config = replace(
            config,
            data=replace(config.data, data=root, batch_size=4 if where.dry else 1024),
            cached_views=TeacherCacheConfig(("wide",)),
            student=ModelConfig("MobileCLIP-tiny" if where.dry else "ViT-M-32"),
            run=replace(config.run, precision="bf16"),
        )
        self.batch_size = config.data.batch_size
        prepared: Prepared = tinyclip.prepare(config)
        self.rows = prepared.rows
        self.updater = Updater(
            prepared.task.to(where.device).train(), config, TOTAL, ranks=Ranks(), device=where.device
        )
        self.steps = iter(range(TOTAL))

    def batches(self, workers: int) -> Iterator[dict[str, Any]]:
        """What the trainer reads."""
        positions = self.rows.plan.positions(0, 0, TOTAL)
        return load_batches(self.rows, positions, workers=workers, device=self.where.device)

    def step(self, batch: dict[str, Any]) -> None:
        """Take a step."""
        self.updater.update(batch, next(self.steps), [len(batch["keys"])])

    def held_seconds(self, batch: dict[str, Any]) -> float:
        """Seconds of a step without reading."""
        repeat = 1 if self.where.dry else STEPS
        return seconds_of(
            lambda: self.step(batch), self.where.device, repeat=repeat, warm_up=1 if self.where.dry else 3
        )

    def seconds(self, batches: Iterator[dict[str, Any]], then: Callable[[dict[str, Any]], None]) -> tuple[float, float]:
        """Mean seconds per batch that is read and given to ``then``, and of these the seconds in the reader."""
        synchronize(self.where.device)
        start = time.perf_counter()
        end, inside, number = start, 0.0, 0
        steps, least, limit = (1, 1, 0.0) if self.where.dry else (STEPS, 2, SECONDS)
        while number < steps and (number < least or end - start < limit):
            before = time.perf_counter()
            batch = next(batches)
            inside += time.perf_counter() - before
            then(batch)
            end = time.perf_counter()
            number += 1
        synchronize(self.where.device)
        return (time.perf_counter() - start) / number, inside / number


def measure_workers(training: Training, workers: int, held: float) -> None:
    """Report the reader alone, and training from it, with a number of workers."""
    batches = training.batches(workers)
    next(batches)  # the start of the processes
    alone, _ = training.seconds(batches, lambda batch: None)
    training.step(next(batches))
    step, inside = training.seconds(batches, training.step)
    word = "worker" if workers == 1 else "workers"
    rate = training.batch_size / alone
    figure(f"reader: {workers} {word}, reading alone", rate, "samples/s", **{"per worker": rate / workers})
    figure(
        f"reader: {workers} {word}, share of a step that the card waits",
        max(0.0, 1 - held / step),
        "of a step",
        **{"samples/s": training.batch_size / step, "inside the reader": inside / step},
    )


def measure_teachers(root: str, where: Options) -> None:
    """Report a cached teacher against a live one."""
    full = ["--batch-size", "256", "--steps", "6", "--rounds", "2", "--workers", "16"]
    tiny = ["--student", "MobileCLIP-tiny", "--teacher", "MobileCLIP-tiny", "--batch-size", "4", "--steps", "1"]
    sizes = [*tiny, "--rounds", "1", "--workers", "0"] if where.dry else full
    chosen = distill.parse([*sizes, "--device", where.device, "--precision", "bf16"])
    costs = distill.measure(root, chosen)
    cached, live = costs.ratios
    rates = {name[4:]: chosen.batch_size / statistics.median(taken) for name, taken in costs.taken.items()}
    said = {f"{name}, samples/s": rate for name, rate in rates.items()}
    names = f"{chosen.student} taught by {chosen.teacher}, batch {chosen.batch_size} bf16"
    figure(f"teacher: {names}: live over cached", live, "x", **{"cached over none": cached}, **said)
    if math.isinf(costs.epochs):  # possible by chance at the tiny sizes of a dry run
        print("the cached teacher's steps were not faster: its cache never pays")
        return
    filling = {"ms a sample": 1e3 * costs.filling}
    figure("teacher: epochs after which its cache has paid", costs.epochs, "epochs", **filling)


def main() -> int:
    """Measure and report; the fewest workers last, for they take longest."""
    where = options(__doc__)
    start = time.perf_counter()
    root = dataset(where)
    figure("reader: making the dataset", time.perf_counter() - start, "s")
    training = Training(root, where)
    held = training.held_seconds(next(training.batches(1 if where.dry else 16)))
    figure("reader: a step on a batch that is held", 1e3 * held, "ms")
    many, few = ((1,), ()) if where.dry else ((16, 8, 4), (2, 1))
    return run_parts(
        *(partial(measure_workers, training, workers, held) for workers in many),
        partial(measure_teachers, root, where),
        *(partial(measure_workers, training, workers, held) for workers in few),
    )


if __name__ == "__main__":
    sys.exit(main())
