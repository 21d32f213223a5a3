"""A class map: for each class of a data set the synsets of a vocabulary that it starts from (SPEC.md §8)."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shards_spec.class_names import LINE_END
from shards_spec.files import UserError, read_bytes, sha256_bytes, write_bytes
from shards_spec.library_errors import decode_text, no_regular_file

Case = Literal["exact", "mean", "nearest", "none"]
HEADER = "# clipmill class map "
COLUMNS = "class\tcase\tsimilarity\twnids\tlemmas"


@dataclass(frozen=True)
class ClassRow:
    """A class and the synsets of the vocabulary it is mapped to; ``similarity`` is WordNet's path similarity.

    exact: its own synset; mean: all its words' synsets; nearest: the most similar synset; none: nothing is known of it.
    """

    name: str
    case: Case
    wnids: tuple[str, ...] = ()
    lemmas: tuple[str, ...] = ()
    similarity: float | None = None


@dataclass(frozen=True)
class ClassMap:
    """``rows`` in the order of the classes; ``header`` has ``vocabulary_sha256``, ``wordnet`` and ``alpha``."""

    rows: tuple[ClassRow, ...]
    header: dict[str, Any]

    @property
    def cases(self) -> dict[str, int]:
        """Classes per case."""
        found = Counter(row.case for row in self.rows)
        return {case: found[case] for case in get_args(Case)}

    @property
    def unmapped(self) -> list[str]:
        """Names of the classes of which nothing is known."""
        return [row.name for row in self.rows if not row.wnids]

    @property
    def summary(self) -> str:
        """How many classes there are of each case, and the first of which nothing is known."""
        said = ", ".join(f"{number} {case}" for case, number in self.cases.items())
        return f"{len(self.rows)} classes: {said}; random: {', '.join(self.unmapped[:20]) or 'none'}"

    def write(self, path: str) -> None:
        """Write the TSV: a ``#`` header line, column names, rows."""
        head = f"{HEADER}{json.dumps(self.header, sort_keys=True)}\n{COLUMNS}\n"
        write_bytes(path, (head + "".join(_line(row) for row in self.rows)).encode())

    @property
    def sha256(self) -> str:
        """Hash of the rows."""
        return sha256_bytes("".join(_line(row) for row in self.rows).encode())


def _line(row: ClassRow) -> str:
    similarity = "" if row.similarity is None else f"{row.similarity:.6f}"
    return "\t".join([row.name, row.case, similarity, ",".join(row.wnids), ",".join(row.lemmas)]) + "\n"


def read_class_map(path: str) -> ClassMap:
    """Read the TSV; rows may have been mended by hand. Raises UserError naming the line that is broken."""
    if reason := no_regular_file(path):
        raise UserError(f"{path} {reason}; a class map is a file that `clipmill classes` makes")
    try:
        lines = LINE_END.split(decode_text(path, read_bytes(path)).rstrip("\r\n"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; make it with `clipmill classes`") from error
    try:
        if len(lines) < 2 or not lines[0].startswith(HEADER) or lines[1] != COLUMNS:
            raise ValueError
        header = json.loads(lines[0].removeprefix(HEADER))
        if not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a clipmill class map; make it with `clipmill classes`") from error
    rows = []
    for number, line in enumerate(lines[2:], start=3):
        fields = line.split("\t")
        try:
            if len(fields) != 5 or fields[1] not in get_args(Case) or (fields[1] == "none") != (not fields[3]):
                raise ValueError
            similarity = float(fields[2]) if fields[2] else None
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is broken: {line[:80]!r}; mend it, or make it again with `clipmill classes`"
            ) from error
        wnids, lemmas = (tuple(part.strip() for part in text.split(",") if part.strip()) for text in fields[3:])
        case: Case = fields[1]  # type: ignore[assignment]  # one of them, as was just seen
        rows.append(ClassRow(fields[0], case, wnids, lemmas, similarity))
    return ClassMap(tuple(rows), header)
