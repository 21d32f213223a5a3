"""Fills the columns of a shard's cache: a teacher on its device, and a pool that renders views ahead of it."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from threading import Lock

import numpy as np

from pipeline.cache.config import CacheConfig
from pipeline.cache.incremental import ColumnUpdate, ShardIndex
from pipeline.cache.teacher import Teacher
from pipeline.cache.tokens import TokenPool, tokenise
from pipeline.core.render_pool import RenderJob, RenderPool, RenderQueue, rendering_processes
from shards_spec.embeddings import Vectors, encode_vectors
from shards_spec.files import DataError, UserError
from shards_spec.messages import counted
from shards_spec.models import TIMM, LoadedModel, load_teacher
from shards_spec.precision import resolve_precision
from shards_spec.soft_labels import MOST_CLASSES, SoftLabelFormat
from shards_spec.timm_classifiers import load_timm_classifier
from shards_spec.views import render_views

RENDERERS_PER_TOKENISER = 8  # processes


def load_configured_teacher(config: CacheConfig, device: str) -> LoadedModel:
    """The config's teacher on a device, in the precision that the device has; with soft labels a classifier."""
    precision = resolve_precision(config.precision, device)
    load = load_teacher if config.soft_labels is None else load_timm_classifier
    return load(config.model, config.pretrained, device=device, precision=precision, trust=config.trust)


def soft_label_format(config: CacheConfig, loaded: LoadedModel) -> SoftLabelFormat | None:
    """How the teacher's soft labels are stored; None where its embeddings are. Raises UserError."""
    kept = config.soft_labels
    if kept is None:
        return None
    classes = loaded.model.num_classes
    if kept == "all" or kept == classes:
        return SoftLabelFormat(classes, "all")
    if kept > classes:
        raise UserError(
            f"--soft-labels {kept}: --model {config.model!r} has {counted(classes, 'class', 'classes')}; keep fewer, "
            "or all"
        )
    if classes > MOST_CLASSES:
        raise UserError(
            f"--soft-labels {kept}: {classes} classes are more than the {MOST_CLASSES} that 16 bits count; only "
            "--soft-labels all stores so many"
        )
    return SoftLabelFormat(classes, kept)


class Embedder:
    """What a process needs to fill a cache: the teacher on ``device``, and its share of the cores to work ahead.

    Linux ends the processes that work ahead with the thread that makes this.
    """

    def __init__(self, config: CacheConfig, device: str, devices: int) -> None:
        """``devices`` is the number of processes that share this machine's cores."""
        self.config = config
        processes = rendering_processes(config.processes, device, devices)
        self.token_pool: TokenPool | None = None
        if processes and not config.model.startswith(TIMM):
            tokenisers = -(-processes // RENDERERS_PER_TOKENISER)
            self.token_pool = TokenPool(tokenisers, config.model, config.trust.trust_remote_code)
        loaded = load_configured_teacher(config, device)
        self.teacher = Teacher(loaded, config.batch_size, soft_label_format(config, loaded))
        self._device_lock = Lock()
        self.render_pool = RenderPool(
            processes, config.threads, rows=self.teacher.rows, most=config.views, size=loaded.image_size
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
        images = _rows_to_embed(updates, self.image_kind)
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
            self.image_kind: np.array([view for _, view in images]),
            "text": np.array([number for _, number in texts]),
        }
        columns = dict[str, Vectors]()
        for update in updates:
            of_column = features[update.kind][numbers[update.kind] == update.number]
            if update.kind == "soft":
                rows = of_column.astype(np.uint8, copy=False)  # they are, unless there are none
                self._check_soft_labels(shard, update, rows)
                new = Vectors(rows, None, np.ones(len(rows), bool))
            else:
                new = encode_vectors(of_column, self.config.dtype)
            columns[update.name] = update.merge(len(shard.keys), new)
        return columns, measurements

    @property
    def image_kind(self) -> str:
        """Kind of the columns that are made of images."""
        return "image" if self.teacher.soft_labels is None else "soft"

    def _check_soft_labels(self, shard: ShardIndex, update: ColumnUpdate, rows: np.ndarray) -> None:
        """Raise DataError naming the first image of whose logits no soft label can be made."""
        assert self.teacher.soft_labels is not None
        if len(rows) and (broken := self.teacher.soft_labels.check(rows)) is not None:
            row, reason = broken
            raise DataError(f"{shard.path}: of key {shard.keys[update.new_rows[row]]} the teacher gives {reason}")

    def _embed(
        self, shard: ShardIndex, images: list[tuple[int, int]], texts: list[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """Vectors (n, D) of each of ``images`` (row, view) and ``texts`` (row, number), by kind."""
        teacher = self.teacher
        teacher.start_clock()
        queue = self._render(shard, images)
        tokens = self._tokenise([shard.captions[row][number] for row, number in texts])
        features = {
            self.image_kind: teacher.embed_images(_rendered_images(queue, images, shard)),
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
        spec, size = self.config.view_spec, self.teacher.loaded.image_size

        def job(row: int, numbers: list[int]) -> RenderJob:
            render = partial(render_views, spec=spec, key=shard.keys[row], views=numbers, size=size)
            return RenderJob(shard.sample(row).image, render)

        return RenderQueue(self.render_pool, (job(row, numbers) for row, numbers in views.items()))

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
