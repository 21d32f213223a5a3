"""What the report counts in a dataset's Parquet files: one shard at a time into counters of bounded size."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.distinct import distinct
from shards_spec.files import DataError, UserError, join, names
from shards_spec.layout import CAPTIONS, RAW, SHARDS, captions_folder
from shards_spec.parquet import open_parquet, validated

PARQUET_PATTERN = re.compile(r"\d+\.parquet")
LOGPROB_UNIT = 0.05
COSINE_UNIT = 0.01
ASPECT_UNIT = 0.125  # octaves


@dataclass
class Captions:
    """The synthetic captions of one captioner.

    ``logprobs`` counts whole multiples of LOGPROB_UNIT, per token; ``cosines`` and ``original_cosines`` (of caption and
    image, from `caption --similarity`) those of COSINE_UNIT.
    """

    images: int = 0
    captions: int = 0
    distinct_per_image: int = 0
    distinct_per_shard: int = 0
    tokens: int = 0
    logprobs: Counter[int] = field(default_factory=Counter)
    not_finite: int = 0
    cosines: Counter[int] = field(default_factory=Counter)
    original_cosines: Counter[int] = field(default_factory=Counter)


@dataclass
class Tally:
    """Counts over all shards. ``problems`` names the files that could not be read."""

    rows: int = 0
    samples: int = 0
    original_sides: Counter[int] = field(default_factory=Counter)
    stored_sides: Counter[int] = field(default_factory=Counter)
    aspects: Counter[int] = field(default_factory=Counter)
    original_words: Counter[int] = field(default_factory=Counter)
    synthetic_words: Counter[int] = field(default_factory=Counter)
    original_synsets: Counter[int] = field(default_factory=Counter)
    synthetic_synsets: Counter[int] = field(default_factory=Counter)
    synsets: Counter[str] = field(default_factory=Counter)
    captioners: dict[str, Captions] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parquet_files(folder: str) -> list[str]:
    """Names of a folder's shard files, in shard order."""
    return sorted(filter(PARQUET_PATTERN.fullmatch, names(folder)), key=lambda name: int(name.split(".")[0]))


def read_columns(path: str, columns: list[str], problems: list[str]) -> Any | None:
    """Those of the columns that a Parquet file has; None, and a problem, when it cannot be read."""
    try:
        with open_parquet(path) as file:
            present = [field.name for field in file.schema_arrow if not pa.types.is_null(field.type)]
            return validated(file.read(columns=[name for name in columns if name in present]))
    except (DataError, UserError) as error:
        problems.append(str(error))
        return None


def _tables(folder: str, columns: list[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Per shard, the columns that are there as Arrow arrays."""
    for name in parquet_files(folder):
        table = read_columns(join(folder, name), columns, problems)
        if table is not None:
            yield {column: table.column(column).combine_chunks() for column in table.column_names}


def count_dataset(root: str) -> Tally:
    """Read the statistics columns of ``raw/``, ``captions/`` and ``shards/`` as far as they are there."""
    tally = Tally()
    packed = bool(parquet_files(join(root, SHARDS)))
    raw = ["status", "caption", "width", "height", "original_width", "original_height"]
    for table in _tables(join(root, RAW), raw, tally.problems):
        _count_raw(tally, table, packed)
    for table in _tables(join(root, SHARDS), ["caption", "synthetic", "synsets", "width", "height"], tally.problems):
        _count_shard(tally, table)
    for captioner in names(join(root, CAPTIONS)):
        counted = Captions()
        columns = ["captions", "logprobs", "num_tokens", "similarities", "original_similarity"]
        for table in _tables(join(root, captions_folder(captioner)), columns, tally.problems):
            _count_captions(counted, table)
            if not packed and "captions" in table:
                _add_words(tally.synthetic_words, pc.list_flatten(table["captions"]))
        if counted.images:
            tally.captioners[captioner] = counted
    return tally


def _count_raw(tally: Tally, table: dict[str, Any], packed: bool) -> None:
    tally.rows += len(next(iter(table.values()), ()))
    if "status" in table:
        keep = pc.fill_null(pc.equal(table["status"], "success"), False)
        table = {name: values.filter(keep) for name, values in table.items()}
    if "original_width" in table and "original_height" in table:
        _add(tally.original_sides, np.minimum(*_sizes(table, "original_width", "original_height")))
    if not packed:
        tally.samples += len(next(iter(table.values()), ()))
        _add_sizes(tally, table)
        if "caption" in table:
            _add_words(tally.original_words, table["caption"])


def _count_shard(tally: Tally, table: dict[str, Any]) -> None:
    tally.samples += len(next(iter(table.values()), ()))
    _add_sizes(tally, table)
    if "caption" in table:
        _add_words(tally.original_words, table["caption"])
    if "synthetic" in table:
        _add_words(tally.synthetic_words, pc.list_flatten(table["synthetic"]))
    if "synsets" in table:
        _add_synsets(tally, table["synsets"])


def _sizes(table: dict[str, Any], width: str, height: str) -> tuple[np.ndarray, np.ndarray]:
    wide, high = (
        pc.fill_null(table[name], 0).to_numpy(zero_copy_only=False).astype(np.int64) for name in (width, height)
    )
    known = (wide > 0) & (high > 0)
    return wide[known], high[known]


def _add_sizes(tally: Tally, table: dict[str, Any]) -> None:
    if "width" in table and "height" in table:
        wide, high = _sizes(table, "width", "height")
        _add(tally.stored_sides, np.minimum(wide, high))
        _add(tally.aspects, np.rint(np.log2(wide / high) / ASPECT_UNIT).astype(np.int64))


def _add_words(counter: Counter[int], texts: Any) -> None:
    """Count texts by their number of words between white space."""
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(texts, ""))
    words = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
    _add(counter, pc.if_else(pc.equal(trimmed, ""), 0, words).to_numpy(zero_copy_only=False))


def _add_synsets(tally: Tally, column: Any) -> None:
    """One list of WNIDs per caption, the original caption's first."""
    per_caption, row = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(per_caption), 0).to_numpy(zero_copy_only=False)
    first = np.append(True, row[1:] != row[:-1])[: len(row)]
    _add(tally.original_synsets, lengths[first])
    _add(tally.synthetic_synsets, lengths[~first])
    for pair in pc.value_counts(pc.list_flatten(per_caption)).to_pylist():
        tally.synsets[pair["values"]] += pair["counts"]


def _count_captions(counted: Captions, table: dict[str, Any]) -> None:
    if "captions" in table:
        column = table["captions"]
        texts = pc.fill_null(pc.list_flatten(column), "").dictionary_encode()
        row, code = pc.list_parent_indices(column).to_numpy(), texts.indices.to_numpy()
        counted.images += len(column)
        counted.captions += len(texts)
        counted.distinct_per_shard += len(texts.dictionary)
        counted.distinct_per_image += len(distinct(row.astype(np.int64) * max(1, len(texts.dictionary)) + code))
    if "logprobs" in table and "num_tokens" in table:
        total = pc.list_flatten(table["logprobs"]).to_numpy(zero_copy_only=False).astype(float)
        tokens = pc.list_flatten(table["num_tokens"]).to_numpy(zero_copy_only=False).astype(float)
        counted.tokens += int(np.nansum(tokens))
        mean = (total / np.maximum(tokens, 1))[pc.list_flatten(table["logprobs"]).is_valid().to_numpy(False)]
        finite = np.isfinite(mean)
        counted.not_finite += int((~finite).sum())
        _add(counted.logprobs, np.floor(mean[finite] / LOGPROB_UNIT).astype(np.int64))
    if "similarities" in table and "original_similarity" in table:
        _add_cosines(counted.cosines, pc.list_flatten(table["similarities"]))
        _add_cosines(counted.original_cosines, table["original_similarity"])


def _add_cosines(counter: Counter[int], column: Any) -> None:
    values = column.drop_null().to_numpy(zero_copy_only=False).astype(float)
    _add(counter, np.floor(values[np.isfinite(values)] / COSINE_UNIT).astype(np.int64))


def _add(counter: Counter[int], values: np.ndarray) -> None:
    for value, number in zip(*np.unique(values, return_counts=True), strict=True):
        counter[int(value)] += int(number)
