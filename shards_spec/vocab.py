"""A vocabulary: synsets by descending count. A class index is a rank in it, so labels belong to one vocabulary."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shards_spec.files import DataError, UserError, sha256_bytes, sha256_json, write_bytes
from shards_spec.messages import counted
from shards_spec.tsv import TsvFormat, read_tsv

FORMAT = TsvFormat("vocabulary", "rank\twnid\tlemma\tcount\tdocuments", command="vocab", error=DataError)
NUMBER = re.compile(r"[0-9]{1,18}")
RULE_KEYS = ("wordnet", "rule", "stop_words")  # in the header and in pack's config: how captions become synsets


@dataclass(frozen=True)
class Vocabulary:
    """``rows`` are (WNID, lemma, occurrences, captions that have it) by rank; ``header`` has the label rule."""

    rows: tuple[tuple[str, str, int, int], ...]
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def index(self) -> dict[str, int]:
        """WNID to class index."""
        return {row[0]: rank for rank, row in enumerate(self.rows)}

    @cached_property
    def body(self) -> str:
        """The table as text."""
        return "".join(f"{rank}\t{w}\t{lemma}\t{c}\t{d}\n" for rank, (w, lemma, c, d) in enumerate(self.rows))

    @property
    def sha256(self) -> str:
        """Hash of the rule and the rows; goes into every checkpoint that has a classifier."""
        rule = json.dumps(self.header, sort_keys=True)
        return sha256_bytes(f"{rule}\n{self.body}".encode())

    def labels(self, wnids: list[str]) -> list[int]:
        """Class indices of the synsets that are in the vocabulary, ascending, each once."""
        return sorted({self.index[wnid] for wnid in wnids if wnid in self.index})

    def check_rule(self, packed: Mapping[str, Any], name: str) -> None:
        """Raise UserError unless shards of pack's config ``packed`` were labelled by the rule of this vocabulary.

        ``name`` is what the message calls the vocabulary.
        """
        shards_rule, own_rule = rule_of(packed), rule_of(self.header)
        if shards_rule != own_rule:
            own, other = _describe_rule(own_rule), _describe_rule(shards_rule)
            raise UserError(
                f"{name} is of the label rule {own}, the shards are of {other}: take a vocabulary that "
                "`clipmill vocab` makes of these shards, or pack them by the other rule with --overwrite"
            )

    def check_captions(self, label_captions: str, name: str) -> None:
        """Raise UserError unless it was counted on the captions that labels come from: ``original`` or ``all``.

        CatLIP counts and labels original captions, so its own file is one of originals. ``name`` is what the message
        calls the vocabulary.
        """
        counted = self.header.get("source")
        if counted != label_captions and not (counted == "catlip" and label_captions == "original"):
            raise UserError(
                f"{name} was counted on {counted} captions, but labels are those of --label-captions {label_captions}: "
                f"make it again with `clipmill vocab --source {label_captions}`"
                + (f", or give --label-captions {counted}" if counted in ("original", "all") else "")
            )

    def write(self, path: str) -> None:
        """Write the TSV: ``#`` header lines, column names, rows."""
        write_bytes(path, self.data)

    @property
    def data(self) -> bytes:
        """The file's bytes."""
        header = json.dumps(self.header, sort_keys=True, ensure_ascii=False)
        return (FORMAT.head(header, f"sha256 {self.sha256}") + self.body).encode()


def rule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The label rule in pack's config or in a vocabulary's header."""
    return {key: config[key] for key in RULE_KEYS if key in config}


def _describe_rule(rule: dict[str, Any]) -> str:
    """A label rule in a few words and the first digits of its hash."""
    stop = f" with {counted(len(rule['stop_words']), 'stop word')}" if "stop_words" in rule else ""
    return f"{rule.get('rule')}{stop} ({sha256_json(rule)[:8]}) on WordNet {rule.get('wordnet')}"


def build_vocabulary(
    counts: Mapping[str, int],
    documents: Mapping[str, int],
    lemmas: Mapping[str, str],
    header: dict[str, Any],
    *,
    min_count: int,
    top_k: int | None = None,
) -> Vocabulary:
    """Synsets with count > ``min_count`` (CatLIP §3.1), most frequent first, ties by WNID, at most ``top_k``.

    Raises UserError when nothing is left.
    """
    kept = sorted((w for w, n in counts.items() if n > min_count), key=lambda w: (-counts[w], w))[:top_k]
    if not kept:
        most = max(counts.values(), default=0)
        raise UserError(f"--min-count {min_count} leaves no synset: the most frequent one counts {most}; lower it")
    rows = tuple((w, lemmas[w], counts[w], documents[w]) for w in kept)
    return Vocabulary(rows, {**header, "min_count": min_count, "top_k": top_k})


def read_vocabulary(path: str) -> Vocabulary:
    """Read the TSV. Raises DataError naming the line when it is not ours or was edited, FileNotFoundError."""
    table = read_tsv(path, FORMAT)
    rows = []
    for rank, (number, fields) in enumerate(table.rows):
        if len(fields) != 5 or fields[0] != str(rank) or not all(map(NUMBER.fullmatch, fields[3:])):
            raise FORMAT.broken(path, number, fields, "make it again with `clipmill vocab`")
        _, wnid, lemma, count, documents = fields
        rows.append((wnid, lemma, int(count), int(documents)))
    vocabulary = Vocabulary(tuple(rows), table.header)
    if table.notes != [f"sha256 {vocabulary.sha256}"]:
        raise DataError(f"{path}: its rows do not match its hash, it was edited; make it again with `clipmill vocab`")
    return vocabulary
