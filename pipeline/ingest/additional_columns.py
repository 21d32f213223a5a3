"""A list's other columns (similarity, uid, NSFW, ...): kept in raw shards as img2dataset's ``save_additional_columns``
keeps them, and conditions on them.

Their types are the list's own in Parquet, text in CSV and TSV, what Python makes of JSON. A column that does not fit
one type in a shard is text there.
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

from pipeline.ingest.cells import shown
from pipeline.ingest.rows import Row
from shards_spec.files import UserError

ALL_COLUMNS = "*"
# names that raw and final shards have themselves: a list's column of such a name gets a prefix
OWN_NAMES = frozenset(
    {
        "caption", "url", "key", "status", "error_message", "width", "height", "original_width", "original_height",
        "exif", "sha256", "phash", "synthetic", "synsets",
    }
)  # fmt: skip
OWN_PATTERN = re.compile(r"syn_\d+")
PREFIX = "source_"
Compare = Callable[[Any, Any], bool]
ORDER: dict[str, Compare] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
EQUAL: dict[str, Compare] = {"==": operator.eq, "!=": operator.ne}
CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|>|<)\s*(.*?)\s*")


def kept_name(name: str) -> str:
    """The name under which a list's column stands in raw shards."""
    return f"{PREFIX}{name}" if name in OWN_NAMES or OWN_PATTERN.fullmatch(name) else name


def plain(value: Any) -> Any:
    """A cell as JSON can have it: dates as ISO 8601, no NaN, all else as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def kept_columns(rows: list[Row], types: dict[str, pa.DataType], wanted: tuple[str, ...]) -> dict[str, pa.Array]:
    """Name in the raw shard to cells, of the wanted columns that the rows of a shard have."""
    names = dict.fromkeys(name for row in rows for name in row.extra if name in wanted or ALL_COLUMNS in wanted)
    return {kept_name(name): _array([row.extra.get(name) for row in rows], types.get(name)) for name in names}


def _array(cells: list[Any], kind: pa.DataType | None) -> pa.Array:
    for wanted in (kind, None):
        try:
            array = pa.array(cells, wanted)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            continue
        if wanted is not None or not (pa.types.is_null(array.type) or "struct" in str(array.type)):
            return array
    texts = [cell if cell is None or isinstance(cell, str) else json.dumps(plain(cell)) for cell in cells]
    return pa.array([text and text.encode(errors="replace").decode() for text in texts], pa.string())


# conditions


@dataclass(frozen=True)
class Condition:
    """``similarity >= 0.3``: a column, an operator, a value. A row without the column's cell does not meet it."""

    column: str
    sign: str
    value: str

    @property
    def reason(self) -> str:
        """Why a row that does not meet it is left out."""
        return f"not {self.column} {self.sign} {self.value}"

    def holds(self, row: Row) -> bool:
        """Whether the row's cell meets it: as numbers where both are, else, for equality, as texts."""
        cell = row.extra.get(self.column)
        if cell is None or cell == "":
            return False
        numbers = _number(cell), _number(self.value)
        if self.sign in ORDER:
            return None not in numbers and ORDER[self.sign](*numbers)
        if None not in numbers:
            return EQUAL[self.sign](*numbers)
        return EQUAL[self.sign](str(cell).casefold(), self.value.casefold())


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def read_conditions(texts: tuple[str, ...]) -> tuple[Condition, ...]:
    """Raises UserError for what is no condition."""
    found = []
    for text in texts:
        match = CONDITION.fullmatch(text)
        if match is None or (match[2] in ORDER and _number(match[3]) is None):
            raise UserError(
                f"--where {text!r} is no condition: give a column, one of >= <= > < == != and a value, such as "
                "'similarity >= 0.3'"
            )
        found.append(Condition(match[1], match[2], match[3].strip("'\"")))
    return tuple(found)


def check_named(rows: list[Row], conditions: tuple[Condition, ...], wanted: tuple[str, ...]) -> None:
    """Raises UserError for a column that none of the first rows has."""
    names = list(dict.fromkeys(name for row in rows for name in row.extra))
    asked = [("--where", condition.column) for condition in conditions]
    asked += [("--save-additional-columns", name) for name in wanted if name != ALL_COLUMNS]
    for option, name in asked:
        if name not in names:
            raise UserError(f"{option}: the list has no other column {name!r}; it has {shown(names)}")
