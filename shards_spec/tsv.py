"""Our tables as text: a line ``# clipmill TITLE {json}``, further ``#`` lines, the names of the columns, rows."""

import json
from dataclasses import dataclass
from typing import Any

from shards_spec.class_names import LINE_END
from shards_spec.files import DataError, UserError, read_bytes
from shards_spec.library_errors import decode_text, no_regular_file


@dataclass(frozen=True)
class TsvFormat:
    """A kind of table: its title, its columns, the command that makes it, and whose fault a broken one is."""

    title: str
    columns: str
    command: str
    error: type[UserError] | type[DataError]

    def head(self, header: str, *notes: str) -> str:
        """The lines before the rows. ``header`` is JSON; ``notes`` are further lines after a ``#``."""
        lines = [f"# clipmill {self.title} {header}", *(f"# {note}" for note in notes), self.columns]
        return "".join(f"{line}\n" for line in lines)

    def broken(self, path: str, number: int, fields: list[str], fix: str) -> Exception:
        """The error for a row, by the number of its line in the file (the first one is 1)."""
        line = "\t".join(fields)
        return self.error(f"{path}: line {number} is broken: {line[:80]!r}; {fix}")


@dataclass(frozen=True)
class Tsv:
    """A table as read. ``rows`` are (number of the line, fields)."""

    header: dict[str, Any]
    notes: list[str]
    rows: list[tuple[int, list[str]]]


def read_tsv(path: str, form: TsvFormat) -> Tsv:
    """Read a table. Raises the format's error when it is not one, FileNotFoundError."""
    if reason := no_regular_file(path):
        raise form.error(f"{path} {reason}; a {form.title} is a file that `clipmill {form.command}` makes")
    given = form.error is UserError
    fix = "" if given else f"make it again with `clipmill {form.command}`"
    lines = LINE_END.split(decode_text(path, read_bytes(path), given, fix).rstrip("\r\n"))
    start = f"# clipmill {form.title} "
    try:
        first = next(number for number, line in enumerate(lines) if not line.startswith("# "))
        header = json.loads(lines[0].removeprefix(start))
        if not lines[0].startswith(start) or lines[first] != form.columns or not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError, StopIteration) as error:
        raise form.error(f"{path}: not a clipmill {form.title}; make it with `clipmill {form.command}`") from error
    notes = [line.removeprefix("# ") for line in lines[1:first]]
    return Tsv(header, notes, [(number, line.split("\t")) for number, line in enumerate(lines[first + 1 :], first + 2)])
