"""Stage `caption`: N synthetic captions per image of ROOT/raw, one Parquet file per shard."""

import json
import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.caption.config import CaptionConfig
from pipeline.caption.listed import caption_from_lists
from pipeline.caption.redraws import CaptionRedrawer
from pipeline.caption.requests import CaptionRequest
from pipeline.caption.served import caption_from_server
from pipeline.caption.shard_captions import SIMILARITY_FIELDS, ImageCaptions, check_writer
from pipeline.core.devices import worker_initializer
from pipeline.core.prefetch import batches
from pipeline.core.render_pool import RenderJob, RenderPool, RenderQueue, rendering_processes
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
from shards_spec.files import DataError
from shards_spec.layout import RAW, captions_folder, raw_tar
from shards_spec.models import load_model, model_label, pick_devices, weights_sha256
from shards_spec.precision import resolve_precision
from shards_spec.sample import Sample
from shards_spec.tar import read_shard

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.caption.captioner import Captioner  # it imports torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionTools:
    """What a process needs to caption shards: the model on its device, and what decodes ahead of it."""

    captioner: "Captioner"
    pool: RenderPool

    @classmethod
    def of(cls, captioner: "Captioner", config: CaptionConfig, device: str, devices: int) -> "CaptionTools":
        """With a new pool; ``devices`` is the number of processes that share this machine's cores."""
        processes = rendering_processes(config.processes, device, devices)
        rows, size = captioner.batch_size, captioner.image_size
        pool = RenderPool(processes, config.threads, rows=rows, most=1, size=size, preload="open_clip")
        return cls(captioner, pool)


_worker_tools: list[CaptionTools] = []  # of a worker process


def caption(config: CaptionConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError for a model that is no CoCa, ShardsFailed for broken shards.

    Captions of others are `pipeline/caption/listed.py`'s and `pipeline/caption/served.py`'s.
    """
    if config.lists.sources:
        return caption_from_lists(config, assignment)
    if config.endpoint.server is not None:
        return caption_from_server(config, assignment)
    shards = upstream_shards(config.root, RAW, "ingest")
    devices = pick_devices(config.device)
    is_parallel = len(devices) > 1
    config = replace(config, precision=resolve_precision(config.precision, devices[0]))
    # with several devices every worker process loads its own model; the one here only identifies the weights
    captioner = _load(config, "cpu" if is_parallel else devices[0])
    stage = Stage(f"caption/{config.label}", captions_folder(config.label), _identity(config, captioner))
    check_writer(config.root, stage, config.overwrite)
    load = partial(_load_in_worker, config, len(devices))
    options = RunOptions(
        workers=len(devices),
        worker_init=worker_initializer(devices, load) if is_parallel else None,
        assignment=assignment,
        overwrite=config.overwrite,
        total=len(shards),
    )
    with ExitStack() as at_end:
        tools = None
        if not is_parallel:
            tools = CaptionTools.of(captioner, config, devices[0], devices=1)
            at_end.callback(tools.pool.shutdown)
        work = partial(caption_shard, stage=stage, config=config, tools=tools)
        return run_stage(config.root, stage, tar_tasks(config.root, RAW, shards, assignment), work, options)


def caption_identity(config: CaptionConfig) -> dict[str, Any]:
    """What the records of captions of these settings say, with the hash of the weights. Raises UserError."""
    device = pick_devices(config.device)[0]
    config = replace(config, precision=resolve_precision(config.precision, device))
    identity: dict[str, Any] = json.loads(json.dumps(_identity(config, _load(config, "cpu"))))
    return identity


def _identity(config: CaptionConfig, captioner: "Captioner") -> dict[str, Any]:
    """Every setting that affects the captions, and the weights' hash: a finished shard with another is refused."""
    return {
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


def _load(config: CaptionConfig, device: str) -> "Captioner":
    from pipeline.caption.captioner import Captioner, check_coca

    check_coca(config.model)
    precision = resolve_precision(config.precision, device)
    loaded = load_model(config.model, config.pretrained, device=device, precision=precision, trust=config.trust)
    return Captioner(
        loaded,
        config.decoding,
        config.num_captions,
        seed=config.seed,
        similarity=config.similarity,
        batch_size=config.batch_size,
    )


def _load_in_worker(config: CaptionConfig, devices: int, device: str) -> None:
    _worker_tools.append(CaptionTools.of(_load(config, device), config, device, devices))


@dataclass(frozen=True)
class _Batch:
    """Samples of a shard: ``keys`` of all, ``requests`` and their stacked ``images`` of those that decode."""

    keys: list[str]
    errors: list[tuple[str, DataError]]
    requests: list[CaptionRequest]
    images: "Tensor | None"

    @classmethod
    def of(cls, captioner: "Captioner", samples: list[tuple[str, CaptionRequest | DataError]]) -> "_Batch":
        """The batch of these samples."""
        errors = [(key, request) for key, request in samples if isinstance(request, DataError)]
        requests = [request for _, request in samples if not isinstance(request, DataError)]
        return cls([key for key, _ in samples], errors, requests, captioner.stack(requests) if requests else None)


def caption_shard(
    root: str, task: ShardTask, *, stage: Stage, config: CaptionConfig, tools: CaptionTools | None = None
) -> ShardResult:
    """Caption one raw shard into one Parquet file; an image that does not decode keeps its row, with no captions.

    ``counters`` of the result count captions: all, those sampled again, and by defect those that are still unusable.
    """
    tools = tools or _worker_tools[0]
    captioner = tools.captioner
    source = raw_tar(root, task.shard)
    counts = Counter[str]()
    redrawer = CaptionRedrawer(captioner, config.redraws)
    decoded = batches(decoded_requests(source, tools, config), captioner.batch_size)
    stacked = (_Batch.of(captioner, samples) for samples in decoded)
    batch = next(stacked, None)
    while batch is not None:
        if batch.images is not None:
            captioner.encode_ahead(batch.images)  # before the next batch is waited for
        upcoming = next(stacked, None)
        for key in batch.keys:
            redrawer.shard.rows[key] = ImageCaptions()
        for key, error in batch.errors:
            log.warning("%s: key %s %s; it gets no caption", source, key, error)
            counts["picture does not decode"] += 1
        counts["success"] += len(batch.requests)
        redrawer.add(batch.requests, batch.images, None if upcoming is None else upcoming.images)
        batch = upcoming
    redrawer.redraw(at_least=1)
    warning = redrawer.head_check.warning()
    if warning:
        log.warning("%s: %s", source, warning)
    outputs = redrawer.shard.write(root, stage, task.shard, SIMILARITY_FIELDS if config.similarity else [])
    return ShardResult(dict(counts), outputs, counters=redrawer.shard.counters())


def decoded_requests(
    source: str, tools: CaptionTools, config: CaptionConfig
) -> Iterator[tuple[str, CaptionRequest | DataError]]:
    """Per sample its key and the request with its image, or the DataError that says why it does not decode."""
    indices = tuple(range(config.num_captions))
    ahead = deque[tuple[str, str | None]]()  # key and original caption of those whose images are being decoded

    def jobs() -> Iterator[RenderJob]:
        for sample in read_shard(source):
            ahead.append((sample.key, _original_caption(sample) if config.similarity else None))
            yield RenderJob(_image(sample), tools.captioner.preprocess)

    for decoded in RenderQueue(tools.pool, jobs()):
        key, original = ahead.popleft()
        if isinstance(decoded, DataError):
            yield key, decoded
        else:
            yield key, CaptionRequest(key, decoded[0].copy(), indices, original)


def _image(sample: Sample) -> bytes | DataError:
    """The encoded image, or why there is none."""
    try:
        return sample.image
    except DataError as error:
        return error


def _original_caption(sample: Sample) -> str | None:
    """The original caption where there is one that can be read."""
    try:
        return sample.caption or None
    except DataError:
        return None
