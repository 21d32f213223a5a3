"""Filling the teacher cache: the teacher alone, the whole stage on photos, what the host hands over, the plain loop.

Rendering processes import this file, so it imports torch only where it runs.
"""

import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

VIEWS = 8
CAPTIONS = 5
OPS = 2
IMAGE = "image, ViT-L/14"
TEXT = "text, ViT-L/14"


def build_teacher(dry: bool, device: str, work: Path) -> tuple[str, Any]:
    """Name and model of a ViT-L/14 in bf16 with random weights, which are made on the device; a tiny one when dry."""
    import torch
    from small_data import tiny_coca

    from shards_spec.models import load_model

    name = tiny_coca(work / "teacher") if dry else "ViT-L-14"
    with torch.device(device):
        return name, load_model(name, device=device, random_weights=True, precision="bf16")


def share_of_ceiling(job: str, rate: float, device: str) -> float:
    """Of this run's bf16 ceiling, at ``rate`` samples per second."""
    from figures import ceiling

    from pipeline.plan.costs import FLOP

    return FLOP[job] * 1e9 * rate / ceiling(device)


def images_per_s(loaded: Any, rows: int, passes: int) -> float:
    """Views per second of random images held in memory, in passes of ``rows``."""
    import numpy as np

    from pipeline.cache.teacher import Teacher

    side = loaded.image_size
    images = list(np.random.default_rng(0).integers(0, 256, (256, side, side, 3), np.uint8))
    teacher = Teacher(loaded, rows)
    return items_per_s(teacher.embed_images, images, teacher.rows, passes)


def texts_per_s(loaded: Any, rows: int, passes: int) -> float:
    """Texts per second, tokenised before."""
    from pipeline.cache.teacher import Teacher
    from pipeline.cache.tokens import tokenise

    texts = (f"a photo of thing {number} on a wall" for number in range(256))
    tokens = list(tokenise(loaded.tokenizer, texts))
    teacher = Teacher(loaded, rows)
    return items_per_s(teacher.embed_tokens, tokens, teacher.rows, passes)


def items_per_s(embed: Any, items: list[Any], rows: int, passes: int) -> float:
    """Items per second of ``passes`` passes, after two that do not count."""
    embed(islice(cycle(items), 2 * rows))
    start = time.perf_counter()
    embed(islice(cycle(items), passes * rows))
    return passes * rows / (time.perf_counter() - start)


def measure_teacher(loaded: Any, dry: bool, device: str) -> tuple[float, float]:
    """Report the teacher alone; returns views and texts per second as the stage embeds them."""
    from figures import figure

    from pipeline.cache.teacher import CUDA_ROWS

    goal = "share of the ceiling >= 0.5"
    passes = 2 if dry else 8
    views = images_per_s(loaded, CUDA_ROWS, passes)
    share = share_of_ceiling(IMAGE, views, device)
    figure("cache: ViT-L/14 images", views, "views/s", goal=goal, rate=IMAGE, share=share, rows=CUDA_ROWS)
    texts = texts_per_s(loaded, CUDA_ROWS, 4 * passes)
    share = share_of_ceiling(TEXT, texts, device)
    figure("cache: ViT-L/14 texts", texts, "texts/s", goal=goal, rate=TEXT, share=share, rows=CUDA_ROWS)
    for rows in () if dry else (64, 128, 512):
        rate = images_per_s(loaded, rows, passes * 256 // rows)
        share = share_of_ceiling(IMAGE, rate, device)
        figure(f"cache: ViT-L/14 images, {rows} rows a pass", rate, "views/s", share=share)
    for rows in () if dry else (128, 1024):
        rate = texts_per_s(loaded, rows, 4 * passes * 256 // rows)
        share = share_of_ceiling(TEXT, rate, device)
        figure(f"cache: ViT-L/14 texts, {rows} rows a pass", rate, "texts/s", share=share)
    return views, texts


def measure_stage(config: Any, loaded: Any, device: str, alone: tuple[float, float]) -> None:
    """Report the whole stage, ``alone`` being the teacher's views and texts per second without it."""
    from cache import hand_over, model_in_memory
    from figures import figure

    from pipeline.cache.stage import cache

    with model_in_memory(loaded):
        summary = cache(config)
    found = summary.measurements
    views = found["new_image_vectors"]
    texts = found["new_text_vectors"]
    busy = (views / alone[0] + texts / alone[1]) / summary.seconds
    figure(
        "cache: the whole stage on photos",
        views / summary.seconds,
        "views/s",
        device_waited=found["waited_s"] / found["embedding_s"],
        teacher_alone_would_take=busy,
        texts_per_view=texts / views,
        seconds=summary.seconds,
    )
    host = hand_over(config, loaded, device)
    cores = 1e6 * host.core_s_per_view
    figure("cache: the host to a teacher that does nothing", host.views_per_s, "views/s", main_process_us_a_view=cores)
    figure("cache: texts, tokenised, to a teacher that does nothing", host.texts_per_s, "texts/s")


def main() -> None:
    """Measure and report."""
    from cache import plain_loop, write_dataset
    from explore_cache import explore
    from figures import figure, options
    from photos import small_photos
    from small_data import draw

    from pipeline.cache.config import CacheConfig
    from shards_spec.views import ViewSpec

    where = options(__doc__)
    name, loaded = build_teacher(where.dry, where.device, where.work)
    alone = measure_teacher(loaded, where.dry, where.device)
    root = str(where.work / "photos-to-cache")
    photos = [draw("a shape")[0]] if where.dry else small_photos(320)
    write_dataset(root, 16 if where.dry else 4000, CAPTIONS, photos)
    config = CacheConfig(
        root,
        name,
        name="t",
        views=VIEWS,
        spec=ViewSpec(ops=OPS),
        device=where.device,
        precision="bf16",
        processes=0 if where.dry else None,  # a process imports torch for seconds
    )
    measure_stage(config, loaded, where.device, alone)
    plain_loop(root, loaded, VIEWS, OPS, most=2)  # warm up
    few = 2 if where.dry else 40
    plain = few * VIEWS / plain_loop(root, loaded, VIEWS, OPS, most=few)
    figure("cache: the plain loop, one sample after the other", plain, "views/s")
    explore(loaded, where.dry, where.device)


if __name__ == "__main__":
    main()
