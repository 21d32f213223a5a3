"""Filling the teacher cache: the teacher alone, the whole stage on photos, what the host hands over, the plain loop.

Rendering processes import this file, so it imports torch only where it runs.
"""

import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.core.workers import usable_cores

VIEWS = 8
CAPTIONS = 5
OPS = 2
IMAGE = "image, ViT-L/14"
TEXT = "text, ViT-L/14"


def build_teacher(dry: bool, device: str, work: Path) -> tuple[str, Any]:
    """Name and model of a ViT-L/14 in bf16 with random weights, made on the device; a tiny one in fp32 when dry."""
    import torch
    from small_data import tiny_coca

    from shards_spec.models import load_model

    name = tiny_coca(work / "teacher") if dry else "ViT-L-14"
    with torch.device(device):
        return name, load_model(name, device=device, random_weights=True, precision="fp32" if dry else "bf16")


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
    """Texts per second, tokenised before, in the passes that go with ``rows`` images."""
    from pipeline.cache.teacher import Teacher
    from pipeline.cache.tokens import tokenise

    texts = (f"a photo of thing {number} on a wall" for number in range(256))
    tokens = list(tokenise(loaded.tokenizer, texts))
    teacher = Teacher(loaded, rows)
    return items_per_s(teacher.embed_tokens, tokens, teacher.text_rows, passes)


def items_per_s(embed: Any, items: list[Any], rows: int, passes: int) -> float:
    """Items per second of ``passes`` passes, after two that do not count."""
    embed(islice(cycle(items), 2 * rows))
    start = time.perf_counter()
    embed(islice(cycle(items), passes * rows))
    return passes * rows / (time.perf_counter() - start)


class Measurement:
    """What the parts share: the teacher, a dataset of photos, and what the teacher manages alone."""

    def __init__(self, where: Any) -> None:
        from cache import write_dataset
        from photos import small_photos
        from small_data import draw

        from pipeline.cache.config import CacheConfig
        from shards_spec.views import ViewSpec

        self.where = where
        name, self.loaded = build_teacher(where.dry, where.device, where.work)
        self.alone = dict[str, float]()
        photos = [draw("a shape")[0]] if where.dry else small_photos(320)
        root = str(where.work / "photos-to-cache")
        write_dataset(root, 16 if where.dry else 4000, CAPTIONS, photos)
        self.config = CacheConfig(
            root,
            name,
            name="t",
            views=VIEWS,
            spec=ViewSpec(ops=OPS),
            device=where.device,
            precision="fp32" if where.dry else "bf16",
            processes=0 if where.dry else None,  # a process imports torch for seconds
        )

    def report(self, job: str, rows: int, passes: int, **more: str) -> float:
        """Measure and report a job in passes of ``rows`` images or as many texts as go with them."""
        from figures import figure

        from pipeline.cache.teacher import Teacher

        teacher = Teacher(self.loaded, rows)
        measured, in_pass, unit = {
            IMAGE: (images_per_s, teacher.rows, "views/s"),
            TEXT: (texts_per_s, teacher.text_rows, "texts/s"),
        }[job]
        rate = measured(self.loaded, rows, passes)
        name = f"cache: ViT-L/14 {job.partition(',')[0]}s"
        name = name if more else f"{name}, {in_pass} rows a pass"
        figure(name, rate, unit, share=share_of_ceiling(job, rate, self.where.device), rows=in_pass, **more)
        return rate

    def teacher(self) -> None:
        """The teacher alone, as the stage embeds."""
        from pipeline.cache.teacher import CUDA_ROWS

        passes = 2 if self.where.dry else 8
        for job in (IMAGE, TEXT):
            self.alone[job] = self.report(job, CUDA_ROWS, passes, rate=job, goal="share of the ceiling >= 0.5")

    def stage(self) -> None:
        """The whole stage on photos."""
        from cache import model_in_memory

        from pipeline.cache.stage import cache

        with model_in_memory(self.loaded):
            summary = cache(self.config)
        self.report_stage("cache: the whole stage on photos", summary.measurements, summary.seconds)

    def report_stage(self, name: str, found: dict[str, float], seconds: float) -> None:
        """Report what the stage logged, and how much of the time the teacher alone would take."""
        from figures import figure

        views = found["new_image_vectors"]
        texts = found["new_text_vectors"]
        figure(
            name,
            views / seconds,
            "views/s",
            device_waited=found["waited_s"] / found["embedding_s"],
            teacher_alone_would_take=(views / self.alone[IMAGE] + texts / self.alone[TEXT]) / seconds,
            texts_per_view=texts / views,
            seconds=seconds,
        )

    def host(self) -> None:
        """What the host hands over, and a shard when all processes have started."""
        from cache import hand_over
        from figures import figure

        host = hand_over(self.config, self.loaded, self.where.device)
        taught = host.taught
        self.report_stage("cache: a shard of photos, all processes running", taught, taught["embedding_s"])
        figure(
            "cache: the host to a teacher that does nothing",
            host.views_per_s,
            "views/s",
            main_process_us_a_view=1e6 * host.core_s_per_view,
            cores=usable_cores(),
        )
        figure("cache: texts, tokenised, to a teacher that does nothing", host.texts_per_s, "texts/s")

    def plain_loop(self) -> None:
        """The rival."""
        from cache import plain_loop
        from figures import figure

        few = 2 if self.where.dry else 40
        plain_loop(self.config.root, self.loaded, VIEWS, OPS, most=2)  # warm up
        seconds = plain_loop(self.config.root, self.loaded, VIEWS, OPS, most=few)
        figure("cache: the plain loop, one sample after the other", few * VIEWS / seconds, "views/s")

    def other_rows(self) -> None:
        """Passes of other numbers of rows; a CPU's have always the same."""
        for rows in () if self.where.dry else (64, 128, 512):
            self.report(IMAGE, rows, 2048 // rows)
            self.report(TEXT, rows, 2048 // rows)


def main() -> int:
    """Measure and report."""
    from figures import options, run_parts

    this = Measurement(options(__doc__))
    return run_parts(this.teacher, this.stage, this.host, this.other_rows, this.plain_loop)


if __name__ == "__main__":
    sys.exit(main())
