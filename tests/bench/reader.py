#!/usr/bin/env python3
"""The training reader against a plain webdataset + torchvision pipeline, in one run: same shards, crops, tokens.

    python tests/bench/reader.py [--samples 2000] [--batch-size 256] [--workers 2] [--size 224] [--rounds 5]

The rival is what open_clip trains with: webdataset's shuffle and decode, torchvision's RandomResizedCrop, ToTensor and
Normalize, open_clip's tokenizer, batches made in the workers. Both end as normalised float32 batches in the main
process. Images have a shorter side of 256. Prints samples per second of both and their ratio (medians of turns taken
one after the other), the ratio of their CPU time without workers, what joining 10 views and 6 captions of a ViT-L/14
teacher costs, by rates and by CPU time of one process (other work on the machine counts less in it), what a second
teacher costs beside it, the time to the first batch, the time to the first batch from the middle of an epoch of 10,000
shards, and the memory of a worker over them.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision.transforms as T
import webdataset as wds
from photos import small_photo

from shards_spec.embeddings import encode_vectors, id_column, write_vectors
from shards_spec.files import json_bytes, sha256_file, write_json
from shards_spec.manifest import Done
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from shards_spec.views import ViewSpec
from training.config import DataConfig, TeacherCacheConfig, ViewConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import open_samples

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
VIEWS = 10
CAPTIONS = 6
DIM = 768
TEACHERS = ("wide", "other")
SCALE = (0.9, 1.0)


def caption(number: int, turn: int) -> str:
    """What CC12M's alternative texts are like in length."""
    return f"a photo of thing number {number} as seen {turn} times on a beach beside some large rocks"


def write_shard_and_cache(
    shard: int, root: str, per_shard: int, make: Callable[[int], bytes], teachers: tuple[str, ...]
) -> None:
    """ROOT/shards/NNNNN.tar as `pack` leaves it, and a file in ROOT/teacher/NAME of each teacher as `cache` does."""
    samples = []
    for index in range(per_shard):
        number = shard * per_shard + index
        texts = {f"syn_{turn - 1}": caption(number, turn) for turn in range(1, CAPTIONS)}
        members = {"jpg": make(number), "txt": caption(number, 0).encode(), "json": json_bytes(texts)}
        samples.append(Sample(f"{shard:05d}{index:04d}", members))
    path = f"shards/{shard:05d}.tar"
    count, digest = write_shard(f"{root}/{path}", samples)
    Done("pack", shard, {}, {"success": count}, {}, {path: digest}).write(f"{root}/shards")
    for number, name in enumerate(teachers):
        write_cache(root, name, shard, [sample.key for sample in samples], {path: digest}, number)


def write_cache(root: str, name: str, shard: int, keys: list[str], inputs: dict[str, str], seed: int) -> None:
    """ROOT/teacher/NAME/NNNNN.parquet."""
    count = len(keys)
    spec, draw = ViewSpec(seed=0, scale=SCALE, flip=0.0), np.random.default_rng([shard, seed])
    meta = {
        "model": name,
        "pretrained": None,
        "weights_sha256": "0",
        "logit_scale": 100.0,
        "views": spec.as_json(),
        "views_sha256": spec.sha256,
        "num_views": VIEWS,
        "num_captions": CAPTIONS,
    }
    columns = [*(f"image_{view}" for view in range(VIEWS)), *(f"text_{turn}" for turn in range(CAPTIONS))]
    rows = {column: encode_vectors(draw.normal(size=(count, DIM)), "float16") for column in columns}
    ids = {id_column(column): np.arange(1, count + 1, dtype=np.uint64) for column in columns}
    file = f"teacher/{name}/{shard:05d}.parquet"
    write_vectors(f"{root}/{file}", keys, rows, ids, meta)
    done = Done(f"cache/{name}", shard, meta, {"success": count}, inputs, {file: sha256_file(f"{root}/{file}")})
    done.write(f"{root}/teacher/{name}")


def write_dataset(
    root: str,
    samples: int,
    shards: int,
    make: Callable[[int], bytes] = small_photo,
    teachers: tuple[str, ...] = TEACHERS[:1],
) -> None:
    """ROOT of ``shards`` shards; ``make`` gives the JPEG of a number."""
    write = partial(write_shard_and_cache, root=root, per_shard=samples // shards, make=make, teachers=teachers)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write, range(shards)))
    write_json(f"{root}/shards/sizes.json", {f"{shard:05d}.tar": samples // shards for shard in range(shards)})


def repeat_dataset(source: str, root: str, shards: int, there: int, per_shard: int) -> None:
    """ROOT of ``shards`` shards that are links to the few of ``source``; their records are written out."""
    Path(root, "shards").mkdir(parents=True)
    for shard in range(shards):
        path, original = f"shards/{shard:05d}.tar", f"{source}/shards/{shard % there:05d}.tar"
        os.symlink(original, f"{root}/{path}")
        Done("pack", shard, {}, {"success": per_shard}, {}, {path: "0"}).write(f"{root}/shards")
    write_json(f"{root}/shards/sizes.json", {f"{shard:05d}.tar": per_shard for shard in range(shards)})


def plain(root: str, shards: int, options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Read by webdataset and torchvision, as open_clip's training loop combines them."""
    crop = T.RandomResizedCrop(options.size, SCALE, interpolation=T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, T.ToTensor(), T.Normalize(MEAN, STD)])
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    dataset = (
        wds.WebDataset(
            [f"{root}/shards/{shard:05d}.tar" for shard in range(shards)],
            shardshuffle=shards,
            workersplitter=wds.split_by_worker,
        )
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(options.batch_size, partial=False)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=options.workers))


def ours(
    root: str, views: ViewConfig | TeacherCacheConfig, captions: Any, options: argparse.Namespace, start: int = 0
) -> Iterator[dict[str, Any]]:
    """The reader as `clipmill train` opens it."""
    student = LoadedModel(None, open_clip.get_tokenizer("ViT-B-32"), {}, options.size, MEAN, STD)
    samples = open_samples(DataConfig(data=root, captions=captions), views, student, 0)
    return load_batches(samples, batch_positions(start, 10**6, options.batch_size), workers=options.workers)


def rate(batches: Iterator[Any], number: int, batch_size: int) -> float:
    """Samples per second after the first batch, so that the start of processes is not in it."""
    next(batches)
    start = time.perf_counter()
    for _ in islice(batches, number):
        pass
    return number * batch_size / (time.perf_counter() - start)


def cpu_against_plain(root: str, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of CPU time a sample of the rival and of the reader, all in this process; by turns, medians."""
    alone = argparse.Namespace(**{**vars(options), "workers": 0})
    number = max(2, options.samples // options.batch_size - 2)
    used: dict[str, list[float]] = {"plain": [], "clipmill": []}
    for _ in range(options.rounds):
        for name, batches in (
            ("plain", plain(root, options.shards, alone)),
            ("clipmill", ours(root, ViewConfig(scale=SCALE), "original", alone)),
        ):
            next(batches)
            start = time.process_time()
            for _ in islice(batches, number):
                pass
            used[name].append(1000 * (time.process_time() - start) / (number * options.batch_size))
    return {name: statistics.median(values) for name, values in used.items()}


def seconds_to_first(make: Callable[[], Iterator[Any]]) -> float:
    """From opening the dataset to its first batch."""
    start = time.perf_counter()
    next(make())
    return time.perf_counter() - start


def memory_over(root: str, shards: int, options: argparse.Namespace) -> list[float]:
    """MiB that one process has taken after each tenth of the shards, when it reads a few samples of every one."""
    student = LoadedModel(None, open_clip.get_tokenizer("ViT-B-32"), {}, options.size, MEAN, STD)
    samples = open_samples(DataConfig(data=root), ViewConfig(scale=SCALE), student, 0)
    step, taken = max(1, samples.order.total // (4 * shards)), []
    for tenth in range(10):
        for position in range(tenth * samples.order.total // 10, (tenth + 1) * samples.order.total // 10, step):
            place = samples.order.locate(position)
            samples.reader.sample(place.shard, place.index)
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return taken


def measure_rates(root: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples per second of the rival, of the reader, and of the reader with a cache; by turns."""
    number = max(2, options.samples // options.batch_size - options.workers - 1)
    drawn, cached = ViewConfig(scale=SCALE), TeacherCacheConfig(TEACHERS[:1])
    rates = dict[str, list[float]]()
    for _ in range(options.rounds):
        for name, batches in (
            ("webdataset + torchvision", lambda: plain(root, options.shards, options)),
            ("clipmill", lambda: ours(root, drawn, "original", options)),
            ("clipmill, cache joined", lambda: ours(root, cached, "all", options)),
        ):
            rates.setdefault(name, []).append(rate(batches(), number, options.batch_size))
    return rates


def measure_cpu(root: str, options: argparse.Namespace) -> list[list[float]]:
    """CPU seconds a sample of one process that reads no teacher's cache, one's, and two; batches by turns."""
    number, alone = 64, argparse.Namespace(**{**vars(options), "workers": 0, "batch_size": 64})
    readers = [ours(root, ViewConfig(scale=SCALE), "original", alone)]
    readers += [ours(root, TeacherCacheConfig(TEACHERS[:count]), "all", alone) for count in (1, 2)]
    taken: list[list[float]] = [[], [], []]
    for turn in range(options.rounds * options.samples // number):
        for batches, own in zip(readers, taken, strict=True):
            start = time.process_time()
            next(batches)
            if turn >= options.samples // number:  # all shards are open
                own.append((time.process_time() - start) / number)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("samples", 2000),
        ("shards", 4),
        ("batch-size", 256),
        ("workers", 2),
        ("size", 224),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the rest of the cores belong to the workers
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/few"
        write_dataset(root, options.samples, options.shards, teachers=TEACHERS)
        rates = measure_rates(root, options)
        middle = {name: statistics.median(values) for name, values in rates.items()}
        for name, values in rates.items():
            print(f"{name:26} {middle[name]:7.0f} samples/s  ({min(values):.0f} to {max(values):.0f})")
        turns = [(own / rival, 1 - joined / own) for rival, own, joined in zip(*rates.values(), strict=True)]
        ratio, cost = (statistics.median(turn) for turn in zip(*turns, strict=True))
        print(f"ratio to the plain pipeline {ratio:.2f}; joining views and captions costs {cost:.1%}: medians of turns")
        plain_ms, own_ms = cpu_against_plain(root, options).values()
        print(f"CPU time of one process {own_ms:.2f} against {plain_ms:.2f} ms a sample, ratio {plain_ms / own_ms:.2f}")
        taken = measure_cpu(root, options)
        took = ", ".join(f"{statistics.median(own) * 1e6:.0f}" for own in taken)
        shares = [statistics.median(1 - a / b for a, b in zip(*pair, strict=True)) for pair in pairwise(taken)]
        print(f"CPU time with no, one and two teachers {took} us a sample")
        print(f"of the rate the first costs {shares[0]:.1%}, the second {shares[1]:.1%}")
        drawn, cached = ViewConfig(scale=SCALE), TeacherCacheConfig(TEACHERS[:1])
        first = [seconds_to_first(lambda: ours(root, cached, "all", options)) for _ in range(3)]
        print(f"first batch of {options.batch_size} after {statistics.median(first):.2f} s")
        many = f"{folder}/many"
        per_shard = options.samples // options.shards
        repeat_dataset(root, many, 10_000, options.shards, per_shard)
        half = 5_000 * per_shard // options.batch_size * options.batch_size
        resumed = [seconds_to_first(lambda: ours(many, drawn, "original", options, half)) for _ in range(3)]
        print(f"first batch from the middle of 10,000 shards after {statistics.median(resumed):.2f} s")
        with ProcessPoolExecutor(1) as pool:
            held = pool.submit(memory_over, many, 10_000, options).result()
        print("MiB after each tenth of 10,000 shards:", " ".join(f"{value:.0f}" for value in held))


if __name__ == "__main__":
    main()
