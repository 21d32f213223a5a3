#!/usr/bin/env python3
"""Filling a teacher cache against the plain loop, in one run: the same images, views, captions and teacher.

    python tests/bench/cache.py [--model ViT-B-32] [--samples 64] [--views 10] [--captions 5] [--ops 2] [--processes 2]

The rival does what a script does: per sample decode, K times torchvision's RandomResizedCrop, flip and RandAugment,
normalise, the teacher on these K images and on the texts, one npz at the end. Ours is `clipmill cache`. Weights are
random (the time does not depend on them), images have a shorter side of 256. Prints the seconds of both, their ratio,
the share of time that the device waited, milliseconds per view on one core of both, and how far apart rows are when
the forward passes have other numbers of rows.
"""

import argparse
import io
import tempfile
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import open_clip
import torch
import torchvision.transforms as T
from photos import photo
from PIL import Image

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.cache.teacher import CPU_ROWS, Teacher
from shards_spec.files import json_bytes, write_json
from shards_spec.images import decode_rgb
from shards_spec.manifest import Done, write_stage
from shards_spec.models import LoadedModel, load_model
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from shards_spec.views import ViewSpec, render_views


def small_photo(seed: int) -> bytes:
    """A photo as `ingest` leaves it: shorter side 256."""
    image = Image.open(io.BytesIO(photo(seed)))
    scale, file = 256 / min(image.size), io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=95
    )
    return file.getvalue()


def write_dataset(root: str, samples: int, captions: int, shards: int = 2) -> None:
    """ROOT/shards of ``shards`` shards as `pack` leaves them."""
    for shard in range(shards):
        own = []
        for index in range(samples // shards):
            texts = {f"syn_{i}": f"a photo of thing {index} seen {i} times" for i in range(captions)}
            members = {"jpg": small_photo(shard * samples + index), "txt": b"a photo", "json": json_bytes(texts)}
            own.append(Sample(f"{shard:05d}{index:04d}", members))
        path = f"shards/{shard:05d}.tar"
        count, digest = write_shard(f"{root}/{path}", own)
        Done("pack", shard, {}, {"success": count}, {}, {path: digest}).write(f"{root}/shards")
    write_json(f"{root}/shards/sizes.json", {f"{shard:05d}.tar": samples // shards for shard in range(shards)})
    write_stage(root, "pack", {"config": {}, "shards": shards, "counts": {}})


@torch.no_grad()
def plain_loop(root: str, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """One sample after the other, torchvision's transforms, no work ahead."""
    device = next(loaded.model.parameters()).device
    transform = T.Compose(
        [
            T.RandomResizedCrop(loaded.image_size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            *([T.RandAugment(options.ops, 9)] if options.ops else []),
            T.ToTensor(),
            T.Normalize(loaded.mean, loaded.std),
        ]
    )
    rows = {}
    for path in sorted(Path(root, "shards").glob("*.tar")):
        for sample in read_shard(str(path)):
            image = Image.open(io.BytesIO(sample.image)).convert("RGB")
            pixels = torch.stack([transform(image) for _ in range(options.views)]).to(device)
            rows[f"{sample.key}_image"] = loaded.model.encode_image(pixels, normalize=True).half().cpu().numpy()
            tokens = loaded.tokenizer(sample.captions).to(device)
            rows[f"{sample.key}_text"] = loaded.model.encode_text(tokens, normalize=True).half().cpu().numpy()
    np.savez(f"{root}/rows.npz", **rows)


def rendering_times(root: str, size: int, options: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds per view on one core: ours, torchvision's; decoding counted once per sample in both."""
    shards = sorted(Path(root, "shards").glob("*.tar"))
    samples = list(islice(chain.from_iterable(read_shard(str(path)) for path in shards), 20))
    spec = ViewSpec(ops=options.ops)
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            *([T.RandAugment(options.ops, 9)] if options.ops else []),
        ]
    )
    start = time.process_time()
    for sample in samples:
        render_views(decode_rgb(sample.image), spec, sample.key, range(options.views), size)
    ours, start = time.process_time() - start, time.process_time()
    for sample in samples:
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        for _ in range(options.views):
            np.asarray(transform(image))
    theirs = time.process_time() - start
    return tuple(1e3 * seconds / len(samples) / options.views for seconds in (ours, theirs))


def batch_effect(loaded: LoadedModel) -> str:
    """How rows differ between passes of 1, 4, … rows and of the stage's 16, stored as float16."""
    images = list(np.random.default_rng(0).integers(0, 256, (CPU_ROWS, *[loaded.image_size] * 2, 3), np.uint8))
    expected, said = Teacher(loaded).embed_images(images), []
    for rows in (1, 4, 8, 32):
        teacher = Teacher(loaded)
        teacher.rows = rows
        found = teacher.embed_images(images)
        equal = (found.astype(np.float16) == expected.astype(np.float16)).all(axis=1).mean()
        said.append(
            f"{rows} rows: {100 * equal:.0f} % of float16 rows equal, at most {np.abs(found - expected).max():.0e}"
        )
    return "; ".join(said)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--captions", type=int, default=5, help="synthetic ones per image")
    parser.add_argument("--ops", type=int, default=2, help="RandAugment operations per view")
    parser.add_argument("--processes", type=int, default=None, help="that render; the stage's own default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        torch.manual_seed(0)
        torch.save(open_clip.create_model(options.model).state_dict(), f"{root}/teacher.pt")
        write_dataset(root, options.samples, options.captions)
        loaded = load_model(options.model, f"{root}/teacher.pt", device=options.device)
        ours, theirs = rendering_times(root, loaded.image_size, options)
        print(f"rendering on one core: {ours:.2f} ms a view, torchvision {theirs:.2f}")
        plain_loop(root, loaded, argparse.Namespace(**{**vars(options), "views": 1}))  # warm up
        start = time.perf_counter()
        plain_loop(root, loaded, options)
        plain = time.perf_counter() - start
        config = CacheConfig(
            root,
            options.model,
            f"{root}/teacher.pt",
            name="t",
            views=options.views,
            spec=ViewSpec(ops=options.ops),
            device=options.device,
            precision=options.precision,
            processes=options.processes,
        )
        summary = cache(config)
        waited = 100 * summary.measurements["waited_s"] / summary.measurements["embedding_s"]
        print(
            f"{options.model} on {options.device}, {options.samples} samples x {options.views} views x "
            f"{options.captions + 1} texts: plain {plain:.1f} s, cache {summary.seconds:.1f} s, ratio "
            f"{plain / summary.seconds:.2f}, the device waited {waited:.1f} %"
        )
        if options.device == "cpu":
            print(batch_effect(loaded))


if __name__ == "__main__":
    main()
