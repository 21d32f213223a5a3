"""Validators of one shard, one per stage: each yields the shard's keys and raises DataError at the first broken one."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from pipeline.cache.incremental import ShardIndex, plan_column_update
from pipeline.check.files import DatasetFiles
from pipeline.core.near_duplicates import EXACT_DUPLICATE, NEAR_DUPLICATE
from shards_spec.class_names import CLASS_LIST, class_list_hash, parse_label, read_class_names
from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.layout import (
    DEDUP,
    RAW,
    SELECT,
    SHARDS,
    STAGES,
    TEACHER,
    StageInfo,
    class_names_txt,
    dedup_parquet,
    parquet_path,
    raw_tar,
    remake_advice,
    resume_advice,
    shard_name,
    stats_path,
    tar_path,
)
from shards_spec.manifest import read_dataset
from shards_spec.messages import counted
from shards_spec.sample import Sample, check_key
from shards_spec.selection import COPIES, read_selection, selected_record
from shards_spec.soft_labels import SoftLabelFormat, format_of
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import unpack_recorded

MOST_CLASSES = 1 << 31  # where the list of classes is gone, which is reported once
Validator = Callable[[DatasetFiles, str, int], Iterator[str]]  # (files, folder, shard) -> the shard's keys


class ShardFolder(NamedTuple):
    """A folder below ROOT with shards, the key of its stage in ``dataset.json``, and what validates a shard of it."""

    folder: str
    stage: str
    validate: Validator


def shard_folders(root: str) -> Iterator[ShardFolder]:
    """The folders of a dataset that are there, in the order of the stages."""
    for stage in STAGES.values():
        if stage.name not in VALIDATORS:
            continue
        for key in stage_keys(root, stage):
            shard_folder = shard_folder_of(key)
            if exists(join(root, shard_folder.folder)):
                yield shard_folder


def stage_keys(root: str, stage: StageInfo) -> list[str]:
    """The keys in ``dataset.json`` that a stage's folders have: ``pack``, or ``cache/NAME`` for each NAME there is."""
    if not stage.is_named:
        return [stage.name]
    return [f"{stage.name}/{name}" for name in names(join(root, stage.writes.partition("/")[0]))]


def shard_folder_of(key: str) -> ShardFolder:
    """The folder of a stage's key in ``dataset.json``. Raises KeyError for a stage whose shards are not validated."""
    kind, _, name = key.partition("/")
    return ShardFolder(STAGES[kind].folder(name), key, VALIDATORS[kind])


def _expect_keys(path: str, expected: list[str], found: list[str], other: str) -> None:
    """Raise DataError naming the first row whose key is not the ``expected`` one, that of ``other``."""
    for row, (want, have) in enumerate(zip_longest(expected, found)):
        if want != have:
            actual, wanted = ("no row" if key is None else f"key {key}" for key in (have, want))
            raise DataError(f"{path}: row {row} is {actual}, {other} has {wanted} there; {remake_advice(path)}")


def _validate_raw(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    base = join(files.root, folder)
    path, stats_file = parquet_path(base, shard), stats_path(base, shard)
    keys = files.tar(tar_path(base, shard)).keys()
    rows = files.rows(path, ["key", "status"], optional=("cls",))
    successes = [row for row in rows if row["status"] == "success"]
    _expect_keys(path, sorted(keys), sorted(row["key"] for row in successes), "the tar")
    _check_labels(files, folder, shard, successes)
    _, stats = files.stats(folder, shard)
    recorded = (stats["count"], stats["successes"], sum(stats["status_dict"].values()))
    if recorded != (len(rows), len(keys), len(rows)):
        raise DataError(
            f"{stats_file}: inputs {stats['count']}, successes {stats['successes']}; "
            f"the Parquet has {counted(len(rows), 'row')} and the tar {counted(len(keys), 'sample')}"
        )
    for key in keys:
        yield check_key(key)


def _validate_captions(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(files.root, folder), shard), tar_path(RAW, shard)
    rows = files.rows(path, ["key", "captions", "logprobs", "num_tokens"], optional=("similarities", "reason"))
    _expect_keys(path, files.tar(join(files.root, tar)).keys(), [row["key"] for row in rows], tar)
    for row in rows:
        lists = [row[name] for name in ("captions", "logprobs", "num_tokens", "similarities") if name in row]
        if len({None if values is None else len(values) for values in lists}) > 1:
            raise DataError(
                f"{path}: key {row['key']} has {counted(len(row['captions'] or ()), 'caption')}, other counts of the "
                f"rest; {remake_advice(path)}"
            )
        if (row["captions"] is None) != (row.get("reason") is not None):
            raise DataError(
                f"{path}: key {row['key']} has captions and a reason for having none, or neither; {remake_advice(path)}"
            )
        yield row["key"]


def _validate_selection(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    root, name = files.root, folder.removeprefix(f"{SELECT}/")
    path = parquet_path(join(root, folder), shard)
    selection, done = read_selection(root, name, shard, files.open), files.done(folder, shard)
    if done is None or done.counters.get(COPIES, 0) != int(selection.copies.sum(dtype=np.int64)):
        raise DataError(f"{path}: its copies are not those of its record; {remake_advice(path)}")
    for key, copies, reason in zip(selection.keys, selection.copies, selection.reasons, strict=True):
        if (copies == 0) != (reason is not None):
            raise DataError(f"{path}: key {key} has {copies} copies and the reason {reason!r}; {remake_advice(path)}")
    if read_dataset(root)["stages"].get("pack", {}).get("config", {}).get("select") != name:
        selected_record(root, name, shard)
        tar = tar_path(SHARDS, shard)
        _expect_keys(path, files.tar(join(root, tar)).keys(), selection.keys, tar)
    yield from selection.keys


def _validate_final(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    root = files.root
    path, tar = parquet_path(join(root, folder), shard), tar_path(join(root, folder), shard)
    rows = files.rows(path, ["key", "synsets"], optional=("cls",))
    _expect_keys(path, files.tar(tar).keys(), [row["key"] for row in rows], "the tar")
    _check_labels(files, folder, shard, rows)
    sources = _raw_shards(files, shard)
    raw_tars = [join(root, RAW, f"{source}.tar") for source in sources]
    raw = _samples_of(files, raw_tars) if exists(join(root, RAW)) else None
    dropped = set[str]().union(*(_dropped_keys(files, int(source)) for source in sources))
    for sample, row in zip(files.tar(tar).samples(), rows, strict=True):
        synsets = sample.meta.get("synsets")
        if synsets != row["synsets"] or len(synsets) != len(sample.captions):
            raise DataError(f"{tar}: key {sample.key} has synsets that do not fit its captions or its Parquet row")
        if raw is not None:
            ingested = _find_sample(raw, sample.key, tar)
            if ingested.image != sample.image:
                raise DataError(f"{tar}: key {sample.key} has another image than raw/{' or '.join(sources)}.tar")
            if "cls" in sample.members and ingested.members.get("cls") != sample.members["cls"]:
                raise DataError(f"{tar}: key {sample.key} has another class than raw/{' or '.join(sources)}.tar")
        if sample.key in dropped:
            raise DataError(f"{tar}: key {sample.key} is a duplicate by {DEDUP}/; run `clipmill pack` again")
        yield check_key(sample.key)


def _samples_of(files: DatasetFiles, tars: list[str]) -> Iterator[Sample]:
    """The samples of several tars, one after the other."""
    for tar in tars:
        yield from files.tar(tar).samples()


def _check_labels(files: DatasetFiles, folder: str, shard: int, rows: list[dict[str, Any]]) -> None:
    """Raise DataError unless each sample of labelled images has a class, the one in its Parquet row; by the record."""
    done = files.done(folder, shard)
    if done is None or CLASS_LIST not in done.config:
        return
    names_file, path = class_names_txt(files.root), tar_path(join(files.root, folder), shard)
    classes = len(read_class_names(names_file)) if exists(names_file) else MOST_CLASSES
    labels = {row["key"]: row.get("cls") for row in rows}
    tar = files.tar(path)
    for key, members in tar:
        if "cls" not in members:
            raise DataError(f"{path}: key {key} has no class (member cls); {remake_advice(path)}")
        label = parse_label(members["cls"].read(tar.buffer), classes, f"{path}: key {key}")
        if labels[key] != label:
            raise DataError(f"{path}: key {key} has class {label}, its Parquet row {labels[key]}")


def _find_sample(raw: Iterator[Sample], key: str, tar: str) -> Sample:
    """The next sample of a key; those before it were not packed. Raises DataError."""
    for sample in raw:
        if sample.key == key:
            return sample
    raise DataError(f"{tar}: key {key} is not in its raw shard, or not in that order")


def _raw_shards(files: DatasetFiles, shard: int) -> list[str]:
    """Names of the raw shards that a final shard was made of, by its done-record; without one it has their number."""
    done = files.done(SHARDS, shard)
    if done is None:
        return [shard_name(shard)]
    tars = [path for path in done.inputs if path.startswith(f"{RAW}/") and path.endswith(".tar")]
    return [path.removeprefix(f"{RAW}/").removesuffix(".tar") for path in tars]


def _dropped_keys(files: DatasetFiles, shard: int) -> set[str]:
    path = dedup_parquet(files.root, shard)
    return {row["key"] for row in files.rows(path, ["key"])} if exists(path) else set()


def _validate_plan(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(files.root, folder), shard), raw_tar(files.root, shard)
    rows, done = files.rows(path, ["key", "reason"]), files.done(folder, shard)
    rows = [row for row in rows if row["key"]]  # others are places of samples that were taken down
    if exists(join(files.root, RAW)):
        _expect_keys(path, files.tar(tar).keys(), [row["key"] for row in rows], tar)
    counts = Counter(row["reason"] or "success" for row in rows)
    if done is not None and done.counts != counts:
        raise DataError(f"{path}: {dict(counts)}, its done-record says {done.counts}; run `clipmill pack` again")
    for row in rows:
        yield row["key"]


def _validate_cache(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(files.root, folder), shard), tar_path(SHARDS, shard)
    cached = files.teacher_shard(folder.removeprefix(f"{TEACHER}/"), shard)
    index = files.shard_index(join(files.root, tar))
    for file in cached.files:
        _expect_keys(file.path, index.keys, file.keys, tar)
    soft = format_of(path, cached.config)
    has_texts = cached.find("text_0") is not None
    for name in index.column_names(cached.config["num_views"], texts=has_texts, soft_labels=soft is not None):
        _validate_column(path, tar, name, index, cached.file(name), may_lack="imported" in cached.config)
        if soft is not None:
            _validate_soft_labels(name, cached, soft)
    if "imported" in cached.config:
        _validate_recorded_views(cached)
    if cached.inputs.get(tar) != files.sha256(join(files.root, tar)):
        raise DataError(
            f"{path}: made from another {tar}, its images and captions are the same; {_resume(path)}, it embeds nothing"
        )
    yield from index.keys


def vector_width(files: DatasetFiles, folder: str, shard: int) -> tuple[str, int] | None:
    """Of a shard of a teacher cache: the file of its first view, and how many numbers a vector of it has.

    None where the shard cannot be read, or has no vector at all.
    """
    with contextlib.suppress(DataError, UserError, OSError):
        file = files.teacher_shard(folder.removeprefix(f"{TEACHER}/"), shard).file("image_0")
        if file.dim > 1 or file.vectors("image_0").present.any():
            return file.path, file.dim
    return None


def _resume(path: str) -> str:
    """The command that brings the folder of a shard's file up to date."""
    return resume_advice(path.rpartition("/")[0])


def _validate_column(
    path: str, tar: str, name: str, index: ShardIndex, file: EmbeddingFile, *, may_lack: bool = False
) -> None:
    """Raise DataError unless every row of a column was made from the shard's own content and is finite.

    ``may_lack``: a row may be null, where the source of imported vectors had none.
    """
    update, vectors = plan_column_update(name, index, file), file.vectors(name)
    if update is not None and may_lack:
        update = replace(update, new_rows=update.new_rows[vectors.present[update.new_rows]])
    if update is not None and len(update.new_rows):
        raise DataError(
            f"{path}: made from another {tar}: key {index.keys[int(update.new_rows[0])]} has another "
            f"{'caption' if name.startswith('text_') else 'image'} than {name} was made from; "
            f"{_resume(path)}, it embeds what is new"
        )
    finite = np.isfinite(vectors.as_floats()).all(axis=1) | ~vectors.present
    if not finite.all():
        raise DataError(f"{path}: key {index.keys[int(finite.argmin())]} has no {name}; {remake_advice(path)}")


def _validate_recorded_views(cached: TeacherShard) -> None:
    """Raise DataError unless every image with vectors has its recorded views, and they have sense."""
    for number in range(cached.config["num_views"]):
        file = cached.file(f"view_{number}")
        views = file.vectors(f"view_{number}")
        if not np.array_equal(views.present, cached.file(f"image_{number}").vectors(f"image_{number}").present):
            raise DataError(f"{file.path}: its view_{number} and image_{number} are not of the same samples")
        for row in np.flatnonzero(views.present):
            try:
                unpack_recorded(views.values[row].tobytes())
            except DataError as error:
                raise DataError(f"{file.path}: key {file.keys[int(row)]} has in view_{number} {error}") from error


def _validate_soft_labels(name: str, cached: TeacherShard, soft: SoftLabelFormat) -> None:
    """Raise DataError unless the rows of a column are soft labels of the class list that the record names."""
    file = cached.file(name)
    again = f"{_resume(file.path)} and --overwrite"
    for key in ("soft_labels", "classes", "classes_sha256"):
        stored, recorded = file.meta.get(key), cached.config.get(key)
        if stored != recorded:
            raise DataError(f"{file.path}: its {key} is {stored!r}, its done-record has {recorded!r}; {again}")
    names = file.meta.get("class_names")
    if names is not None and (len(names), class_list_hash(names)) != (soft.classes, file.meta["classes_sha256"]):
        raise DataError(f"{file.path}: its class_names are not the list whose hash is classes_sha256; {again}")
    if file.dim != soft.width:
        raise DataError(f"{file.path}: its rows have {file.dim} bytes, soft labels of its format {soft.width}; {again}")
    if (broken := soft.check(file.vectors(name).values)) is not None:
        row, reason = broken
        raise DataError(f"{file.path}: key {file.keys[row]} has in {name} {reason}; {again}")


def _validate_dedup(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(files.root, folder), shard), raw_tar(files.root, shard)
    keys = set(files.tar(tar).keys()) if exists(join(files.root, RAW)) else None
    for row in files.rows(path, ["key", "reason", "kept"]):
        if keys is not None and row["key"] not in keys:
            raise DataError(f"{path}: key {row['key']} is not in {tar}; run `clipmill dedup` again")
        if row["reason"] not in (EXACT_DUPLICATE, NEAR_DUPLICATE):
            raise DataError(f"{path}: key {row['key']} has reason {row['reason']!r}; run `clipmill dedup` again")
        yield row["key"]


def _validate_lists(files: DatasetFiles, folder: str, shard: int) -> Iterator[str]:
    path, cache = parquet_path(join(files.root, folder), shard), folder.removesuffix("/lists")
    cached, done = files.teacher_shard(cache.removeprefix(f"{TEACHER}/"), shard), files.done(folder, shard)
    keys = [row["key"] for row in files.rows(path, ["key"])]
    _expect_keys(path, cached.files[-1].keys, keys, f"{cache}/{shard_name(shard)}")
    made_of = files.done(cache, shard)
    if done is not None and made_of is not None and done.inputs != made_of.outputs:
        advice = f"{resume_advice(join(files.root, cache))} and --export-lists"
        raise DataError(f"{path}: made from another {cache}; {advice}")
    yield from keys


VALIDATORS: dict[str, Validator] = {  # of a stage's shards
    "ingest": _validate_raw,
    "dedup": _validate_dedup,
    "caption": _validate_captions,
    "plan": _validate_plan,
    "pack": _validate_final,
    "select": _validate_selection,
    "cache": _validate_cache,
    "cache-lists": _validate_lists,
}
