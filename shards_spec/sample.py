"""A sample: a key and its members, one file per member in the tar."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shards_spec.files import DataError
from shards_spec.messages import counted
from shards_spec.names import IMAGE_EXTENSIONS, is_image

KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)*")
MAX_NAME_BYTES = 100  # the name field of a USTAR header
MAX_DEPTH = 100  # levels of JSON: writers fail over what is nested deeper
TEXT_EXTENSIONS = ("txt", "caption", "text")
NAMED_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "img_bytes")
LABEL_IMAGES = ("mask", "seg", "segmentation", "label", "semantic", "instance", "depth", "normal", "alpha", "matte")
MOST_SHARED = 20  # members that several samples of one key may have together
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """``members`` maps a single-part lower-case extension (``jpg``, ``txt``, ``json``) to bytes."""

    key: str
    members: dict[str, bytes]

    @property
    def image_extension(self) -> str:
        """The extension of the image member. Raises DataError when there is none."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return extension
        raise DataError(f"key {self.key}: no image member among {sorted(self.members)}")

    @property
    def image(self) -> bytes:
        """The encoded image, untouched."""
        return self.members[self.image_extension]

    @property
    def caption(self) -> str:
        """The original caption; empty when the source had none. Raises DataError when it is not UTF-8."""
        try:
            return self.members.get("txt", b"").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"key {self.key}: its txt member is not UTF-8 ({error.reason})") from error

    @property
    def captions(self) -> list[str]:
        """The original caption, then ``syn_0``, ``syn_1`` … of the json member (SPEC.md §3). Raises DataError."""
        captions, meta = [self.caption], self.meta
        while isinstance(synthetic := meta.get(f"syn_{len(captions) - 1}"), str):
            captions.append(synthetic)
        return captions

    @property
    def meta(self) -> dict[str, Any]:
        """The json member. Raises DataError when it is no JSON object."""
        try:
            return parse_object(self.members.get("json", b"{}"))
        except ValueError as error:
            raise DataError(f"key {self.key}: its json member {error}") from error


def parse_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError that says what is wrong: no JSON, no object, nested too deep, huge numbers."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # of the former are numbers with more digits than Python converts
        raise ValueError(f"does not parse ({str(error).split(';')[0]})") from error
    if not isinstance(value, dict):
        raise ValueError("is no object")
    check_depth(data, value)
    return value


def check_depth(data: str | bytes, value: Any) -> None:
    """Raise ValueError for a JSON value, parsed from ``data``, that is nested deeper than `MAX_DEPTH`."""
    brackets = (b"[", b"{") if isinstance(data, bytes) else ("[", "{")
    if sum(map(data.count, brackets)) > MAX_DEPTH and not _is_shallow(value, MAX_DEPTH):  # type: ignore[arg-type]
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def _is_shallow(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    else:
        return True
    return not inner or (levels > 0 and all(_is_shallow(item, levels - 1) for item in inner))


def check_key(key: str) -> str:
    """The key itself when it follows the rule of SPEC.md §2. Raises DataError."""
    if not KEY_PATTERN.fullmatch(key) or len(key) + 6 > MAX_NAME_BYTES:
        raise DataError(
            f"key {key!r}: use letters, digits, '_', '-' and '/', no dots, {MAX_NAME_BYTES - 6} bytes at most"
        )
    return key


def check_keys(path: str, stored: Sequence[str], keys: Sequence[str], advice: str) -> None:
    """Raise DataError, which tells the first row that differs, unless the keys of a file are those of its shard.

    Args:
        path: The file.
        stored: Its keys, row by row.
        keys: Those of the shard, in the order of its tar.
        advice: What to do about it.
    """
    for row, (ours, theirs) in enumerate(zip(stored, keys, strict=False)):
        if ours != theirs:
            raise DataError(f"{path}: row {row} is key {ours}, the shard has {theirs} there; {advice}")
    if len(stored) != len(keys):
        first = (stored if len(stored) > len(keys) else keys)[min(len(stored), len(keys))]
        raise DataError(
            f"{path}: {counted(len(stored), 'row')}, the shard has {len(keys)}, first odd key {first}; {advice}"
        )


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def subsamples(key: str, members: dict[str, T]) -> list[tuple[str, dict[str, T]]]:
    """The samples that webdataset's rule puts under one key: ``track 2.0.jpg``, ``track 2.0.txt``, ``track 2.1.jpg`` ….

    Dots in file names make one key of many. An image is a sample of its own, under the longer key (``track 2.0``), when
    a text or a json has the same longer stem, or that stem begins with a digit; members without such a stem belong
    to all of them when no image is left among those. When there are only images with longer stems and nothing to share,
    each is a sample, too. What remains is one sample with several members, as ``x.jpg``, ``x.seg.png`` and ``x.txt``.
    """
    if not any("." in extension for extension in members):
        return [(key, members)]
    stems = dict[str, dict[str, T]]()
    for extension, member in members.items():
        stem, last = split_extension(extension)
        stems.setdefault(stem, {})[last] = member
    images = {stem for stem, own in stems.items() if stem not in LABEL_IMAGES and any(map(is_image, own))}
    beside = TEXT_EXTENSIONS if "" in images else (*TEXT_EXTENSIONS, "json")
    paired = {stem for stem in images - {"", *NAMED_IMAGES} if not stems[stem].keys().isdisjoint(beside)}
    numbered = {stem for stem in stems if _is_number(stem)} if any(map(_is_number, images)) else set()
    own = paired | numbered
    left = images - own
    rest = {extension: member for extension, member in members.items() if split_extension(extension)[0] not in own}
    if len(left) > 1 and left.isdisjoint(("", *NAMED_IMAGES)) and all(map(is_image, rest)):
        own |= left
        left, rest = set(), {}
    shared = rest if not left and len(rest) <= MOST_SHARED else {}
    samples = [(f"{key}.{stem}", {**shared, **stems[stem]}) for stem in stems if stem in own]
    if rest and not shared:
        samples.append((key, rest))
    return samples if len(samples) > 1 else [(key, members)]


def split_extension(extension: str) -> tuple[str, str]:
    """(longer stem, last part) of a member: ``0.jpg``, and ``0.jpg.txt`` beside it, have the stem ``0``."""
    stem, _, last = extension.rpartition(".")
    return (stem.rpartition(".")[0] if is_image(stem) and not is_image(last) else stem), last


def _is_number(stem: str) -> bool:
    return stem.strip()[:1].isdigit()
