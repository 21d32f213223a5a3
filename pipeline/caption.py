"""Stage `caption`: N synthetic captions per picture of ROOT/raw, one Parquet file per shard."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ahead import ahead, batches
from pipeline.stage import Result, Root, Stage, Summary, Task, run_stage, tar_tasks, upstream_shards
from shards_spec.files import DataError, UserError, atomic_writer, join, sha256_file
from shards_spec.manifest import forget, shard_name
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from shards_spec.views import decode_rgb

log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("num_tokens", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class CaptionConfig:
    """Write N synthetic captions per picture with an open_clip CoCa model."""

    root: Root
    """the dataset: a folder or an fsspec URL; reads raw/, writes captions/NAME/"""
    model: str = "coca_ViT-L-14"
    """open_clip name of a CoCa model, local-dir:PATH or hf-hub:ORG/NAME"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file, such as mscoco_finetuned_laion2b_s13b_b90k"""
    name: str | None = None
    """folder below captions/; by default made from model and pretrained"""
    num_captions: int = 5
    """captions per picture"""
    method: Literal["greedy", "nucleus"] = "nucleus"
    """how tokens are chosen"""
    top_p: float = 0.9
    """nucleus: the smallest set of tokens that reaches this probability"""
    temperature: float = 1.0
    """nucleus: logits are divided by it"""
    max_tokens: int = 30
    """longest caption in tokens"""
    min_tokens: int = 5
    """shortest caption in tokens"""
    batch_size: int = 64
    """pictures per forward pass"""
    seed: int = 0
    """of the sampling; a caption depends on (seed, key, caption index) only"""
    threads: int = 2
    """threads that decode pictures ahead of the device"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise UserError(f"batch_size {self.batch_size} and threads {self.threads} must be at least 1")


def model_label(model: str, pretrained: str | None) -> str:
    """A folder name for a model: the last part of its name and its tag, safe characters only."""
    parts = [re.split(r"[/:]", model.rstrip("/"))[-1], re.split(r"/", pretrained or "")[-1]]
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", "-".join(part for part in parts if part))


def caption(config: CaptionConfig) -> Summary:
    """Run the stage. Raises UserError for a model that is no CoCa, ShardsFailed for broken shards."""
    from pipeline.coca import Decoding
    from shards_spec.models import load_model, pick_device, weights_sha256

    shards = upstream_shards(config.root, "raw", "ingest")
    decoding = Decoding(
        config.method, config.num_captions, config.top_p, config.temperature, config.max_tokens, config.min_tokens,
        config.seed,
    )  # fmt: skip
    loaded = load_model(config.model, config.pretrained, pick_device(config.device))
    name = config.name or model_label(config.model, config.pretrained)
    identity = {
        "model": model_label(config.model, None),
        "pretrained": config.pretrained,
        "weights_sha256": weights_sha256(loaded.model),
        "batch_size": config.batch_size,
        **asdict(decoding),
    }
    stage = Stage(f"caption/{name}", f"captions/{name}", identity)
    tasks = tar_tasks(config.root, "raw", shards)
    work = partial(caption_shard, stage=stage, loaded=loaded, decoding=decoding, config=config)
    return run_stage(config.root, stage, tasks, work, total=len(shards), overwrite=config.overwrite)


def caption_shard(root: str, task: Task, *, stage: Stage, loaded: Any, decoding: Any, config: CaptionConfig) -> Result:
    """One raw shard to one Parquet file; a picture that does not decode keeps its row with no captions."""
    source = join(root, "raw", f"{shard_name(task.shard)}.tar")
    counts, rows = Counter[str](), list[dict[str, Any]]()
    for batch in _decoded_batches(source, loaded, config):
        good = [(key, image) for key, image in batch if not isinstance(image, DataError)]
        written = dict(zip([key for key, _ in good], _captions(good, loaded, decoding), strict=True))
        for key, image in batch:
            if isinstance(image, DataError):
                log.warning("%s: key %s %s; it gets no caption", source, key, image)
            counts["success" if key in written else "picture does not decode"] += 1
            rows.append({"key": key, **written.get(key, {"captions": [], "logprobs": [], "num_tokens": []})})
    path = f"{stage.folder}/{shard_name(task.shard)}.parquet"
    forget(join(root, stage.folder), task.shard)
    schema = SCHEMA.with_metadata({"clipmill": json.dumps(stage.config)})
    with atomic_writer(join(root, path)) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return Result(dict(counts), {path: sha256_file(join(root, path))})


def _decoded_batches(source: str, loaded: Any, config: CaptionConfig) -> Iterator[list[tuple[str, Any]]]:
    """Lists of (key, image tensor (3, S, S) or the DataError that says why there is none)."""
    import open_clip

    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(loaded.model)), is_train=False
    )

    def decode(sample: Sample) -> tuple[str, Any]:
        try:
            return sample.key, preprocess(decode_rgb(sample.image))
        except DataError as error:
            return sample.key, error

    decoded = ahead(decode, read_shard(source), config.threads, 2 * config.batch_size)
    return batches(decoded, config.batch_size)


def _captions(good: list[tuple[str, Any]], loaded: Any, decoding: Any) -> list[dict[str, Any]]:
    import torch

    from pipeline.coca import generate

    if not good:
        return []
    images = torch.stack([image for _, image in good]).to(next(loaded.model.parameters()).device)
    tokenizer = loaded.tokenizer
    found = generate(
        loaded.model, images, [key for key, _ in good], decoding, tokenizer.sot_token_id, tokenizer.eot_token_id
    )
    return [
        {
            "captions": [" ".join(tokenizer.decode(caption.tokens).split()) for caption in row],
            "logprobs": [caption.logprob for caption in row],
            "num_tokens": [len(caption.tokens) for caption in row],
        }
        for row in found
    ]
