"""A class map: for each class of a data set the synsets of a vocabulary that it starts from (SPEC.md §8)."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from shards_spec.files import UserError, sha256_bytes, write_bytes
from shards_spec.messages import counted
from shards_spec.tsv import TsvFormat, read_tsv

NAMES_SHOWN = 20  # in a message
Case = Literal["exact", "mean", "nearest", "none"]
FORMAT = TsvFormat("class map", "class\tcase\tsimilarity\twnids\tlemmas", command="classes", error=UserError)


@dataclass(frozen=True)
class ClassRow:
    """A class and the synsets of the vocabulary it is mapped to; ``similarity`` is WordNet's path similarity.

    exact: its own synset; mean: all its words' synsets; nearest: the most similar synset; none: no synset was found.
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
        counts = Counter(row.case for row in self.rows)
        return {case: counts[case] for case in get_args(Case)}

    @property
    def unmapped(self) -> list[str]:
        """Names of the classes for which no synset was found."""
        return [row.name for row in self.rows if not row.wnids]

    @property
    def summary(self) -> str:
        """The number of classes of each case, and the first ones without a synset, whose rows start at random."""
        cases = ", ".join(f"{number} {case}" for case, number in self.cases.items() if number)
        named = ", ".join(self.unmapped[:NAMES_SHOWN]) + (", ..." if len(self.unmapped) > NAMES_SHOWN else "")
        text = f"{counted(len(self.rows), 'class', 'classes')}: {cases}"
        return f"{text}; no synset for {named}" if named else text

    def write(self, path: str) -> None:
        """Write the TSV: a ``#`` header line, column names, rows."""
        head = FORMAT.head(json.dumps(self.header, sort_keys=True))
        write_bytes(path, (head + "".join(_line(row) for row in self.rows)).encode())

    @property
    def sha256(self) -> str:
        """Hash of the rows."""
        return sha256_bytes("".join(_line(row) for row in self.rows).encode())


def _line(row: ClassRow) -> str:
    similarity = "" if row.similarity is None else f"{row.similarity:.6f}"
    return "\t".join([row.name, row.case, similarity, ",".join(row.wnids), ",".join(row.lemmas)]) + "\n"


def read_class_map(path: str) -> ClassMap:
    """Read the TSV; rows may have been edited by hand. Raises UserError naming the line that is broken."""
    try:
        table = read_tsv(path, FORMAT)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; make it with `clipmill classes`") from error
    rows = []
    for number, fields in table.rows:
        try:
            rows.append(_parse_row(fields))
        except ValueError as error:
            fix = "fix it, or make it again with `clipmill classes`"
            raise FORMAT.broken(path, number, fields, fix) from error
    return ClassMap(tuple(rows), table.header)


def _parse_row(fields: list[str]) -> ClassRow:
    """Raises ValueError."""
    name, case, similarity, *lists = fields
    wnids, lemmas = (tuple(part.strip() for part in text.split(",") if part.strip()) for text in lists)
    if case not in get_args(Case) or (case == "none") != (not lists[0]):
        raise ValueError(case)
    return ClassRow(name, cast(Case, case), wnids, lemmas, float(similarity) if similarity else None)
