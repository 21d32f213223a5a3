"""A list's other columns (similarity, uid, NSFW, ...): kept in raw shards, and conditions on them.

They are kept as img2dataset's ``save_additional_columns`` keeps them. Their types are the list's own in Parquet, text
in CSV and TSV, what Python makes of JSON. A column that does not fit one type in a shard is text there.
"""

import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

import pyarrow as pa

from pipeline.ingest.cells import format_names
from pipeline.ingest.rows import Row
from shards_spec.files import UserError

ALL_COLUMNS = "*"
# Names that raw and final shards have themselves: a list's column of such a name gets a prefix.
RESERVED_NAMES = frozenset(
    {
        "caption",
        "url",
        "key",
        "status",
        "error_message",
        "width",
        "height",
        "original_width",
        "original_height",
        "exif",
        "sha256",
        "phash",
        "synthetic",
        "synsets",
    }
)
RESERVED_PATTERN = re.compile(r"syn_\d+")
PREFIX = "source_"
Compare = Callable[[Any, Any], bool]
ORDERS: dict[str, Compare] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
EQUALITIES: dict[str, Compare] = {"==": operator.eq, "!=": operator.ne}
CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|>|<)\s*(.*?)\s*")


def kept_name(name: str) -> str:
    """The name of a list's column in raw shards."""
    return f"{PREFIX}{name}" if name in RESERVED_NAMES or RESERVED_PATTERN.fullmatch(name) else name


def json_value(value: Any) -> Any:
    """A cell as JSON can have it: dates as ISO 8601, no NaN, all else as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, dict):
        return {str(name): json_value(part) for name, part in value.items()}
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def kept_columns(rows: list[Row], types: dict[str, pa.DataType], wanted: tuple[str, ...]) -> dict[str, pa.Array]:
    """The columns that are kept of the rows of a shard: name in the raw shard to cells.

    Args:
        rows: The rows.
        types: Types of the list's columns, where it has types.
        wanted: Names of the columns to keep; `ALL_COLUMNS` among them: all.
    """
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row.extra if name in wanted or ALL_COLUMNS in wanted)
    return {kept_name(name): _array([row.extra.get(name) for row in rows], types.get(name)) for name in names}


def _array(cells: list[Any], kind: pa.DataType | None) -> pa.Array:
    """The cells in the given type, else in the type that fits them all, else as text."""
    if kind is not None:
        array = _convert(cells, kind)
        if array is not None:
            return array
    array = _convert(cells, None)
    # structs would differ from shard to shard with the keys that their rows happen to have
    if array is not None and not pa.types.is_null(array.type) and "struct" not in str(array.type):
        return array
    texts = []
    for cell in cells:
        text = cell if cell is None or isinstance(cell, str) else json.dumps(json_value(cell))
        texts.append(text and text.encode(errors="replace").decode())  # lone surrogates
    return pa.array(texts, pa.string())


def _convert(cells: list[Any], kind: pa.DataType | None) -> pa.Array | None:
    try:
        return pa.array(cells, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


# conditions


@dataclass(frozen=True)
class Condition:
    """``similarity >= 0.3``: a column, an operator, a value. A row without a cell in the column does not meet it."""

    column: str
    sign: str
    value: str

    @property
    def reason(self) -> str:
        """Why a row that does not meet it is left out."""
        return f"not {self.column} {self.sign} {self.value}"

    def holds(self, row: Row) -> bool:
        """Whether the row's cell meets it: as numbers where both are, else, for equality, as texts in any case."""
        cell = row.extra.get(self.column)
        if cell is None or cell == "":
            return False
        number = _number(cell)
        limit = _number(self.value)
        are_numbers = number is not None and limit is not None
        if self.sign in ORDERS:
            return are_numbers and ORDERS[self.sign](number, limit)
        compare = EQUALITIES[self.sign]
        if are_numbers:
            return compare(number, limit)
        return compare(str(cell).casefold(), self.value.casefold())


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def read_conditions(texts: tuple[str, ...]) -> tuple[Condition, ...]:
    """Parse the values of --where. Raises UserError for what is not a condition."""
    conditions = []
    for text in texts:
        match = CONDITION.fullmatch(text)
        if match is None or (match[2] in ORDERS and _number(match[3]) is None):
            raise UserError(
                f"--where {text!r} is not a condition: give a column, one of >= <= > < == != and a value, such as "
                "'similarity >= 0.3'"
            )
        conditions.append(Condition(match[1], match[2], match[3].strip("'\"")))
    return tuple(conditions)


def check_named(
    rows: list[Row], conditions: tuple[Condition, ...], wanted: tuple[str, ...], sha256_column: str | None = None
) -> None:
    """Raises UserError when a column that is named in an option is in none of the first ``rows``."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.extra)
    asked = [("--where", condition.column) for condition in conditions]
    asked += [("--save-additional-columns", name) for name in wanted if name != ALL_COLUMNS]
    asked += [("--sha256-col", sha256_column)] if sha256_column is not None else []
    for option, name in asked:
        if name not in names:
            raise UserError(f"{option}: the list has no other column {name!r}; it has {format_names(list(names))}")
