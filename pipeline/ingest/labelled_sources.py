"""Rows of labelled images: of a folder of class folders, as ImageNet's ``train/``, or of CLIP_benchmark's shards.

The classes are the folders in the source, in the order of their names; images lie at any depth below them. A class is
called what the line of its folder in ``classnames.txt`` says (in the source or in the folder above it, where
CLIP_benchmark has it); without that file, folders named as ImageNet's get its names and order (`shards_spec.imagenet`),
and others name themselves. A split of CLIP_benchmark's layout (``nshards.txt``, ``0.tar`` …) has the numbers of classes
in its members ``cls``. The name of a class is the caption of its images, underscores as spaces.

Rows are shuffled: in the order of the folders a shard would hold one class or two, and training, which reads some
shards at a time, would see batches of few classes. The order is a pure function of the number of images. Memory: a path
per image of class folders, a row per image of shards.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.ingest.image_folder import stamp_and_problem, taken_images
from pipeline.ingest.rows import FileRef, Row
from pipeline.ingest.source_files import base_name, source_files
from pipeline.ingest.webdataset_source import labelled_tar_rows
from shards_spec import imagenet
from shards_spec.class_names import (
    LINE_END,
    SHARD_COUNT,
    class_text,
    numbered_shards,
    parse_label,
    read_class_names,
)
from shards_spec.counter_rng import raw_draws
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.folders import class_folders, walk
from shards_spec.layout import CLASS_NAMES, dataset_json
from shards_spec.messages import counted
from shards_spec.names import clean_name, endings_line, file_ending, is_image

log = logging.getLogger(__name__)
SPLITS = frozenset({"train", "val", "test", "validation"})
ORDER = "ingest/classes"  # the random stream of the rows' order
NAMED = 5  # folders in a message
NO_CLASS = "no number of a class"


def source_classes(source: str) -> list[str]:
    """The names of the classes of a source, by number.

    Raises UserError for a source without class folders, one of several splits, and a list of names that does not fit
    the folders.
    """
    if exists(join(source, SHARD_COUNT)):
        return read_class_names(_names_file(source) or join(source, CLASS_NAMES))
    return [name for _, name in _named_folders(source)]


def class_rows(source: str) -> Iterator[Row]:
    """A row per image, shuffled.

    Of class folders, its other column ``class_folder`` is the folder's name; one warning names the classes without an
    image, one counts the files that are not taken. Raises UserError as `source_classes` does.
    """
    yield from _shard_rows(source) if exists(join(source, SHARD_COUNT)) else _folder_rows(source)


def _shuffled(count: int) -> list[int]:
    order: list[int] = np.argsort(raw_draws(ORDER, count), kind="stable").tolist()
    return order


def _folder_rows(source: str) -> Iterator[Row]:
    named = _named_folders(source)
    folders = [folder for folder, _ in named]
    captions = [class_text(name) for _, name in named]
    paths: list[str] = []
    labels: list[int] = []
    infos: list[dict[str, Any]] = []
    left_out = Counter[str]()
    for label, folder in enumerate(folders):
        for prefix, files in walk(join(source, folder)):
            taken = taken_images(files)
            paths += [f"{folder}/{prefix}{name}" for name in taken]
            infos += [files[name] for name in taken]
            labels += [label] * len(taken)
            left_out.update(map(file_ending, files.keys() - taken))
    _warn(source, folders, labels, left_out)
    for index in _shuffled(len(paths)):
        path, label = paths[index], labels[index]
        stamp, problem = stamp_and_problem(source, path, infos[index])
        image_ref = FileRef(join(source, path)) if problem is None else None
        extra = {"class_folder": clean_name(folders[label])}
        yield Row(captions[label], clean_name(path), problem, stamp, image_ref, extra=extra, label=label)


def _shard_rows(source: str) -> Iterator[Row]:
    names = source_classes(source)
    wanted = set(map(base_name, numbered_shards(source)))
    files = [file for file in source_files(source, "webdataset") if file.below in wanted]
    rows = list(labelled_tar_rows(files))
    for index in _shuffled(len(rows)):
        row, data = rows[index]
        try:
            label = parse_label(data, len(names), row.url or "")
        except DataError:
            yield replace(row, problem=row.problem or NO_CLASS)
        else:
            yield replace(row, caption=class_text(names[label]), label=label)


def _source_folders(source: str) -> list[str]:
    folders = class_folders(source)
    if not folders:
        raise UserError(
            f"--source {source} has no class folders: --format classes takes a folder with a folder of images per "
            f"class, or a split of CLIP_benchmark's ({SHARD_COUNT}, 0.tar ...)"
        )
    if exists(dataset_json(source)):
        raise UserError(
            f"--source {source} is a ROOT itself, its folders are no classes: use it as it is, or give its own source"
        )
    if len(folders) > 1 and SPLITS.issuperset(folders):
        commands = " and ".join(
            f"`clipmill ingest ROOT/{'train' if folder == 'train' else 'test'} --format classes "
            f"--source {join(source, folder)}`"
            for folder in folders
        )
        raise UserError(f"--source {source}: {', '.join(folders)} are splits, and a ROOT is one split; run {commands}")
    return folders


def _names_file(source: str) -> str | None:
    """The list of the classes' names of a source: in it, or in the folder above."""
    above = source.rstrip("/").rpartition("/")[0]
    return next(filter(exists, (join(source, CLASS_NAMES), join(above or ".", CLASS_NAMES))), None)


def _named_folders(source: str) -> list[tuple[str, str]]:
    """(folder, name of its class) by the class's number. Raises UserError."""
    folders = _source_folders(source)
    names_file = _names_file(source)
    if names_file is not None:
        names = read_class_names(names_file)
        if len(names) != len(folders):
            lines, found = counted(len(names), "line"), counted(len(folders), "class folder")
            raise UserError(
                f"{names_file} has {lines}, {source} {found}; give a line per folder, in the order of their names"
            )
        return list(zip(folders, names, strict=True))
    labels = _imagenet_labels(folders)
    if labels is not None:
        return [(folder, imagenet.class_names()[labels[folder]]) for folder in sorted(folders, key=labels.__getitem__)]
    names = [LINE_END.sub(" ", clean_name(folder)).strip() for folder in folders]
    if "" in names:
        folder = folders[names.index("")]
        raise UserError(f"--source {source}: the folder {folder!r} has no name to call its class by; rename it")
    return list(zip(folders, names, strict=True))


def _imagenet_labels(folders: Sequence[str]) -> dict[str, int] | None:
    try:
        return imagenet.labels_of_folders(folders, "", "")
    except UserError:  # WNIDs of a larger set, such as ImageNet-21k
        return None


def _warn(source: str, folders: Sequence[str], labels: list[int], left_out: Counter[str]) -> None:
    present = set(labels)
    if empty := [folder for label, folder in enumerate(folders) if label not in present]:
        more = " and others" if len(empty) > NAMED else ""
        log.warning(
            "--source %s: %s without an image: %s%s",
            source,
            counted(len(empty), "class folder"),
            ", ".join(map(clean_name, empty[:NAMED])),
            more,
        )
    if left_out:
        log.warning("--source %s: files that are not taken: %s", source, endings_line(left_out))
    if stray := sum(map(is_image, names(source))):
        log.warning(
            "--source %s: %s beside the class folders, in none of them: not taken", source, counted(stray, "image")
        )
