"""Stage `ingest`: a list of URLs, a folder of images or img2dataset's shards → ROOT/raw in img2dataset's layout."""

import logging
import os
import resource
import time
from collections.abc import Container, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import pyarrow as pa

from pipeline.core.runner import ALL, Result, Root, RunOptions, ShardAssignment, Stage, Summary, Task, run_stage
from pipeline.ingest.additional_columns import ALL_COLUMNS, check_named, plain, read_conditions
from pipeline.ingest.cells import ADDRESS_TOO_LONG, CAPTION_TOO_LONG, KEPT_CHARS
from pipeline.ingest.detect import detect
from pipeline.ingest.downloader import Downloader
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.filters import Selection, read_exclusions
from pipeline.ingest.http_client import FetchRules
from pipeline.ingest.images import JPEG_QUALITY, ImageRules
from pipeline.ingest.img2dataset import import_shard, import_tasks
from pipeline.ingest.parquet_cells import other_types
from pipeline.ingest.raw_shard import Inputs, sample_key, write_raw_shard
from pipeline.ingest.retry import additional_shards, kept_tasks, remove_shard, retry_tasks
from pipeline.ingest.rows import Columns, Row
from pipeline.ingest.source_files import Format, source_files
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError, free_bytes, is_url, join, sha256_bytes, sha256_json
from shards_spec.layout import FOLDERS, RAW, shard_name
from shards_spec.manifest import finished_shards

log = logging.getLogger(__name__)
OTHER_FILES = 200  # that this process has open beside its downloads
MEAN_CHARS = 8192  # of a row's texts over its shard; more is no captions but something that fills the memory
LISTS: tuple[Format, ...] = ("cc3m", "cc12m", "csv", "jsonl", "parquet", "txt")
FILES: tuple[Format, ...] = ("webdataset", "hf-parquet")  # with images, as a shell's *.tar names them
NO_COLUMNS: tuple[Format, ...] = ("cc3m", "cc12m", "txt", "img2dataset")  # without names
OTHER_FOLDERS = tuple(folder for folder in FOLDERS if folder != RAW)
ENOUGH_ROWS = 2000  # to guess from how large the rest will be


@dataclass(frozen=True)
class IngestConfig:
    """Download a list, read a folder of images or take over img2dataset's shards; write ROOT/raw."""

    root: Root
    """the dataset: a folder or an fsspec URL; writes raw/"""
    source: tuple[str, ...]
    """links in .tsv, .csv, .jsonl or .parquet (also .gz), a folder or glob of such files, Parquet files with images,
    a folder of images, WebDataset tars, or img2dataset's shards; local or an fsspec URL; several lists or tars are
    read as one"""
    format: Literal["auto"] | Format = "auto"
    """form of the source: cc3m is caption, tab, URL; cc12m is URL, tab, caption"""
    url_col: str | None = None
    """column with the link (or the image's bytes); found by its name when not given"""
    caption_col: str | None = None
    """column with the caption; found by its name when not given"""
    shard_size: int = 1000
    """inputs per shard"""
    image_size: int = 256
    """pixels of the shorter side; smaller images are not enlarged"""
    concurrency: int = 1024
    """downloads in flight"""
    per_host: int = 16
    """downloads in flight from one host"""
    open_shards: int = 0
    """shards under way at once, so that a slow host of one holds nobody; 0: four per core, from 12 to 64"""
    workers: int = 0
    """processes that decode images; 0: one per core"""
    timeout_s: float = 10.0
    """seconds for one try, from name look-up to last byte"""
    decode_timeout_s: float = 30.0
    """seconds for decoding one image"""
    retries: int = 1
    """further tries, after a pause, where one can help: a time-out, a lost connection, an answer 429 or 5xx"""
    max_bytes: int = 20_000_000
    """larger files are left out"""
    max_pixels: int = 100_000_000
    """images with more are left out"""
    min_size: int = 0
    """images whose shorter side has fewer pixels are left out"""
    max_aspect_ratio: float = 0.0
    """images with a larger ratio of the sides are left out; 0: none is"""
    min_caption_chars: int = 0
    """rows with a shorter caption are left out"""
    max_caption_chars: int = 0
    """rows with a longer caption are left out; 0: none is"""
    sane_captions: bool = False
    """leave out captions without letters, addresses and file names, captions that repeat themselves or are symbols"""
    dedup: Literal["none", "exact", "near"] = "none"
    """leave out an image that stands earlier in its shard under another link; `clipmill dedup` looks at all shards"""
    near_bits: int = 3
    """bits of 64 by which perceptual hashes of near-duplicates differ at most"""
    where: tuple[str, ...] = ()
    """conditions on a list's other columns that a row has to meet, such as 'similarity >= 0.3' 'NSFW == UNLIKELY'"""
    save_additional_columns: tuple[str, ...] = (ALL_COLUMNS,)
    """which of a list's other columns raw/ keeps: names, all ('*'), or none (nothing after the option)"""
    exclude: tuple[str, ...] = ()
    """text files of links, or of sha256 of images, to leave out: one per line, also .gz"""
    allow_private: bool = False
    """also fetch from addresses that are not public, such as 127.0.0.1 or 10.0.0.0/8"""
    ignore_opt_out: bool = False
    """also take images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex"""
    nameservers: tuple[str, ...] = ()
    """DNS servers to ask in place of the system's"""
    retry_failed: bool = False
    """after a finished run: try again what failed for a reason that may pass, into additional shards"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        ones = ("shard_size", "image_size", "concurrency", "per_host", "max_bytes", "max_pixels")
        zeros = (
            "open_shards", "workers", "retries", "min_size", "min_caption_chars", "max_caption_chars", "near_bits"
        )  # fmt: skip
        for field, least in {**dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)}.items():
            if (value := getattr(self, field)) < least:
                raise UserError(f"{field} is {value}: allowed are whole numbers from {least}")
        for field in ("timeout_s", "decode_timeout_s"):
            if not getattr(self, field) > 0:
                raise UserError(f"{field} is {getattr(self, field)}: allowed are seconds above 0")
        if self.max_aspect_ratio and not self.max_aspect_ratio >= 1:
            raise UserError(f"max_aspect_ratio is {self.max_aspect_ratio}: allowed are numbers from 1, and 0 for any")
        if not self.sources or not all(self.sources):
            raise UserError("source is empty: give a list, a folder of images or a folder of img2dataset's shards")
        if self.retry_failed and self.overwrite:
            raise UserError("--retry-failed adds to finished shards, --overwrite makes them again: give one of them")

    @property
    def named(self) -> str:
        """The sources as text."""
        return " ".join(self.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources; callers may give one as a string."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def columns(self) -> Columns:
        """The given names of the caption's and the link's column."""
        return self.caption_col, self.url_col

    @property
    def processes(self) -> int:
        """Decoder processes: as asked, else one per core this process may use."""
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.workers or here or 1

    @property
    def shards_at_once(self) -> int:
        """Shards under way at once."""
        return self.open_shards or min(64, max(12, 4 * self.processes))


def ingest(config: IngestConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Make what is missing of ROOT/raw.

    Raises UserError for a source that cannot be used, finished shards of another config or a full disk, ShardsFailed
    for img2dataset's broken shards.
    """
    form = _form(config)
    log.info("%s: %s", config.named, form)
    if form == "img2dataset":
        stage = Stage("ingest", RAW, {"kind": "img2dataset"})
        adopted = import_tasks(config.root, config.sources[0])
        _refuse_surplus(config, len(adopted))
        options = RunOptions(
            workers=config.processes,
            assignment=assignment,
            overwrite=config.overwrite,
            total=len(adopted),
            remove_surplus=partial(_remove_surplus, config),
            source=config.named,
        )
        return run_stage(config.root, stage, adopted, import_shard, options)
    return _ingest_rows(config, form, assignment)


def source_shards(config: IngestConfig) -> int | None:
    """About how many shards a source makes, without reading it; None when only reading it would tell."""
    form = _form(config)
    return len(finished_shards(config.sources[0])) if form == "img2dataset" else Listing(config, form).shards


def _form(config: IngestConfig) -> Format:
    """The one form of all sources. Raises UserError for sources that cannot be read together, and unused options."""
    for source in config.sources:
        _check_outside(config.root, source)
    forms = (
        [detect(source, config.columns) for source in config.sources] if config.format == "auto" else [config.format]
    )
    if len(set(forms)) > 1:
        found = ", ".join(f"{source} is {form}" for source, form in zip(config.sources, forms, strict=True))
        raise UserError(f"--source: lists of several forms ({found}); give lists of one form, or ingest into two ROOTs")
    form = forms[0]
    if len(config.sources) > 1 and form not in (*LISTS, *FILES):
        raise UserError(f"--source: several sources of form {form}; only lists are read together, give one folder")
    for option, given in (("--caption-col", config.caption_col), ("--url-col", config.url_col)):
        if given is not None and form in NO_COLUMNS and (form, option) != ("txt", "--url-col"):  # which is its header
            raise UserError(f"{option} {given!r} means nothing for a source of form {form}; leave it out")
    if form not in (*LISTS, "hf-parquet") and config.where:
        raise UserError(f"--where means nothing for a source of form {form}, which has no other columns; leave it out")
    return form


def _check_outside(root: str, source: str) -> None:
    """Raises UserError for a source that is ROOT itself, or a folder of it that a stage writes."""
    place, own = (
        path.rstrip("/") if is_url(path) else os.path.realpath(path) for path in (source, root)
    )  # fmt: skip
    if place == own or any(f"{place}/".startswith(f"{own}/{folder}/") for folder in OTHER_FOLDERS):
        raise UserError(
            f"--source {source} is ROOT itself, or what its stages write: give another folder as ROOT; shards of "
            f"img2dataset that lie in {join(root, RAW)} are taken as they are by --source {join(root, RAW)}"
        )


def _ingest_rows(config: IngestConfig, form: Format, assignment: ShardAssignment) -> Summary:
    """Everything but img2dataset's shards: rows, from the web or from where they lie, to shards."""
    selection = Selection(
        config.sane_captions, config.min_caption_chars, config.max_caption_chars, config.dedup != "none",
        config.near_bits if config.dedup == "near" else None, read_conditions(config.where),
        read_exclusions(config.exclude),
    )  # fmt: skip
    images = ImageRules(config.image_size, config.max_pixels, config.min_size, config.max_aspect_ratio)
    fetch = FetchRules(
        config.timeout_s, config.max_bytes, config.retries, _affordable(config.concurrency), config.per_host,
        config.allow_private, config.ignore_opt_out, config.nameservers,
    )  # fmt: skip
    stage = Stage("ingest", RAW, _shape(config, form, selection, images))
    source = Listing(config, form)
    tasks = retry_tasks(config.root, config.shard_size) if config.retry_failed else source.tasks(assignment)
    with Downloader(fetch, images, config.processes, config.decode_timeout_s) as downloader:
        work = partial(rows_to_shard, downloader=downloader, selection=selection)
        options = RunOptions(
            threads=config.shards_at_once,
            assignment=assignment,
            overwrite=config.overwrite,
            total=None if config.retry_failed else source.shards,
            status_text=partial(_live, source, downloader, config.root),
            remove_surplus=partial(_remove_surplus, config),
            source=config.named,
        )
        summary = run_stage(config.root, stage, tasks, work, options)
    if nothing := downloader.tally.nothing():
        log.warning(nothing)
    return summary


def _shape(config: IngestConfig, form: Format, selection: Selection, images: ImageRules) -> dict[str, Any]:
    """All of the config that decides which samples there are and what they hold."""
    return {
        "kind": form,
        "columns": [config.caption_col, config.url_col],
        "shard_size": config.shard_size,
        "max_bytes": config.max_bytes,
        "jpeg_quality": JPEG_QUALITY,
        **asdict(images),
        **{name: value for name, value in asdict(selection).items() if name not in ("exclusions", "where")},
        **({"where": list(config.where)} if config.where else {}),
        **({"other_columns": list(kept)} if (kept := config.save_additional_columns) != (ALL_COLUMNS,) else {}),
        "exclusions": sha256_bytes(selection.exclusions.tobytes()) if len(selection.exclusions) else None,
        "allow_private": config.allow_private,
        "ignore_opt_out": config.ignore_opt_out,
    }


def _affordable(concurrency: int) -> int:
    """As many connections as this process may open files, which it asks to be allowed as many as it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = concurrency + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("the system allows %d open files (ulimit -n): fewer downloads in flight than asked", soft)
    return concurrency if soft == resource.RLIM_INFINITY else max(1, min(concurrency, soft - OTHER_FILES))


class Listing:
    """The rows of a source in shards, and how far the reading is."""

    def __init__(self, config: IngestConfig, form: Format) -> None:
        self._config, self._form = config, form
        self.read = 0
        estimates = [estimate_rows(source, form) for source in config.sources]
        self.rows = sum(estimate[0] for estimate in estimates if estimate) if all(estimates) else None

    @property
    def shards(self) -> int | None:
        """About how many shards the rows make."""
        return -(-self.rows // self._config.shard_size) if self.rows else None

    def tasks(self, assignment: ShardAssignment = ALL) -> Iterator[Task]:
        """Slices of ``shard_size`` rows, the assignment's, then the shards of earlier retries.

        Raises UserError when there is no row, more rows than when failed ones were tried again, or fewer shards than
        are there.
        """
        config, shard = self._config, 0
        additional = additional_shards(config.root)
        if config.overwrite:
            for number in reversed(additional):
                remove_shard(config.root, number)
            additional = {}
        rows = chain.from_iterable(list_rows(source, self._form, config.columns) for source in config.sources)
        types = self._types()
        size = config.shard_size
        chunks = iter(lambda: list(bounded(islice(rows, size), size * MEAN_CHARS)), [])
        for chunk, last in _with_last(chunks):
            if last:  # said before the last one is made again with fewer rows
                _refuse_surplus(config, shard + 1, additional)
            if shard in additional:
                raise UserError(
                    f"--source {config.named} has more rows than when its failed rows were tried again; give the new "
                    "rows as a list of their own to another ROOT, or make all anew with --overwrite"
                )
            if not shard:  # before anything is written under a config that cannot be meant
                check_named(chunk, read_conditions(config.where), config.save_additional_columns)
            if assignment.claim(shard):  # asked before the rows are hashed, which takes longer than reading them
                keys = [sample_key(shard, index, config.shard_size) for index in range(len(chunk))]
                inputs = Inputs(keys, chunk, {}, types, config.save_additional_columns)
                former = {"rows": sha256_json([_identity(row) for row in chunk])}
                others = [{name: plain(cell) for name, cell in row.extra.items()} for row in chunk]
                more = {"columns": sha256_json(others)} if any(others) else {}
                yield Task(shard, former | more, inputs, former)
            self.read += len(chunk)
            shard += 1
        if not shard:
            raise UserError(f"--source {config.named} has no row and no image in it; nothing to ingest")
        self.rows = self.read
        yield from kept_tasks(config.root, shard)

    def _types(self) -> dict[str, pa.DataType]:
        """Of the list's columns, where it has types: those of its first file."""
        if self._form not in ("parquet", "hf-parquet"):
            return {}
        return other_types(source_files(self._config.sources[0], self._form)[0].path)


def bounded(rows: Iterator[Row], most: int) -> Iterator[Row]:
    """The rows of a shard, whose texts have ``most`` characters: when they are used up, only short ones are kept."""
    for row in rows:
        most -= len(row.caption or "") + len(row.url or "") + sum(len(str(value)) for value in row.extra.values())
        if most >= 0:
            yield row
            continue
        long_caption, long_url = (len(text or "") > KEPT_CHARS for text in (row.caption, row.url))
        problem = CAPTION_TOO_LONG if long_caption else ADDRESS_TOO_LONG if long_url else None
        cut = [text and text[:KEPT_CHARS] for text in (row.caption, row.url)]
        yield replace(row, caption=cut[0], url=cut[1], problem=row.problem or problem, extra={})


def _identity(row: Row) -> list[Any]:
    """What a row is, wherever its source lies: a folder that was moved is the same folder."""
    return [row.caption, row.url, row.problem, row.stamp, *(astuple(row.image_ref)[1:] if row.image_ref else ())]


def _live(source: Listing, downloader: Downloader, root: str) -> str:
    """What the progress line says; warns, once, when nothing comes or the disk will not hold what is still to come."""
    tally = downloader.tally
    done = sum(tally.outcomes.values())
    left = max(0, source.rows - source.read + tally.given - done) if source.rows and source.read else None
    if done > ENOUGH_ROWS and not tally.warned:
        needed, free = (left or 0) * tally.image_bytes // done, free_bytes(root)
        if free is not None and needed > free:
            log.warning("about %d GB more are needed for %d rows, %s has %d", needed >> 30, left, root, free >> 30)
            tally.warned = True
        if nothing := tally.nothing():
            log.warning(nothing)
            tally.warned = True
    return tally.line(left)


def rows_to_shard(root: str, task: Task, *, downloader: Downloader, selection: Selection) -> Result:
    """Download or read, decode and write one shard. Raises UserError when the disk is full."""
    start, inputs = time.time(), task.payload
    rows = selection.before(inputs.rows)
    outcomes = selection.after(rows, downloader.outcomes(rows))
    result = write_raw_shard(root, task.shard, inputs, outcomes)
    end = time.time()  # img2dataset's time fields are seconds since 1970
    return replace(result, extra={"duration": end - start, "start_time": start, "end_time": end})


def _with_last(chunks: Iterator[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
    """Each chunk, and whether it is the last one."""
    before = next(chunks, None)
    for chunk in chunks:
        assert before is not None
        yield before, False
        before = chunk
    if before is not None:
        yield before, True


def _surplus(config: IngestConfig, shards: int) -> list[int]:
    """Shards beyond the source's end, left by a longer source."""
    return [number for number in finished_shards(join(config.root, RAW)) if number >= shards]


def _refuse_surplus(config: IngestConfig, shards: int, additional: Container[int] = ()) -> None:
    """Raise UserError when there are more shards than the source makes, but for the ``additional`` ones of retries."""
    surplus = [number for number in _surplus(config, shards) if number not in additional]
    if surplus and not config.overwrite:
        raise UserError(
            f"{join(config.root, RAW)} has {len(surplus)} shards more ({shard_name(surplus[0])} and on) than "
            f"--source {config.named} makes; use another ROOT, or --overwrite, which deletes them"
        )


def _remove_surplus(config: IngestConfig, folder: str, shards: int) -> None:
    """Before the totals are written: an error, or with ``overwrite`` they go."""
    _refuse_surplus(config, shards)
    for number in _surplus(config, shards):
        remove_shard(config.root, number)
