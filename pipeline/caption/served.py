"""`caption --server`: captions by a model that an OpenAI-compatible server runs, such as vLLM.

Every image is sent as a JPEG in a data URL with one prompt. The rules are those of a model that runs here: N captions
an image, each of which is asked for again when it is empty, looping or the same as another.
"""

import base64
import io
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from PIL import Image

from pipeline.caption.caption_lists import cleaned
from pipeline.caption.chat_client import ChatChoice, ChatClient, ChatError, api_key
from pipeline.caption.config import CaptionConfig
from pipeline.caption.requests import GeneratedCaption
from pipeline.caption.shard_captions import FIELDS, REASON_FIELD, ImageCaptions, ShardCaptions, check_writer
from pipeline.core.no_success import advice_for
from pipeline.core.prefetch import prefetch_map
from pipeline.core.runner import (
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
from pipeline.ingest.cells import MAX_CELL_BYTES
from shards_spec.counter_rng import draw_index
from shards_spec.files import DataError, UserError, join
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, captions_folder, parquet_path, raw_tar
from shards_spec.manifest import Done, forget, read_dataset, read_done
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.tar import read_shard

log = logging.getLogger(__name__)
SHARDS_AT_ONCE = 2  # so that the last answers of one shard do not keep the server from the next
JPEG_QUALITY = 92
PROBE_SIDE = 224  # pixels of the image that the server is tried with
SEEDS = 1 << 31
FAILED = "server: "  # begins the reasons on disk
CARRIED_OVER = ("redrawn", "cut at max_tokens")  # facts of the captions that --retry-failed keeps
EMPTY = "empty answer"
TOO_LONG = "caption too long"
LEFT_OUT = "too long, left out"  # a fact, as of --from


def caption_from_server(config: CaptionConfig, assignment: ShardAssignment) -> Summary:
    """Run the stage with a server's captions.

    Raises UserError when there is no server, it does not have the model or take images, or it is gone; ShardsFailed.
    """
    root, options = config.root, config.endpoint
    shards = upstream_shards(root, RAW, "ingest")
    stage = Stage(f"caption/{config.label}", captions_folder(config.label), _identity(config))
    if options.retry_failed and stage.name not in read_dataset(root)["stages"]:
        raise UserError(f"{stage.name} has not finished in {root}: run the same command without --retry-failed first")
    check_writer(root, stage, config.overwrite)
    with ChatClient(
        options.server or "",
        api_key(),
        concurrency=options.concurrency,
        timeout_s=options.request_timeout_s,
        retries=options.retries,
    ) as client:
        captioner = ServedCaptioner(config, client)
        work = partial(_caption_shard, stage=stage, captioner=captioner, concurrency=options.concurrency)
        run = RunOptions(threads=SHARDS_AT_ONCE, assignment=assignment, overwrite=config.overwrite, total=len(shards))
        tasks = tar_tasks(root, RAW, shards, assignment)
        return run_stage(root, stage, _with_failed(root, stage, tasks) if options.retry_failed else tasks, work, run)


def _identity(config: CaptionConfig) -> dict[str, Any]:
    """Every setting that affects the captions; not where the server is, nor how fast it is asked."""
    decoding = config.decoding
    return {
        "server_model": config.endpoint.server_model,
        "prompt": config.endpoint.prompt,
        "image_side": config.endpoint.image_side,
        "num_captions": config.num_captions,
        "method": decoding.method,
        **{name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
        "min_tokens": decoding.min_tokens,
        "max_tokens": decoding.max_tokens,
        "seed": config.seed,
        "redraws": config.redraws,
    }


@dataclass(frozen=True)
class ServedImage:
    """What became of one sample: its captions (none: the image does not decode).

    ``redrawn`` were asked for again, ``too_long`` are left out.
    """

    key: str
    captions: ImageCaptions
    redrawn: int = 0
    too_long: int = 0


class ServedCaptioner:
    """Asks a server for the captions of images; to be used by many threads."""

    def __init__(self, config: CaptionConfig, client: ChatClient) -> None:
        self.num_captions = config.num_captions
        self._config = config
        self._client = client
        self._check_lock = threading.Lock()
        self._is_checked = False
        self._several_at_once = False
        self._decoding = threading.Semaphore(config.threads)  # not as many images at once as there are requests
        self._extras = dict[str, Any]()

    def check(self) -> None:
        """Try the server with an image, once, before the first shard is begun.

        Raises UserError when there is no server, it does not have the model, or no request with an image succeeds.
        """
        with self._check_lock:
            if not self._is_checked:
                self._try_server()
            self._is_checked = True

    def _try_server(self) -> None:
        """Find out what the server understands: several answers at once, our extra fields."""
        self._client.check_model(self._config.endpoint.server_model)
        image = _data_url(Image.linear_gradient("L").resize((PROBE_SIDE, PROBE_SIDE)).convert("RGB"), PROBE_SIDE)
        refusal: ChatError | None = None
        extras = {"logprobs": True, "min_tokens": self._config.decoding.min_tokens}
        numbers = dict.fromkeys((self._config.num_captions, 1))
        for number, self._extras in product(numbers, (extras, {"logprobs": True}, {})):
            self._client.probe = self._body(image, number, "probe")
            try:
                answers = self._client.ask(self._client.probe)
                self._several_at_once = len(answers) == number > 1
                if not any(cleaned(answer.text) for answer in answers):
                    log.warning("--server: the answer to a first image is empty; %s", advice_for(FAILED + EMPTY))
                return
            except ChatError as error:
                refusal = error
        raise UserError(
            f"--server {self._config.endpoint.server}: {self._config.endpoint.server_model} does not describe an image "
            f"({refusal}); does it take images?"
        ) from refusal

    def caption(self, sample: Sample) -> ServedImage:
        """The captions of a sample. Raises UserError when the server is gone."""
        try:
            with self._decoding:
                image = _data_url(decode_rgb(sample.image), self._config.endpoint.image_side)
        except DataError as error:
            log.warning("key %s %s; it gets no caption", sample.key, error)
            return ServedImage(sample.key, ImageCaptions())
        row = ImageCaptions()
        too_long = set[int]()
        unusable = list(range(self._config.num_captions))
        redrawn = 0
        for attempt in range(self._attempts):
            redrawn += len(unusable) if attempt else 0
            try:
                answers = self._ask(sample.key, image, unusable, attempt)
            except ChatError as error:
                if not attempt:  # else those of the attempt before are kept
                    row.reason = FAILED + error.reason
                    log.warning("key %s: %s; it gets no caption", sample.key, error)
                break
            unusable = _take(row, dict(zip(unusable, answers, strict=True)), too_long)
            if not unusable:
                break
        if row.reason is None and not any(caption.text for caption in row.captions.values()):
            row = ImageCaptions(reason=FAILED + (TOO_LONG if too_long else EMPTY))
            log.warning("key %s: %s; it gets no caption", sample.key, row.reason)
        return ServedImage(sample.key, row, redrawn, len(too_long))

    @property
    def _attempts(self) -> int:
        """How often a caption is asked for at most: without sampling the same would come again."""
        return 1 + self._config.redraws if self._config.decoding.is_sampling else 1

    def _ask(self, key: str, image: str, indices: list[int], attempt: int) -> list[ChatChoice]:
        """An answer for each of the captions ``indices``. Raises ChatError, UserError."""
        answers = list[ChatChoice]()
        if self._several_at_once and len(indices) > 1:
            body = self._body(image, len(indices), _random_name(self._config.seed, key, indices[0], attempt))
            answers = self._client.ask(body)[: len(indices)]
        for index in indices[len(answers) :]:
            body = self._body(image, 1, _random_name(self._config.seed, key, index, attempt))
            answers.append(self._client.ask(body)[0])
        return answers

    def _body(self, image: str, number: int, name: str) -> dict[str, Any]:
        """A request for ``number`` captions of an image, whose random numbers belong to ``name``."""
        decoding = self._config.decoding
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": self._config.endpoint.prompt},
        ]
        body: dict[str, Any] = {
            "model": self._config.endpoint.server_model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature if decoding.is_sampling else 0,
            "seed": draw_index(name, SEEDS),
            **self._extras,
        }
        if number > 1:
            body["n"] = number
        if decoding.method == "nucleus":
            body["top_p"] = decoding.top_p
        if decoding.method == "top_k":
            body["top_k"] = decoding.top_k
        if decoding.repetition_penalty != 1:
            body["repetition_penalty"] = decoding.repetition_penalty
        return body


def _take(row: ImageCaptions, answers: dict[int, ChatChoice], too_long: set[int]) -> list[int]:
    """Put answers into an image's row; the numbers of those to ask for again.

    Answers above the limit of a list's captions are in ``too_long`` instead.
    """
    unusable = list[int]()
    for index, answer in answers.items():
        if len(answer.text.encode(errors="surrogatepass")) > MAX_CELL_BYTES:
            too_long.add(index)
            unusable.append(index)
            continue
        too_long.discard(index)
        text = cleaned(answer.text)
        row.captions[index] = GeneratedCaption(text, answer.logprob, answer.num_tokens, answer.ended)
        if row.defect(index):
            unusable.append(index)
    row.captions = dict(sorted(row.captions.items()))
    return unusable


def _random_name(seed: int, key: str, index: int, attempt: int) -> str:
    """The name that a caption's seed belongs to: the one that its random numbers have where a model runs here."""
    name = f"caption/{seed}/{key}/{index}"
    return f"{name}/{attempt}" if attempt else name


def _data_url(image: Image.Image, side: int) -> str:
    """The image as a JPEG whose longer side has at most ``side`` pixels."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _with_failed(root: str, stage: Stage, tasks: Iterator[ShardTask]) -> Iterator[ShardTask]:
    """The tasks; a finished shard with images that the server failed at loses its record, which is the payload."""
    folder = join(root, stage.folder)
    for task in tasks:
        done = read_done(folder, task.shard)
        has_failed = done is not None and any(reason.startswith(FAILED) for reason in done.counts)
        if done is not None and has_failed and (done.config, done.inputs) == (stage.config, task.inputs):
            forget(folder, task.shard)
            yield replace(task, payload=done)
        else:
            yield task


def _earlier(root: str, stage: Stage, done: Done) -> dict[str, ImageCaptions]:
    """The images of a shard that has been captioned before, without those that the server failed at."""
    table = read_table(
        parquet_path(join(root, stage.folder), done.shard), [*(field.name for field in FIELDS), REASON_FIELD.name]
    )
    rows = dict[str, ImageCaptions]()
    for row in table.to_pylist():
        if row["reason"] is None:
            parts = zip(row["captions"], row["logprobs"], row["num_tokens"], strict=True)
            written = [GeneratedCaption(text, logprob, tokens, True) for text, logprob, tokens in parts]
            rows[row["key"]] = ImageCaptions(dict(enumerate(written)))
    return rows


def _caption_shard(
    root: str, task: ShardTask, *, stage: Stage, captioner: ServedCaptioner, concurrency: int
) -> ShardResult:
    """Caption one raw shard; an image that does not decode has empty lists, one that the server fails at has nulls."""
    captioner.check()
    done: Done | None = task.payload
    earlier = {} if done is None else _earlier(root, stage, done)

    def caption(sample: Sample) -> ServedImage:
        if sample.key in earlier:
            kept = earlier[sample.key]
            missing = captioner.num_captions - len(kept.captions) if kept.captions else 0
            return ServedImage(sample.key, kept, too_long=missing)
        return captioner.caption(sample)

    shard = ShardCaptions()
    counts = Counter[str]()
    too_long = 0
    samples = read_shard(raw_tar(root, task.shard))
    for image in prefetch_map(caption, samples, concurrency, 2 * concurrency):
        shard.rows[image.key] = image.captions
        shard.redrawn += image.redrawn
        too_long += image.too_long
        if image.captions.captions:
            counts["success"] += 1
        else:
            counts[image.captions.reason or "picture does not decode"] += 1
    outputs = shard.write(root, stage, task.shard, [REASON_FIELD])
    counters = Counter(shard.counters()) + Counter({LEFT_OUT: too_long})
    if done is not None:  # the captions themselves do not tell
        counters += Counter({name: done.counters.get(name, 0) for name in CARRIED_OVER})
    return ShardResult(dict(counts), outputs, counters=dict(sorted(counters.items())))
