"""Stage `caption`: N synthetic captions per image of ROOT/raw, one Parquet file per shard."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
from tyro.conf import OmitArgPrefixes

from pipeline.caption.decoding import Decoding
from pipeline.caption.redraws import Drafts, Row, Wanted
from pipeline.core.devices import worker_initializer
from pipeline.core.prefetch import batches, prefetch_map
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
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, captions_folder, raw_tar
from shards_spec.models import Trust
from shards_spec.names import check_name
from shards_spec.precision import PrecisionOption, resolve_precision
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import read_shard

if TYPE_CHECKING:
    from pipeline.caption.captioner import Captioner  # it imports torch

log = logging.getLogger(__name__)
MODEL, TAG = "coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k"
FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("num_tokens", pa.list_(pa.int32())),
]
SIMILARITY_FIELDS = [
    pa.field("similarities", pa.list_(pa.float32())),
    pa.field("original_similarity", pa.float32()),
]


@dataclass(frozen=True)
class CaptionConfig:
    """Write N synthetic captions per image with an open_clip CoCa model."""

    root: Root
    """the dataset: a folder or an fsspec URL; reads raw/, writes captions/NAME/"""
    model: str = MODEL
    """open_clip name of a CoCa model, local-dir:PATH or hf-hub:ORG/NAME"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file; of the default model by default mscoco_finetuned_laion2b_s13b_b90k"""
    name: str | None = None
    """folder below captions/; by default made from model and pretrained; several can stand side by side"""
    num_captions: int = 5
    """captions per image"""
    decoding: OmitArgPrefixes[Decoding] = field(default_factory=Decoding)
    redraws: int = 2
    """top_k, nucleus: how often an empty, looping or repeated caption is drawn again"""
    similarity: bool = False
    """also store each caption's cosine with its image by the model's contrastive heads, and the original's; a shard
    whose original captions score no better than shuffled ones is warned of"""
    precision: PrecisionOption = "auto"
    """auto: bf16 on a CUDA device that has it, else fp32"""
    batch_size: int | None = None
    """images at a time; by default what the device's memory holds, at most 512, on a CPU 32"""
    seed: int = 0
    """of the drawing; a caption depends on (seed, key, caption index) only"""
    threads: int = os.cpu_count() or 1
    """threads per process that decode images ahead of the device"""
    device: str = "auto"
    """auto (every CUDA device, else the CPU), cpu, cuda, cuda:N, or several with commas, a process each"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if self.pretrained is None and self.model == MODEL:
            object.__setattr__(self, "pretrained", TAG)
        check_name(self.label)
        if min(self.batch_size or 1, self.threads) < 1 or self.batch_size == 0:
            raise UserError(f"batch_size {self.batch_size} and threads {self.threads} must be at least 1")
        if self.redraws < 0:
            raise UserError(f"redraws {self.redraws} must be 0 or more")
        self.decoding.check_number(self.num_captions)

    @property
    def label(self) -> str:
        """The captions' folder below captions/."""
        return model_label(self.model, self.pretrained) if self.name is None else self.name


def model_label(model: str, pretrained: str | None) -> str:
    """A folder name for a model: the last part of its name and its tag, safe characters only."""
    parts = [re.split(r"[/:]", model.rstrip("/"))[-1], re.split(r"/", pretrained or "")[-1]]
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", "-".join(part for part in parts if part))


def caption(config: CaptionConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError for a model that is no CoCa, ShardsFailed for broken shards."""
    from shards_spec.models import pick_devices, weights_sha256

    shards = upstream_shards(config.root, RAW, "ingest")
    devices = pick_devices(config.device)
    several = len(devices) > 1  # then every worker process loads its own, and this one only says who they are
    config = replace(config, precision=resolve_precision(config.precision, devices[0]))
    captioner = _load(config, "cpu" if several else devices[0])
    identity = {
        "model": model_label(config.model, None),
        "pretrained": config.pretrained,
        "weights_sha256": weights_sha256(captioner.coca.model),
        "precision": config.precision,
        "num_captions": config.num_captions,
        **asdict(config.decoding),
        "seed": config.seed,
        "redraws": config.redraws,
        "similarity": config.similarity,
        "batch_size": config.batch_size,
    }
    stage = Stage(f"caption/{config.label}", captions_folder(config.label), identity)
    work = partial(caption_shard, stage=stage, config=config, captioner=None if several else captioner)
    worker_init = worker_initializer(devices, partial(_load_worker, config)) if several else None
    tasks = tar_tasks(config.root, RAW, shards, assignment)
    options = RunOptions(
        workers=len(devices),
        worker_init=worker_init,
        assignment=assignment,
        overwrite=config.overwrite,
        total=len(shards),
    )
    return run_stage(config.root, stage, tasks, work, options)


def _load(config: CaptionConfig, device: str) -> "Captioner":
    from pipeline.caption.captioner import Captioner, check_coca
    from shards_spec.models import load_model

    check_coca(config.model)
    precision = resolve_precision(config.precision, device)
    loaded = load_model(config.model, config.pretrained, device, precision=precision, trust=config.trust)
    return Captioner(loaded, config.decoding, config.num_captions, config.seed, config.similarity, config.batch_size)


_WORKER: list["Captioner"] = []  # a worker process' own


def _load_worker(config: CaptionConfig, device: str) -> None:
    _WORKER.append(_load(config, device))


def caption_shard(
    root: str, task: Task, *, stage: Stage, config: CaptionConfig, captioner: "Captioner | None" = None
) -> Result:
    """One raw shard to one Parquet file; an image that does not decode keeps its row with no captions.

    ``counters`` of the result count captions: all, those drawn again, and what is still wrong with how many.
    """
    captioner = captioner or _WORKER[0]
    source = raw_tar(root, task.shard)
    counts, drafts = Counter[str](), Drafts(captioner, config.redraws)
    for batch in batches(_decoded(source, captioner, config), captioner.batch_size):
        for key, found in batch:
            drafts.rows[key] = Row()
            if isinstance(found, DataError):
                log.warning("%s: key %s %s; it gets no caption", source, key, found)
            counts["picture does not decode" if isinstance(found, DataError) else "success"] += 1
        drafts.add([found for _, found in batch if not isinstance(found, DataError)])
    drafts.redraw(least=1)
    if complaint := drafts.contrast.complaint():
        log.warning("%s: %s", source, complaint)
    schema = pa.schema(
        [*FIELDS, *(SIMILARITY_FIELDS if config.similarity else [])], {"clipmill": json.dumps(stage.config)}
    )
    files = ShardWriter(root, stage.folder, task.shard)
    files.write_parquet(pa.Table.from_pylist(drafts.as_columns(), schema=schema))
    return Result(dict(counts), files.outputs, counters=drafts.facts())


def _decoded(source: str, captioner: "Captioner", config: CaptionConfig) -> Iterator[tuple[str, Wanted | DataError]]:
    """Per sample its key and the image ready for the captioner, or the DataError that says why it is not."""
    indices = tuple(range(config.num_captions))

    def decode(sample: Sample) -> tuple[str, Wanted | DataError]:
        try:
            image = captioner.preprocess(decode_rgb(sample.image))
        except DataError as error:
            return sample.key, error
        return sample.key, Wanted(sample.key, image, indices, _original(sample) if config.similarity else None)

    return prefetch_map(decode, read_shard(source), config.threads, 2 * captioner.batch_size)


def _original(sample: Sample) -> str | None:
    """The original caption where there is one that can be read."""
    try:
        return sample.caption or None
    except DataError:
        return None
