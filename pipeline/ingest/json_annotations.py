"""Captions of images in JSON files as data sets publish them: COCO's, Karpathy's splits, plain objects and lists."""

import json
from collections.abc import Iterator
from typing import Any

from pipeline.ingest.rows import CAPTION_NAMES, SourceCaption, captions_of, find_column, json_text
from shards_spec.names import is_image

TEXT_NAMES = ("text", "caption", *CAPTION_NAMES, "captions", "texts", "comment", "sentence")
FILE_NAMES = ("file_name", "filename", "image", "image_name", "file", "img", "filepath", "image_path")

Entry = tuple[str | None, list[SourceCaption]]  # file name (None: the list does not tell it), its captions


def json_entries(value: Any, given: str | None) -> Iterator[Entry] | None:
    """File names and captions in a parsed JSON file; None when it is not a list of captions.

    Args:
        value: The parsed file: COCO's annotations (``images``, ``annotations``), Karpathy's (``images`` with
            ``sentences``), an object of file name to captions, or a list of objects with a file name and captions.
        given: Name of the field with the captions; None: one of the usual ones.
    """
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        images = [image for image in value["images"] if isinstance(image, dict)]
        annotations = value.get("annotations")
        if isinstance(annotations, list):
            return _coco_entries(images, [one for one in annotations if isinstance(one, dict)], given or "caption")
        return _karpathy_entries(images) if any("sentences" in image for image in images) else None
    if isinstance(value, dict) and all(isinstance(name, str) and is_image(name) for name in value):
        return ((_file_name(name), captions_of(captions)) for name, captions in value.items())
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        names = list(value[0])
        file = find_column(None, FILE_NAMES, names)
        text = find_column(given, TEXT_NAMES, names)
        if file is not None and text is not None:
            return ((_file_name(row.get(names[file])), captions_of(row.get(names[text]))) for row in value)
    return None


def _file_name(value: object) -> str | None:
    """A file name from JSON, where lone surrogates are possible."""
    return json_text(value)[0] or None


def _coco_entries(images: list[Any], annotations: list[Any], column: str) -> Iterator[Entry] | None:
    """https://cocodataset.org/#format-data: captions name their image by its id, which may be any JSON value."""
    if not any(column in annotation for annotation in annotations):
        return None
    captions = dict[str, list[SourceCaption]]()
    for annotation in annotations:
        image_id = json.dumps(annotation.get("image_id"))
        captions.setdefault(image_id, []).extend(captions_of(annotation.get(column)))
    return _join_by_id(images, captions)


def _join_by_id(images: list[Any], captions: dict[str, list[SourceCaption]]) -> Iterator[Entry]:
    known = set()
    for image in images:
        image_id = json.dumps(image.get("id"))
        known.add(image_id)
        yield _file_name(image.get("file_name")), captions.get(image_id, [SourceCaption()])
    for image_id, texts in captions.items():
        if image_id not in known:
            yield from ((None, [caption]) for caption in texts)


def _karpathy_entries(images: list[Any]) -> Iterator[Entry]:
    """https://cs.stanford.edu/people/karpathy/deepimagesent: ``filename``, ``filepath`` (a folder), ``sentences``."""
    for image in images:
        file = _file_name(image.get("filename"))
        folder = image.get("filepath")
        name = _file_name(f"{folder}/{file}") if isinstance(folder, str) and file else file
        sentences = image.get("sentences")
        captions = list[SourceCaption]()
        for sentence in sentences if isinstance(sentences, list) else []:
            if isinstance(sentence, dict):
                captions += captions_of(sentence.get("raw"))
        yield name, captions or [SourceCaption()]
