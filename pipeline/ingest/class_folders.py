"""Rows of labelled images: a folder of class folders, as ImageNet's ``train/``.

The classes are the folders in the source, in the order of their names; images lie at any depth below them. A class is
called what the line of its folder in ``classnames.txt`` says (in the source or in the folder above it, where
CLIP_benchmark has it), else as the folder. Its name is the caption of its images, underscores as spaces.

Rows are shuffled: in the order of the folders a shard would hold one class or two, and training, which reads some
shards at a time, would see batches of few classes. The order is a pure function of the number of files. Memory: a path
per image.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.ingest.image_folder import stamp_and_problem, taken_images
from pipeline.ingest.rows import FileRef, Row
from shards_spec.class_names import LINE_END, class_text, read_class_names
from shards_spec.counter_rng import raw_draws
from shards_spec.files import UserError, exists, join
from shards_spec.folders import class_folders, walk
from shards_spec.layout import CLASS_NAMES
from shards_spec.messages import counted
from shards_spec.names import clean_name, endings_line, file_ending

log = logging.getLogger(__name__)
SPLITS = frozenset({"train", "val", "test", "validation"})
ORDER = "ingest/classes"  # the random stream of the rows' order
NAMED = 5  # folders in a message


def source_classes(source: str) -> list[str]:
    """The names of the classes of a source, by number.

    Raises UserError for a source without class folders, one of several splits, and a list of names that does not fit
    the folders.
    """
    return _class_names(source, _source_folders(source))


def class_rows(source: str) -> Iterator[Row]:
    """A row per image of the class folders, shuffled; its other column ``class_folder`` is the folder's name.

    Warns of classes without an image, and of files that are not taken. Raises UserError as `source_classes` does.
    """
    folders = _source_folders(source)
    captions = [class_text(name) for name in _class_names(source, folders)]
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
    for index in np.argsort(raw_draws(ORDER, len(paths)), kind="stable").tolist():
        path, label = paths[index], labels[index]
        stamp, problem = stamp_and_problem(source, path, infos[index])
        image_ref = FileRef(join(source, path)) if problem is None else None
        extra = {"class_folder": clean_name(folders[label])}
        yield Row(captions[label], clean_name(path), problem, stamp, image_ref, extra=extra, label=label)


def _source_folders(source: str) -> list[str]:
    folders = class_folders(source)
    if not folders:
        raise UserError(
            f"--source {source} has no class folders: --format classes takes a folder with a folder of images per class"
        )
    if len(folders) > 1 and SPLITS.issuperset(folders):
        commands = " and ".join(
            f"`clipmill ingest ROOT/{'train' if folder == 'train' else 'test'} --format classes "
            f"--source {join(source, folder)}`"
            for folder in folders
        )
        raise UserError(f"--source {source}: {', '.join(folders)} are splits, and a ROOT is one split; run {commands}")
    return folders


def _class_names(source: str, folders: Sequence[str]) -> list[str]:
    """The lines of a ``classnames.txt``, else the names of the folders. Raises UserError."""
    above = source.rstrip("/").rpartition("/")[0]
    for path in (join(source, CLASS_NAMES), join(above or ".", CLASS_NAMES)):
        if exists(path):
            names = read_class_names(path)
            if len(names) != len(folders):
                lines, found = counted(len(names), "line"), counted(len(folders), "class folder")
                raise UserError(
                    f"{path} has {lines}, {source} {found}; give a line per folder, in the order of their names"
                )
            return names
    names = [LINE_END.sub(" ", clean_name(folder)).strip() for folder in folders]
    if "" in names:
        folder = folders[names.index("")]
        raise UserError(f"--source {source}: the folder {folder!r} has no name to call its class by; rename it")
    return names


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
