"""What was taken down of a dataset: salted hashes in ``takedown/hashes.json``, and rows of raw/ without content.

The file tells whether a link, an image or a row was taken down, and not which ones were: `ingest` leaves those out when
it makes a shard again, and nobody can read a list of them from the dataset.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shards_spec import SPEC_VERSION
from shards_spec.files import DataError, join, names, read_json, sha256_bytes
from shards_spec.layout import TAKEDOWN
from shards_spec.manifest import SEAL, read_dataset, seal
from shards_spec.messages import counted

TAKEN_DOWN = "taken down"  # a reason on disk
TAKEN_DOWN_SAMPLES = "samples taken down"  # a counter on disk: places of a final shard of equal size that stay empty
STATUS = "failed_to_download"  # of a row that was taken down, in img2dataset's words
HASHES = f"{TAKEDOWN}/hashes.json"
DIGITS = 32  # of a hash that is kept: 128 bits
FIX = "put it back from a copy: without it `clipmill ingest` would fetch again what was taken down"


@dataclass(frozen=True)
class TakedownHashes:
    """Salted hashes of links, of images (by the sha256 of their bytes), of rows (link and caption) and of uids."""

    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    hashes: frozenset[str] = frozenset()

    def has_url(self, url: str | None) -> bool:
        """Whether this link was taken down."""
        return bool(self.hashes) and url is not None and self._hash("url", url) in self.hashes

    def has_image(self, sha256: str | None) -> bool:
        """Whether an image of this sha256 was taken down."""
        return bool(self.hashes) and sha256 is not None and self._hash("image", sha256) in self.hashes

    def has_row(self, url: str | None, caption: str | None) -> bool:
        """Whether the link, or this very row of a list, was taken down."""
        return self.has_url(url) or (bool(self.hashes) and self._hash("row", _row(url, caption)) in self.hashes)

    def has_uid(self, uid: str) -> bool:
        """Whether a row of this uid was taken down."""
        return bool(self.hashes) and self._hash("uid", uid) in self.hashes

    def extended(
        self,
        urls: Iterable[str],
        images: Iterable[str],
        rows: Iterable[tuple[str | None, str | None]],
        uids: Iterable[str] = (),
    ) -> "TakedownHashes":
        """These and more; ``images`` are sha256, ``rows`` are (link, caption), ``uids`` of rows that have one."""
        more = {self._hash("uid", uid) for uid in uids}
        more |= {self._hash("url", url) for url in urls}
        more |= {self._hash("image", image) for image in images}
        more |= {self._hash("row", _row(url, caption)) for url, caption in rows if url is not None}
        return TakedownHashes(self.salt, self.hashes | more)

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        content = {"spec_version": SPEC_VERSION, "salt": self.salt, "hashes": sorted(self.hashes)}
        return {**content, SEAL: seal(content)}

    def _hash(self, kind: str, text: str) -> str:
        return sha256_bytes(f"{self.salt}\0{kind}\0{text}".encode(errors="surrogatepass"))[:DIGITS]


def check_takedown_hashes(root: str) -> None:
    """Raise DataError when the file is damaged, or gone although something was taken down."""
    counts = read_dataset(root)["stages"].get("ingest", {}).get("counts", {})
    if not read_takedown_hashes(root).hashes and counts.get(TAKEN_DOWN):
        raise DataError(
            f"{join(root, HASHES)} is not there, but {counted(counts[TAKEN_DOWN], 'row')} were taken down; {FIX}"
        )


NOTHING = TakedownHashes("")


def _row(url: str | None, caption: str | None) -> str:
    return json.dumps([url, caption])


def read_takedown_hashes(root: str) -> TakedownHashes:
    """What was taken down of a dataset so far; nothing where there is no such file. Raises DataError."""
    path = join(root, HASHES)
    if HASHES.removeprefix(f"{TAKEDOWN}/") not in names(join(root, TAKEDOWN)):  # a store says why it refuses to list
        return TakedownHashes()
    content = read_json(path, FIX)
    if not isinstance(content, dict) or content.get(SEAL) != seal(content):
        raise DataError(f"{path}: not as it was written; {FIX}")
    if content.get("spec_version") != SPEC_VERSION:
        raise DataError(
            f"{path}: spec version {content.get('spec_version')}, this clipmill reads {SPEC_VERSION}; use the one "
            "that wrote it"
        )
    return TakedownHashes(content["salt"], frozenset(content["hashes"]))


def without_content(table: pa.Table, rows: np.ndarray, last: np.ndarray) -> pa.Table:
    """A table of raw/ in which the ``rows`` (indices) have but their key, status and reason.

    Those of them that are ``last`` (bool, as long as ``rows``) have the reason `TAKEN_DOWN`; the others, earlier tries
    of a row that a later shard has again, keep the reason of their time.
    """
    indices = np.arange(len(table))
    is_blank = np.zeros(len(table), bool)
    is_blank[rows] = True
    blank = table.take(pa.array(indices, mask=is_blank))
    is_last = np.zeros(len(table), bool)
    is_last[rows[last]] = True
    if "error_message" in table.column_names:
        reasons = table.column("error_message")
    else:
        reasons = pa.chunked_array([pa.nulls(len(table), pa.string())])
    kept = {
        "key": table.column("key"),
        "status": _replaced(table.column("status"), is_last, STATUS),
        "error_message": _replaced(reasons, is_last, TAKEN_DOWN),
    }
    for name, column in kept.items():
        place = blank.schema.get_field_index(name)
        if place < 0:
            blank = blank.append_column(name, column)
        else:
            blank = blank.set_column(place, blank.schema.field(place), column)
    return blank


def _replaced(column: pa.ChunkedArray, where: np.ndarray, text: str) -> pa.Array:
    values = [text if taken else value for value, taken in zip(column.to_pylist(), where, strict=True)]
    return pa.array(values, column.type)


def counters_of_rest(counters: dict[str, int], captions: int) -> dict[str, int]:
    """The counters of a shard of which so many captions are left, whose own ends and defects are not known any more.

    No count of captions exceeds their number; ``redrawn`` is what the run did.
    """
    most = {name: min(number, captions) for name, number in counters.items() if name != "redrawn"}
    return {**counters, **most, "captions": captions}
