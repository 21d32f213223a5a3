"""`select --export-list`: what a selection keeps as a list that others apply with `--from`."""

import logging
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.select.facts import FactSources, ShardFacts
from pipeline.select.sample_lists import UID, UID_PAIR, uid_halves
from shards_spec.files import UserError, atomic_writer, is_url
from shards_spec.messages import counted
from shards_spec.selection import read_selection

log = logging.getLogger(__name__)


def check_export(path: str, by: str, root: str, available: FactSources) -> None:
    """Raise UserError for a list that cannot be written, or that would replace what is no list."""
    place, top = _place(path), _place(root)
    if place == top or place.startswith(f"{top}/"):
        raise UserError(
            f"--export-list {path}: lies in the dataset {root}, whose files it could replace; give a place outside"
        )
    if os.path.isdir(path):
        raise UserError(f"--export-list {path}: is a folder; give a file, such as {os.path.join(path, 'list.txt')}")
    if by != "key" and by not in available.columns:
        raise UserError(
            f"--export-by {by}: raw/ has no such column; give another, or ingest with --save-additional-columns {by}"
        )
    if path.endswith(".npy") and by != "uid":
        raise UserError(f"--export-list {path}: an array of numbers has uids; give --export-by uid, or another ending")


def _place(path: str) -> str:
    """A path by which it can be compared with another: without links and dots, but for that of a store."""
    return path.rstrip("/") if is_url(path) else os.path.realpath(path)


def export_list(root: str, name: str, shards: list[int], *, path: str, by: str) -> int:
    """Write the names of the samples that a selection keeps, each once, and return how many they are.

    By its ending, the file is Parquet with a column, an array of uids as DataComp publishes them (ascending, 16 bytes a
    uid in memory), or text with a name per line. Samples without the name are left out, with a warning. Raises
    UserError, and DataError for a broken selection.
    """
    missing = 0
    written = 0

    def parts() -> Iterator[list[str]]:
        nonlocal missing, written
        for shard in shards:
            kept = np.flatnonzero(read_selection(root, name, shard).copies)
            facts = ShardFacts(root, shard, FactSources(columns=() if by == "key" else (by,)))
            column = facts.of_samples(by).cast(pa.string()).take(pa.array(kept))
            texts = [text for text in column.to_pylist() if text]
            missing += len(kept) - len(texts)
            written += len(texts)
            yield texts

    if path.endswith(".npy"):
        write_uids(path, parts())
    elif path.endswith(".parquet"):
        _write_parquet(path, by, parts())
    else:
        with atomic_writer(path) as file:
            for texts in parts():
                file.write("".join(f"{text}\n" for text in texts).encode())
    if missing:
        log.warning("select: %s without a %s are not in %s", counted(missing, "sample", style=","), by, path)
    log.info("select: %s in %s", counted(written, "sample", style=","), path)
    return written


def _write_parquet(path: str, by: str, parts: Iterator[list[str]]) -> None:
    schema = pa.schema([pa.field(by, pa.string())])
    with atomic_writer(path) as file, pq.ParquetWriter(file, schema) as writer:
        for texts in parts:
            writer.write_table(pa.table([texts], schema))


def write_uids(path: str, parts: Iterator[list[str]]) -> None:
    """Write uids of 32 hexadecimal digits as an array of two uint64 each, ascending. Raises UserError for others."""
    arrays = [np.empty(0, UID_PAIR)]
    for texts in parts:
        if wrong := [text for text in texts if not UID.fullmatch(text)]:
            raise UserError(f"--export-list {path}: {wrong[0]!r} is no uid of 32 hexadecimal digits; take .txt")
        arrays.append(np.array([uid_halves(text) for text in texts], UID_PAIR))
    uids = np.concatenate(arrays)
    uids.sort()
    with atomic_writer(path) as file:
        np.save(file, uids)
