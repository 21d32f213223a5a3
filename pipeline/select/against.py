"""`select --against`: samples that show an image of an evaluation set again, found by hash, confirmed by pixels.

The images of the sets become an index, files that all worker processes share. Of a shard's samples those with a near
hash are decoded and compared; the others are not read where ``raw/`` has their hashes.
"""

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from pipeline.core.cropped_copies import COPY_SIDE, NEAR_BITS, crop_hashes, is_copy, small_copy
from pipeline.core.hash_index import HashIndex
from pipeline.core.image_match import fingerprint
from pipeline.core.near_duplicates import parse_hashes
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.core.prefetch import prefetch_map
from pipeline.select.against_cosine import CosineRule, EvaluationEmbeddings, centre_crop
from pipeline.select.evaluation_images import EvaluationImage, EvaluationSet, images_of, open_sets
from pipeline.select.facts import mean_views, open_cache, raw_shards_of, unit_rows
from shards_spec.files import DataError, UserError, join, read_buffer, read_json, write_json
from shards_spec.images import decode_rgb
from shards_spec.layout import final_tar, raw_parquet
from shards_spec.messages import counted
from shards_spec.parquet import column_names, read_table
from shards_spec.selection import COPY_OF
from shards_spec.tar import index_shard, read_sample

log = logging.getLogger(__name__)
MOST_COMPARED = 64  # images with near hashes, and with near embeddings, that one sample is compared with


@dataclass(frozen=True)
class Against:
    """An index of evaluation images: the folder of its files, and a hash of the images of each set by its label.

    ``embeddings`` where samples are looked up by a teacher's, too.
    """

    folder: str
    sets: dict[str, str]
    embeddings: EvaluationEmbeddings | None = None

    def describe(self) -> dict[str, Any]:
        """What a done-record says of it; the first ``teacher`` that it names is that of the embeddings."""
        described: dict[str, Any] = {"against": self.sets}
        if self.embeddings is not None:
            described["against_cosine"] = self.embeddings.rule.least
        return described


@dataclass(frozen=True)
class Copied:
    """The image of an evaluation set that a sample shows: the set's label, and where the image is."""

    label: str
    pair: str

    @property
    def reason(self) -> str:
        """Why the sample is left out: a reason on disk."""
        return f"{COPY_OF}{self.label}"


@dataclass(frozen=True)
class _Indexed:
    """An evaluation image as the index needs it; no ``copy`` where it does not decode."""

    name: str
    digest: str
    copy: np.ndarray | None
    hashes: np.ndarray
    crop: np.ndarray | None = None  # what a teacher sees of it, where one is asked


@contextmanager
def index_of(
    paths: tuple[str, ...], root: str, threads: int, rule: CosineRule | None = None
) -> Iterator[Against | None]:
    """Make the index of the images of evaluation sets, deleted at the end; None without any.

    Raises UserError for a set that is not there or has no image that decodes, and where the teacher of ``rule`` is not
    at hand.
    """
    if not paths:
        yield None
        return
    sets = open_sets(paths, root)
    with TemporaryDirectory(prefix="clipmill-against-") as folder:
        embeddings = None if rule is None else EvaluationEmbeddings(folder, root, rule)
        digests = _write_index(Path(folder), sets, threads, embeddings)
        yield Against(folder, digests, embeddings)


def _write_index(
    folder: Path, sets: list[EvaluationSet], threads: int, embeddings: EvaluationEmbeddings | None
) -> dict[str, str]:
    """Write the index of all sets; returns a hash of the names and bytes of each one's images. Raises UserError."""
    read = partial(_indexed, crop_size=None if embeddings is None else embeddings.image_size)
    names = list[tuple[int, str]]()  # of all images: set, name
    hashes = list[np.ndarray]()
    digests = dict[str, str]()
    with (folder / "copies").open("wb") as file:
        for number, one in enumerate(sets):
            digest = sha256()
            before = len(names)
            unread = list[str]()
            for image in prefetch_map(read, images_of(one), threads, 4 * threads):
                digest.update(f"{image.name}\0{image.digest}\n".encode())
                if image.copy is None:
                    unread.append(image.name)
                    continue
                names.append((number, image.name))
                hashes.append(image.hashes)
                file.write(image.copy.tobytes())
                if embeddings is not None and image.crop is not None:
                    embeddings.add(image.crop)
            if len(names) == before:
                raise UserError(f"--against {one.path} has no image that decodes; give an evaluation set")
            digests[one.label] = digest.hexdigest()
            if unread:
                log.warning(
                    "select: --against %s: %s cannot be read (first: %s); samples that show them are not found",
                    one.path,
                    counted(len(unread), "image"),
                    unread[0],
                )
            log.info("select: against %s of %s", counted(len(names) - before, "image"), one.label)
    if embeddings is not None:
        embeddings.finish()
    HashIndex.build(folder, np.concatenate(hashes))
    np.save(folder / "owners.npy", np.repeat(np.arange(len(hashes), dtype=np.uint32), list(map(len, hashes))))
    about = {"labels": [one.label for one in sets], "paths": [one.path for one in sets], "names": names}
    write_json(str(folder / "names.json"), about)
    return digests


def _indexed(image: EvaluationImage, crop_size: int | None) -> _Indexed:
    try:
        data = image.read()
    except OSError:  # a link to nowhere, a file without permission
        return _Indexed(image.name, "", None, np.empty(0, np.uint64))
    digest = sha256(data).hexdigest()
    try:
        pixels = decode_rgb(data)
    except DataError:
        return _Indexed(image.name, digest, None, np.empty(0, np.uint64))
    copy = small_copy(pixels)
    crop = None if crop_size is None else centre_crop(pixels, crop_size)
    return _Indexed(image.name, digest, copy, crop_hashes(copy), crop)


class EvaluationIndex:
    """The index in a folder, opened."""

    def __init__(self, folder: str) -> None:
        self._hashes = HashIndex(Path(folder))
        self._owners = np.load(Path(folder, "owners.npy"), mmap_mode="r")
        shape = (-1, COPY_SIDE, COPY_SIDE, 3)
        self._copies = np.memmap(Path(folder, "copies"), np.uint8, "r").reshape(shape)
        about = read_json(str(Path(folder, "names.json")))
        self._labels: list[str] = about["labels"]
        self._paths: list[str] = about["paths"]
        self._names: list[tuple[int, str]] = about["names"]

    def candidates(self, hashes: np.ndarray) -> dict[int, list[int]]:
        """Of samples by their hashes, uint64 [n], those that may be copies: row to images of the index."""
        rows, entries = self._hashes.near(hashes, NEAR_BITS)
        found = dict[int, list[int]]()
        for row, image in zip(rows.tolist(), self._owners[entries].tolist(), strict=True):
            found.setdefault(row, []).append(image)
        return {row: list(dict.fromkeys(images)) for row, images in found.items()}

    def confirm(self, images: list[int], sample: np.ndarray) -> Copied | None:
        """The first of the images whose copy a sample is, by its `fingerprint`."""
        for image in images:
            if is_copy(self._copies[image], sample):
                number, name = self._names[image]
                return Copied(self._labels[number], join(self._paths[number], name))
        return None


@lru_cache(1)
def _open(folder: str) -> EvaluationIndex:
    return EvaluationIndex(folder)


def find_copies(root: str, shard: int, keys: list[str], rows: list[int], against: Against) -> dict[int, Copied]:
    """Of these rows of a final shard, all of whose keys are given, those that show an image of the index: row to image.

    A sample that does not decode is none. Raises DataError for a broken file.
    """
    index = _open(against.folder)
    row_of = {keys[row]: row for row in rows}
    hashes = _stored_hashes(root, shard)
    prints = dict[int, np.ndarray]()
    if hashes is None:
        hashes = dict[str, str | None]()
        for key, image in _images(root, shard, row_of.keys()):
            hashes[key] = perceptual_hash(image)
            prints[row_of[key]] = fingerprint(image)
    near = index.candidates(parse_hashes([hashes.get(keys[row]) for row in rows]))
    candidates = {rows[place]: images[:MOST_COMPARED] for place, images in near.items()}
    if against.embeddings is not None:
        cached = open_cache(root, against.embeddings.rule.teacher, shard, keys)
        near = against.embeddings.candidates(unit_rows(mean_views(cached)[rows]), MOST_COMPARED)
        for place, images in near.items():
            candidates[rows[place]] = list(dict.fromkeys([*candidates.get(rows[place], []), *images]))
    missing = {keys[row] for row in candidates.keys() - prints.keys()}
    if missing:
        prints |= {row_of[key]: fingerprint(image) for key, image in _images(root, shard, missing)}
    found = dict[int, Copied]()
    for row, images in candidates.items():
        copied = index.confirm(images, prints[row]) if row in prints else None
        if copied is not None:
            found[row] = copied
    return found


def _stored_hashes(root: str, shard: int) -> dict[str, str | None] | None:
    """Key to perceptual hash, as ingest kept them; None where one of the raw shards has none."""
    hashes = dict[str, str | None]()
    raws = raw_shards_of(root, shard)
    for raw in raws:
        path = raw_parquet(root, raw)
        if "phash" not in column_names(path):
            return None
        table = read_table(path, ["key", "status", "phash"])
        table = table.filter(pc.equal(table.column("status"), "success"))
        hashes |= dict(zip(table.column("key").to_pylist(), table.column("phash").to_pylist(), strict=True))
    return hashes if raws else None


def _images(root: str, shard: int, keys: Set[str]) -> Iterator[tuple[str, Image.Image]]:
    """Key and image of those of a final shard's samples that decode."""
    path = final_tar(root, shard)
    with read_buffer(path) as buffer:
        for key, members in index_shard(buffer, path):
            if key in keys:
                with suppress(DataError):
                    yield key, decode_rgb(read_sample(buffer, key, members).image)
