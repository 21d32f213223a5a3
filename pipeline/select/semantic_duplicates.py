"""`select --semantic-duplicates`: images whose embeddings are nearly the same (SemDeDup, arXiv 2303.09540).

As there, k-means divides the embeddings into cells, only those of one cell are compared, and of similar ones that stays
which is the least similar to the centre of its cell. Unlike the released code, which compares with what went too, a
sample goes only for one that stays: so each has a pair above the bound, and a chain of small steps does not end far
from where it began.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.core.process_map import map_in_order
from pipeline.dedup.disk_columns import DiskKeys
from pipeline.select.cells import Embeddings, divide
from pipeline.select.facts import mean_views, open_cache, unit_rows
from shards_spec.files import join
from shards_spec.messages import counted

log = logging.getLogger(__name__)
BLOCK = 2048  # embeddings of a cell that are compared at a time
TILE = 8192  # embeddings that stay, with which a block is compared at a time
MOST_LOADED = 1 << 16  # embeddings of a cell that are in memory as a whole
NONE = -1
Fetch = Callable[[np.ndarray], np.ndarray]  # places in a cell, int64 (n,) -> their unit embeddings, float32 (n, D)


@dataclass(frozen=True)
class DuplicateRule:
    """Samples whose ``teacher``'s embeddings have a cosine above the bound are one; ``cells`` None: √samples."""

    teacher: str
    above: float
    cells: int | None = None


@dataclass(frozen=True)
class ShardRows:
    """A final shard, the keys of all its samples, and the rows of those that are compared, int64 (n,)."""

    shard: int
    keys: list[str]
    rows: np.ndarray


ReadRows = Callable[[int], ShardRows]


def find_semantic_duplicates(
    root: str, rule: DuplicateRule, shards: list[int], *, read: ReadRows, workers: int
) -> Iterator[tuple[int, dict[int, str]]]:
    """Each shard with its rows that repeat a sample that stays, and that one's key.

    ``read`` gives the samples that are compared; worker processes call it, too. Memory: 20 bytes a sample, and what
    `divide` and `first_alike` take. Embeddings lie in a temporary file, 2 bytes a number. Raises DataError for a broken
    cache, UserError for a full disk.
    """
    with tempfile.TemporaryDirectory(prefix="clipmill-select-") as folder:
        keys = DiskKeys(join(folder, "keys"))
        try:
            for one in map(read, shards):
                keys.append([one.keys[row] for row in one.rows.tolist()])
            embeddings = Embeddings(join(folder, "embeddings"))
            work = partial(_shard_embeddings, root, rule.teacher, read)
            for number, unit in enumerate(map_in_order(work, shards, min(workers, len(shards)))):
                embeddings.append(unit)
                if number == 0:
                    embeddings.reserve(len(keys))
            repeated = repeated_rows(embeddings, rule)
            for number, shard in enumerate(shards):
                start, stop = keys.starts[number : number + 2]
                gone = start + np.flatnonzero(repeated[start:stop] != NONE)
                if len(gone):
                    rows = read(shard).rows[gone - start]
                    kept = map(keys.__getitem__, repeated[gone].tolist())
                    yield shard, dict(zip(rows.tolist(), kept, strict=True))
        finally:
            keys.close()


def _shard_embeddings(root: str, teacher: str, read: ReadRows, shard: int) -> np.ndarray:
    """The unit embeddings of a shard's samples that are compared, (n, D); zeros where the cache has none."""
    one = read(shard)
    means = mean_views(open_cache(root, teacher, shard, one.keys))[one.rows]
    return unit_rows(means).astype(Embeddings.STORED)


def repeated_rows(embeddings: Embeddings, rule: DuplicateRule) -> np.ndarray:
    """int64 (n,): the embedding that stays for each one that goes, `NONE` for those that stay."""
    if rule.cells is not None and 2 * rule.cells > len(embeddings):
        log.warning(
            "select: --cells %d of %s: most are alone in their cell, and compared with no other; give fewer",
            rule.cells,
            counted(len(embeddings), "sample", style=","),
        )
    cells = divide(embeddings, rule.cells or max(1, round(len(embeddings) ** 0.5)))
    repeated = np.full(len(embeddings), NONE, np.int64)
    for rows in cells:
        if len(rows) > 1:
            kept = first_alike(_fetch(embeddings, rows), len(rows), rule.above)
            gone = kept != NONE
            repeated[rows[gone]] = rows[kept[gone]]
    log.info(
        "select: %s repeat another, of %s",
        counted(int((repeated != NONE).sum()), "sample", style=","),
        counted(len(embeddings), "embedding", style=","),
    )
    return repeated


def _fetch(embeddings: Embeddings, rows: np.ndarray) -> Fetch:
    if len(rows) <= MOST_LOADED:
        return embeddings.take(rows).__getitem__
    return lambda places: embeddings.take(rows[places])


def first_alike(fetch: Fetch, number: int, above: float) -> np.ndarray:
    """int64 (number,): of embeddings in order the first one that stays with a cosine above the bound; else `NONE`.

    One stays when there is none. Memory: the cosines of `BLOCK` with `TILE` embeddings.
    """
    found = np.full(number, NONE, np.int64)
    for start in range(0, number, BLOCK):
        places = np.arange(start, min(number, start + BLOCK))
        block = fetch(places)
        kept = np.flatnonzero(found[:start] == NONE)
        for first in range(0, len(kept), TILE):
            tile = kept[first : first + TILE]
            near = block @ fetch(tile).T > above
            hit = near.any(axis=1) & (found[places] == NONE)
            found[places[hit]] = tile[near[hit].argmax(axis=1)]
        near = np.triu(block @ block.T > above, 1)
        for own in np.flatnonzero(near.any(axis=1)).tolist():
            if found[start + own] == NONE:
                later = places[near[own]]
                found[later[found[later] == NONE]] = start + own
    return found
