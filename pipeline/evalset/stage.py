"""`clipmill evalset`: an evaluation set in CLIP_benchmark's WebDataset layout.

EVAL/dataset_type.txt                                        "classification" or "retrieval"
EVAL/classnames.txt, zeroshot_classification_templates.txt   of a classification
EVAL/test/0.tar …, nshards.txt                               members jpg|png|webp, and cls (a number) or txt (captions)
EVAL/test/evalset.json                                       what it was made from, and what was left out by reason

JPEG, PNG and WebP are copied; other formats become PNG with the pixels that evaluation sees. ``nshards.txt`` and
``evalset.json`` are written last: a set that was interrupted is none, and the same command writes it whole.
"""

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from pipeline.core.prefetch import prefetch_map
from pipeline.core.progress import show_progress
from pipeline.core.workers import usable_cores
from pipeline.evalset.captioned import captioned_source
from pipeline.evalset.config import EvalsetConfig
from pipeline.evalset.items import EvalItem, EvalSource
from pipeline.evalset.labelled import labelled_source
from pipeline.ingest.image_bytes import ImageReadError, read_image_bytes
from shards_spec.class_names import read_class_names
from shards_spec.file_kinds import HEAD_BYTES, image_kind
from shards_spec.files import (
    DataError,
    UserError,
    exists,
    is_url,
    join,
    names,
    read_json,
    remove,
    remove_stale,
    sha256_json,
    write_bytes,
    write_json,
)
from shards_spec.images import decode_rgb
from shards_spec.messages import counted, flag
from shards_spec.names import is_image
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

log = logging.getLogger(__name__)
RECORD = "evalset.json"
MAX_IMAGE_BYTES = 1 << 28
MAX_SHARD_BYTES = 1_000_000_000  # as CLIP_benchmark's own sets have it
AHEAD = 64  # images that are read and decoded ahead
COPIED = {"a JPEG image": "jpg", "a PNG image": "png", "a WebP image": "webp"}  # what CLIP_benchmark reads
SHARD = re.compile(r"\d+\.tar")
TEXTS = ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt")  # of EVAL itself
EXAMPLES = 5  # of what is left out, in the record


def evalset(config: EvalsetConfig) -> str:
    """Write the set, and return a line that says what it holds and what was left out.

    Raises:
        UserError: The source is missing or of an unknown form, holds no image, or EVAL holds another set.
    """
    for path in (config.classes, config.images, config.captions):
        if path is not None and is_url(path):
            raise UserError(f"{path}: the source of an evaluation set is a local folder or file; copy it first")
    source = _open(config)
    folder = join(config.out, config.split)
    made_from = {
        "format": 1,
        "split": config.split,
        "shard_size": config.shard_size,
        "classes": source.classes,
        "prompts": source.prompts,
        "items": sha256_json([[item.name, item.answer, item.stamp, item.problem] for item in source.items]),
        "dropped": source.dropped,
    }
    fingerprint = sha256_json(made_from)
    if (former := _former(folder)) is not None:
        if former.get("made_from") == fingerprint:
            return f"{_summary(former)} (there already)"
        if not config.overwrite:
            raise UserError(f"{folder} holds a set that was made from something else; --overwrite, or another EVAL")
    _check_folder(config, folder, is_known=former is not None)
    _check_other_split(config, source)
    for name in (RECORD, "nshards.txt"):
        remove(join(folder, name))
    remove_stale(folder)
    _write_texts(config.out, source)
    record = _write_images(folder, source, config.shard_size)
    record = {"made_from": fingerprint, "split": config.split, "classes": len(source.classes), **record}
    write_bytes(join(folder, "nshards.txt"), f"{record['shards']}\n".encode())
    write_json(join(folder, RECORD), record)
    return _summary(record)


def _open(config: EvalsetConfig) -> EvalSource:
    if config.classes is not None:
        return labelled_source(config.classes, config.split, config.label_col, config.class_names, config.prompts)
    assert config.images is not None
    assert config.captions is not None
    for field in ("class_names", "prompts", "label_col"):
        if (value := getattr(config, field)) is not None:
            raise UserError(f"{flag(field)} {value!r} would not be used: --captions have no classes")
    return captioned_source(config.images, config.captions, config.split, config.caption_col)


def _former(folder: str) -> dict[str, Any] | None:
    """The record of a finished set, an empty one where another program made it; None where there is none."""
    if not exists(join(folder, "nshards.txt")):
        return None
    path = join(folder, RECORD)
    record = read_json(path, fix="delete the folder") if exists(path) else {}
    return record if isinstance(record, dict) else {}


def _check_folder(config: EvalsetConfig, folder: str, is_known: bool) -> None:
    """Raise UserError where the set would lie among its own images, or among the files of somebody else."""
    source = os.path.realpath(config.classes or config.images or "")
    if f"{os.path.realpath(folder)}/".startswith(f"{source}/") and os.path.isdir(source):
        raise UserError(f"{folder} is among the images of {source}; give an EVAL elsewhere")
    if is_known or config.overwrite:
        return
    others = [join(config.out, name) for name in names(config.out) if is_image(name)]
    others += [join(folder, name) for name in names(folder) if not SHARD.fullmatch(name) and not name.startswith(".")]
    if others:
        raise UserError(f"{others[0]} is no file of a set; give another EVAL, or --overwrite")
    splits = (join(config.out, split, "nshards.txt") for split in ("train", "test"))
    texts = [name for name in TEXTS if exists(join(config.out, name))]
    if texts and not exists(folder) and not any(map(exists, splits)):
        raise UserError(f"{join(config.out, texts[0])} is there without a set; give another EVAL, or --overwrite")


def _check_other_split(config: EvalsetConfig, source: EvalSource) -> None:
    """Raise UserError where the other split of EVAL is of other classes, or has captions where this one has classes."""
    other = join(config.out, "train" if config.split == "test" else "test")
    if not exists(join(other, "nshards.txt")):
        return
    names_file = join(config.out, "classnames.txt")
    there = read_class_names(names_file) if exists(names_file) else []
    if there != source.classes:
        raise UserError(
            f"{other} is there with {counted(len(there), 'class', 'classes')}, and this split has "
            f"{counted(len(source.classes), 'class', 'classes')}, other ones or in another order; take another EVAL"
        )


def _write_texts(out: str, source: EvalSource) -> None:
    kind = "classification" if source.classes else "retrieval"
    write_bytes(join(out, "dataset_type.txt"), f"{kind}\n".encode())
    for name, lines in (("classnames.txt", source.classes), ("zeroshot_classification_templates.txt", source.prompts)):
        if lines:
            write_bytes(join(out, name), "".join(f"{line}\n" for line in lines).encode())
        else:
            remove(join(out, name))


def _write_images(folder: str, source: EvalSource, shard_size: int) -> dict[str, Any]:
    """Write the shards; return the numbers of shards, samples, captions, and what was left out."""
    member = "cls" if source.classes else "txt"
    left_out = Counter[str](source.dropped)
    examples = dict[str, list[str]]()
    counts = Counter[str]()
    present = set[str]()  # answers

    def samples() -> Iterator[Sample]:
        for item, read in prefetch_map(_read, source.items, usable_cores(), AHEAD):
            if isinstance(read, str):
                left_out[read] += 1
                if len(shown := examples.setdefault(read, [])) < EXAMPLES:
                    shown.append(item.name)
                continue
            extension, data = read
            yield Sample(f"s{counts['samples']:07d}", {extension: data, member: item.answer.encode()})
            counts["samples"] += 1
            present.add(item.answer)
            counts["captions"] += item.answer.count("\n") + 1 if member == "txt" else 0

    expected = -(-len(source.items) // shard_size)
    with show_progress("evalset", expected, lambda: counted(counts["samples"], "image")) as show:
        shards = _write_shards(folder, samples(), shard_size, show)
    if not counts["samples"]:
        raise UserError(f"{folder}: no image is left ({_reasons(left_out)}); check the images")
    if source.classes and (empty := len(source.classes) - len(present)):
        log.warning("%s: %s without an image that decodes", folder, counted(empty, "class", "classes"))
    for reason, named in examples.items():
        log.warning("%s: %s left out: %s, such as %s", folder, counted(left_out[reason], "image"), reason, named[0])
    return {
        "shards": shards,
        "samples": counts["samples"],
        "captions": counts["captions"],
        "left_out": dict(left_out),
        "examples": examples,
    }


def _write_shards(folder: str, samples: Iterator[Sample], shard_size: int, show: Callable[[int], None]) -> int:
    """Write the samples as shards, remove those of a larger set that was there; return how many were written."""
    shards = 0
    while (first := next(samples, None)) is not None:
        write_shard(join(folder, f"{shards}.tar"), _one_shard(chain([first], samples), shard_size))
        shards += 1
        show(shards)
    beyond = shards
    while exists(path := join(folder, f"{beyond}.tar")):
        remove(path)
        beyond += 1
    return shards


def _one_shard(samples: Iterator[Sample], shard_size: int) -> Iterator[Sample]:
    """The next samples, up to ``shard_size`` of them or until they have `MAX_SHARD_BYTES`."""
    size = 0
    for number, sample in enumerate(samples, start=1):
        yield sample
        size += sum(map(len, sample.members.values()))
        if number >= shard_size or size >= MAX_SHARD_BYTES:
            return


def _read(item: EvalItem) -> tuple[EvalItem, tuple[str, bytes] | str]:
    """An item, with the extension and the bytes of its image as they are written, or why it is left out."""
    if item.ref is None:
        return item, item.problem or ""
    try:
        data = read_image_bytes(item.ref, MAX_IMAGE_BYTES)
        image = decode_rgb(data, as_benchmark=True)
    except (ImageReadError, DataError) as error:
        return item, str(error)
    if extension := COPIED.get(image_kind(data[:HEAD_BYTES]) or ""):
        return item, (extension, data)
    file = io.BytesIO()
    image.save(file, "PNG")
    return item, ("png", file.getvalue())


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())


def _summary(record: dict[str, Any]) -> str:
    """``evalset: 5000 images with 25010 captions in 1 shard; left out: 3 file not found``."""
    if record["classes"]:
        answers = f"of {counted(record['classes'], 'class', 'classes')}"
    else:
        answers = f"with {counted(record['captions'], 'caption')}"
    line = f"evalset: {counted(record['samples'], 'image')} {answers} in {counted(record['shards'], 'shard')}"
    return f"{line}; left out: {_reasons(Counter(record['left_out']))}" if record["left_out"] else line
