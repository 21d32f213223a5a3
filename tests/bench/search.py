#!/usr/bin/env python3
"""Indexing and searching images against the plain loop and a bare matrix product, in one run.

    python tests/bench/search.py [--model ViT-B-32] [--photos 192] [--rounds 3] [--vectors 1000000] [--dim 512]

Indexing: the rival is what a script does with open_clip: ``Image.open``, the model's transform, batches of 32 through
``encode_image``, one after the other. Ours is `clipmill search` on the same files from nothing to the index on disk,
with the model in its form for inference, as the command loads it. They take turns; weights are random, photos have
sides of 300 to 1,300 pixels.

Searching: `FeatureIndex.search` over files on disk (in the page cache) against numpy's ``features @ query`` and
``argpartition`` of the same vectors in one array in memory, for 1 and 16 queries.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from photos import write_photos
from PIL import Image

from pipeline.search.config import SearchConfig
from pipeline.search.index import FILE_ROWS, FeatureIndex
from pipeline.search.stage import INDEX, search
from shards_spec.models import load_model, weights_sha256
from training.evaluation.cost import inference_form
from training.evaluation.features import EmbeddingModel

RIVAL_BATCH = 32
TOP = 10


@torch.no_grad()
def plain_loop(model: torch.nn.Module, preprocess, paths: list[Path]) -> tuple[float, float]:
    """Seconds, and those of all cores, of the loop of open_clip's README over files."""
    start = time.perf_counter()
    cpu = time.process_time()
    features = []
    for first in range(0, len(paths), RIVAL_BATCH):
        images = torch.stack([preprocess(Image.open(path)) for path in paths[first : first + RIVAL_BATCH]])
        found = model.encode_image(images)
        features.append(found / found.norm(dim=-1, keepdim=True))
    torch.cat(features)
    return time.perf_counter() - start, time.process_time() - cpu


def index_files(model: EmbeddingModel, folder: Path) -> tuple[float, float]:
    """Seconds, and those of all cores, of a first `clipmill search` of a folder, the model being loaded."""
    shutil.rmtree(folder / INDEX, ignore_errors=True)
    start = time.perf_counter()
    cpu = time.process_time()
    search(SearchConfig("model", images=str(folder)), model)
    return time.perf_counter() - start, time.process_time() - cpu


def compare_indexing(options: argparse.Namespace, folder: Path) -> None:
    """Print images/s of both, and the median of their ratios."""
    loaded = load_model(options.model, random_weights=True)
    merged = replace(loaded, model=inference_form(loaded.model))
    model = EmbeddingModel(
        merged, name="bench", weights=weights_sha256(loaded.model), device="cpu", bf16=False, batch_size=options.batch
    )
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(loaded.model)), is_train=False
    )
    paths = sorted(folder.glob("*.jpg"))
    plain_loop(loaded.model, preprocess, paths[:RIVAL_BATCH])
    plain, own = [], []
    for turn in range(options.rounds):
        runs = [
            lambda: plain.append(plain_loop(loaded.model, preprocess, paths)),
            lambda: own.append(index_files(model, folder)),
        ]
        for run in runs[:: -1 if turn % 2 else 1]:
            run()
    ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(plain, own, strict=True))
    rates = [len(paths) / statistics.median(wall for wall, _ in seconds) for seconds in (plain, own)]
    cpu = [1000 * statistics.median(cpu for _, cpu in seconds) / len(paths) for seconds in (plain, own)]
    print(
        f"index {len(paths)} photos with {options.model}: plain loop {rates[0]:.1f}, clipmill search {rates[1]:.1f} "
        f"images/s, {ratio:.2f} times; {cpu[0]:.0f} and {cpu[1]:.0f} ms of CPU per image"
    )


def write_index(folder: str, features: np.ndarray) -> FeatureIndex:
    """An index of vectors, in files of the usual size."""
    index = FeatureIndex(folder, {})
    for start in range(0, len(features), FILE_ROWS):
        part = features[start : start + FILE_ROWS]
        ids = np.arange(start + 1, start + 1 + len(part), dtype=np.uint64)
        index.add([f"images/{number:09d}.jpg" for number in ids], ids, part)
    opened = FeatureIndex(folder, {})
    opened.keep_all()
    return opened


def bare_product(features: np.ndarray, queries: np.ndarray) -> float:
    """Seconds of the product with all vectors, and of the best rows of each query."""
    start = time.perf_counter()
    scores = features @ queries.T
    for column in scores.T:
        best = np.argpartition(-column, TOP)[:TOP]
        best[np.argsort(-column[best])]
    return time.perf_counter() - start


def compare_searching(options: argparse.Namespace, folder: str) -> None:
    """Print milliseconds of both for 1 and 16 queries."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((options.vectors, options.dim), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = write_index(folder, features)
    for number in (1, 16):
        queries = features[rng.integers(0, options.vectors, number)]
        index.search(queries, TOP)
        rounds = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            hits = index.search(queries, TOP)
            rounds.append((bare_product(features, queries), time.perf_counter() - start))
        assert all(found[0].score > 0.999 for found in hits)
        bare, own = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
        print(
            f"search {options.vectors:,} x {options.dim} for {number}: numpy in memory {1000 * bare:.0f} ms, index on "
            f"disk {1000 * own:.0f} ms, {statistics.median(ours / theirs for theirs, ours in rounds):.2f} times"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--photos", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        if options.photos:
            folder = Path(work, "photos")
            write_photos(folder, options.photos)
            compare_indexing(options, folder)
        if options.vectors:
            compare_searching(options, str(Path(work, "index")))


if __name__ == "__main__":
    main()
