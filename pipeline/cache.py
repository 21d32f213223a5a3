"""Stage `cache`: a teacher's embeddings of K replayable views and of all captions, one Parquet file per shard."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from pipeline.ahead import ahead, batches
from pipeline.caption import model_label
from pipeline.stage import Result, Root, Stage, Summary, Task, run_stage, tar_tasks, upstream_shards
from shards_spec.embeddings import write_embeddings
from shards_spec.files import DataError, UserError, join, sha256_file, sha256_json
from shards_spec.manifest import forget, shard_name
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from shards_spec.views import ViewSpec, apply_view, decode_rgb, draw_view

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheConfig:
    """Store a teacher's image embeddings of K views and its text embeddings of all captions."""

    root: Root
    """the dataset; reads shards/, writes teacher/NAME/"""
    model: str = "ViT-L-14"
    """open_clip name of the teacher, local-dir:PATH or hf-hub:ORG/NAME"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file"""
    name: str | None = None
    """folder below teacher/; by default made from model and pretrained"""
    views: int = 8
    """replayable views per picture"""
    dtype: Literal["float16", "int8"] = "float16"
    """how vectors are stored; int8 has one scale per row"""
    scale: tuple[float, float] = (0.08, 1.0)
    """views: share of the picture that a crop covers, low and high"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """views: aspect of a crop, low and high"""
    flip: float = 0.5
    """views: probability of a horizontal flip"""
    ops: int = 0
    """views: RandAugment operations per view (SiCLIP and MobileCLIP use 2)"""
    magnitude: int = 9
    """views: RandAugment magnitude, 0 to 30"""
    augment: bool = True
    """views: --no-augment caches the plain centre crop only (one view)"""
    batch_size: int = 64
    """pictures or texts per forward pass"""
    seed: int = 0
    """of the views"""
    threads: int = 2
    """threads that decode and augment ahead of the device"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if min(self.views, self.batch_size, self.threads) < 1:
            raise UserError(
                f"views {self.views}, batch_size {self.batch_size}, threads {self.threads}: at least 1 each"
            )
        if not self.augment and self.views != 1:
            raise UserError(
                f"views {self.views} of the same centre crop would be equal: say --views 1 with --no-augment"
            )

    @property
    def view_spec(self) -> ViewSpec:
        """What the views are drawn from."""
        scale = self.scale if self.augment else None
        return ViewSpec(self.seed, scale, self.ratio, self.flip, self.ops, self.magnitude)


def cache(config: CacheConfig) -> Summary:
    """Run the stage. Raises UserError, ShardsFailed."""
    from shards_spec.models import load_model, pick_device, weights_sha256

    shards = upstream_shards(config.root, "shards", "pack")
    loaded = load_model(config.model, config.pretrained, pick_device(config.device))
    name = config.name or model_label(config.model, config.pretrained)
    spec = config.view_spec
    identity = {
        "model": model_label(config.model, None),
        "pretrained": config.pretrained,
        "weights_sha256": weights_sha256(loaded.model),
        "logit_scale": loaded.model.logit_scale.detach().exp().item(),
        "image_size": loaded.image_size,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "views": spec.as_json(),
        "views_sha256": spec.sha256,
        "num_views": config.views,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
    }
    stage = Stage(f"cache/{name}", f"teacher/{name}", identity)
    tasks = tar_tasks(config.root, "shards", shards)
    work = partial(cache_shard, stage=stage, loaded=loaded, config=config)
    return run_stage(config.root, stage, tasks, work, total=len(shards), overwrite=config.overwrite)


def cache_shard(root: str, task: Task, *, stage: Stage, loaded: Any, config: CacheConfig) -> Result:
    """One final shard to one Parquet file with the rows in the shard's order.

    Raises DataError naming file and key when a picture does not decode: a missing row would be an error later.
    """
    source = join(root, "shards", f"{shard_name(task.shard)}.tar")
    keys, captions = list[str](), list[list[str]]()

    def samples() -> Iterator[Sample]:
        for sample in read_shard(source):
            keys.append(sample.key)
            captions.append(sample.captions)
            yield sample

    images = _embed_images(samples(), source, loaded, config)
    columns = {f"image_{view}": images[:, view] for view in range(config.views)}
    columns |= _embed_texts(captions, loaded, config.batch_size)
    (shard_hash,) = task.inputs.values()
    meta = {
        **stage.config,
        "num_captions": max(map(len, captions), default=0),
        "shard_sha256": shard_hash,
        "captions_sha256": sha256_json([keys, captions]),
    }
    path = f"{stage.folder}/{shard_name(task.shard)}.parquet"
    forget(join(root, stage.folder), task.shard)
    write_embeddings(join(root, path), keys, columns, meta, config.dtype)
    return Result({"success": len(keys)}, {path: sha256_file(join(root, path))})


def _embed_images(samples: Iterator[Sample], source: str, loaded: Any, config: CacheConfig) -> np.ndarray:
    """(n, K, D) float32, L2-normalised."""
    import torch

    spec = config.view_spec
    mean = torch.tensor(loaded.mean).view(3, 1, 1)
    std = torch.tensor(loaded.std).view(3, 1, 1)

    def render(sample: Sample) -> Any:
        try:
            image = decode_rgb(sample.image)
        except DataError as error:
            raise DataError(
                f"{source}: key {sample.key} {error}; run caption, it finds such pictures, then pack again"
            ) from error
        views = [
            apply_view(image, spec, draw_view(spec, sample.key, v), loaded.image_size) for v in range(config.views)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views]))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std

    rendered = ahead(render, samples, config.threads, max(2, 2 * config.batch_size // config.views))
    device = next(loaded.model.parameters()).device
    features = []
    with torch.no_grad():
        for batch in batches((view for views in rendered for view in views), config.batch_size):
            encoded = loaded.model.encode_image(torch.stack(batch).to(device), normalize=True)
            features.append(encoded.float().cpu().numpy())
    if not features:
        raise DataError(f"{source}: an empty shard; pack again")
    stacked = np.concatenate(features)
    return stacked.reshape(-1, config.views, stacked.shape[-1])


def _embed_texts(captions: list[list[str]], loaded: Any, batch_size: int) -> dict[str, np.ndarray]:
    """``text_0`` … as (n, D) float32, L2-normalised; NaN rows where a sample has fewer captions."""
    import torch

    device = next(loaded.model.parameters()).device
    places = [(row, column) for row, texts in enumerate(captions) for column in range(len(texts))]
    columns: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for batch in batches(places, batch_size):
            tokens = loaded.tokenizer([captions[row][column] for row, column in batch])
            encoded = loaded.model.encode_text(tokens.to(device), normalize=True).float().cpu().numpy()
            for (row, column), vector in zip(batch, encoded, strict=True):
                name = f"text_{column}"
                if name not in columns:
                    columns[name] = np.full((len(captions), len(vector)), np.nan, np.float32)
                columns[name][row] = vector
    return dict(sorted(columns.items(), key=lambda item: int(item[0].rpartition("_")[2])))
