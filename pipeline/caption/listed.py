"""`caption --from`: captions that others wrote, joined with the images of ROOT/raw; no image is looked at.

Each row of the files says of which image it is by a column that raw/ has too. An image's captions come from all its
rows, in the order of the files. Unusable captions (empty, looping, the same again) are left out and counted: nobody
can be asked for others.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption.caption_index import CaptionIndex, RowCaptions
from pipeline.caption.caption_lists import (
    NO_TEXT,
    NOT_UTF8,
    ListColumns,
    cleaned,
    image_name,
    list_files,
    listed_rows,
    pick_columns,
)
from pipeline.caption.config import CaptionConfig
from pipeline.caption.requests import GeneratedCaption
from pipeline.caption.shard_captions import REASON_FIELD, ImageCaptions, ShardCaptions, caption_defect, check_writer
from pipeline.core.runner import (
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardTask,
    Stage,
    Summary,
    run_stage,
    upstream_shards,
)
from pipeline.ingest.source_files import SourceFile
from shards_spec.content_id import content_ids
from shards_spec.files import UserError, is_url, sha256_file, sha256_json
from shards_spec.layout import RAW, captions_folder, parquet_path, raw_parquet, raw_tar, tar_path
from shards_spec.manifest import file_hashes
from shards_spec.messages import counted
from shards_spec.parquet import column_names, read_table
from shards_spec.tar import shard_keys

log = logging.getLogger(__name__)
NO_NAME = "nothing in raw to join it by"  # reasons on disk
NOT_LISTED = "no caption in the list"
ALL_UNUSABLE = "every caption of the list unusable"
ALL_OF_ONE_KIND = {NO_TEXT: "every caption of the list no text", NOT_UTF8: "every caption of the list not UTF-8"}


def caption_from_lists(config: CaptionConfig, assignment: ShardAssignment) -> Summary:
    """Run the stage with captions from files. Raises UserError for files that cannot be read, ShardsFailed."""
    root = config.root
    shards = upstream_shards(root, RAW, "ingest")
    files = list_files(config.lists.sources)
    columns = pick_columns(files, config.lists, column_names(raw_parquet(root, shards[0])))
    log.info("--from: column %r is %s of raw/, captions are in %s", columns.by_col, columns.by, list(columns.captions))
    is_raw = _are_raw(root, shards, files)
    identity = {
        "from": RAW if is_raw else _hash(files),
        "by": columns.by,
        "by_col": columns.by_col,
        "caption_col": list(columns.captions),
        "num_captions": config.num_captions,
    }
    stage = Stage(f"caption/{config.label}", captions_folder(config.label), identity)
    check_writer(root, stage, config.overwrite)
    with closing(_Joiner(root, shards, None if is_raw else files, columns)) as joiner:
        work = partial(_join_shard, joiner=joiner, stage=stage, most=config.num_captions)
        options = RunOptions(assignment=assignment, overwrite=config.overwrite, total=len(shards))
        return run_stage(root, stage, _tasks(root, shards, assignment), work, options)


def _are_raw(root: str, shards: list[int], files: list[SourceFile]) -> bool:
    """Whether the files are the Parquet files of raw/ itself, all of them: a list that grows with every retry."""

    def resolved(path: str) -> str:
        return path if is_url(path) else os.path.realpath(path)

    return {resolved(file.path) for file in files} == {resolved(raw_parquet(root, shard)) for shard in shards}


def _hash(files: list[SourceFile]) -> str:
    """sha256 of the file; of several the hash of the list of theirs."""
    hashes = [sha256_file(file.path) for file in files]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def _tasks(root: str, shards: list[int], assignment: ShardAssignment) -> Iterator[ShardTask]:
    """A task per shard of the assignment; the tar gives the keys, the Parquet file what rows are joined by."""
    for shard in filter(assignment.claim, shards):
        paths = [tar_path(RAW, shard), parquet_path(RAW, shard)]
        yield ShardTask(shard, dict(zip(paths, file_hashes(root, RAW, shard, paths), strict=True)))


class _Joiner:
    """Finds the captions of a shard's images; the files are read when the first shard needs them.

    Without ``files`` each shard's captions are in its own Parquet file, one of its inputs: what a retry adds to raw/
    changes nothing for the shards before.
    """

    def __init__(self, root: str, shards: list[int], files: list[SourceFile] | None, columns: ListColumns) -> None:
        self._root = root
        self._shards = shards
        self._files = files
        self._columns = columns
        self._index: CaptionIndex | None = None
        self._left_out = dict[str, float]()

    def close(self) -> None:
        """Drop the index."""
        if self._index is not None:
            self._index.close()

    def find(self, shard: int, keys: list[str]) -> Iterator[tuple[str, list[RowCaptions] | None]]:
        """Each key with the rows of its image; None where raw/ has nothing to look it up by.

        Raises UserError for a file that cannot be read, DataError for a broken raw shard.
        """
        names = self._names(shard)
        wanted = [names[key] for key in keys if key in names]
        if self._files is None:
            with closing(self._filled([shard], [raw_parquet(self._root, shard)])) as own:
                rows = own.find(wanted)
        else:
            if self._index is None:
                self._index = self._filled(self._shards, [file.path for file in self._files])
                self._index.report()
            rows = self._index.find(wanted)
            if keys and self._columns.by == "key":
                self._check_zeros(self._index.first_unknown, keys[0])
        for key in keys:
            yield key, rows[names[key]] if key in names else None

    def _filled(self, shards: list[int], paths: list[str]) -> CaptionIndex:
        """The captions that files have of the images of raw shards."""
        known = [content_ids(self._names(shard).values()) for shard in shards]
        index = CaptionIndex(np.unique(np.concatenate(known)))
        index.fill(chain.from_iterable(listed_rows(path, self._columns) for path in paths))
        self._left_out = dict(index.left_out)
        return index

    def _check_zeros(self, first_unknown: str | None, key: str) -> None:
        """Raise UserError for a list of keys that became numbers on the way: none of them would be found."""
        if first_unknown is not None and first_unknown.isdigit() and len(first_unknown) < len(key) and key.isdigit():
            raise UserError(
                f"--from: keys are text of {counted(len(key), 'digit')}, such as {key}; the list has {first_unknown}: "
                "write them with their zeros, or join by another column with --by"
            )

    def take_left_out(self) -> dict[str, float]:
        """How many rows of the files were left out, by reason; told once, for the log of the run that read them."""
        left_out, self._left_out = self._left_out, {}
        return left_out

    def _names(self, shard: int) -> dict[str, str]:
        """Key to what the rows of a list call the image, of the images of a raw shard that have such a name."""
        path = raw_parquet(self._root, shard)
        table = read_table(path, [*dict.fromkeys(["key", "status", self._columns.by])], fix="run ingest again")
        table = table.filter(pc.equal(table.column("status"), "success"))
        names = table.column(self._columns.by)
        try:
            texts = names.cast(pa.string()).to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"--by {self._columns.by}: in {path} it is {names.type}, no text or number") from error
        named = zip(table.column("key").to_pylist(), texts, strict=True)
        return {key: image_name(text, self._columns.by) for key, text in named if text}


def _join_shard(root: str, task: ShardTask, *, joiner: _Joiner, stage: Stage, most: int) -> ShardResult:
    """The captions of one raw shard, at most ``most`` an image; an image without any has a null and a reason."""
    captions = ShardCaptions()
    counts = Counter[str]()
    notes = Counter[str]()
    for key, rows in joiner.find(task.shard, shard_keys(raw_tar(root, task.shard))):
        texts = _usable(rows or [], most, notes)
        row = ImageCaptions({index: GeneratedCaption(text, None, None, True) for index, text in enumerate(texts)})
        if rows is None:
            row.reason = NO_NAME
        elif not texts:
            row.reason = _reason(rows)
        captions.rows[key] = row
        counts[row.reason or "success"] += 1
        notes["further rows of one image"] += max(0, len(rows or []) - 1)
    outputs = captions.write(root, stage, task.shard, [REASON_FIELD])
    counters = dict(sorted((+notes + Counter(captions.counters())).items()))
    return ShardResult(dict(counts), outputs, counters=counters, measurements=joiner.take_left_out())


def _reason(rows: list[RowCaptions]) -> str:
    """Why an image with these rows has no caption."""
    if not any(own.texts or own.left_out for own in rows):
        return NOT_LISTED
    kinds = set[str]().union(*(own.left_out for own in rows))
    if len(kinds) == 1 and not any(own.texts for own in rows):
        return ALL_OF_ONE_KIND.get(kinds.pop(), ALL_UNUSABLE)
    return ALL_UNUSABLE


def _usable(rows: list[RowCaptions], most: int, notes: Counter[str]) -> list[str]:
    """The captions of an image's rows that are stored; ``notes`` counts the others."""
    texts = list[str]()
    for row in rows:
        notes.update(f"{reason}, left out" for reason in row.left_out)
        for text in map(cleaned, row.texts):
            defect = caption_defect(text, texts)
            if defect is None and len(texts) == most:
                defect = "above --num-captions"
            if defect is None:
                texts.append(text)
            else:
                notes[f"{defect}, left out"] += 1
    return texts
