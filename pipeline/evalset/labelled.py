"""Images with one label each: class folders, and Parquet files as on Hugging Face."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evalset.items import PROMPT, EvalItem, EvalSource
from pipeline.ingest.image_folder import not_decoded
from pipeline.ingest.parquet_images import image_column, row_refs
from pipeline.ingest.rows import FileRef
from pipeline.ingest.source_io import local_stamp
from shards_spec import imagenet
from shards_spec.class_names import read_class_names, read_lines
from shards_spec.files import UserError
from shards_spec.folders import walk
from shards_spec.messages import counted
from shards_spec.names import file_ending, is_image, undecoded_ending
from shards_spec.parquet import open_parquet

log = logging.getLogger(__name__)
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target")
PARQUET = ".parquet"
# split that is asked for -> how Hugging Face calls its files; ImageNet's labelled test images are its validation
FILE_SPLITS = {"test": ("test", "validation", "val", "valid"), "train": ("train",)}
FILE_SPLIT = re.compile(r"(?P<split>[a-z_]+)-[0-9]+-of-[0-9]+.*", re.IGNORECASE)
NO_LABEL = "no label"  # Hugging Face writes -1 for labels that are kept secret
OUTSIDE = "image outside a class folder"


def labelled_source(
    path: str, split: str, label_column: str | None, names_file: str | None, prompts_file: str | None
) -> EvalSource:
    """List labelled images with the names of their classes and the prompts.

    Args:
        path: A folder of class folders, a Parquet file, or a folder of them.
        split: Which Parquet files are taken where their names say a split.
        label_column: The Parquet files' column of labels; None: found by its name or its type.
        names_file: File with a line per class; None: found.
        prompts_file: File with a line per prompt; None: CLIP's 80 for ImageNet's classes, else one.

    Raises:
        UserError: There is no such folder or file, no image or label in it, or the names do not fit.
    """
    if not os.path.exists(path):
        raise UserError(f"--classes {path} is not there; check the path")
    files = _parquet_files(path, split)
    if files:
        items, names, is_imagenet = _parquet_items(files, label_column, names_file)
        dropped = Counter[str]()
    else:
        if label_column is not None:
            raise UserError(f"--label-col {label_column!r} would not be used: {path} has no Parquet files")
        items, names, is_imagenet, dropped = _folder_items(path, names_file)
    return EvalSource(items, names, _prompts(prompts_file, is_imagenet), dict(dropped))


def _prompts(path: str | None, is_imagenet: bool) -> list[str]:
    if path is None:
        return list(imagenet.prompts()) if is_imagenet else [PROMPT]
    prompts = [line for line in read_lines(path, "one prompt per line with {c} for the class") if line]
    if bad := [prompt for prompt in prompts if "{c}" not in prompt]:
        raise UserError(f"--prompts {path}: {bad[0]!r} has no {{c}} for the class")
    return prompts


# class folders


def _folder_items(folder: str, names_file: str | None) -> tuple[list[EvalItem], list[str], bool, Counter[str]]:
    """Items, names of the classes, whether they are ImageNet's, and what is no image by reason. Raises UserError."""
    dropped = Counter[str]()
    files = dict[str, list[str]]()  # class folder -> paths below the set's folder
    for prefix, names in walk(folder):
        name = prefix.partition("/")[0]
        if name:
            files.setdefault(name, [])
        for file in names:
            if not is_image(file):
                ending = undecoded_ending(file)
                dropped[not_decoded(ending) if ending else f"no image: {file_ending(file) or file}"] += 1
            elif not name:
                dropped[OUTSIDE] += 1
            else:
                files[name].append(prefix + file)
    _check_folders(folder, files, dropped)
    order = _class_order(folder, list(files), names_file)
    items = list[EvalItem]()
    for label, (name, _) in enumerate(order.pairs):
        for file in files[name]:
            path = os.path.join(folder, file)
            items.append(EvalItem(file, str(label), FileRef(path), local_stamp(path)))
    return items, [name for _, name in order.pairs], order.is_imagenet, dropped


def _check_folders(folder: str, files: dict[str, list[str]], dropped: Counter[str]) -> None:
    """Raise UserError where there is no class folder, or one without images."""
    if not files:
        loose = dropped[OUTSIDE]
        advice = "put each class's images in a folder of its own, named by the class or its WNID"
        raise UserError(f"--classes {folder} has no class folders ({counted(loose, 'image')} lie in it); {advice}")
    if {"train", "val"} <= files.keys() or {"train", "test"} <= files.keys():
        raise UserError(f"--classes {folder} has the splits {', '.join(files)}: give the folder of one of them")
    if empty := [name for name, images in files.items() if not images]:
        raise UserError(
            f"--classes {folder}: {counted(len(empty), 'class folder')} without an image that can be decoded "
            f"({', '.join(empty[:3])}); fill them, or delete them to leave these classes out"
        )


class _ClassOrder:
    """Folder and name of each class by label, and whether the names are ImageNet's."""

    def __init__(self, pairs: list[tuple[str, str]], is_imagenet: bool) -> None:
        self.pairs = pairs
        self.is_imagenet = is_imagenet


def _class_order(folder: str, folders: list[str], names_file: str | None) -> _ClassOrder:
    """Raises UserError when a file of names does not fit, or for WNIDs that are none of ImageNet's."""
    ordered = sorted(folders)
    if names_file is not None:
        return _ClassOrder(list(zip(ordered, _given_names(names_file, len(ordered), folder), strict=True)), False)
    labels = imagenet.labels_of_folders(ordered, f"--classes {folder}", "name them with --class-names")
    if labels is None:
        return _ClassOrder([(name, name.replace("_", " ")) for name in ordered], False)
    names = imagenet.class_names()
    return _ClassOrder([(name, names[labels[name]]) for name in sorted(ordered, key=labels.__getitem__)], True)


def _given_names(path: str, number: int, where: str) -> list[str]:
    names = read_class_names(path)
    if len(names) != number:
        raise UserError(
            f"--class-names {path} has {counted(len(names), 'line')}, {where} {counted(number, 'class', 'classes')}; "
            "give a line per class, in the order of the labels or of the folders' names"
        )
    return names


# Parquet files


def _parquet_files(path: str, split: str) -> list[str]:
    """The Parquet files of a split that a path names; none where it is a folder of something else. Raises UserError."""
    if os.path.isfile(path):
        if file_ending(path) == PARQUET:
            return [path]
        raise UserError(f"--classes {path} is a file: give a folder of class folders, or a .parquet")
    files: list[str] = []
    for prefix, names in walk(path):
        files += [os.path.join(path, prefix, name) for name in names if file_ending(name) == PARQUET]
    by_split = dict[str, list[str]]()
    for file in files:
        match = FILE_SPLIT.fullmatch(os.path.basename(file))
        by_split.setdefault(match["split"].lower() if match else "", []).append(file)
    if len(by_split) <= 1:
        return files
    for name in FILE_SPLITS[split]:
        if name in by_split:
            return by_split[name]
    raise UserError(
        f"--classes {path} has Parquet files of {', '.join(name or 'no split' for name in by_split)}, none of the "
        f"split {split}; give the files' folder or one file"
    )


def _parquet_items(
    files: list[str], label_column: str | None, names_file: str | None
) -> tuple[list[EvalItem], list[str], bool]:
    """Items, names of the classes, whether they are ImageNet's. Raises UserError."""
    names: list[str] | None = None
    labelled = list[tuple[EvalItem, int]]()
    for file in files:
        with open_parquet(file, given=True) as table:
            column = _label_column(file, table.schema_arrow, label_column)
            own = _class_label_names(table.schema_arrow, column)
            if names is not None and own is not None and own != names:
                raise UserError(f"{file} has other class names than {files[0]}; give files of one data set")
            names = names or own
            labelled += _rows(file, table, column)
    if not labelled:
        raise UserError(f"--classes {files[0]} has no rows")
    most = max(label for _, label in labelled) + 1
    is_imagenet = False
    if names_file is not None:
        names = read_class_names(names_file)
    elif names is not None and imagenet.are_synset_words(names):
        names, is_imagenet = list(imagenet.class_names()), True
    if names is None:
        raise UserError(
            f"--classes {files[0]}: its labels are numbers up to {most - 1} without names (no ClassLabel in the "
            "schema's metadata); give --class-names, a file with a line per class"
        )
    if most > len(names):
        where = f"--class-names {names_file}" if names_file else f"--classes {files[0]}"
        raise UserError(f"{where} names {counted(len(names), 'class', 'classes')}, but there is a label {most - 1}")
    return [item for item, _ in labelled], names, is_imagenet


def _rows(file: str, table: pq.ParquetFile, column: str) -> Iterator[tuple[EvalItem, int]]:
    """An item per row and its label, -1 where there is none. Raises UserError for a file without images."""
    leaf = image_column(table.schema_arrow)
    if leaf is None:
        raise UserError(f"{file}: no column holds images; its columns are {', '.join(table.schema_arrow.names)}")
    labels = table.read([column]).column(0).to_pylist()
    stamp = local_stamp(file)
    for number, (ref, label) in enumerate(zip(row_refs(file, table, leaf), labels, strict=True)):
        name = f"{os.path.basename(file)}#{number}"
        if label is None or label < 0:
            yield EvalItem(name, problem=NO_LABEL), -1
        else:
            yield EvalItem(name, str(label), ref, stamp), label


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's datasets says of the columns in a schema's metadata."""
    try:
        value = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = value["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a ClassLabel; None where the metadata has none."""
    feature = _features(schema).get(column)
    names: Any = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return [" ".join(name.replace("_", " ").split()) for name in names]
    return None


def _label_column(file: str, schema: pa.Schema, given: str | None) -> str:
    """The column of integer labels. Raises UserError naming the columns."""
    integers: list[str] = [field.name for field in schema if pa.types.is_integer(field.type)]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if given is not None:
        if given not in integers:
            raise UserError(f"{file}: --label-col {given!r} is no column of integers; its columns are {columns}")
        return given
    for name in LABEL_NAMES:
        if name in integers:
            return name
    named = [name for name in integers if _class_label_names(schema, name)]
    if len(named) == 1:
        return named[0]
    raise UserError(
        f"{file}: no column of integer labels named {', '.join(LABEL_NAMES)}; its columns are {columns}: give "
        "--label-col"
    )
