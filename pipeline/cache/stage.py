"""Stage `cache`: a teacher's embeddings of K replayable views and of all captions, or a classifier's soft labels.

Only what is new is embedded and written: further views, further captions, rows whose image or caption changed.
"""

import json
import logging
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.cache.config import CacheConfig
from pipeline.cache.export_lists import export_lists
from pipeline.cache.imported import import_cache
from pipeline.cache.incremental import ColumnUpdate, ShardIndex, plan_column_update
from pipeline.core.devices import worker_initializer
from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardTask,
    Stage,
    Summary,
    run_stage,
    tar_tasks,
    upstream_shards,
)
from shards_spec.class_names import class_list_hash, read_class_names
from shards_spec.embeddings import id_column, write_vectors
from shards_spec.files import exists, join, remove, sha256_json
from shards_spec.layout import SHARDS, class_names_txt, final_tar, parquet_path, teacher_folder
from shards_spec.manifest import forget, read_done
from shards_spec.models import LoadedModel, model_label, pick_devices, weights_sha256
from shards_spec.teacher_shard import TeacherShard
from shards_spec.timm_classifiers import class_names
from shards_spec.views import parse_view_spec

if TYPE_CHECKING:
    from pipeline.cache.embedder import Embedder  # it imports torch

log = logging.getLogger(__name__)
PROBE = "Two naïve dogs' $3.50 café, 東京 & <b>http://a.b/c</b>"  # its tokens tell tokenizers apart
SHARDS_AT_ONCE = 2  # of a GPU: one is embedded, while the next is read and the last written
_worker_embedder: list["Embedder"] = []  # of a worker process


def cache(config: CacheConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError, ShardsFailed, DataError for views of another Pillow."""
    from pipeline.cache.embedder import Embedder, load_configured_teacher

    if config.source.from_:
        return import_cache(config, assignment)
    if config.export_lists:
        return export_lists(config.root, config.label, config.overwrite)
    shards = upstream_shards(config.root, SHARDS, "pack")
    devices = pick_devices(config.device)
    is_parallel = len(devices) > 1
    with ExitStack() as at_end:
        if is_parallel:  # every worker process loads its own teacher; the one here only identifies the weights
            embedder = None
            loaded = load_configured_teacher(config, devices[0])
        else:
            embedder = at_end.enter_context(closing(Embedder(config, devices[0], devices=1)))
            loaded = embedder.teacher.loaded
        if config.soft_labels is not None:
            _warn_of_other_classes(config.root, class_names(loaded.model))
        folder = teacher_folder(config.label)
        if not config.overwrite:
            _check_rendering(join(config.root, folder))
        stage = Stage(f"cache/{config.label}", folder, _identity(config, loaded), extendable=("num_views",))
        work = partial(cache_shard, stage=stage, config=config, embedder=embedder)
        load = partial(_load_in_worker, config, len(devices))
        options = RunOptions(
            workers=len(devices),
            threads=SHARDS_AT_ONCE if devices[0].startswith("cuda") and not is_parallel else 0,
            worker_init=worker_initializer(devices, load) if is_parallel else None,
            assignment=assignment,
            overwrite=config.overwrite,
            total=len(shards),
        )
        summary = run_stage(config.root, stage, tar_tasks(config.root, SHARDS, shards, assignment), work, options)
    embedding_s = summary.measurements.get("embedding_s")
    if embedding_s:
        share = 100 * summary.measurements["waited_s"] / embedding_s
        log.info("cache: the device waited for views %.1f %% of the time", share)
    return summary


def _warn_of_other_classes(root: str, classes: list[str] | None) -> None:
    """Say before the work that training will refuse these soft labels, where images and teacher have class names."""
    path = class_names_txt(root)
    if classes and exists(path) and read_class_names(path) != classes:
        log.warning(
            "cache: the teacher's classes are not those of %s: training on these images will refuse its soft labels",
            path,
        )


def _load_in_worker(config: CacheConfig, devices: int, device: str) -> None:
    from pipeline.cache.embedder import Embedder

    _worker_embedder.append(Embedder(config, device, devices))


def _check_rendering(folder: str) -> None:
    """Raise DataError when the cache's views are of another Pillow: before any work, not at the first old shard."""
    first = read_done(folder, 0)
    if first is not None:
        parse_view_spec(folder, first.config.get("views", {}))


def cache_identity(config: CacheConfig) -> dict[str, Any]:
    """What the records of a cache of these settings say, with hashes of weights and tokenizer. Raises UserError."""
    from pipeline.cache.embedder import load_configured_teacher

    loaded = load_configured_teacher(config, pick_devices(config.device)[0])
    identity: dict[str, Any] = json.loads(json.dumps(_identity(config, loaded)))
    return identity


def _identity(config: CacheConfig, loaded: LoadedModel) -> dict[str, Any]:
    """Every setting that affects a vector, and hashes of weights and tokenizer: a cache with another is refused."""
    from pipeline.cache.embedder import soft_label_format

    spec = config.view_spec
    soft = soft_label_format(config, loaded)
    parameter = next(loaded.model.parameters())
    scale = getattr(loaded.model, "logit_scale", None)
    bias = getattr(loaded.model, "logit_bias", None)
    identity = {
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
    if soft is not None:  # caches of vectors have no such fields, and are not made again for them
        names = class_names(loaded.model)
        identity |= {
            "dtype": "uint8",
            "soft_labels": soft.kept,
            "classes": soft.classes,
            "classes_sha256": class_list_hash(names) if names else None,
        }
    return identity


def cache_shard(
    root: str, task: ShardTask, *, stage: Stage, config: CacheConfig, embedder: "Embedder | None" = None
) -> ShardResult:
    """Bring the cache of one final shard up to date: what it lacks goes to one new Parquet file, in the shard's order.

    Raises DataError naming file and key when an image does not decode: a missing row would be an error later.
    """
    embedder = embedder or _worker_embedder[0]
    loaded = embedder.teacher.loaded
    has_texts = loaded.tokenizer is not None
    folder = join(root, stage.folder)
    shard = ShardIndex(final_tar(root, task.shard))
    done = None if config.overwrite else read_done(folder, task.shard)
    previous = done.outputs if done else {}
    cached = TeacherShard(root, config.label, task.shard) if done else None
    names = shard.column_names(config.views, texts=has_texts, soft_labels=config.soft_labels is not None)
    files = {name: cached.find(name) if cached else None for name in names}
    updates = list[ColumnUpdate]()
    for name in names:
        update = plan_column_update(name, shard, files[name])
        if update is not None:
            updates.append(update)
    columns, measurements = embedder.embed_columns(shard, updates)

    # a file stays as long as one of its columns is current
    current = {file.path for name, file in files.items() if file is not None and name not in columns}
    outputs = {path: digest for path, digest in previous.items() if join(root, path) in current}
    if not done or len(outputs) < len(previous):
        forget(folder, task.shard)  # a stale record would validate the wrong files
    if columns:
        (shard_hash,) = task.inputs.values()
        meta = {**stage.config, "shard_sha256": shard_hash, "model_config": loaded.config, "software": _software()}
        if config.soft_labels is not None:
            meta["class_names"] = class_names(loaded.model)
        path = free_path(stage.folder, task.shard, outputs)
        ids = {id_column(name): shard.ids[id_column(name)] for name in columns}
        outputs[path] = write_vectors(join(root, path), shard.keys, columns, ids, meta)
    remove_stale_files(root, stage.folder, task.shard, outputs, previous)
    counters = _counters(shard, config, has_texts)
    return ShardResult({"success": len(shard.keys)}, outputs, counters=counters, measurements=measurements)


def _counters(shard: ShardIndex, config: CacheConfig, has_texts: bool) -> dict[str, int]:
    """What a shard's cache has, for the dataset's totals."""
    views = len(shard.keys) * config.views
    if config.soft_labels is not None:
        return {"soft labels": views}
    return {"image vectors": views, "text vectors": sum(map(len, shard.captions)) if has_texts else 0}


def _software() -> dict[str, str]:
    """Versions that may change a vector's last bits: for the record, nothing compares them."""
    from PIL import features

    versions = {name: version(name) for name in ("torch", "open_clip_torch", "timm", "pillow")}
    return {**versions, "libjpeg_turbo": features.version("libjpeg_turbo") or "none"}


def free_path(folder: str, shard: int, taken: dict[str, str]) -> str:
    """NNNNN.parquet, or NNNNN-1.parquet … when that stays."""
    paths = (parquet_path(folder, shard, part) for part in range(len(taken) + 1))
    return next(path for path in paths if path not in taken)


def remove_stale_files(root: str, folder: str, shard: int, outputs: dict[str, str], previous: dict[str, str]) -> None:
    """Delete the shard's files that are not among ``outputs``: ``previous`` ones, and those that a killed run left."""
    stale = set(previous)
    part = 1
    while True:
        path = parquet_path(folder, shard, part)
        if path not in outputs and not exists(join(root, path)):
            break
        stale.add(path)
        part += 1
    for path in sorted(stale - set(outputs)):
        remove(join(root, path))
