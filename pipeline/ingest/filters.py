"""Which rows a user wants: rules on captions and columns, excluded links and images, duplicates within a shard.

What is left out gets a short, stable reason.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.core.filters import caption_problem
from pipeline.core.image_match import fingerprint, fingerprints_match
from pipeline.core.near_duplicates import EXACT_DUPLICATE, NEAR_DUPLICATE, find_duplicates
from pipeline.core.taken_down import NOTHING, TAKEN_DOWN, TakedownHashes
from pipeline.ingest.additional_columns import Condition, kept_name
from pipeline.ingest.images import EncodedImage, Outcome
from pipeline.ingest.rows import Row
from pipeline.ingest.source_io import lines
from shards_spec.content_id import content_id
from shards_spec.files import UserError, exists
from shards_spec.images import decode_rgb

EXCLUDED_URL = "excluded address"
EXCLUDED_IMAGE = "excluded picture"
NO_SHA256 = "no sha256 in the list"
OTHER_SHA256 = "other sha256 than the list's"
SHA256_DIGITS = 64
Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]


def _hash(text: str) -> int:
    return content_id(text.encode(errors="surrogatepass"))


def read_exclusions(paths: Iterable[str]) -> Hashes:
    """Sorted 64-bit hashes of the lines of text files, gzipped or not: addresses, or sha256 of images in hex.

    8 bytes a line: lists of many millions fit. Raises UserError for a file that does not exist.
    """
    return np.unique(np.fromiter(map(_hash, _exclusions(paths)), np.uint64))


def _exclusions(paths: Iterable[str]) -> Iterator[str]:
    """The lines that are not empty; what may be a sha256 in small letters."""
    for path in paths:
        if not exists(path):
            raise UserError(f"--exclude {path}: no such file; give a text file with an address or a sha256 per line")
        for line in lines(path):
            text = line.decode(errors="surrogateescape").strip()
            if text:
                yield text.lower() if len(text) == SHA256_DIGITS else text


def verify_sha256(row: Row, outcome: Outcome, column: str) -> Outcome:
    """The outcome, or the reason why a downloaded image is left out: its bytes have another hash than ``column`` says.

    An image that came with the source stays: it may be a reduced copy of what the hash is of.
    """
    if not isinstance(outcome, EncodedImage) or row.image_ref is not None:
        return outcome
    expected = row.extra.get(column) or row.extra.get(kept_name(column))  # the latter in a row that is tried again
    if not isinstance(expected, str) or not expected.strip():
        return NO_SHA256
    return outcome if expected.strip().lower() == outcome.sha256 else OTHER_SHA256


@dataclass(frozen=True)
class Selection:
    """Rules on rows and images.

    ``min_caption_chars`` and ``max_caption_chars`` 0: no limit; ``duplicates``: leave out images that occur earlier in
    their shard, with ``near_bits`` also those whose perceptual hashes differ in at most that many of 64 bits.
    """

    sane_captions: bool = False
    min_caption_chars: int = 0
    max_caption_chars: int = 0
    duplicates: bool = False
    near_bits: int | None = None
    where: tuple[Condition, ...] = ()
    exclusions: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    taken_down: TakedownHashes = NOTHING

    def filter_rows(self, rows: list[Row]) -> list[Row]:
        """All rows; those that are left out have the reason as their problem, and are not downloaded."""
        return [replace(row, problem=self._problem(row)) for row in rows]

    def _problem(self, row: Row) -> str | None:
        if self.taken_down.has_row(row.url, row.caption):
            return TAKEN_DOWN
        if row.problem is not None:
            return row.problem
        if row.url is not None and self._is_excluded(row.url):
            return EXCLUDED_URL
        for condition in self.where:
            if not condition.holds(row):
                return condition.reason
        return caption_problem(row.caption, self.min_caption_chars, self.max_caption_chars, self.sane_captions)

    def filter_images(self, rows: list[Row], outcomes: list[Outcome]) -> list[Outcome]:
        """Outcomes, with a reason in place of images that are excluded or occur earlier in the shard."""
        kept: list[Outcome] = [
            self._image_problem(outcome) or outcome if isinstance(outcome, EncodedImage) else outcome
            for outcome in outcomes
        ]
        if not self.duplicates:
            return kept
        images = [outcome if isinstance(outcome, EncodedImage) else None for outcome in kept]
        sha256s = [image.sha256 if image else None for image in images]
        hashes = [image.phash if image else None for image in images]
        fingerprints = dict[int, np.ndarray]()

        def same(one: int, other: int) -> bool:
            for index in {one, other} - set(fingerprints):
                image = images[index]
                assert image is not None  # rows without an image are no candidates
                fingerprints[index] = fingerprint(decode_rgb(image.data))
            return fingerprints_match(fingerprints[one], fingerprints[other])

        repeated = find_duplicates([row.url for row in rows], sha256s, hashes, self.near_bits, same)
        for index, first in repeated.items():
            kept[index] = EXACT_DUPLICATE if sha256s[index] == sha256s[first] else NEAR_DUPLICATE
        return kept

    def _image_problem(self, image: EncodedImage) -> str | None:
        if self.taken_down.has_image(image.sha256):
            return TAKEN_DOWN
        return EXCLUDED_IMAGE if self._is_excluded(image.sha256) else None

    def _is_excluded(self, text: str) -> bool:
        if not len(self.exclusions):
            return False
        wanted = np.uint64(_hash(text))
        index = int(np.searchsorted(self.exclusions, wanted))
        return index < len(self.exclusions) and bool(self.exclusions[index] == wanted)
