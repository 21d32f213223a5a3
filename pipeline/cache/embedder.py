"""Fills the columns of a shard's cache: a teacher on its device, and a pool that renders views ahead of it."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

import numpy as np

from pipeline.cache.config import CacheConfig
from pipeline.cache.incremental import ColumnUpdate, ShardIndex
from pipeline.cache.render_pool import RenderJob, RenderQueue, create_render_pool
from pipeline.cache.teacher import Teacher
from shards_spec.embeddings import Vectors
from shards_spec.files import DataError
from shards_spec.models import load_teacher
from shards_spec.precision import resolve_precision


class Embedder:
    """What a process needs to fill a cache: the teacher on ``device``, and its share of the cores for rendering."""

    def __init__(self, config: CacheConfig, device: str, devices: int) -> None:
        """``devices`` is the number of processes that share this machine's cores."""
        self.config = config
        processes = config.processes
        if processes is None:
            cores = max(1, (os.cpu_count() or 1) // devices)
            processes = cores if device.startswith("cuda") else 0
        self.pool: Executor = create_render_pool(processes, config.threads)
        precision = resolve_precision(config.precision, device)
        loaded = load_teacher(config.model, config.pretrained, device=device, precision=precision, trust=config.trust)
        self.teacher = Teacher(loaded, config.batch_size)

    def embed_columns(
        self, shard: ShardIndex, updates: list[ColumnUpdate]
    ) -> tuple[dict[str, Vectors], dict[str, float]]:
        """The updated columns with all their rows, and seconds and numbers of vectors for the log.

        Texts are embedded while the first views are rendered. Raises DataError naming the file and the key when an
        image does not decode.
        """
        start = time.monotonic()
        teacher = self.teacher
        images = _rows_to_embed(updates, "image")
        texts = _rows_to_embed(updates, "text")
        queue = self._render(shard, images)
        features = {
            "text": teacher.embed_texts(shard.captions[row][number] for row, number in texts),
            "image": teacher.embed_images(_rendered_images(queue, images, shard)),
        }
        if not shard.keys:  # then nothing was embedded that would tell the width
            features = dict.fromkeys(features, np.empty((0, teacher.dim), np.float32))
        numbers = {
            "image": np.array([view for _, view in images]),
            "text": np.array([number for _, number in texts]),
        }
        columns = dict[str, Vectors]()
        for update in updates:
            of_column = features[update.kind][numbers[update.kind] == update.number]
            columns[update.name] = update.merge(len(shard.keys), of_column, self.config.dtype)
        measurements = {
            "embedding_s": time.monotonic() - start,
            "waited_s": queue.waited_s,
            "new_image_vectors": len(images),
            "new_text_vectors": len(texts),
        }
        return columns, measurements

    def _render(self, shard: ShardIndex, images: list[tuple[int, int]]) -> RenderQueue:
        """The views of each row in ``images`` (row, view), a result per row."""
        views = defaultdict[int, list[int]](list)
        for row, view in images:
            views[row].append(view)
        jobs = (RenderJob(shard.keys[row], shard.sample(row).image, tuple(numbers)) for row, numbers in views.items())
        depth = 2 * self.config.threads + 2 * self.teacher.rows // self.config.views
        image_size = self.teacher.loaded.image_size
        return RenderQueue(self.pool, jobs, depth=depth, spec=self.config.view_spec, size=image_size)


def _rows_to_embed(updates: list[ColumnUpdate], kind: str) -> list[tuple[int, int]]:
    """(row, number of the view or caption) of all that is new in columns of this kind, sorted."""
    pairs = list[tuple[int, int]]()
    for update in updates:
        if update.kind == kind:
            pairs += [(int(row), update.number) for row in update.new_rows]
    return sorted(pairs)


def _rendered_images(
    queue: Iterable[np.ndarray | DataError], images: list[tuple[int, int]], shard: ShardIndex
) -> Iterator[np.ndarray]:
    """(S, S, 3) for each of ``images`` (row, view), which are sorted."""
    rows = dict.fromkeys(row for row, _ in images)  # each once, in order
    for row, rendered in zip(rows, queue, strict=True):
        if isinstance(rendered, DataError):
            raise DataError(
                f"{shard.path}: key {shard.keys[row]} {rendered}; run caption, it finds such images, then pack again"
            ) from rendered
        yield from rendered
