"""Parquet files of a dataset and of users: one way to read and to write them, one wording of what is wrong with one.

``given`` and ``fix`` are those of `shards_spec.library_errors`: whether the user gave the file (else a stage wrote
it), and what to do about a broken one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards_spec.files import DataError, UserError, atomic_writer, open_read, sha256_file
from shards_spec.layout import remake_advice
from shards_spec.library_errors import FETCH, REMAKE, open_parquet_errors, parquet_errors, product_error


def check_columns(path: str, names: list[str], given: bool = False) -> None:
    """Raise UserError or DataError when a table has a column name twice: readers disagree which of them counts."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        fix = "rename or drop one of them" if given else remake_advice(path, REMAKE)
        raise (UserError if given else DataError)(f"{path} has the column {twice[0]!r} more than once; {fix}")


def open_table(path: str, file: IO[bytes], given: bool = False) -> pq.ParquetFile:
    """A Parquet file of an opened file, whose column names differ. Raises UserError and DataError."""
    with open_parquet_errors(path, given):
        table = pq.ParquetFile(file)
        check_columns(path, table.schema_arrow.names, given)
        return table


@contextmanager
def open_parquet(
    path: str, given: bool = False, fix: str = "", opener: Callable[[str], IO[bytes]] = open_read
) -> Iterator[pq.ParquetFile]:
    """An opened Parquet file, in a block whose reading errors are the product's own; ``opener`` reads its bytes.

    Raises UserError or DataError when it is not there, is no Parquet, is damaged or has a column twice.
    """
    try:
        with parquet_errors(path, given, fix), opener(path) as file:
            yield open_table(path, file, given)
    except FileNotFoundError as error:
        raise product_error(path, error, "Parquet file", given, fix) from error


def read_table(
    path: str,
    columns: Sequence[str] | None = None,
    *,
    optional: Sequence[str] = (),
    given: bool = False,
    fix: str = "",
    opener: Callable[[str], IO[bytes]] = open_read,
) -> pa.Table:
    """These columns of a Parquet file and those ``optional`` ones that it has; all without ``columns``.

    Raises UserError or DataError as `open_parquet` does, and when a column is not there.
    """
    with open_parquet(path, given, fix, opener) as file:
        if columns is None:
            return validated(file.read())
        there = file.schema_arrow.names
        if missing := [name for name in columns if name not in there]:
            own = UserError if given else DataError
            advice = fix or FETCH if given else remake_advice(path, fix or REMAKE)
            raise own(f"{path}: no column {missing[0]}; {advice}")
        return validated(file.read([*columns, *(name for name in optional if name in there)]))


def validated(table: pa.Table) -> pa.Table:
    """The table, whose texts are UTF-8: reading does not look. Raises pyarrow.ArrowInvalid, as reading does."""
    table.validate(full=True)
    return table


def column_names(path: str, given: bool = False, fix: str = "") -> list[str]:
    """The columns of a Parquet file. Raises UserError or DataError as `open_parquet` does."""
    with open_parquet(path, given, fix) as file:
        return list(file.schema_arrow.names)


def write_table(path: str, table: pa.Table, **options: Any) -> str:
    """Write a Parquet file atomically and return its sha256. ``options`` are those of `pyarrow.parquet.write_table`."""
    with atomic_writer(path) as file:
        pq.write_table(table, file, **options)
    return sha256_file(path)
