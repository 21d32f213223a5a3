"""Images with captions, from the lists that COCO, Karpathy and Flickr publish."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.evalset.items import EvalItem, EvalSource
from pipeline.ingest.json_annotations import Entry, json_entries
from pipeline.ingest.metadata import list_entries
from pipeline.ingest.rows import NOT_FOUND, FileRef, captions_of
from pipeline.ingest.source_io import local_stamp
from shards_spec.files import UserError, read_bytes
from shards_spec.folders import walk
from shards_spec.library_errors import decode_text, no_regular_file, parse_json
from shards_spec.messages import counted
from shards_spec.names import file_ending, is_image

NO_CAPTION = "no caption"
NO_NAME = "caption without a file name"
OTHER_SPLIT = "image of another split"
KNOWN = (
    "known are COCO's captions_*.json, Karpathy's dataset_*.json, Flickr's captions.txt (image,caption), results.csv "
    "and .token, and tables (csv, tsv, jsonl, parquet) with a column of file names and one of captions"
)
# split that is asked for -> splits of Karpathy's files; restval is the part of COCO's val that is trained on
SPLITS = {"test": ("test",), "train": ("train", "restval")}


def captioned_source(images: str, captions: str, split: str, caption_column: str | None) -> EvalSource:
    """List the images of a captions file with all their captions, in the file's order.

    Args:
        images: Folder of the images; they may lie in folders below it, whatever folder the list says.
        captions: The list.
        split: Which images of a list with splits are taken.
        caption_column: Name of a table's caption column; None: one of the usual names.

    Raises:
        UserError: One of both is missing, the list cannot be read or is of an unknown form, or none of its images is
            there.
    """
    if not os.path.isdir(images):
        raise UserError(f"--images {images} is no folder; give the folder with the images that {captions} names")
    if not os.path.exists(captions):
        raise UserError(f"--captions {captions} is not there; check the path")
    if (reason := no_regular_file(captions)) is not None:
        raise UserError(f"--captions {captions} {reason}; give the file")
    dropped = Counter[str]()
    by_file = dict[str, list[str]]()
    for file, texts in _entries(captions, split, caption_column, dropped):
        if file is None:
            dropped[NO_NAME] += len(texts) or 1
            continue
        own = by_file.setdefault(file, [])
        for caption in texts:
            if text := " ".join((caption.text or "").split()):  # in the set a line is a caption
                own.append(text)
    items = list(_items(images, by_file))
    if not any(item.ref for item in items):
        raise _none_there(images, captions, items, dropped)
    return EvalSource(items, dropped=dict(dropped))


def _none_there(images: str, captions: str, items: list[EvalItem], dropped: Counter[str]) -> UserError:
    if not items:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "it is empty"
        return UserError(f"--captions {captions} names no image ({reasons}); {KNOWN}")
    uncaptioned = all(item.problem == NO_CAPTION for item in items)
    what = "has a caption" if uncaptioned else f"is in {images}"
    first = items[0].name
    return UserError(
        f"none of the {counted(len(items), 'image')} that {captions} names {what} (the first is {first!r}); "
        "check --images and --captions"
    )


def _items(images: str, by_file: dict[str, list[str]]) -> Iterator[EvalItem]:
    elsewhere: dict[str, str] | None = None
    for file, texts in by_file.items():
        path = os.path.join(images, file)
        if not os.path.isfile(path):
            if elsewhere is None:
                elsewhere = _paths_by_name(images)
            path = elsewhere.get(os.path.basename(file.replace("\\", "/")), "")
        if not texts:
            yield EvalItem(file, problem=NO_CAPTION)
        elif not path:
            yield EvalItem(file, problem=NOT_FOUND)
        else:
            yield EvalItem(file, "\n".join(texts), FileRef(path), local_stamp(path))


def _paths_by_name(folder: str) -> dict[str, str]:
    """The path of each image below a folder by its file name; of equal names the first."""
    paths = dict[str, str]()
    for prefix, names in walk(folder):
        for name in names:
            if is_image(name):
                paths.setdefault(name, os.path.join(folder, prefix, name))
    return paths


def _entries(path: str, split: str, column: str | None, dropped: Counter[str]) -> Iterable[Entry]:
    """File names and captions of a list of any known form. Raises UserError."""
    if file_ending(path) == ".json":
        value = _of_split(parse_json(path, read_bytes(path), given=True), split, path, dropped)
        entries = json_entries(value, column)
        found = _describe_json(value)
    elif (rows := _split_table(path)) is not None:
        kept = _chosen(rows, split, path, dropped)
        return ((row["filename"], captions_of(parse_json(path, row["raw"].encode(), given=True))) for row in kept)
    else:
        entries = list_entries(path, column)
        found = f"its first line is {_first_line(path)!r}"
    if entries is None:
        raise UserError(f"--captions {path} is of an unknown form: {found}; {KNOWN}")
    return entries


def _of_split(value: Any, split: str, path: str, dropped: Counter[str]) -> Any:
    """A parsed file with only the images of a split, where its images have one."""
    images = value.get("images") if isinstance(value, dict) else None
    if not isinstance(images, list) or not any(isinstance(image, dict) and "split" in image for image in images):
        return value
    objects = [image for image in images if isinstance(image, dict)]
    return value | {"images": _chosen(objects, split, path, dropped)}


def _chosen(rows: list[dict[str, Any]], split: str, path: str, dropped: Counter[str]) -> list[dict[str, Any]]:
    """The rows of a split; the others are counted. Raises UserError when there are none."""
    kept = [row for row in rows if row.get("split") in SPLITS[split]]
    if not kept:
        splits = sorted({str(row.get("split")) for row in rows})
        raise UserError(f"--captions {path} has no images of the split {split}; its splits are {', '.join(splits)}")
    if others := len(rows) - len(kept):
        dropped[OTHER_SPLIT] += others
    return kept


def _split_table(path: str) -> list[dict[str, str]] | None:
    """Rows of Karpathy's Flickr30k as a CSV (columns raw, split and filename); None for another file."""
    if file_ending(path) != ".csv" or not {"raw", "split", "filename"} <= {*_first_line(path).split(",")}:
        return None
    return list(csv.DictReader(io.StringIO(decode_text(path, read_bytes(path)), newline="")))


def _first_line(path: str) -> str:
    with open(path, "rb") as file:
        return file.readline(200).decode(errors="replace").strip()


def _describe_json(value: Any) -> str:
    """What a JSON file has at its top, for a message."""
    if isinstance(value, dict):
        return f"it has the keys {', '.join(map(repr, list(value)[:6])) or '(none)'}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"it is a list of objects with the keys {', '.join(map(repr, list(value[0])[:6]))}"
    return f"it holds a {type(value).__name__}"
