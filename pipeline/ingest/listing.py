"""The rows of a source as tasks of `shard_size` rows each, and the shards that a source has no rows for."""

from collections.abc import Container, Iterator
from dataclasses import astuple, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from pipeline.core.runner import ALL, ShardAssignment, ShardTask
from pipeline.ingest.additional_columns import check_named, json_value, read_conditions
from pipeline.ingest.cells import ADDRESS_TOO_LONG, CAPTION_TOO_LONG, KEPT_CHARS
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.parquet_cells import other_types
from pipeline.ingest.raw_shard import RawShardInput, sample_key
from pipeline.ingest.retry import additional_shards, kept_tasks, remove_shard
from pipeline.ingest.rows import Row
from pipeline.ingest.source_files import Format, source_files
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError, join, sha256_json
from shards_spec.layout import RAW, shard_name
from shards_spec.manifest import finished_shards
from shards_spec.messages import counted

MEAN_CHARS = 8192  # of a row's texts, on average over a shard: longer texts are no captions and would fill the memory


class Listing:
    """The rows of a source in shards; ``read`` counts those read so far, ``rows`` is their number, if known."""

    def __init__(self, config: IngestConfig, form: Format) -> None:
        self._config = config
        self._form = form
        self.read = 0
        estimates = [estimate_rows(source, form) for source in config.sources]
        self.rows = sum(estimate[0] for estimate in estimates if estimate) if all(estimates) else None

    @property
    def shards(self) -> int | None:
        """About how many shards the rows make."""
        return -(-self.rows // self._config.shard_size) if self.rows else None

    def tasks(self, assignment: ShardAssignment = ALL) -> Iterator[ShardTask]:
        """A task per ``shard_size`` rows, for the assignment's shards, then the shards of earlier retries as they are.

        Raises UserError when the source has no row, more rows than when its failed ones were tried again, or too few
        rows for the shards that exist.
        """
        config = self._config
        additional = self._additional_shards()
        types = self._column_types()
        shard = 0
        for rows, is_last in _with_last(self._chunks()):
            if is_last:  # before the last shard is made again with fewer rows
                refuse_surplus(config, shard + 1, additional)
            if shard in additional:
                raise UserError(
                    f"--source {config.source_text} has more rows than when its failed rows were tried again; give the "
                    "new rows as a list of their own to another ROOT, or make all shards again with --overwrite"
                )
            if shard == 0:  # before anything is written under a config that cannot be meant
                check_named(rows, read_conditions(config.where), config.save_additional_columns, config.sha256_col)
            if assignment.claim(shard):  # asked before the rows are hashed, which takes longer than reading them
                yield self._task(shard, rows, types)
            self.read += len(rows)
            shard += 1
        if not shard:
            raise UserError(f"--source {config.source_text} has no row and no image in it; nothing to ingest")
        self.rows = self.read
        yield from kept_tasks(config.root, shard)

    def tasks_of(self, shards: set[int]) -> Iterator[ShardTask]:
        """The tasks of these shards alone, in order, whatever is in ROOT; nothing is deleted or refused."""
        types = self._column_types()
        for shard, rows in enumerate(self._chunks()):
            if shard in shards:
                yield self._task(shard, rows, types)
            if shard >= max(shards):
                return

    def _additional_shards(self) -> Container[int]:
        """Numbers of the shards that earlier retries wrote; ``overwrite`` deletes those, the last one first."""
        additional = additional_shards(self._config.root)
        if not self._config.overwrite:
            return additional
        for number in reversed(additional):
            remove_shard(self._config.root, number)
        return ()

    def _chunks(self) -> Iterator[list[Row]]:
        """The rows of one shard after the other."""
        config = self._config
        read = partial(list_rows, form=self._form, columns=config.columns, original_captions=config.original_captions)
        rows = chain.from_iterable(map(read, config.sources))
        size = config.shard_size
        while chunk := list(limit_texts(islice(rows, size), size * MEAN_CHARS)):
            yield chunk

    def _task(self, shard: int, rows: list[Row], types: dict[str, pa.DataType]) -> ShardTask:
        """One shard's task; its inputs are hashes of the rows, and of the list's other columns where it has them."""
        config = self._config
        keys = [sample_key(shard, index, config.shard_size) for index in range(len(rows))]
        hashes = {"rows": rows_hash(rows)}
        others = [{name: json_value(cell) for name, cell in row.extra.items()} for row in rows]
        other_hashes = {"columns": sha256_json(others)} if any(others) else {}
        shard_input = RawShardInput(keys, rows, column_types=types, kept_columns=config.save_additional_columns)
        # shards made before other columns were kept have no hash of them, and stay valid
        return ShardTask(shard, hashes | other_hashes, payload=shard_input, former=hashes)

    def _column_types(self) -> dict[str, pa.DataType]:
        """Types of the list's other columns, from its first file; empty for lists without types."""
        if self._form not in ("parquet", "hf-parquet"):
            return {}
        return other_types(source_files(self._config.sources[0], self._form)[0].path)


def limit_texts(rows: Iterator[Row], max_chars: int) -> Iterator[Row]:
    """The rows of a shard with at most ``max_chars`` characters of text in all.

    Once these are used up, long captions and links are cut, with the reason as the row's problem, and the other columns
    are dropped.
    """
    left = max_chars
    for row in rows:
        left -= len(row.caption or "") + len(row.url or "")
        if row.extra:
            left -= sum(len(str(value)) for value in row.extra.values())
        yield row if left >= 0 else _cut(row)


def _cut(row: Row) -> Row:
    """The row with short texts: a long caption or link makes it unusable."""
    problem = row.problem
    if problem is None and len(row.caption or "") > KEPT_CHARS:
        problem = CAPTION_TOO_LONG
    elif problem is None and len(row.url or "") > KEPT_CHARS:
        problem = ADDRESS_TOO_LONG
    caption = row.caption and row.caption[:KEPT_CHARS]
    url = row.url and row.url[:KEPT_CHARS]
    return replace(row, caption=caption, url=url, problem=problem, extra={})


def rows_hash(rows: list[Row]) -> str:
    """The identity of a shard's rows, as its done-record has it among the inputs."""
    return sha256_json([_identity(row) for row in rows])


def _identity(row: Row) -> list[Any]:
    """What makes a row another one; not the path of its source: a folder that was moved is the same folder."""
    place_in_file = astuple(row.image_ref)[1:] if row.image_ref else ()
    label = [] if row.label is None else [row.label]
    return [row.caption, row.url, row.problem, row.stamp, *place_in_file, *label]


def _with_last(chunks: Iterator[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
    """Each chunk, and whether it is the last one."""
    previous = next(chunks, None)
    for chunk in chunks:
        assert previous is not None
        yield previous, False
        previous = chunk
    if previous is not None:
        yield previous, True


def _surplus(config: IngestConfig, shards: int) -> list[int]:
    """Numbers of the finished shards beyond the source's ``shards``, left by a longer source."""
    return [number for number in finished_shards(join(config.root, RAW)) if number >= shards]


def refuse_surplus(config: IngestConfig, shards: int, additional: Container[int] = ()) -> None:
    """Raise UserError when there are more shards than the source makes, unless they are ``additional`` or overwritten.

    ``additional`` are the numbers of the shards that retries wrote.
    """
    surplus = [number for number in _surplus(config, shards) if number not in additional]
    if surplus and not config.overwrite:
        raise UserError(
            f"{join(config.root, RAW)} has {counted(len(surplus), 'shard')} more ({shard_name(surplus[0])} and on) "
            f"than --source {config.source_text} makes; use another ROOT, or --overwrite, which deletes them"
        )


def remove_surplus(config: IngestConfig, shards: int) -> None:
    """Delete the shards beyond the source's ``shards``. Raises UserError without ``overwrite``."""
    refuse_surplus(config, shards)
    for number in _surplus(config, shards):
        remove_shard(config.root, number)
