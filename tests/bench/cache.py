#!/usr/bin/env python3
"""Filling a teacher cache against the plain loop, in one run: the same images, views, captions and teacher.

    python tests/bench/cache.py [--model ViT-B-32] [--samples 64] [--views 10] [--captions 5] [--ops 2] [--processes 2]
    python tests/bench/cache.py --rendering-only [--views 10] [--ops 2]

The rival does what a script does: per sample decode, K times torchvision's RandomResizedCrop, flip and RandAugment,
normalise, the teacher on these K images and on the texts, one npz at the end. Ours is `clipmill cache`. Weights are
random (the time does not depend on them), images have a shorter side of 256. Prints the seconds of both, their ratio,
the share of time that the device waited, milliseconds per view on one core of both and of Pillow's resizing, without
operations and with them, what the host hands over to a teacher that does nothing, and how far apart rows are when the
forward passes have other numbers of rows.
"""

import argparse
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import open_clip
import torch
import torchvision.transforms as T
from photos import small_photo
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from small_data import write_final

from pipeline.cache.config import CacheConfig
from pipeline.cache.embedder import Embedder
from pipeline.cache.incremental import ShardIndex, plan_column_update
from pipeline.cache.stage import cache
from pipeline.cache.teacher import CPU_ROWS, Teacher
from shards_spec.files import json_bytes
from shards_spec.images import decode_rgb
from shards_spec.models import LoadedModel, load_model
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from shards_spec.views import BY_PILLOW, ViewSpec, render_views


def write_dataset(root: str, samples: int, captions: int, photos: list[bytes] | None = None) -> None:
    """Two shards as `pack` leaves them, of these photos in turn, or each sample of its own."""
    found = []
    for index in range(samples):
        texts = {f"syn_{i}": f"thing {index} seen {i} times on a table beside a window" for i in range(captions)}
        image = photos[index % len(photos)] if photos else small_photo(index)
        found.append(Sample(f"{index:09d}", {"jpg": image, "txt": b"a photo", "json": json_bytes(texts)}))
    write_final(root, [found[: samples // 2], found[samples // 2 :]])


@torch.no_grad()
def plain_loop(root: str, loaded: LoadedModel, views: int, ops: int, most: int | None = None) -> float:
    """One sample after the other, torchvision's transforms, no work ahead; ``most`` samples. Returns seconds."""
    start = time.perf_counter()
    weight = next(loaded.model.parameters())
    transform = T.Compose(
        [
            T.RandomResizedCrop(loaded.image_size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            *([T.RandAugment(ops, 9)] if ops else []),
            T.ToTensor(),
            T.Normalize(loaded.mean, loaded.std),
        ]
    )
    rows = {}
    for sample in islice(samples_of(root), most):
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        pixels = torch.stack([transform(image) for _ in range(views)]).to(weight)
        rows[f"{sample.key}_image"] = loaded.model.encode_image(pixels, normalize=True).half().cpu().numpy()
        tokens = loaded.tokenizer(sample.captions).to(weight.device)
        rows[f"{sample.key}_text"] = loaded.model.encode_text(tokens, normalize=True).half().cpu().numpy()
    np.savez(f"{root}/rows.npz", **rows)
    return time.perf_counter() - start


def samples_of(root: str) -> Iterator[Sample]:
    """All samples of ROOT/shards."""
    return chain.from_iterable(read_shard(str(path)) for path in sorted(Path(root, "shards").glob("*.tar")))


@contextmanager
def model_in_memory(loaded: LoadedModel) -> Iterator[None]:
    """Within it the stage takes this model instead of loading one."""
    with patch("pipeline.cache.embedder.load_teacher", lambda *_args, **_options: loaded):
        yield


class NoTeacher(Teacher):
    """Takes what the host hands over and does nothing with it."""

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 768, device=images.device)

    _encode_tokens = _encode_images


@dataclass(frozen=True)
class HandedOver:
    """What the host's side of the stage manages: rates, and how many seconds of its main process one view takes.

    ``taught`` is what the stage logs of a shard with the teacher, when all processes have started.
    """

    views_per_s: float
    texts_per_s: float
    core_s_per_view: float
    taught: dict[str, float]


def hand_over(config: CacheConfig, loaded: LoadedModel, device: str) -> HandedOver:
    """The second shard of ``config.root`` through the stage to `NoTeacher`, then to ``loaded``; the first warms up."""
    with model_in_memory(loaded), closing(Embedder(config, device, devices=1)) as embedder:
        teacher = embedder.teacher
        embedder.teacher = NoTeacher(loaded, config.batch_size)
        embed_shard(embedder, 0, ("image", "text"))
        used = time.process_time()
        views = embed_shard(embedder, 1, ("image",))
        used = time.process_time() - used
        texts = embed_shard(embedder, 1, ("text",))
        embedder.teacher = teacher
        taught = embed_shard(embedder, 1, ("image", "text"))
    count = views["new_image_vectors"]
    return HandedOver(
        count / views["embedding_s"], texts["new_text_vectors"] / texts["embedding_s"], used / count, taught
    )


def embed_shard(embedder: Embedder, shard: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """What the embedder logs of all columns of these kinds, "image" and "text"."""
    index = ShardIndex(f"{embedder.config.root}/shards/{shard:05d}.tar")
    updates = []
    for name in index.column_names(embedder.config.views, texts=True, soft_labels=False):
        update = plan_column_update(name, index, None)
        if update is not None and update.kind in kinds:
            updates.append(update)
    return embedder.embed_columns(index, updates)[1]


def rendering_times(root: str, size: int, views: int, ops: int) -> dict[str, float]:
    """Milliseconds of CPU time per view on one core, the fewest of five turns; decoding counts once per sample."""
    samples = list(islice(samples_of(root), 20))
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            *([T.RandAugment(ops, 9)] if ops else []),
        ]
    )

    def render(spec: ViewSpec) -> None:
        for sample in samples:
            render_views(decode_rgb(sample.image), spec, sample.key, range(views), size)

    def transform_plainly() -> None:
        for sample in samples:
            image = Image.open(io.BytesIO(sample.image)).convert("RGB")
            for _ in range(views):
                np.asarray(transform(image))

    ways: dict[str, Callable[[], None]] = {
        "clipmill": partial(render, ViewSpec(ops=ops)),
        "the same with Pillow's resizing (rendering 2)": partial(render, ViewSpec(ops=ops, rendering=BY_PILLOW)),
        "torchvision": transform_plainly,
    }
    taken = dict.fromkeys(ways, math.inf)
    for name, way in [*ways.items()] * 5:
        start = time.process_time()
        way()
        taken[name] = min(taken[name], 1e3 * (time.process_time() - start) / len(samples) / views)
    return taken


def print_rendering(root: str, size: int, views: int, ops: int) -> None:
    """Print `rendering_times` without operations and with ``ops``."""
    for number in sorted({0, ops}):
        times = rendering_times(root, size, views, number)
        ours = times["clipmill"]
        said = "; ".join(f"{name} {taken:.2f} ({ours / taken:.2f})" for name, taken in times.items())
        print(f"rendering with {number} operations, ms of one core a view (our share of it): {said}")


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
    parser.add_argument("--rendering-only", action="store_true", help="milliseconds per view, nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if options.rendering_only:
            torch.set_num_threads(1)
            write_dataset(root, options.samples, options.captions)
            print_rendering(root, 224, options.views, options.ops)
            return
        torch.manual_seed(0)
        torch.save(open_clip.create_model(options.model).state_dict(), f"{root}/teacher.pt")
        write_dataset(root, options.samples, options.captions)
        loaded = load_model(options.model, f"{root}/teacher.pt", device=options.device)
        print_rendering(root, loaded.image_size, options.views, options.ops)
        plain_loop(root, loaded, views=1, ops=options.ops)  # warm up
        plain = plain_loop(root, loaded, views=options.views, ops=options.ops)
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
        host = hand_over(config, loaded, options.device)
        print(
            f"without a teacher: {host.views_per_s:,.0f} views/s, {host.texts_per_s:,.0f} texts/s; the main process "
            f"takes {1e6 * host.core_s_per_view:.0f} us of a core per view"
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
