"""A sample: a key and its members, one file per member in the tar."""

import json
import re
from dataclasses import dataclass
from typing import Any

from shards_spec.files import DataError
from shards_spec.names import IMAGE_EXTENSIONS

KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)*")
MAX_NAME_BYTES = 100  # the name field of a USTAR header


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
        found, meta = [self.caption], self.meta
        while isinstance(synthetic := meta.get(f"syn_{len(found) - 1}"), str):
            found.append(synthetic)
        return found

    @property
    def meta(self) -> dict[str, Any]:
        """The json member. Raises DataError when it is no JSON object."""
        try:
            value = json.loads(self.members.get("json", b"{}"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"key {self.key}: its json member does not parse ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"key {self.key}: its json member is no object")
        return value


def check_key(key: str) -> str:
    """The key itself when it follows the rule of SPEC.md §2. Raises DataError."""
    if not KEY_PATTERN.fullmatch(key) or len(key) + 6 > MAX_NAME_BYTES:
        raise DataError(
            f"key {key!r}: use letters, digits, '_', '-' and '/', no dots, {MAX_NAME_BYTES - 6} bytes at most"
        )
    return key


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key runs up to the first dot of the base name, the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()
