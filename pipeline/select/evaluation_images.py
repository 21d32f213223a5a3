"""The images of evaluation sets: those that `clipmill eval` would measure on, those of a ROOT, or of a folder."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shards_spec.files import DataError, UserError, exists, is_url, join, read_buffer, read_bytes
from shards_spec.folders import walk
from shards_spec.layout import RAW, SHARDS, dataset_json
from shards_spec.names import IMAGE_EXTENSIONS, is_image
from shards_spec.tar import index_shard

log = logging.getLogger(__name__)
SPLITS = ("test", "val")  # of which `eval` takes the first that is there


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set: how reasons call it, where it lies, and the folder in it that is measured on, or nothing."""

    label: str
    path: str
    part: str


@dataclass(frozen=True)
class EvaluationImage:
    """An image: its name below the set (``test/cat/1.jpg``, ``test/0.tar:KEY``) and what reads its encoded bytes."""

    name: str
    read: Callable[[], bytes]


def open_sets(paths: tuple[str, ...], root: str) -> list[EvaluationSet]:
    """The sets at these paths, in their order, each with a label of its own.

    Raises UserError for a path that is not there, or is the dataset itself.
    """
    given = list(dict.fromkeys(path.rstrip("/") or "/" for path in paths))
    labels = list(map(_label, given))
    sets = []
    for path, label in zip(given, labels, strict=True):
        if not exists(path):
            raise UserError(f"--against {path} is not there: give evaluation sets, or folders of images")
        if not is_url(path) and not Path(path).is_dir():
            raise UserError(f"--against {path} is a file: give the folder of an evaluation set, or of images")
        if _real(path) == _real(root):
            raise UserError(f"--against {path} is the dataset itself: every sample would go; give evaluation sets")
        sets.append(EvaluationSet(label if label and labels.count(label) == 1 else path, path, _measured_part(path)))
    return sets


def _label(path: str) -> str:
    """The name of a set: its folder's, with the one above for a split's."""
    parts = path.split("/")
    return "/".join(parts[-2:] if parts[-1] in SPLITS else parts[-1:])


def _real(path: str) -> str:
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def _measured_part(path: str) -> str:
    """The folder below a set whose images are measured on, empty for the set's own."""
    split = next((name for name in SPLITS if exists(join(path, name))), "")
    folder = join(path, split) if split else path
    if exists(dataset_json(folder)):
        for stage in (SHARDS, RAW):
            if exists(join(folder, stage)):
                return f"{split}/{stage}".lstrip("/")
    return split


def images_of(one: EvaluationSet) -> Iterator[EvaluationImage]:
    """The images of a set in a fixed order. Raises UserError for a folder that cannot be listed.

    What is no image is passed over. Of a damaged tar those before the damage come, and a warning.
    """
    folder = join(one.path, one.part) if one.part else one.path
    below = f"{one.part}/" if one.part else ""
    for prefix, files in walk(folder):
        for name in files:
            path = join(folder, prefix + name)
            if name.lower().endswith(".tar"):
                yield from _samples(path, f"{below}{prefix}{name}")
            elif is_image(name):
                yield EvaluationImage(f"{below}{prefix}{name}", partial(read_bytes, path))


def _samples(path: str, name: str) -> Iterator[EvaluationImage]:
    try:
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
                if image is not None:
                    data = image.read(buffer)
                    yield EvaluationImage(f"{name}:{key}", partial(bytes, data))
    except DataError as error:
        log.warning("%s; what comes before the damage is compared", error)
