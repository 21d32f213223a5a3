"""`cache --from`: a teacher cache of the vectors that DataCompDR published, with the augmentations that they are of.

Vectors are joined to final shards by the uid and the tar that `ingest` kept in every sample's json, and to captions by
their text, so whatever was dropped, reordered or cut anew in between, no row gets another's vector. What the source
has no vector for is null in the cache, which no other cache has: an original caption that it does not know, a caption
of another captioner, a sample whose members are damaged. Reasons are counted.
"""

import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import PIL

from pipeline.cache.config import CacheConfig
from pipeline.cache.datacompdr_sample import SIDE, SourceTar, StoredSample, recorded_views
from pipeline.cache.incremental import ShardIndex
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
from pipeline.core.workers import usable_cores
from pipeline.ingest.datacompdr_source import TAR, UID
from pipeline.ingest.source_files import SourceFile, source_files
from pipeline.ingest.source_io import expected_errors
from pipeline.pack.caption_cleaning import clean_caption
from shards_spec.embeddings import Vectors, encode_vectors, id_column, write_vectors
from shards_spec.files import DataError, UserError, exists, join, remove
from shards_spec.layout import SHARDS, final_tar, parquet_path, tar_path, teacher_folder
from shards_spec.manifest import finished_shards, forget, read_done
from shards_spec.messages import counted
from shards_spec.models import model_label
from shards_spec.sample import Sample, parse_object
from shards_spec.views import RECORDED_BYTES, RecordedSpec

log = logging.getLogger(__name__)
OPEN_TARS = 2  # of the source, whose samples are known by uid; shards follow its order
# the teachers whose vectors stand side by side (ml-mobileclip, training/configs/datacompdr12m.json), and their scale
TEACHERS = (("ViT-L-14", "openai"), ("ViT-L-14", "datacomp_xl_s13b_b90k"))
LOGIT_SCALE = 100.0
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NO_PLACE = "no uid or tar in its json member"
NO_TAR = "its tar is not in --from"
FEWER_VIEWS = "fewer augmentations than --views"
BAD_PART = "vectors do not divide into the teachers"
OTHER_WIDTH = "vectors of another width than most"
SOURCE = "vectors"  # in records, of inputs: JSON of the tars that a shard's vectors are from, and their stamps
WIDTH = "dim"  # in records: numbers of this teacher's vectors
PEEKED_TARS, PEEKED_SAMPLES = 3, 20  # the first ones, whose vectors tell the width
NO_VECTOR = "captions without a vector"


class SourceTars:
    """The tars of a source by their names below it; the last ones used stay open.

    Attributes:
        stamps: Size and time, or version, of each tar by its name.
    """

    def __init__(self, files: list[SourceFile]) -> None:
        self._files = {file.below: file for file in files}
        self.stamps = {file.below: file.stamp for file in files}
        self._open = OrderedDict[str, SourceTar]()

    def read(self, tar: str, uid: str) -> StoredSample:
        """A sample's vectors and augmentations.

        Raises DataError with the reason when they are not there, UserError when the tar cannot be read.
        """
        if tar not in self._files:
            raise DataError(NO_TAR)
        with readable(self._files[tar].path):
            if tar not in self._open:
                while len(self._open) >= OPEN_TARS:
                    self._open.popitem(last=False)[1].close()
                self._open[tar] = SourceTar(self._files[tar])
            self._open.move_to_end(tar)
            return self._open[tar].read(uid)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Around reading a tar of the source: a disk or a store that fails ends the run, which can be resumed."""
    try:
        yield
    except (UserError, DataError):
        raise
    except expected_errors(path) as error:
        raise UserError(
            f"--from {path}: cannot be read ({error}); the same command goes on where it stopped"
        ) from error


_worker_tars: list[SourceTars] = []  # of a worker process


def import_cache(config: CacheConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError for a source without such vectors, ShardsFailed."""
    part, parts = _part(config)
    files = _source_tars(config)
    shards = upstream_shards(config.root, SHARDS, "pack")
    folder = teacher_folder(config.label)
    dim = _agreed_width(files, parts)
    identity = _identity(config, part, parts)
    if _records_width(config, join(config.root, folder)):
        identity[WIDTH] = dim
    stage = Stage(f"cache/{config.label}", folder, identity, extendable=("num_views",))
    workers = min(config.processes or usable_cores(), len(shards))
    tars = None if workers > 1 else SourceTars(files)
    options = RunOptions(
        workers=workers,
        worker_init=partial(_open_in_worker, files) if workers > 1 else None,
        assignment=assignment,
        overwrite=config.overwrite,
        total=len(shards),
    )
    work = partial(import_shard, stage=stage, config=config, dim=dim, tars=tars)
    stamps = SourceTars(files).stamps
    tasks = (
        _with_source(task, join(config.root, folder), stamps)
        for task in tar_tasks(config.root, SHARDS, shards, assignment)
    )
    summary = run_stage(config.root, stage, tasks, work, options)
    if lacking := summary.counters.get(NO_VECTOR):
        log.warning(
            "cache: %s: they are not --from's own; training leaves out the samples when it draws them",
            counted(lacking, "caption without a vector", "captions without a vector", style=","),
        )
    return summary


def _with_source(task: ShardTask, folder: str, stamps: dict[str, str]) -> ShardTask:
    """The task with the tars that its finished shard was made of as they are now, so that other vectors are taken.

    A tar that is gone counts as unchanged: what was made of it stays. Shards made before tars were recorded are valid.
    """
    done = read_done(folder, task.shard)
    if done is None or SOURCE not in done.inputs:
        return task
    try:
        made_of = parse_object(done.inputs[SOURCE])
    except ValueError:  # a damaged record
        return task
    now = {tar: stamps.get(tar, stamp) for tar, stamp in made_of.items()}
    return replace(task, inputs=task.inputs | {SOURCE: json.dumps(now)})


def _open_in_worker(files: list[SourceFile]) -> None:
    _worker_tars.append(SourceTars(files))


def _part(config: CacheConfig) -> tuple[int, int]:
    """Which part of the stored vectors is this teacher's, from 0, and of how many. Raises UserError."""
    if config.source.part:
        part, _, parts = config.source.part.partition("/")
        return int(part) - 1, int(parts)
    teacher = (config.model, config.pretrained)
    if teacher not in TEACHERS:
        known = " and ".join(f"--model {model} --pretrained {tag}" for model, tag in TEACHERS)
        raise UserError(
            f"--model {config.model}: DataCompDR's teachers are {known}; for the vectors of others name their part, "
            "such as --part 1/2"
        )
    return TEACHERS.index(teacher), len(TEACHERS)


def _source_tars(config: CacheConfig) -> list[SourceFile]:
    """The tars of --from. Raises UserError where there are none, or the first of them serves no one."""
    files = list[SourceFile]()
    for source in config.source.from_:
        try:
            files += source_files(source, "datacompdr")
        except UserError as error:
            raise UserError(str(error).replace("--source", "--from")) from error
    twice = [below for below, number in Counter(file.below for file in files).items() if number > 1]
    if twice:
        raise UserError(f"--from: several tars are called {twice[0]} below it; give the folder above them as one")
    with readable(files[0].path):
        with_vectors = next(_vectors_of(files[0]), None)
    if with_vectors is None:
        raise UserError(f"--from {files[0].path}: none of its samples has vectors and augmentations as DataCompDR has")
    if len(with_vectors.augmentations) < config.views:
        raise UserError(
            f"--views {config.views}: {files[0].path} has {counted(len(with_vectors.augmentations), 'augmentation')} "
            "per sample; ask for at most so many"
        )
    return files


def _vectors_of(file: SourceFile) -> Iterator[StoredSample]:
    """The samples of a tar that can be read."""
    tar = SourceTar(file)
    try:
        for uid in tar.uids:
            try:
                yield tar.read(uid)
            except DataError:
                continue
    finally:
        tar.close()


def _agreed_width(files: list[SourceFile], parts: int) -> int:
    """The width of one teacher's vectors: that of most samples of the first tars, as one may be damaged.

    Raises UserError where no sample's vectors divide into the teachers.
    """
    widths = Counter[int]()
    for file in files[:PEEKED_TARS]:
        with readable(file.path):
            for sample in islice(_vectors_of(file), PEEKED_SAMPLES):
                width = sample.images.shape[1]
                if width == sample.texts.shape[1] and width % parts == 0:
                    widths[width // parts] += 1
    if not widths:
        raise UserError(
            f"--from {files[0].path}: its vectors do not divide into {counted(parts, 'teacher')} of the same width; "
            "--part N/M names a part of another number of teachers"
        )
    return widths.most_common(1)[0][0]


def _records_width(config: CacheConfig, folder: str) -> bool:
    """Whether records have the width; shards made before they did stay valid."""
    first = next(iter(finished_shards(folder)), None)
    done = None if first is None or config.overwrite else read_done(folder, first)
    return done is None or WIDTH in done.config


def _identity(config: CacheConfig, part: int, parts: int) -> dict[str, Any]:
    """As `cache` records a teacher; null is what the source does not tell."""
    spec = RecordedSpec()
    return {
        "model": model_label(config.model, None),
        "pretrained": config.pretrained,
        "library": "open_clip",
        "weights_sha256": None,
        "precision": None,
        "logit_scale": LOGIT_SCALE,
        "logit_bias": None,
        "image_size": SIDE,
        "mean": list(MEAN),
        "std": list(STD),
        "tokenizer_sha256": None,
        "views": spec.as_json(),
        "views_sha256": spec.sha256,
        "num_views": config.views,
        "dtype": config.dtype,
        "imported": "datacompdr",
        "part": f"{part + 1}/{parts}",
    }


def import_shard(
    root: str, task: ShardTask, *, stage: Stage, config: CacheConfig, dim: int, tars: SourceTars | None = None
) -> ShardResult:
    """Write the cache of one final shard: its vectors, then the recorded views in a file of their own.

    ``dim`` is the width of the vectors. A sample without vectors has a null row, counted under its reason.
    """
    tars = tars or _worker_tars[0]
    path = final_tar(root, task.shard)
    shard = ShardIndex(path)
    rows = _ShardRows(shard, config, dim)
    counts = Counter[str]()
    for row, key in enumerate(shard.keys):
        try:
            rows.put(row, tars)
            counts["success"] += 1
        except DataError as error:
            if str(error) not in counts:  # the record counts the others
                log.warning("%s: key %s has no vectors: %s", path, key, error)
            counts[str(error)] += 1
    folder = join(root, stage.folder)
    forget(folder, task.shard)  # a stale record would validate the wrong files
    shard_hash = task.inputs[tar_path(SHARDS, task.shard)]
    meta = {**stage.config, "shard_sha256": shard_hash, "software": {"pillow": PIL.__version__}}
    outputs = dict[str, str]()
    for number, columns in enumerate((rows.vectors(), rows.views())):
        ids = {id_column(name): rows.ids(name, vectors) for name, vectors in columns.items()}
        output = parquet_path(stage.folder, task.shard, number)
        outputs[output] = write_vectors(join(root, output), shard.keys, columns, ids, meta)
    number = len(outputs)
    while exists(stale := join(root, parquet_path(stage.folder, task.shard, number))):
        remove(stale)
        number += 1
    made_of = {tar: tars.stamps.get(tar, "") for tar in sorted(rows.tars)}
    return ShardResult(dict(counts), outputs, counters=rows.counters, inputs={SOURCE: json.dumps(made_of)})


class _ShardRows:
    """The vectors and views of a final shard, filled row by row; NaN and zeros where nothing was put.

    Attributes:
        counters: Facts for the shard's record.
        tars: Names of the source's tars that the rows asked for.
    """

    def __init__(self, shard: ShardIndex, config: CacheConfig, dim: int) -> None:
        self._shard = shard
        self._config = config
        self._part = _part(config)
        self._columns = dict[str, np.ndarray]()  # (n, D)
        self._dim = dim  # D
        self._packed = np.zeros((config.views, len(shard.keys), RECORDED_BYTES), np.uint8)
        self._present = np.zeros(len(shard.keys), bool)
        self.counters = {"image vectors": 0, "text vectors": 0}
        self.tars = set[str]()

    def put(self, row: int, tars: SourceTars) -> None:
        """Put a sample's vectors and views. Raises DataError with the reason when it has none."""
        sample = self._shard.sample(row)
        meta = sample.meta
        if not isinstance(meta.get(UID), str) or not isinstance(meta.get(TAR), str):
            raise DataError(NO_PLACE)
        self.tars.add(meta[TAR])
        stored = tars.read(meta[TAR], meta[UID])
        if len(stored.augmentations) < self._config.views:
            raise DataError(FEWER_VIEWS)
        size = _upright_size(meta)
        views = recorded_views(stored.augmentations, size, _orientation(meta))[: self._config.views]
        images = self._teachers(stored.images)
        texts = self._teachers(stored.texts)
        captions = _caption_rows(sample, stored)
        if {images.shape[1], texts.shape[1]} != {self._dim}:
            raise DataError(OTHER_WIDTH)
        for number, view in enumerate(views):
            self._column(f"image_{number}")[row] = images[number]
            self._packed[number, row] = np.frombuffer(view.pack(), np.uint8)
        for number, caption in enumerate(captions):
            if caption is not None:
                self._column(f"text_{number}")[row] = texts[caption]
        pairs = zip(captions, sample.captions, strict=True)
        lacking = sum(caption is None and bool(text.strip()) for caption, text in pairs)
        self._present[row] = True
        self.counters["image vectors"] += len(views)
        self.counters["text vectors"] += sum(caption is not None for caption in captions)
        if lacking:
            self.counters[NO_VECTOR] = self.counters.get(NO_VECTOR, 0) + lacking

    def vectors(self) -> dict[str, Vectors]:
        """The columns of vectors as they are stored."""
        names = self._shard.column_names(self._config.views, texts=True, soft_labels=False)
        return {name: encode_vectors(self._column(name), self._config.dtype) for name in names}

    def views(self) -> dict[str, Vectors]:
        """The columns ``view_0`` … of packed views."""
        return {f"view_{number}": Vectors(packed, None, self._present) for number, packed in enumerate(self._packed)}

    def ids(self, name: str, vectors: Vectors) -> np.ndarray:
        """Content ids (n,) of what a column was made from, 0 where it is null."""
        return np.where(vectors.present, self._shard.ids[id_column(name)], np.uint64(0))

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = np.full((len(self._shard.keys), self._dim), np.nan, np.float32)
        return self._columns[name]

    def _teachers(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) of this teacher, L2-normalised."""
        part, parts = self._part
        dim = vectors.shape[1] // parts
        own = vectors[:, part * dim : (part + 1) * dim]
        norms = np.linalg.norm(own, axis=1, keepdims=True)
        if dim * parts != vectors.shape[1] or not norms.all():
            raise DataError(BAD_PART)
        normalised: np.ndarray = own / norms
        return normalised


def _upright_size(meta: dict[str, Any]) -> tuple[int, int]:
    """Width and height of the image that `ingest` got."""
    width = meta.get("original_width")
    height = meta.get("original_height")
    if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
        raise DataError("no original size in its json member")
    return width, height


def _orientation(meta: dict[str, Any]) -> int:
    """The EXIF orientation of the file that `ingest` got; 1 where it has none."""
    try:
        stored = parse_object(meta.get("exif") or "{}").get("Image Orientation", "1")
        orientation = int(stored)
    except (ValueError, TypeError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _caption_rows(sample: Sample, stored: StoredSample) -> list[int | None]:
    """For each caption of the sample the row of its vector among the stored texts; None where there is none."""
    originals = len(stored.texts) - len(stored.synthetic)
    known = dict[str, int]()
    for number, text in enumerate(stored.synthetic):
        if isinstance(text, str):
            known.setdefault(text, originals + number)
            known.setdefault(_one_line(text), originals + number)
    original, *synthetic = sample.captions
    rows: list[int | None] = [0 if original.strip() else None]
    return rows + [known.get(text, known.get(_one_line(text))) for text in synthetic]


def _one_line(text: str) -> str:
    """A caption as `caption --from` stores it."""
    return " ".join(clean_caption(text)[0].split())
