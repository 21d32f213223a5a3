"""The small text files of a labelled data set: class names, numbers of shards, labels. One reader for all stages.

A class is the number of its line, so no line is left out: names are read up to the last line that is not empty, and an
empty one before it is an error. CLIP_benchmark drops such lines, which shifts every later class.
"""

import re
from collections.abc import Sequence

from shards_spec.files import DataError, UserError, exists, join, read_bytes, sha256_json, write_bytes
from shards_spec.layout import class_names_txt
from shards_spec.library_errors import decode_text
from shards_spec.manifest import read_dataset
from shards_spec.sample import Sample

SHARD_COUNT = "nshards.txt"  # CLIP_benchmark's, beside the shards of a split
CLASS_LIST = "class_names_sha256"  # in the config of `ingest` and `pack`, of labelled images alone
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines would end lines at characters that names may hold
NUMBER = re.compile(r"[0-9]{1,9}")  # "²" and "٣" are digits to str.isdigit, too


def read_lines(path: str, what: str) -> list[str]:
    """Lines of a UTF-8 file without a BOM, stripped, up to the last that is not empty.

    ``what`` says what it holds. Raises UserError when it is not there, not UTF-8, or says nothing.
    """
    try:
        text = decode_text(path, read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: it holds {what}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it holds {what}") from error
    lines = [line.strip() for line in LINE_END.split(text.rstrip())]
    if not any(lines):
        raise UserError(f"{path} is empty: it holds {what}")
    return lines


def read_class_names(path: str) -> list[str]:
    """One class per line. Raises UserError naming an empty line, since classes are the numbers of lines."""
    names = read_lines(path, "one class name per line")
    if "" in names:
        line = names.index("") + 1
        raise UserError(
            f"{path}: line {line} is empty, and labels are numbers of lines; name that class, or delete the line"
        )
    return names


def write_class_names(path: str, names: Sequence[str]) -> None:
    """Write one class per line, so that `read_class_names` returns ``names``: stripped, none empty or of two lines."""
    write_bytes(path, "".join(f"{name}\n" for name in names).encode())


def class_list_hash(names: Sequence[str]) -> str:
    """The identity of a list of classes: `CLASS_LIST` of the config of the stages that write labels."""
    return sha256_json(list(names))


def read_labelled_classes(root: str, stage: str) -> list[str] | None:
    """The classes of a ROOT of labelled images; None for one of image-text pairs.

    Raises UserError where ``classnames.txt`` is not the list by which the shards of a finished stage were labelled.
    """
    path = class_names_txt(root)
    recorded = read_dataset(root)["stages"].get(stage, {}).get("config", {}).get(CLASS_LIST)
    if recorded is None:
        if exists(path):
            raise UserError(f"{path}: the shards of {stage} have no classes; take the file away")
        return None
    names = read_class_names(path)
    if class_list_hash(names) != recorded:
        raise UserError(
            f"{path}: not the classes that the shards of {stage} were labelled by; put the list back, or run "
            f"`clipmill {stage} --overwrite`"
        )
    return names


def describe_difference(classes: Sequence[str], others: Sequence[str]) -> str:
    """Up to five class names that only one of two lists has, for a message."""
    return ", ".join(sorted({*classes} ^ {*others})[:5]) or "in another order"


def class_text(name: str) -> str:
    """The name of a class as a text says it: folders write ``golden_retriever``."""
    return name.replace("_", " ")


def read_shard_count(path: str) -> int:
    """The number in a CLIP_benchmark ``nshards.txt``. Raises UserError."""
    text = next(filter(None, read_lines(path, "the number of shards in its folder")))
    if not NUMBER.fullmatch(text):
        raise UserError(f"{path} says {text[:40]!r}: it must be a number")
    return int(text)


def numbered_shards(folder: str) -> list[str]:
    """The paths of CLIP_benchmark's shards, ``0.tar`` …, as many as ``nshards.txt`` says.

    Raises UserError when that file or one of the shards is missing.
    """
    count = read_shard_count(join(folder, SHARD_COUNT))
    paths = [join(folder, f"{shard}.tar") for shard in range(count)]
    if missing := [path for path in paths if not exists(path)]:
        raise UserError(f"{missing[0]} is not there, though {SHARD_COUNT} says {count}; copy the missing shards")
    return paths


def label_of(path: str, sample: Sample, classes: int) -> int:
    """The class of a sample of the tar at ``path``. Raises DataError when it is none."""
    return parse_label(sample.members.get("cls", b""), classes, f"{path}: key {sample.key}")


def parse_label(data: bytes, classes: int, where: str) -> int:
    """The class in a ``cls`` member, a number below ``classes``; ``where`` names file and key. Raises DataError."""
    text = data.decode("utf-8-sig", "replace").strip()
    if not NUMBER.fullmatch(text) or int(text) >= classes:
        raise DataError(
            f"{where} has class {text[:40]!r}, not a number below {classes} (the lines of classnames.txt); for images "
            "with captions use --task retrieval"
        )
    return int(text)
