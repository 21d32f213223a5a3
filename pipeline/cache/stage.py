"""Stage `cache`: a teacher's embeddings of K replayable views and of all captions, Parquet files per shard.

Only what is new is embedded and written: further views, further captions, rows whose image or caption changed.
"""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import OmitArgPrefixes

from pipeline.cache.export_lists import export_lists
from pipeline.cache.incremental import Column, OpenShard, stale_column
from pipeline.cache.render_pool import Job, Rendering, rendering_pool
from pipeline.caption.stage import model_label
from pipeline.core.devices import worker_initializer
from pipeline.core.runner import (
    ALL,
    Result,
    Root,
    RunOptions,
    ShardAssignment,
    Stage,
    Summary,
    Task,
    run_stage,
    tar_tasks,
    upstream_shards,
)
from shards_spec.embeddings import Dtype, Vectors, id_column, write_vectors
from shards_spec.files import DataError, UserError, exists, join, remove, sha256_json
from shards_spec.layout import SHARDS, final_tar, parquet_path, teacher_folder
from shards_spec.manifest import forget, read_done
from shards_spec.models import LoadedModel, Trust, load_teacher, pick_devices, weights_sha256
from shards_spec.names import check_name
from shards_spec.precision import PrecisionOption, resolve_precision
from shards_spec.teacher_shard import CachedShard
from shards_spec.views import ViewSpec, stored_spec

if TYPE_CHECKING:
    from pipeline.cache.teacher import Teacher  # it imports torch

log = logging.getLogger(__name__)
MODEL, TAG = "ViT-L-14", "datacomp_xl_s13b_b90k"
PROBE = "Two naïve dogs' $3.50 café, 東京 & <b>http://a.b/c</b>"  # its tokens tell tokenizers apart


@dataclass(frozen=True)
class CacheConfig:
    """Store a teacher's image embeddings of K views and its text embeddings of all captions."""

    root: Root
    """the dataset; reads shards/, writes teacher/NAME/"""
    model: str = MODEL
    """open_clip name of the teacher, local-dir:PATH, hf-hub:ORG/NAME, or timm:NAME for an image-only one"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file; of the default model by default datacomp_xl_s13b_b90k; for timm a checkpoint
    file, or None for timm's own weights"""
    name: str | None = None
    """folder below teacher/; by default made from model and pretrained; several can stand side by side"""
    views: int = 8
    """replayable views per image; more than are there are added to them"""
    dtype: Dtype = "float16"
    """how vectors are stored; int8 has one scale per row"""
    spec: OmitArgPrefixes[ViewSpec] = field(default_factory=ViewSpec)
    augment: bool = True
    """views: --no-augment caches the plain centre crop only (one view)"""
    precision: PrecisionOption = "auto"
    """of the teacher; auto: bf16 on a CUDA device that has it, else fp32"""
    batch_size: int | None = None
    """images or texts per forward pass on a CUDA device, 256 by default, halved when memory runs out; 16 on a CPU"""
    processes: int | None = None
    """processes per device that decode and augment ahead of it; by default one per core beside CUDA devices, 0 (threads
    do it) beside a CPU"""
    threads: int = os.cpu_count() or 1
    """threads that decode and augment where there are no processes for it"""
    device: str = "auto"
    """auto (every CUDA device, else the CPU), cpu, cuda, cuda:N, or several with commas, a process each"""
    export_lists: bool = False
    """embed nothing; write teacher/NAME/lists/, one file per shard with lists of float32, for pandas and DuckDB"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if self.pretrained is None and self.model == MODEL:
            object.__setattr__(self, "pretrained", TAG)
        check_name(self.label)
        if min(self.views, self.threads, self.batch_size or 1) < 1 or self.batch_size == 0:
            raise UserError(
                f"views {self.views}, batch_size {self.batch_size}, threads {self.threads}: at least 1 each"
            )
        if (self.processes or 0) < 0:
            raise UserError(f"processes {self.processes} must be 0 or more")
        if not self.augment and self.views != 1:
            raise UserError(
                f"views {self.views} of the same centre crop would be equal: say --views 1 with --no-augment"
            )

    @property
    def view_spec(self) -> ViewSpec:
        """What the views are drawn from."""
        return self.spec if self.augment else replace(self.spec, scale=None)

    @property
    def label(self) -> str:
        """The cache's folder below teacher/."""
        return model_label(self.model, self.pretrained) if self.name is None else self.name


@dataclass
class Embedder:
    """What a process needs to fill a cache: the teacher on its device, and the pool that renders ahead of it."""

    teacher: "Teacher"
    pool: Executor


def cache(config: CacheConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError, ShardsFailed, DataError for views of another Pillow."""
    if config.export_lists:
        return export_lists(config.root, config.label, config.overwrite)
    shards = upstream_shards(config.root, SHARDS, "pack")
    devices = pick_devices(config.device)
    embedder: Embedder | None = _load(config, devices[0], len(devices))
    assert embedder is not None
    folder = teacher_folder(config.label)
    first = read_done(join(config.root, folder), 0) if not config.overwrite else None
    if first is not None:
        stored_spec(join(config.root, folder), first.config.get("views", {}))
    stage = Stage(
        f"cache/{config.label}", folder, _identity(config, embedder.teacher.loaded), extendable=("num_views",)
    )
    worker_init, pool = None, embedder.pool
    if len(devices) > 1:
        embedder = None  # every worker loads its own
        worker_init = worker_initializer(devices, partial(_load_worker, config, len(devices)))
    work = partial(cache_shard, stage=stage, config=config, embedder=embedder)
    try:
        tasks = tar_tasks(config.root, SHARDS, shards, assignment)
        options = RunOptions(
            workers=len(devices),
            worker_init=worker_init,
            assignment=assignment,
            overwrite=config.overwrite,
            total=len(shards),
        )
        summary = run_stage(config.root, stage, tasks, work, options)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if busy := summary.measurements.get("embedding_s"):
        log.info(
            "cache: the device waited for views %.1f %% of the time", 100 * summary.measurements["waited_s"] / busy
        )
    return summary


def _load(config: CacheConfig, device: str, devices: int) -> Embedder:
    from pipeline.cache.teacher import Teacher

    cores = max(1, (os.cpu_count() or 1) // devices)
    processes = config.processes if config.processes is not None else cores if device.startswith("cuda") else 0
    pool = rendering_pool(processes, config.threads)
    loaded = load_teacher(
        config.model, config.pretrained, device, resolve_precision(config.precision, device), config.trust
    )
    return Embedder(Teacher(loaded, config.batch_size), pool)


_WORKER: list[Embedder] = []  # a worker process' own


def _load_worker(config: CacheConfig, devices: int, device: str) -> None:
    _WORKER.append(_load(config, device, devices))


def _identity(config: CacheConfig, loaded: LoadedModel) -> dict[str, Any]:
    """All that decides what a vector is, but the sample."""
    spec, parameter = config.view_spec, next(loaded.model.parameters())
    scale, bias = (getattr(loaded.model, name, None) for name in ("logit_scale", "logit_bias"))
    return {
        "model": model_label(config.model, None),
        "pretrained": config.pretrained,
        "library": "open_clip" if loaded.tokenizer else "timm",
        "weights_sha256": weights_sha256(loaded.model),
        "precision": str(parameter.dtype).removeprefix("torch."),
        "logit_scale": None if scale is None else scale.detach().exp().item(),
        "logit_bias": None if bias is None else bias.detach().item(),
        "image_size": loaded.image_size,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "tokenizer_sha256": sha256_json(loaded.tokenizer([PROBE]).tolist()) if loaded.tokenizer else None,
        "views": spec.as_json(),
        "views_sha256": spec.sha256,
        "num_views": config.views,
        "dtype": config.dtype,
    }


def cache_shard(
    root: str, task: Task, *, stage: Stage, config: CacheConfig, embedder: Embedder | None = None
) -> Result:
    """Bring the cache of one final shard up to date: what it lacks goes to one new Parquet file, in the shard's order.

    Raises DataError naming file and key when a picture does not decode: a missing row would be an error later.
    """
    embedder = embedder or _WORKER[0]
    folder, loaded = join(root, stage.folder), embedder.teacher.loaded
    shard = OpenShard(final_tar(root, task.shard))
    done = None if config.overwrite else read_done(folder, task.shard)
    old = CachedShard(root, config.label, task.shard) if done else None
    names = shard.columns(config.views, texts=loaded.tokenizer is not None)
    files = {name: old.find(name) if old else None for name in names}
    columns = [column for name in names if (column := stale_column(name, shard, files[name]))]
    new, measured = _embed(shard, columns, embedder, config)
    fresh = {name for name in names if name not in new}
    kept = [file for file in (old.files if old else []) if any(files[name] is file for name in fresh)]
    outputs = {
        path: digest
        for path, digest in (done.outputs if done else {}).items()
        if join(root, path) in {file.path for file in kept}
    }
    if new:
        (shard_hash,) = task.inputs.values()
        meta = {**stage.config, "shard_sha256": shard_hash, "model_config": loaded.config, "software": _software()}
        path = _free_path(root, stage.folder, task.shard, outputs)
        if old is None or len(kept) < len(old.files):
            forget(folder, task.shard)  # it vouches for files that go
        ids = {id_column(name): shard.ids[id_column(name)] for name in new}
        outputs[path] = write_vectors(join(root, path), shard.keys, new, ids, meta)
    _remove_others(root, stage.folder, task.shard, outputs, done.outputs if done else {})
    texts = sum(map(len, shard.captions)) if loaded.tokenizer else 0
    counters = {"image vectors": len(shard.keys) * config.views, "text vectors": texts}
    return Result({"success": len(shard.keys)}, outputs, counters=counters, measurements=measured)


def _embed(
    shard: OpenShard, columns: list[Column], embedder: Embedder, config: CacheConfig
) -> tuple[dict[str, Vectors], dict[str, float]]:
    """The columns with all their rows, and what it took. Texts are embedded while the first views are rendered."""
    start, teacher = time.monotonic(), embedder.teacher
    images, texts = (
        sorted((int(row), column.number) for column in columns if column.kind == kind for row in column.rows)
        for kind in ("image", "text")
    )
    views = {row: tuple(view for _, view in own) for row, own in groupby(images, itemgetter(0))}
    jobs = (Job(shard.keys[row], shard.sample(row).image, own) for row, own in views.items())
    depth = 2 * config.threads + 2 * teacher.rows // config.views
    rendering = Rendering(embedder.pool, jobs, depth, config.view_spec, teacher.loaded.image_size)
    features = {"text": teacher.embed_texts(shard.captions[row][caption] for row, caption in texts)}
    features["image"] = teacher.embed_images(_images(rendering, list(views), shard))
    if not shard.keys:
        features = dict.fromkeys(features, np.empty((0, teacher.dim), np.float32))
    numbers = {"image": np.array([view for _, view in images]), "text": np.array([caption for _, caption in texts])}
    new = {
        column.name: column.filled(
            len(shard.keys), features[column.kind][numbers[column.kind] == column.number], config.dtype
        )
        for column in columns
    }
    took = {"embedding_s": time.monotonic() - start, "waited_s": rendering.waited_s}
    return new, {**took, "new_image_vectors": len(images), "new_text_vectors": len(texts)}


def _images(rendering: Rendering, rows: list[int], shard: OpenShard) -> Iterator[np.ndarray]:
    """(S, S, 3) each, the rows' views in order."""
    for row, rendered in zip(rows, rendering, strict=True):
        if isinstance(rendered, DataError):
            raise DataError(
                f"{shard.path}: key {shard.keys[row]} {rendered}; run caption, it finds such images, then pack again"
            ) from rendered
        yield from rendered


def _software() -> dict[str, str]:
    """Versions that may change a vector's last bits: for a reader who wonders, nothing compares them."""
    from PIL import features

    versions = {name: version(name) for name in ("torch", "open_clip_torch", "timm", "pillow")}
    return {**versions, "libjpeg_turbo": features.version("libjpeg_turbo") or "none"}


def _free_path(root: str, folder: str, shard: int, taken: dict[str, str]) -> str:
    """NNNNN.parquet, or NNNNN-1.parquet … when that stays."""
    names = (parquet_path(folder, shard, part) for part in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _remove_others(root: str, folder: str, shard: int, outputs: dict[str, str], before: dict[str, str]) -> None:
    """Delete the shard's files that no longer count, and those that a killed run left."""
    number = 1
    while exists(join(root, path := parquet_path(folder, shard, number))) or path in outputs:
        before, number = {**before, path: ""}, number + 1
    for path in set(before) - set(outputs):
        remove(join(root, path))
