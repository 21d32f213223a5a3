"""The first pass of `select` where a rule looks at all samples: drafts of all shards, then what the rules find in them.

Drafts and verdict lie below select/NAME in a hidden folder until the selection is finished. A run that was killed, and
each job of a Slurm array, takes what is there of the same samples and rules; one process at a time writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import starmap

import numpy as np
import pyarrow as pa

from pipeline.core.runner import RunOptions, ShardResult, ShardTask, Stage, run_stage
from pipeline.select.dataset_rules import (
    DatasetRules,
    Draft,
    Verdict,
    entries_of,
    judge,
    read_verdict,
    values_of,
)
from pipeline.select.facts import ShardFacts
from pipeline.select.sample_rules import SampleRules
from pipeline.select.semantic_duplicates import ShardRows, find_semantic_duplicates
from shards_spec.files import DataError, UserError, exists, is_url, join, remove, sha256_file, write_json
from shards_spec.layout import parquet_path, select_folder
from shards_spec.lock import locked
from shards_spec.manifest import read_intact, remove_parts
from shards_spec.parquet import read_table, write_table
from shards_spec.selection import selection_of, selection_table
from shards_spec.shard_writer import ShardWriter

FOLDER = ".survey"  # below select/NAME; hidden files are nobody's
LOCK = ".survey.lock"
VERDICT = "verdict.json"
VALUE = pa.field("value", pa.float64())
ENTRIES = pa.field("entries", pa.list_(pa.string()))


@dataclass(frozen=True)
class Survey:
    """Where drafts and verdict of a selection lie, and what they are of. Sent to worker processes.

    ``config`` is a hash of all rules, ``fingerprint`` one of all rules and samples.
    """

    root: str
    name: str
    rules: DatasetRules = field(default_factory=DatasetRules)
    config: str = ""
    fingerprint: str = ""

    @property
    def folder(self) -> str:
        """Relative to ROOT."""
        return f"{select_folder(self.name)}/{FOLDER}"

    @property
    def verdict_path(self) -> str:
        """The file of the verdict."""
        return join(self.root, self.folder, VERDICT)

    def make(self, sample_rules: SampleRules, tasks: list[ShardTask], workers: int, *, wait: bool) -> None:
        """Make what is missing. ``wait``: for another process that makes it. Raises UserError, ShardsFailed."""
        folder = join(self.root, select_folder(self.name))
        if not is_url(folder):
            os.makedirs(folder, exist_ok=True)
        with _without_empty_folder(folder), locked(join(folder, LOCK), folder, wait=wait):
            shards = [task.shard for task in tasks]
            former = read_verdict(self.verdict_path, self.fingerprint)
            if former is not None and (wait or self._all_intact(shards, former)):
                return  # a job of an array looks at its own drafts, when it takes them
            stage = Stage(f"select/{self.name}", self.folder, {})  # what the rules are is among the inputs
            rules = {"rules": self.config}
            work = partial(_draft_shard, survey=self, sample_rules=sample_rules)
            drafts = (ShardTask(task.shard, task.inputs | rules) for task in tasks)
            options = RunOptions(workers=min(workers, len(tasks)), total=len(tasks), totals=False)
            try:
                run_stage(self.root, stage, drafts, work, options)
                repeated = self._find_repeated(shards, workers)
                verdict = judge(self.rules, lambda: (self.draft(shard, repeated) for shard in shards))
            except UserError:  # of a rule that serves no run: nothing would take up what is there
                self.remove()
                raise
            write_json(self.verdict_path, replace(verdict, repeated=repeated).to_json(self.fingerprint))

    def draft(self, shard: int, repeated: dict[str, str]) -> Draft:
        """The draft of a shard; ``repeated`` as `Verdict` has it, empty before it is known. Raises DataError."""
        path = join(self.root, parquet_path(self.folder, shard))
        if not self._is_intact(shard):
            raise DataError(f"{path}: not the file that was written; {self._fix}")
        table = read_table(path, fix=self._fix)
        entries = table.column(ENTRIES.name).combine_chunks()
        values = table.column(VALUE.name).fill_null(np.nan).to_numpy()
        plain = table.drop_columns([VALUE.name, ENTRIES.name])
        return Draft(selection_of(plain, path, self.root, self.name), values, entries, self._repeated(shard, repeated))

    @property
    def _fix(self) -> str:
        return f"delete {join(self.root, self.folder)} and run this `clipmill select` again"

    def _is_intact(self, shard: int) -> bool:
        return read_intact(self.root, self.folder, shard) is not None

    def _all_intact(self, shards: list[int], verdict: Verdict) -> bool:
        """Whether drafts and the files that belong to the verdict are as they were written; reads them."""
        return all(map(self._is_intact, shards)) and all(starmap(self._has_hash, verdict.repeated.items()))

    def _has_hash(self, path: str, digest: str) -> bool:
        try:
            return sha256_file(join(self.root, path)) == digest
        except OSError:
            return False

    def rows(self, shard: int) -> ShardRows:
        """The samples of a shard that are compared. Raises DataError."""
        draft = self.draft(shard, {})
        return ShardRows(shard, draft.selection.keys, draft.rows)

    def _find_repeated(self, shards: list[int], workers: int) -> dict[str, str]:
        """Write the samples that repeat another; return the files, of shards that have some, as `Verdict` does."""
        rule = self.rules.duplicates
        if rule is None:
            return {}
        written = dict[str, str]()
        for shard, kept in find_semantic_duplicates(self.root, rule, shards, read=self.rows, workers=workers):
            table = pa.table({"row": pa.array(kept, pa.int64()), "kept": pa.array(kept.values(), pa.string())})
            path = self._repeated_path(shard)
            written[path] = write_table(join(self.root, path), table)
        return written

    def _repeated(self, shard: int, files: dict[str, str]) -> dict[int, str]:
        path = self._repeated_path(shard)
        if path not in files:
            return {}
        file = join(self.root, path)
        if not self._has_hash(path, files[path]):
            raise DataError(f"{file}: not the file that was written; {self._fix}")
        table = read_table(file, ["row", "kept"], fix=self._fix)
        return dict(zip(table.column("row").to_pylist(), table.column("kept").to_pylist(), strict=True))

    def _repeated_path(self, shard: int) -> str:
        """Relative to ROOT: the file with a shard's samples that repeat another."""
        return parquet_path(self.folder, shard, part=1)

    @property
    def verdict(self) -> Verdict:
        """What the rules found. Raises DataError when it is gone."""
        return _verdict(self.verdict_path, self.fingerprint)

    def remove(self) -> None:
        """Delete all that was made."""
        folder = join(self.root, self.folder)
        if exists(folder):
            remove(self.verdict_path)
            remove_parts(folder)


@contextmanager
def _without_empty_folder(folder: str) -> Iterator[None]:
    """Where the block is refused, an empty folder is no selection that was begun. Another process' lock keeps it."""
    try:
        yield
    except UserError:
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
        raise


@lru_cache(1)
def _verdict(path: str, fingerprint: str) -> Verdict:
    verdict = read_verdict(path, fingerprint)
    if verdict is None:
        raise DataError(f"{path}: gone, or of other rules; run this `clipmill select` again")
    return verdict


def _draft_shard(root: str, task: ShardTask, *, survey: Survey, sample_rules: SampleRules) -> ShardResult:
    """Write the draft of one final shard. Raises DataError when a file is broken or of another shard."""
    facts = ShardFacts(root, task.shard, sample_rules.sources)
    rules = survey.rules
    selection = sample_rules.apply(facts)
    values = np.full(len(facts), np.nan) if rules.by is None else values_of(facts, rules.by)
    entries = [None] * len(facts) if rules.balance is None else entries_of(facts)
    table = selection_table(selection)
    table = table.append_column(VALUE, pa.array(values, VALUE.type, mask=np.isnan(values)))
    table = table.append_column(ENTRIES, pa.array(entries, ENTRIES.type))
    writer = ShardWriter(root, survey.folder, task.shard)
    writer.write_parquet(table)
    return ShardResult({"success": len(facts)}, writer.outputs)
