"""A class map: for each class of a data set the synsets of a vocabulary that it starts from (SPEC.md §8)."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shards_spec.files import DataError, read_bytes, sha256_bytes, write_bytes

Case = Literal["exact", "mean", "nearest", "none"]
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
        head = f"# clipmill class map {json.dumps(self.header, sort_keys=True)}\n{COLUMNS}\n"
        write_bytes(path, (head + "".join(_line(row) for row in self.rows)).encode())

    @property
    def sha256(self) -> str:
        """Hash of the rows."""
        return sha256_bytes("".join(_line(row) for row in self.rows).encode())


def _line(row: ClassRow) -> str:
    similarity = "" if row.similarity is None else f"{row.similarity:.6f}"
    return "\t".join([row.name, row.case, similarity, ",".join(row.wnids), ",".join(row.lemmas)]) + "\n"


def read_class_map(path: str) -> ClassMap:
    """Read the TSV; rows may have been mended by hand. Raises DataError naming the line that is broken."""
    try:
        lines = read_bytes(path).decode().splitlines()
        if len(lines) < 2 or not lines[0].startswith("# clipmill class map ") or lines[1] != COLUMNS:
            raise ValueError
        header = json.loads(lines[0].removeprefix("# clipmill class map "))
    except ValueError as error:
        raise DataError(f"{path}: not a clipmill class map; make it with `clipmill classes`") from error
    rows = []
    for number, line in enumerate(lines[2:], start=3):
        fields = line.split("\t")
        if len(fields) != 5 or fields[1] not in get_args(Case) or (fields[1] == "none") != (not fields[3]):
            raise DataError(f"{path}: line {number} is broken: {line!r}; make it again with `clipmill classes`")
        wnids, lemmas = (tuple(part for part in text.split(",") if part) for text in fields[3:])
        case: Case = fields[1]  # type: ignore[assignment]  # one of them, as was just seen
        rows.append(ClassRow(fields[0], case, wnids, lemmas, float(fields[2]) if fields[2] else None))
    return ClassMap(tuple(rows), header)
