"""The contact sheet: a few samples, evenly over the dataset, read from few shards."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.near_duplicates import NEAR_DUPLICATE
from pipeline.report.columns import parquet_files, read_columns
from shards_spec.files import DataError, exists, join, names, read_buffer
from shards_spec.images import decode_rgb
from shards_spec.layout import CAPTIONS, DEDUP, RAW, SHARDS, captions_folder
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_sample

OPENED = 6  # shards opened for the sheet at most
LISTS = 40  # of dedup's lists that pairs are taken from at most
THUMBNAIL = 320  # pixels of the longer side


@dataclass(frozen=True)
class Shown:
    """A sample of the sheet. ``captions`` pairs a text with its synsets, the original first."""

    key: str
    captions: list[tuple[str, list[str]]]
    image: str | None
    width: int
    height: int


def draw_samples(root: str, number: int, problems: list[str]) -> list[Shown]:
    """``number`` samples evenly over shards and rows: from ``shards/``, or from ``raw/`` before `pack` has run."""
    folder = SHARDS if parquet_files(join(root, SHARDS)) else RAW
    files = parquet_files(join(root, folder))
    chosen = [files[i] for i in evenly(len(files), min(OPENED, number))]
    shown = list[Shown]()
    for done, name in enumerate(chosen):
        share = -(-(number - len(shown)) // (len(chosen) - done))
        rows = _shard_rows(root, folder, name, share, problems)
        shown += with_images(join(root, folder, name.replace(".parquet", ".tar")), rows, problems)
    return shown


def draw_pairs(root: str, number: int, problems: list[str]) -> list[tuple[Shown, Shown]]:
    """(image that is kept, near-duplicate that `dedup` left out for it), from a few of its lists."""
    files = parquet_files(join(root, DEDUP))
    rows = list[dict[str, str]]()
    for name in (files[i] for i in evenly(len(files), LISTS)):
        table = read_columns(join(root, DEDUP, name), ["key", "reason", "kept"], problems)
        if table is not None and {"key", "reason", "kept"} <= set(table.column_names):
            near = table.filter(pc.fill_null(pc.equal(table.column("reason"), NEAR_DUPLICATE), False))
            rows += [{**row, "shard": name.split(".")[0]} for row in near.slice(0, number).to_pylist()]
    rows = [rows[i] for i in evenly(len(rows), number)]
    wanted = dict[str, dict[str, Any]]()  # by shard: a key begins with its shard's name, except those of a retry
    for row in rows:
        wanted.setdefault(row["shard"], {})[row["key"]] = []
        wanted.setdefault(row["kept"][: len(row["shard"])], {})[row["kept"]] = []
    shown = dict[str, Shown]()
    for shard, keys in wanted.items():
        path = join(root, RAW, f"{shard}.tar")
        if exists(path):
            shown |= {one.key: one for one in with_images(path, keys, problems)}
    for row in rows:
        for key in (row["key"], row["kept"]):
            shown.setdefault(key, Shown(key, [], None, 0, 0))
    return [(shown[row["kept"]], shown[row["key"]]) for row in rows]


def evenly(total: int, number: int) -> list[int]:
    """``number`` different indices below ``total`` (all of them if there are fewer), evenly spaced."""
    number = min(total, number)
    return [(2 * i + 1) * total // (2 * number) for i in range(number)]


def _shard_rows(root: str, folder: str, name: str, number: int, problems: list[str]) -> dict[str, Any]:
    """Key to captions with synsets, of ``number`` rows of one shard."""
    columns = ["key", "caption", "synthetic", "synsets", "status"]
    table = read_columns(join(root, folder, name), columns, problems)
    if table is None:
        return {}
    if "status" in table.column_names:
        table = table.filter(pc.fill_null(pc.equal(table.column("status"), "success"), False))
    rows = table.take(pa.array(evenly(len(table), number), pa.int64())).to_pylist()
    made = _made_captions(root, name, problems) if folder == RAW else {}
    return {row["key"]: _captions(row, row.get("synthetic") or made.get(row["key"]) or []) for row in rows}


def _captions(row: dict[str, Any], synthetic: list[str]) -> list[tuple[str, list[str]]]:
    synsets = row.get("synsets") or []
    texts = [row.get("caption") or "", *synthetic]
    return [(text, (synsets[i] or []) if i < len(synsets) else []) for i, text in enumerate(texts)]


def _made_captions(root: str, name: str, problems: list[str]) -> dict[str, list[str]]:
    """Captions of a shard that is not packed yet, from the first captioner that has it."""
    for captioner in names(join(root, CAPTIONS)):
        path = join(root, captions_folder(captioner), name)
        if exists(path) and (table := read_columns(path, ["key", "captions"], problems)) is not None:
            return dict(zip(table.column("key").to_pylist(), table.column("captions").to_pylist(), strict=True))
    return {}


def with_images(path: str, rows: dict[str, Any], problems: list[str]) -> list[Shown]:
    """Read a tar's images of the given keys only; a sample without a readable one is listed without."""
    images: dict[str, tuple[str | None, int, int]] = {}
    try:
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                if key in rows:
                    images[key] = _thumbnail(read_sample(buffer, key, members), problems)
                    if len(images) == len(rows):
                        break
    except (DataError, OSError) as error:
        problems.append(str(error))
    return [Shown(key, captions, *images.get(key, (None, 0, 0))) for key, captions in rows.items()]


def _thumbnail(sample: Sample, problems: list[str]) -> tuple[str | None, int, int]:
    """An image as a data URI with its size; None, and a problem, when it does not decode."""
    try:
        return thumbnail(sample.image)
    except DataError as error:
        text = str(error)
        problems.append(text if text.startswith("key ") else f"key {sample.key}: its image {text}")
        return None, 0, 0


def thumbnail(data: bytes) -> tuple[str, int, int]:
    """An encoded image as a data URI of a small JPEG, with its size. Raises DataError when it does not decode."""
    image = decode_rgb(data)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), *image.size
