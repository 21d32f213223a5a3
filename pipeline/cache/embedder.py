"""Fills the columns of a shard's cache: a teacher on its device, and a pool that renders views ahead of it."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from threading import Lock

import numpy as np

from pipeline.cache.config import CacheConfig
from pipeline.cache.incremental import ColumnUpdate, ShardIndex
from pipeline.cache.render_pool import RenderJob, RenderPool, RenderQueue
from pipeline.cache.teacher import Teacher
from pipeline.cache.tokens import TokenPool, tokenise
from pipeline.core.workers import usable_cores
from shards_spec.embeddings import Vectors
from shards_spec.files import DataError
from shards_spec.models import TIMM, LoadedModel, load_teacher
from shards_spec.precision import resolve_precision

RENDERERS_PER_TOKENISER = 8  # processes


def load_configured_teacher(config: CacheConfig, device: str) -> LoadedModel:
    """The config's teacher on a device, in the precision that the device has."""
    precision = resolve_precision(config.precision, device)
    return load_teacher(config.model, config.pretrained, device=device, precision=precision, trust=config.trust)


class Embedder:
    """What a process needs to fill a cache: the teacher on ``device``, and its share of the cores to work ahead.

    Linux ends the processes that work ahead with the thread that makes this.
    """

    def __init__(self, config: CacheConfig, device: str, devices: int) -> None:
        """``devices`` is the number of processes that share this machine's cores."""
        self.config = config
        processes = config.processes
        if processes is None:
            processes = max(1, usable_cores() // devices) if device.startswith("cuda") else 0
        self.token_pool: TokenPool | None = None
        if processes and not config.model.startswith(TIMM):
            tokenisers = -(-processes // RENDERERS_PER_TOKENISER)
            self.token_pool = TokenPool(tokenisers, config.model, config.trust.trust_remote_code)
        loaded = load_configured_teacher(config, device)
        self.teacher = Teacher(loaded, config.batch_size)
        self._device_lock = Lock()
        self.render_pool = RenderPool(
            processes, config.threads, rows=self.teacher.rows, views=config.views, size=loaded.image_size
        )

    def close(self) -> None:
        """End the processes and threads that work ahead."""
        self.render_pool.shutdown()
        if self.token_pool is not None:
            self.token_pool.shutdown()

    def embed_columns(
        self, shard: ShardIndex, updates: list[ColumnUpdate]
    ) -> tuple[dict[str, Vectors], dict[str, float]]:
        """The updated columns with all their rows, and seconds and numbers of vectors for the log.

        Texts are tokenised while images are embedded. Threads embed one shard after the other, and prepare and finish
        theirs meanwhile. Raises DataError naming the file and the key when an image does not decode.
        """
        images = _rows_to_embed(updates, "image")
        texts = _rows_to_embed(updates, "text")
        with self._device_lock:
            start = time.monotonic()
            features = self._embed(shard, images, texts)
            measurements = {
                "embedding_s": time.monotonic() - start,
                "waited_s": self.teacher.waited_s,
                "new_image_vectors": len(images),
                "new_text_vectors": len(texts),
            }
        numbers = {
            "image": np.array([view for _, view in images]),
            "text": np.array([number for _, number in texts]),
        }
        columns = dict[str, Vectors]()
        for update in updates:
            of_column = features[update.kind][numbers[update.kind] == update.number]
            columns[update.name] = update.merge(len(shard.keys), of_column, self.config.dtype)
        return columns, measurements

    def _embed(
        self, shard: ShardIndex, images: list[tuple[int, int]], texts: list[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """Vectors (n, D) of each of ``images`` (row, view) and ``texts`` (row, number), by kind."""
        teacher = self.teacher
        teacher.start_clock()
        queue = self._render(shard, images)
        tokens = self._tokenise([shard.captions[row][number] for row, number in texts])
        features = {
            "image": teacher.embed_images(_rendered_images(queue, images, shard)),
            "text": teacher.embed_tokens(tokens),
        }
        if not shard.keys:  # then nothing was embedded that would tell the width
            return dict.fromkeys(features, np.empty((0, teacher.dim), np.float32))
        return features

    def _render(self, shard: ShardIndex, images: list[tuple[int, int]]) -> RenderQueue:
        """The views of each row in ``images`` (row, view), a result per row."""
        views = defaultdict[int, list[int]](list)
        for row, view in images:
            views[row].append(view)
        jobs = (RenderJob(shard.keys[row], shard.sample(row).image, tuple(numbers)) for row, numbers in views.items())
        return RenderQueue(self.render_pool, jobs, self.config.view_spec)

    def _tokenise(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Tokens of each text: ahead of their use where there are processes."""
        if self.token_pool is None:
            return tokenise(self.teacher.loaded.tokenizer, texts)
        return self.token_pool.tokenise(texts)


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
