"""Stage `ingest`: a list of URLs, a folder of images or img2dataset's shards → ROOT/raw in img2dataset's layout."""

import logging
import os
import resource
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from pipeline.core.no_success import advice_for
from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardTask,
    Stage,
    Summary,
    read_compatible_record,
    run_stage,
)
from pipeline.core.taken_down import read_takedown_hashes
from pipeline.ingest.additional_columns import ALL_COLUMNS, read_conditions
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.datacompdr_source import HASH
from pipeline.ingest.detect import detect
from pipeline.ingest.downloader import Downloader
from pipeline.ingest.filters import Selection, read_exclusions, verify_sha256
from pipeline.ingest.http_client import FetchRules
from pipeline.ingest.images import JPEG_QUALITY, ImageRules, Outcome
from pipeline.ingest.img2dataset import import_shard, import_tasks
from pipeline.ingest.labelled_sources import source_classes
from pipeline.ingest.listing import Listing, refuse_surplus, remove_surplus
from pipeline.ingest.raw_shard import RawShardInput, write_raw_shard
from pipeline.ingest.retry import retry_tasks
from pipeline.ingest.rows import Row
from pipeline.ingest.source_files import Format
from shards_spec.class_names import (
    CLASS_LIST,
    class_list_hash,
    describe_difference,
    read_class_names,
    write_class_names,
)
from shards_spec.files import UserError, exists, free_bytes, is_url, join, remove, sha256_bytes
from shards_spec.layout import FOLDERS, RAW, class_names_txt
from shards_spec.manifest import finished_shards, read_done

log = logging.getLogger(__name__)
OTHER_OPEN_FILES = 200  # of this process, beside its downloads
ROWS_BEFORE_WARNING = 2000  # enough to estimate how large the rest will be
LIST_FORMS: tuple[Format, ...] = ("cc3m", "cc12m", "csv", "jsonl", "parquet", "txt")
SEVERAL_FILES: tuple[Format, ...] = (
    "webdataset",
    "datacompdr",
    "hf-parquet",
)  # files with images, given one by one by a shell's *
WITHOUT_COLUMN_NAMES: tuple[Format, ...] = ("cc3m", "cc12m", "txt", "classes", "datacompdr", "img2dataset")
ORIGINAL_CAPTIONS = "original_captions"  # in records: that rows have their captions from --original-captions
UNRECORDED = ("exclusions", "where", "taken_down")  # fields of a selection that records do not have under their names
OUTPUT_FOLDERS = tuple(folder for folder in FOLDERS if folder != RAW)  # of the stages after this one


def ingest(config: IngestConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Make what is missing of ROOT/raw.

    Raises UserError for a source that cannot be used, finished shards of another config or a full disk, ShardsFailed
    for img2dataset's broken shards.
    """
    form = source_form(config)
    log.info("%s: %s", config.source_text, form)
    if form == "img2dataset":
        return _import_img2dataset(config, assignment)
    return _ingest_rows(config, form, assignment)


def source_shards(config: IngestConfig) -> int | None:
    """About how many shards a source makes, without reading it; None when only reading it would tell."""
    form = source_form(config)
    return len(finished_shards(config.sources[0])) if form == "img2dataset" else Listing(config, form).shards


def source_form(config: IngestConfig) -> Format:
    """The one form of all sources. Raises UserError for sources that cannot be read together, and unused options."""
    for source in config.sources:
        _check_outside(config.root, source)
    if config.format == "auto":
        forms = [detect(source, config.columns) for source in config.sources]
    else:
        forms = [config.format]
    form = forms[0]
    if form == "classes":
        _check_classes_source(config)
    if len(set(forms)) > 1:
        found = ", ".join(f"{source} is {form}" for source, form in zip(config.sources, forms, strict=True))
        raise UserError(f"--source: lists of several forms ({found}); give lists of one form, or ingest into two ROOTs")
    if len(config.sources) > 1 and form not in (*LIST_FORMS, *SEVERAL_FILES):
        raise UserError(f"--source: several sources of form {form}; only lists are read together, give one folder")
    for option, given in (("--caption-col", config.caption_col), ("--url-col", config.url_col)):
        is_header = form == "txt" and option == "--url-col"  # a .txt list may have the column's name as first line
        if given is not None and form in WITHOUT_COLUMN_NAMES and not is_header:
            raise UserError(f"{option} {given!r} means nothing for a source of form {form}; leave it out")
    if form != "datacompdr" and config.original_captions is not None:
        raise UserError(f"--original-captions goes with DataCompDR's tars, --source {config.source_text} is {form}")
    if form not in (*LIST_FORMS, "hf-parquet") and config.sha256_col is not None:
        raise UserError(
            f"--sha256-col means nothing for a source of form {form}, which brings its hashes or none; leave it out"
        )
    if form not in (*LIST_FORMS, "hf-parquet", "datacompdr") and config.where:
        raise UserError(f"--where means nothing for a source of form {form}, which has no other columns; leave it out")
    return form


def _check_outside(root: str, source: str) -> None:
    """Raises UserError for a source that is ROOT itself, or a folder of it that a stage writes."""
    source_path = _absolute(source)
    root_path = _absolute(root)
    written = any(f"{source_path}/".startswith(f"{root_path}/{folder}/") for folder in OUTPUT_FOLDERS)
    if source_path == root_path or written:
        raise UserError(
            f"--source {source} is ROOT itself, or what its stages write: give another folder as ROOT; shards of "
            f"img2dataset that lie in {join(root, RAW)} are taken as they are by --source {join(root, RAW)}"
        )


def _check_classes_source(config: IngestConfig) -> None:
    """Raises UserError for options that mean nothing for class folders, and a ROOT in one, which would be a class."""
    if config.retry_failed:
        raise UserError("--retry-failed: images of class folders are not downloaded; run the same command without it")
    if f"{_absolute(config.root)}/".startswith(f"{_absolute(config.sources[0])}/"):
        raise UserError(f"{config.root} is in --source {config.sources[0]}, where its folders are classes: move ROOT")


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.realpath(path)


def _import_img2dataset(config: IngestConfig, assignment: ShardAssignment) -> Summary:
    """Take over img2dataset's shards as they are."""
    if config.overwrite:
        remove(class_names_txt(config.root))  # of labelled images that were here before
    tasks = import_tasks(config.root, config.sources[0])
    refuse_surplus(config, len(tasks))
    options = RunOptions(
        workers=config.decoder_processes,
        assignment=assignment,
        overwrite=config.overwrite,
        total=len(tasks),
        remove_surplus=lambda _, shards: remove_surplus(config, shards),
        source=config.source_text,
    )
    work = partial(import_shard, taken_down=read_takedown_hashes(config.root))
    return run_stage(config.root, Stage("ingest", RAW, {"kind": "img2dataset"}), tasks, work, options)


def _ingest_rows(config: IngestConfig, form: Format, assignment: ShardAssignment) -> Summary:
    """Everything but img2dataset's shards: rows whose images are downloaded, or read from the source, to shards."""
    selection = _selection(config)
    image_rules = _image_rules(config)
    settings = _output_settings(config, form, selection, image_rules)
    sha256_column = _sha256_column(config, form)
    classes = source_classes(config.sources[0]) if form == "classes" else None
    if classes is not None:
        settings[CLASS_LIST] = class_list_hash(classes)
    stage = Stage("ingest", RAW, settings)
    _update_class_names(config, stage, classes)
    listing = Listing(config, form)
    tasks = retry_tasks(config.root, config.shard_size) if config.retry_failed else listing.tasks(assignment)
    with _downloader(config) as downloader:
        work = partial(rows_to_shard, downloader=downloader, selection=selection, sha256_column=sha256_column)
        options = RunOptions(
            threads=config.shards_in_progress,
            assignment=assignment,
            overwrite=config.overwrite,
            total=None if config.retry_failed else listing.shards,
            status_text=partial(_status_text, listing, downloader, config.root),
            remove_surplus=lambda _, shards: remove_surplus(config, shards),
            source=config.source_text,
        )
        return run_stage(config.root, stage, tasks, work, options)


def fetch_missing(config: IngestConfig, rows: list[Row], known: list[Outcome | None]) -> list[Outcome]:
    """The outcomes of a shard's rows: those that are ``known``, and for None what `ingest` makes of the row now.

    Writes nothing. Raises UserError for a file of --exclude that is not there.
    """
    selection = _selection(config)
    missing = [index for index, outcome in enumerate(known) if outcome is None]
    with _downloader(config) as downloader:
        wanted = selection.filter_rows([rows[index] for index in missing])
        fetched = _download(downloader, wanted, _sha256_column(config, config.format))
    made = dict(zip(missing, fetched, strict=True))
    outcomes = [made[index] if outcome is None else outcome for index, outcome in enumerate(known)]
    return selection.filter_images(rows, outcomes)


def _sha256_column(config: IngestConfig, form: str) -> str | None:
    """The column with the hash that an image's file must have, if the source has one."""
    return HASH if form == "datacompdr" else config.sha256_col


def _download(downloader: Downloader, rows: list[Row], sha256_column: str | None) -> list[Outcome]:
    """What became of each row, without images whose hash is not that of their row."""
    outcomes = downloader.outcomes(rows)
    if sha256_column is None:
        return outcomes
    return [verify_sha256(*pair, sha256_column) for pair in zip(rows, outcomes, strict=True)]


def _selection(config: IngestConfig) -> Selection:
    """Which rows and images are wanted. Raises UserError for a file of --exclude that is not there."""
    return Selection(
        sane_captions=config.sane_captions,
        min_caption_chars=config.min_caption_chars,
        max_caption_chars=config.max_caption_chars,
        duplicates=config.dedup != "none",
        near_bits=config.near_bits if config.dedup == "near" else None,
        where=read_conditions(config.where),
        exclusions=read_exclusions(config.exclude),
        taken_down=read_takedown_hashes(config.root),
    )


def _image_rules(config: IngestConfig) -> ImageRules:
    """How images are decoded and shrunk."""
    return ImageRules(
        image_size=config.image_size,
        max_pixels=config.max_pixels,
        min_size=config.min_size,
        max_aspect_ratio=config.max_aspect_ratio,
    )


def _downloader(config: IngestConfig) -> Downloader:
    """What turns rows into images."""
    fetch_rules = FetchRules(
        timeout_s=config.timeout_s,
        max_bytes=config.max_bytes,
        retries=config.retries,
        concurrency=_allowed_connections(config.concurrency),
        per_host=config.per_host,
        allow_private=config.allow_private,
        ignore_opt_out=config.ignore_opt_out,
        nameservers=config.nameservers,
    )
    return Downloader(
        fetch_rules,
        _image_rules(config),
        decoders=config.decoder_processes,
        decode_timeout_s=config.decode_timeout_s,
    )


def _update_class_names(config: IngestConfig, stage: Stage, classes: list[str] | None) -> None:
    """Write the list of classes, or with ``overwrite`` take away that of labelled images that were here before.

    A list that was edited is as it was then. Raises UserError where ROOT has other classes, or finished shards of
    another config.
    """
    path = class_names_txt(config.root)
    if config.overwrite and classes is None:
        remove(path)
    if classes is None:
        return
    if not config.overwrite:
        folder = join(config.root, RAW)
        done = read_done(folder, 0)
        is_ours = done is not None and done.config.get(CLASS_LIST) == stage.config[CLASS_LIST]
        if not is_ours and exists(path) and (there := read_class_names(path)) != classes:
            raise UserError(
                f"{path}: --source {config.source_text} has other classes ({describe_difference(there, classes)}); "
                "use another ROOT, or make all shards again with --overwrite"
            )
        read_compatible_record(folder, stage, 0)
    write_class_names(path, classes)


def _output_settings(config: IngestConfig, form: Format, selection: Selection, images: ImageRules) -> dict[str, Any]:
    """Every setting that affects which samples there are and what they hold, by its name on disk."""
    selected = {name: value for name, value in asdict(selection).items() if name not in UNRECORDED}
    # options that came later are written only when given, so that shards made before stay valid
    later: dict[str, Any] = {}
    if config.where:
        later["where"] = list(config.where)
    if config.save_additional_columns != (ALL_COLUMNS,):
        later["other_columns"] = list(config.save_additional_columns)
    if config.sha256_col is not None:
        later["sha256_col"] = config.sha256_col
    if config.original_captions is not None and _records_original_captions(config):
        later[ORIGINAL_CAPTIONS] = True
    return {
        "kind": form,
        "columns": [config.caption_col, config.url_col],
        "shard_size": config.shard_size,
        "max_bytes": config.max_bytes,
        "jpeg_quality": JPEG_QUALITY,
        **asdict(images),
        **selected,
        **later,
        "exclusions": sha256_bytes(selection.exclusions.tobytes()) if len(selection.exclusions) else None,
        "allow_private": config.allow_private,
        "ignore_opt_out": config.ignore_opt_out,
    }


def _records_original_captions(config: IngestConfig) -> bool:
    """Whether records say that captions come from --original-captions; shards made before they did stay valid."""
    folder = join(config.root, RAW)
    first = next(iter(finished_shards(folder)), None)
    done = None if first is None or config.overwrite else read_done(folder, first)
    return done is None or ORIGINAL_CAPTIONS in done.config


def _allowed_connections(concurrency: int) -> int:
    """At most ``concurrency``: as many connections as this process may open files, a limit that it raises if it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = concurrency + OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY:
        return concurrency
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("the system allows %d open files (ulimit -n): fewer downloads in flight than asked", soft)
    return max(1, min(concurrency, soft - OTHER_OPEN_FILES))


def _status_text(listing: Listing, downloader: Downloader, root: str) -> str:
    """What the progress line says; warns, once, when no image comes or the disk is too small for the rest."""
    tally = downloader.tally
    done = sum(tally.outcomes.values())
    rows_left = None
    if listing.rows and listing.read:
        rows_left = max(0, listing.rows - listing.read + tally.given - done)
    if done > ROWS_BEFORE_WARNING and not tally.warned:
        needed = (rows_left or 0) * tally.image_bytes // done
        free = free_bytes(root)
        if free is not None and needed > free:
            log.warning("about %d GB more are needed for %d rows, %s has %d", needed >> 30, rows_left, root, free >> 30)
            tally.warned = True
        if not tally.outcomes["success"]:
            reason = tally.outcomes.most_common(1)[0][0]
            log.warning("not one image so far, mostly for %r: %s", reason, advice_for(reason))
            tally.warned = True
    return tally.format(rows_left)


def rows_to_shard(
    root: str, task: ShardTask, *, downloader: Downloader, selection: Selection, sha256_column: str | None = None
) -> ShardResult:
    """Download or read, decode and write one shard. Raises UserError when the disk is full."""
    start = time.time()  # img2dataset's time fields are seconds since 1970
    shard_input: RawShardInput = task.payload
    rows = selection.filter_rows(shard_input.rows)
    outcomes = selection.filter_images(rows, _download(downloader, rows, sha256_column))
    result = write_raw_shard(root, task.shard, shard_input, outcomes)
    end = time.time()
    return replace(result, extra={"duration": end - start, "start_time": start, "end_time": end})
