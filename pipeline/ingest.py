"""Stage `ingest`: a list of URLs, a folder of pictures or img2dataset's shards → ROOT/raw in img2dataset's layout."""

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import chain, islice
from types import TracebackType
from typing import Literal

from pipeline.adopt import adopt_shard, adopt_tasks
from pipeline.fetch import Fetcher, FetchError, FetchRules
from pipeline.images import JPEG_QUALITY, MAX_PIXELS, BadImage, convert
from pipeline.raw_shard import FOLDER, RESIZE, Outcome, write_raw_shard
from pipeline.sources import Row, detect, folder_rows, list_rows
from pipeline.stage import Result, Root, Stage, Summary, Task, die_with_parent, run_stage
from shards_spec.files import UserError, join, names, remove, sha256_json
from shards_spec.manifest import STATS_PATTERN, shard_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestConfig:
    """Download a list, read a folder of pictures or take over img2dataset's shards; write ROOT/raw."""

    root: Root
    """the dataset: a folder or an fsspec URL; writes raw/"""
    source: str
    """a list of URLs (.tsv, .csv, .parquet, also .gz), a folder of pictures, or a folder of img2dataset's shards"""
    format: Literal["auto", "cc3m", "cc12m", "csv", "parquet", "folder", "img2dataset"] = "auto"
    """form of the source: cc3m is caption, tab, URL; cc12m is URL, tab, caption"""
    shard_size: int = 1000
    """inputs per shard"""
    image_size: int = 256
    """pixels of the shorter side; smaller pictures are not enlarged"""
    concurrency: int = 64
    """downloads in flight"""
    workers: int = 0
    """processes that decode pictures; 0: one per core"""
    timeout_s: float = 10.0
    """seconds for one try, from name look-up to last byte"""
    retries: int = 1
    """further tries after a time-out, a lost connection or an answer 5xx"""
    max_bytes: int = 20_000_000
    """larger files are left out"""
    allow_private: bool = False
    """also fetch from addresses that are not public, such as 127.0.0.1 or 10.0.0.0/8"""
    ignore_opt_out: bool = False
    """also take pictures whose X-Robots-Tag says noai, noimageai, noindex or noimageindex"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        limits = {"shard_size": 1, "image_size": 1, "concurrency": 1, "workers": 0, "retries": 0, "max_bytes": 1}
        for field, least in limits.items():
            if (value := getattr(self, field)) < least:
                raise UserError(f"{field} is {value}: allowed are whole numbers from {least}")
        if not self.timeout_s > 0:
            raise UserError(f"timeout_s is {self.timeout_s}: allowed are seconds above 0")
        if not self.source:
            raise UserError("source is empty: give a list, a folder of pictures or a folder of img2dataset's shards")

    @property
    def processes(self) -> int:
        """Decoder processes: as asked, else one per core this process may use."""
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.workers or here or 1


def ingest(config: IngestConfig) -> Summary:
    """Make what is missing of ROOT/raw.

    Raises UserError for a source that cannot be used or finished shards of another config, ShardsFailed for
    img2dataset's broken shards.
    """
    form = detect(config.source) if config.format == "auto" else config.format
    log.info("%s: %s", config.source, form)
    run = partial(run_stage, config.root, overwrite=config.overwrite, source=config.source)
    if form == "img2dataset":
        adopted = adopt_tasks(config.root, config.source)
        stage = Stage("ingest", FOLDER, {"kind": "img2dataset"})
        summary = run(stage, adopted, adopt_shard, total=len(adopted), workers=config.processes)
    elif form == "folder":
        stage = Stage("ingest", FOLDER, _picture_config(config, "folder"))
        tasks = shard_tasks(folder_rows(config.source), config)
        summary = run(stage, tasks, partial(folder_shard, config), workers=config.processes)
    else:
        web = {"allow_private": config.allow_private, "ignore_opt_out": config.ignore_opt_out}
        stage = Stage("ingest", FOLDER, {**_picture_config(config, "urls"), **web})
        with Downloader(config) as downloader:
            summary = run(stage, shard_tasks(list_rows(config.source, form), config), downloader.shard)
    _remove_surplus(config, summary.shards)
    return summary


def _picture_config(config: IngestConfig, kind: str) -> dict[str, str | int]:
    return {
        "kind": kind,
        "shard_size": config.shard_size,
        "image_size": config.image_size,
        "max_bytes": config.max_bytes,
        "max_pixels": MAX_PIXELS,
        "jpeg_quality": JPEG_QUALITY,
    }


def shard_tasks(rows: Iterator[Row], config: IngestConfig) -> Iterator[Task]:
    """Rows in slices of ``shard_size``. Raises UserError, before the first one, when there is no row."""
    first = next(rows, None)
    if first is None:
        raise UserError(f"--source {config.source} has no row and no picture in it; nothing to ingest")
    rest = chain([first], rows)
    shard = 0
    while chunk := list(islice(rest, config.shard_size)):
        yield Task(shard, {"rows": sha256_json([astuple(row) for row in chunk])}, chunk)
        shard += 1


def _remove_surplus(config: IngestConfig, shards: int) -> None:
    """Shards beyond the source's end, left by a longer source: an error, or removed with ``overwrite``."""
    folder = join(config.root, FOLDER)
    found = [int(match[1]) for name in names(folder) if (match := STATS_PATTERN.fullmatch(name))]
    surplus = sorted(number for number in found if number >= shards)
    if surplus and not config.overwrite:
        raise UserError(
            f"{folder} has {len(surplus)} shards more ({shard_name(surplus[0])} and on) than --source {config.source} "
            "makes; use another ROOT, or --overwrite, which deletes them"
        )
    for number in surplus:
        for ending in ("_stats.json", ".tar", ".parquet"):
            remove(join(folder, shard_name(number) + ending))


def decode(data: bytes, image_size: int) -> Outcome:
    """A picture, or the named reason why the bytes are none."""
    try:
        return convert(data, image_size)
    except BadImage as error:
        return f"{RESIZE}{error}"


def _timed(result: Result, start: float) -> Result:
    """With img2dataset's time fields (seconds since 1970)."""
    end = time.time()
    return replace(result, extra={"duration": end - start, "start_time": start, "end_time": end})


def folder_shard(config: IngestConfig, root: str, task: Task) -> Result:
    """One shard of a folder of pictures."""
    start, rows = time.time(), task.payload
    outcomes = [_read(config, row) for row in rows]
    return _timed(write_raw_shard(root, task.shard, rows, outcomes, config.shard_size), start)


def _read(config: IngestConfig, row: Row) -> Outcome:
    if row.problem or row.url is None:
        return row.problem or "no file name"
    try:
        path = join(config.source, row.url)
        if os.path.getsize(path) > config.max_bytes:
            return "too large"
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return "file not readable"
    return decode(data, config.image_size) if data else "empty file"


class Downloader:
    """What outlives single shards of a list: the event loop, the web session, the decoder processes."""

    def __init__(self, config: IngestConfig) -> None:
        self._config = config
        rules = FetchRules(
            config.timeout_s, config.max_bytes, config.retries, config.allow_private, config.ignore_opt_out
        )
        self._fetcher = Fetcher(rules, config.concurrency)
        self._runner = asyncio.Runner()

    def __enter__(self) -> "Downloader":
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._config.processes, context, initializer=die_with_parent)
        self._runner.run(self._fetcher.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._fetcher.__aexit__(kind, error, trace))
        self._runner.close()
        self._pool.shutdown(wait=error is None, cancel_futures=True)

    def shard(self, root: str, task: Task) -> Result:
        """Download, decode and write one shard."""
        start = time.time()
        outcomes = self._runner.run(self._outcomes(task.payload))
        return _timed(write_raw_shard(root, task.shard, task.payload, outcomes, self._config.shard_size), start)

    async def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        """What became of each row; at most ``concurrency`` of them are in memory undecoded."""
        outcomes: list[Outcome] = [""] * len(rows)
        queue = iter(enumerate(rows))

        async def work(queue: Iterable[tuple[int, Row]]) -> None:
            for index, row in queue:
                outcomes[index] = await self._outcome(row)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, len(rows))):
                group.create_task(work(queue))
        return outcomes

    async def _outcome(self, row: Row) -> Outcome:
        if row.problem or row.url is None:
            return row.problem or "no URL"
        try:
            data = await self._fetcher.get(row.url)
        except FetchError as error:
            return str(error)
        return await asyncio.get_running_loop().run_in_executor(self._pool, decode, data, self._config.image_size)
