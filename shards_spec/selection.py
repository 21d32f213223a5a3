"""ROOT/select/NAME: how often an epoch has each sample of a final shard, and which of its captions it may show.

One Parquet file per final shard, whose rows are the shard's samples in the order of its tar (SPEC.md, section 10).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
import pyarrow as pa

from shards_spec.files import DataError, UserError, join, names, open_read, sha256_json
from shards_spec.layout import SELECT, SHARDS, parquet_path, select_folder, select_parquet, tar_path
from shards_spec.manifest import Done, file_hash, finished_shards, read_done
from shards_spec.parquet import read_table
from shards_spec.shard_writer import ShardWriter

MOST_COPIES = 255
COPIES = "samples of an epoch"  # a counter on disk: the sum of all copies
CAPTIONS_LEFT_OUT = "captions left out by --captions-where"  # a counter on disk, of the samples that stay
CAPTIONS_OF = "captions_of"  # in a selection's config: pack's settings that decide which captions a sample has
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("copies", pa.uint8(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("captions", pa.list_(pa.uint8())),
    ]
)


ALL_SAMPLES = "all samples"  # an input of a record where a rule looks at all samples: `survey_fingerprint`
COPY_OF = "near-duplicate of "  # a reason on disk begins so: the name of an evaluation set follows
PAIR = pa.field("pair", pa.string())  # a further column, where a rule compares samples with other images


@dataclass(frozen=True)
class ShardSelection:
    """The selection of one final shard, in the order of its tar.

    ``copies`` uint8 (n,): times an epoch has the sample, 0 where it is left out. ``reasons``: why it is left out, None
    where it is not. ``captions``: indices of the captions that it may show, 0 the original; None: all of them.
    ``pairs``: the image of an evaluation set that the sample shows again, or the key of the sample that stays for it,
    None where there is none; None as a whole where none were looked for.
    """

    keys: list[str]
    copies: np.ndarray
    reasons: list[str | None]
    captions: list[list[int] | None]
    pairs: list[str | None] | None = None

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.copies) == len(self.reasons) == len(self.captions)

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 (Σ copies,): the row of each sample that is used, one after the other, each as often as it counts."""
        return np.repeat(np.arange(len(self.keys)), self.copies)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 (n,): where each sample's places in ``rows`` end."""
        return np.cumsum(self.copies, dtype=np.int64)


def captions_of(pack: dict[str, Any]) -> dict[str, Any]:
    """The settings of a pack's config by which a sample has its captions."""
    return {"captioner": pack.get("captioner"), "min_similarity": pack.get("min_similarity")}


def survey_fingerprint(config: dict[str, Any], inputs: list[dict[str, str]]) -> str:
    """A hash of a selection's rules and of what all its shards are made from."""
    return sha256_json([config, inputs])


def write_selection(root: str, name: str, shard: int, selection: ShardSelection) -> dict[str, str]:
    """Write one shard's selection; returns its path below ROOT and its sha256."""
    writer = ShardWriter(root, select_folder(name), shard)
    writer.write_parquet(selection_table(selection))
    return writer.outputs


def selection_table(selection: ShardSelection) -> pa.Table:
    """A selection's columns."""
    columns = [selection.keys, selection.copies, selection.reasons, selection.captions]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    return table if selection.pairs is None else table.append_column(PAIR, pa.array(selection.pairs, PAIR.type))


def read_selection(root: str, name: str, shard: int, opener: Callable[[str], IO[bytes]] = open_read) -> ShardSelection:
    """One shard's selection; ``opener`` reads its bytes. Raises DataError for a file that is not there or is none."""
    path = select_parquet(root, name, shard)
    table = read_table(path, SCHEMA.names, optional=[PAIR.name], fix=again(root, name), opener=opener)
    return selection_of(table, path, root, name)


def selection_of(table: pa.Table, path: str, root: str, name: str) -> ShardSelection:
    """The selection that `selection_table` made a table of. Raises DataError naming ``path`` when it is none."""
    is_selection = table.schema.types in (SCHEMA.types, [*SCHEMA.types, PAIR.type])
    if not is_selection or any(table.column(i).null_count for i in (0, 1)):
        raise DataError(f"{path}: its columns are not those of a selection; {again(root, name)}")
    keys, copies, reasons, captions = (table.column(column) for column in SCHEMA.names)
    pairs = table.column(PAIR.name).to_pylist() if PAIR.name in table.column_names else None
    return ShardSelection(keys.to_pylist(), copies.to_numpy(), reasons.to_pylist(), captions.to_pylist(), pairs)


def again(root: str, name: str) -> str:
    """What to do about a selection that is broken."""
    return f"run `clipmill select {root} --name {name} --overwrite` with its rules again"


def check_begun(root: str, name: str) -> None:
    """Raise UserError, which lists those of which a shard is finished, unless this selection is one."""
    there = [own for own in names(join(root, SELECT)) if finished_shards(join(root, select_folder(own)))]
    if name in there:
        return
    known = f"there are: {', '.join(there)}" if there else "there are none"
    raise UserError(
        f"--select {name!r}: no such selection in {root}; {known}; `clipmill select {root} --name {name}` makes one"
    )


def selected_record(root: str, name: str, shard: int) -> Done:
    """The done-record of a shard's selection, when it belongs to the final shard that is there.

    Raises UserError when the selection is not there or not finished, DataError when it is of another shard.
    """
    done = read_done(join(root, select_folder(name)), shard)
    if done is None:
        check_begun(root, name)
        raise UserError(
            f"{select_parquet(root, name, shard)} is not finished: run `clipmill select {root} --name {name}` with its "
            "rules to its end"
        )
    tar = tar_path(SHARDS, shard)
    if done.inputs.get(tar) != file_hash(root, SHARDS, shard, tar):
        raise DataError(
            f"{select_parquet(root, name, shard)}: made from another {join(root, tar)} than the one there; "
            f"run `clipmill select {root} --name {name}` with its rules again"
        )
    return done


def selected_sizes(root: str, name: str, shards: int) -> tuple[list[int], list[str]]:
    """Samples that an epoch has of each of the first so many final shards, and the sha256 of each shard's selection.

    Read from done-records alone. Raises UserError and DataError as `selected_record` does.
    """
    sizes, hashes = list[int](), list[str]()
    for shard in range(shards):
        done = selected_record(root, name, shard)
        sizes.append(done.counters.get(COPIES, 0))
        hashes.append(done.outputs.get(parquet_path(select_folder(name), shard), ""))
    return sizes, hashes
