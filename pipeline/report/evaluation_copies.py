"""Samples that `select --against` left out, each beside the evaluation image that it shows again."""

from collections import defaultdict

import pyarrow.compute as pc

from pipeline.report.columns import parquet_files, read_columns
from pipeline.report.samples import Shown, evenly, thumbnail, with_images
from shards_spec.files import DataError, UserError, join, names, read_buffer, read_bytes
from shards_spec.layout import SELECT, final_tar, select_folder
from shards_spec.names import IMAGE_EXTENSIONS
from shards_spec.selection import COPY_OF, PAIR
from shards_spec.tar import index_shard

LISTS = 40  # of each selection, that pairs are taken from at most
IN_TAR = ".tar:"  # of a pair: TAR:KEY


def draw_copies(root: str, number: int, problems: list[str]) -> list[tuple[Shown, Shown]]:
    """(evaluation image, sample that shows it again) of the selections, each pair once, from a few of their lists."""
    pairs = dict[tuple[int, str], str]()  # final shard and key -> evaluation image
    for name in names(join(root, SELECT)):
        folder = join(root, select_folder(name))
        files = parquet_files(folder)
        for file in (files[i] for i in evenly(len(files), LISTS)):
            table = read_columns(join(folder, file), ["key", "reason", PAIR.name], problems)
            if table is not None and PAIR.name in table.column_names:
                copies = table.filter(pc.fill_null(pc.starts_with(table.column("reason"), COPY_OF), False))
                shard = int(file.split(".")[0])
                pairs |= {(shard, row["key"]): row[PAIR.name] for row in copies.slice(0, number).to_pylist()}
    chosen = [list(pairs)[i] for i in evenly(len(pairs), number)]
    by_shard = defaultdict[int, list[str]](list)
    for shard, key in chosen:
        by_shard[shard].append(key)
    samples = dict[str, Shown]()
    for shard, keys in by_shard.items():
        shown = with_images(final_tar(root, shard), {key: [] for key in keys}, problems)
        samples |= {one.key: one for one in shown}
    return [(_evaluation_image(pairs[shard, key]), samples[key]) for shard, key in chosen]


def _evaluation_image(path: str) -> Shown:
    """An image of an evaluation set by its path or TAR:KEY, without a thumbnail where it is no longer there."""
    try:
        return Shown(path, [], *thumbnail(_read(path)))
    except (DataError, UserError, OSError):
        return Shown(path, [], None, 0, 0)


def _read(path: str) -> bytes:
    tar, separator, key = path.rpartition(IN_TAR)
    if not separator:
        return read_bytes(path)
    with read_buffer(f"{tar}.tar") as buffer:
        for own, members in index_shard(buffer, f"{tar}.tar"):
            if own == key:
                image = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
                return bytes(image.read(buffer))
    raise DataError(f"{tar}.tar: key {key} is not there")
