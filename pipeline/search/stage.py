"""`clipmill search`: bring the index of a model up to date with the images, and compare it with the queries."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

import numpy as np

from pipeline.core.prefetch import batches, prefetch_map
from pipeline.report import check_page_path
from pipeline.search.config import SearchConfig
from pipeline.search.index import FeatureIndex, Hit
from pipeline.search.model import FeatureModel
from pipeline.search.sources import ImageEntry, ImageSource, ReadImage, TarListing, open_source
from shards_spec.files import (
    DataError,
    UserError,
    is_url,
    join,
    json_bytes,
    read_bytes,
    remove_stale,
    sha256_bytes,
    sha256_json,
)
from shards_spec.images import crop_extreme_aspect, decode_rgb
from shards_spec.lock import locked
from shards_spec.messages import counted
from shards_spec.models import model_label

log = logging.getLogger(__name__)
INDEX = ".clipmill-search"  # below the images; hidden, so that no command takes it for a part of them
LISTED = 4096  # images of the listing looked up at a time
WRITE_ROWS = 8192  # images of a new file
DECODED_SIDES = 2  # a large JPEG is decoded at a part of its size, with at least so many sides of the model's input
NAMED = 20  # images that do not decode and are named; the others are counted
WRITE_S = 60.0  # or as many seconds: what a killed search embeds again


@dataclass(frozen=True)
class QueryResult:
    """What a search found for one query, best first; ``image`` is the query's own image, encoded, where it is one."""

    query: str
    image: bytes | None
    hits: list[Hit]


@dataclass(frozen=True)
class SearchResult:
    """The queries' results, and where the images are that they name."""

    model: str
    source: ImageSource
    images: int
    results: list[QueryResult]

    def lines(self, as_json: bool) -> Iterator[str]:
        """Yield what the command prints: a block per query, or a JSON object per image found."""
        for result in self.results:
            if not as_json:
                yield result.query
            for rank, hit in enumerate(result.hits, start=1):
                path = self.source.path(hit.name)
                if as_json:
                    row = {"query": result.query, "rank": rank, "score": round(hit.score, 6), "image": path}
                    yield json_bytes(row, indent=None).decode().rstrip("\n")
                else:
                    yield f"{rank:4}  {hit.score:.4f}  {path}"


def search(config: SearchConfig, model: FeatureModel) -> SearchResult:
    """Index the images and find those that are nearest to each query.

    Raises:
        UserError: There are no such images, none can be used, a query cannot be read, or another search writes the
            index.
        DataError: An image that is a query does not decode.
    """
    if config.html:
        check_page_path(config.html, "--html")
    source = open_source(config.images)
    queries = [_read_query(path) for path in config.image]  # before the work that takes long
    index_root = _index_root(config)
    folder = join(index_root, index_name(model))
    if config.update:
        index = _updated(source, folder, model, index_root)
    else:
        index = FeatureIndex(folder, {})
        index.keep_all()
    if not len(index):
        raise UserError(_nothing(config, source, folder))
    features = [model.embed_texts(config.text)] if config.text else []
    if queries:
        features.append(model.embed_images([_prepared_query(model, path, data) for path, data in queries]))
    images: list[tuple[str, bytes | None]] = [(text, None) for text in config.text]
    images += queries
    found = index.search(np.concatenate(features), config.top) if features else []
    results = [QueryResult(query, image, hits) for (query, image), hits in zip(images, found, strict=True)]
    return SearchResult(model.name, source, len(index), results)


def _index_root(config: SearchConfig) -> str:
    """The folder of the indexes of these images: below them, or in ``config.index`` under a name of their own."""
    if config.index is None:
        return join(config.images, INDEX)
    images = config.images if is_url(config.images) else str(Path(config.images).resolve())
    return join(config.index, f"{model_label(images, None)}-{sha256_bytes(images.encode())[:12]}")


def index_name(model: FeatureModel) -> str:
    """Return the name of a model's folder in an index: models that compute other features have another."""
    return f"{model_label(model.name, None)}-{sha256_json(model.identity)[:12]}"


def _read_query(path: str) -> tuple[str, bytes]:
    try:
        return path, read_bytes(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"--image {path}: {(error.strerror or 'not there').lower()}; give an image file") from error


def _prepared(model: FeatureModel, data: bytes) -> np.ndarray:
    """An encoded image as the image tower takes it. Raises DataError when it does not decode."""
    return model.prepare(crop_extreme_aspect(decode_rgb(data, shorter_side=DECODED_SIDES * model.image_size)))


def _prepared_query(model: FeatureModel, path: str, data: bytes) -> np.ndarray:
    try:
        return _prepared(model, data)
    except DataError as error:
        raise UserError(f"--image {path}: {error}; give an image file") from error


def _nothing(config: SearchConfig, source: ImageSource, folder: str) -> str:
    if not config.update:
        return f"{folder} has no embeddings of this model: leave --no-update out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in source.left_out.most_common()) or "none"
    return (
        f"--images {config.images}: no image to search (left out: {reasons}; other files: {source.files_seen()}); "
        "give a folder of images or the ROOT of a dataset"
    )


def _updated(source: ImageSource, folder: str, model: FeatureModel, index_root: str) -> FeatureIndex:
    """The index with the features of all images of today; prints what was done."""
    if not is_url(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with locked(join(folder, ".lock"), f"the index {folder}"):
        remove_stale(folder)
        index = FeatureIndex(folder, {"search": 1, **model.identity})
        listing = TarListing(join(index_root, "tars.parquet"))
        start = time.monotonic()
        embedded = _embed_missing(source, index, model, listing)
        if embedded:
            seconds = time.monotonic() - start
            log.info(
                "search: %s embedded in %.1f s (%.1f images/s)", counted(embedded, "image"), seconds, embedded / seconds
            )
        index.merge()
        listing.save()
    if source.left_out:
        log.warning("search: left out: %s", ", ".join(f"{n} {reason}" for reason, n in source.left_out.most_common()))
    if source.other_files:
        log.info("search: files that are no images: %s", source.files_seen())
    return index


def _embed_missing(source: ImageSource, index: FeatureIndex, model: FeatureModel, listing: TarListing) -> int:
    """Embed the images that the index lacks, in files of `WRITE_ROWS` images; return how many."""

    def missing() -> Iterator[ImageEntry]:
        for entries in batches(source.entries(listing), LISTED):
            known = index.keep(np.array([entry.id for entry in entries], np.uint64))
            yield from (entry for entry, is_known in zip(entries, known, strict=True) if not is_known)

    def prepare(item: tuple[ImageEntry, ReadImage]) -> tuple[ImageEntry, np.ndarray | str]:
        entry, read = item
        try:
            return entry, _prepared(model, read())
        except DataError as error:
            return entry, str(error)
        except OSError as error:  # it is gone, or may not be read
            return entry, f"cannot be read: {(error.strerror or str(error)).lower()}"

    threads = cpu_count() or 1
    prepared = prefetch_map(prepare, source.read(missing()), threads, depth=2 * model.batch_size)
    total = 0
    entries, features = list[ImageEntry](), list[np.ndarray]()
    written_at = time.monotonic()
    for batch in batches(_usable(prepared, source), model.batch_size):
        features.append(model.embed_images([pixels for _, pixels in batch]))
        entries += [entry for entry, _ in batch]
        if len(entries) >= WRITE_ROWS or time.monotonic() - written_at > WRITE_S:
            total += _write(index, entries, features)
            entries, features = [], []
            written_at = time.monotonic()
            log.info("search: %s embedded", counted(total, "image", style=","))
    return total + _write(index, entries, features)


def _usable(
    prepared: Iterator[tuple[ImageEntry, np.ndarray | str]], source: ImageSource
) -> Iterator[tuple[ImageEntry, np.ndarray]]:
    """The images that decode; the others are counted, and the first `NAMED` named."""
    named = 0
    for entry, pixels in prepared:
        if isinstance(pixels, str):
            source.left_out[pixels] += 1
            named += 1
            if named <= NAMED:
                log.warning("%s: %s; left out", source.path(entry.name), pixels)
        else:
            yield entry, pixels


def _write(index: FeatureIndex, entries: list[ImageEntry], features: list[np.ndarray]) -> int:
    if entries:
        ids = np.array([entry.id for entry in entries], np.uint64)
        index.add([entry.name for entry in entries], ids, np.concatenate(features))
    return len(entries)
