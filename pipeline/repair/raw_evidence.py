"""All that is known of a damaged raw shard: its rows, and which of its images are whole.

The rows of the Parquet file and the json members of the tar say the same, so either restores the other; the source's
list has the rows too, where it is still there. Every input ends as a row with an image, or with a reason.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.core.runner import ShardTask
from pipeline.ingest.images import EncodedImage, Outcome
from pipeline.ingest.raw_shard import SCHEMA, RawShardInput, sample_key
from pipeline.ingest.retry import RETRY_PASS
from pipeline.ingest.rows import Row
from pipeline.repair.recorded import Recorded, file_sha256, hashes_in, sound_record
from pipeline.repair.salvage import (
    ImageWitnesses,
    Members,
    encoded_image,
    find_witnesses,
    image_of,
    looks_right,
    raw_samples,
    row_of_json,
)
from shards_spec.class_names import CLASS_LIST
from shards_spec.files import DataError, UserError, join, read_bytes
from shards_spec.layout import RAW, parquet_path, raw_parquet, raw_tar, stats_path, tar_path
from shards_spec.library_errors import parse_json
from shards_spec.manifest import Done, finished_shards
from shards_spec.parquet import read_table

TIME = re.compile(rb'"(duration|start_time|end_time)": ([0-9.e-]{1,30})[,\n]')  # in a record that is no JSON any more
INPUT = re.compile(rb'"(rows|columns|retry pass|parquet)": "([^"\\]*)"')
LINK = re.compile(r"https?://", re.IGNORECASE)


@dataclass
class RawEvidence:
    """What is known of a raw shard.

    ``done`` is its record when that is sound, ``stats`` what can be read of it otherwise. ``whole`` has the paths below
    ROOT of files that are as they were written, which ``expected`` tells: path to hashes. ``table`` are the rows as
    they can be read, ``samples`` the members of the samples, ``task`` the shard as its source has it.
    ``tried_again`` has the reasons of inputs that later shards have too.
    """

    root: str
    shard: int
    config: dict[str, Any]
    done: Done | None
    stats: dict[str, Any]
    expected: dict[str, set[str]]
    whole: set[str]
    table: pa.Table | None
    samples: dict[str, Members]
    task: ShardTask | None = None
    schema: pa.Schema | None = None
    witnesses: ImageWitnesses = field(default_factory=ImageWitnesses)
    tried_again: dict[str, str] = field(default_factory=dict)

    @property
    def tar(self) -> str:
        """Path of the tar below ROOT."""
        return tar_path(RAW, self.shard)

    @property
    def parquet(self) -> str:
        """Path of the Parquet file below ROOT."""
        return parquet_path(RAW, self.shard)

    def use_task(self, task: ShardTask | None) -> None:
        """Take the rows of the source, if they are those that the shard was made of, by the hash in its record."""
        made_of = self.done.inputs if self.done is not None else None
        if task is not None and (made_of is None or made_of in (task.inputs, task.former)):
            self.task = task

    @property
    def rows_are_whole(self) -> bool:
        """Whether the Parquet file is as it was written."""
        return self.parquet in self.whole

    def keys(self) -> list[str]:
        """The key of every input, in order."""
        stored = self.table.column("key").to_pylist() if self.table is not None else []
        if self.rows_are_whole:
            return stored
        if self.task is not None:
            return list(self.task.payload.keys)
        if self._is_additional(stored):
            return stored or list(self.samples)
        own = [key for key in (*self.samples, *self.witnesses.rows) if self._index(key) is not None]
        count = max([len(stored), self._count(), *((self._index(key) or 0) + 1 for key in own)])
        size = int(self.config.get("shard_size", count))
        return [sample_key(self.shard, index, size) for index in range(count)]

    def passes(self) -> list[int]:
        """The numbers of the pass of `ingest --retry-failed` that may have made it, the likeliest first."""
        record = self.stats.get("clipmill")
        inputs = record.get("inputs") if isinstance(record, dict) else None
        stored = str(inputs.get(RETRY_PASS, "")) if isinstance(inputs, dict) else ""
        near = {1}
        for number in finished_shards(join(self.root, RAW)):
            done = sound_record(self.root, "ingest", number)
            if done is not None and RETRY_PASS in done.inputs:
                near |= {int(done.inputs[RETRY_PASS]), int(done.inputs[RETRY_PASS]) + 1}
        return [*([int(stored)] if stored.isdecimal() else []), *sorted(near)]

    def _is_additional(self, keys: list[Any]) -> bool:
        """Whether rows of other shards are tried again here: then the list has no shard of this number."""
        known = [key for key in (keys or list(self.samples)) if isinstance(key, str)]
        return bool(known) and sum(self._index(key) is None for key in known) > len(known) // 2

    def _index(self, key: str) -> int | None:
        """Number of an input in this shard by its key; None for a key of another shard."""
        prefix = sample_key(self.shard, 0, 1)[:-4]
        number = key.removeprefix(prefix)
        return int(number) if key.startswith(prefix) and number.isascii() and number.isdigit() else None

    def _count(self) -> int:
        """The number of inputs by the record; 0 when it does not say."""
        if self.done is not None:
            return sum(self.done.counts.values())
        count = self.stats.get("count")
        most = int(self.config.get("shard_size", 0))
        return count if isinstance(count, int) and 0 <= count <= most else 0

    def values(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """Key to the row of the Parquet file, for the inputs whose row is known."""
        stored = self.table.to_pylist() if self.table is not None else []
        rows = {row["key"]: row for row in stored}
        if self.rows_are_whole:
            return rows
        reasons = set(self.done.counts) if self.done is not None else set()
        values = dict[str, dict[str, Any]]()
        for key in keys:
            row = row_of_json(self.samples.get(key, {}), key)
            if row is None and key in rows and _is_plausible(rows[key], reasons):
                row = rows[key]
            row = self.witnesses.rows.get(key) if row is None else row
            if row is not None:
                values[key] = row
        return values

    def shard_input(self, keys: list[str], values: dict[str, dict[str, Any]]) -> RawShardInput:
        """The inputs as `ingest` had them: from the source where it is there, else from what the rows say."""
        if self.task is not None and list(self.task.payload.keys) == keys:
            task_input: RawShardInput = self.task.payload
            return task_input
        schema = self.table.schema if self.table is not None else self.schema
        types = {column.name: column.type for column in schema or () if column.name not in SCHEMA.names}
        if self.config.get("kind") == "datacompdr":  # Parquet calls a list's items elements, `ingest` does not
            types = {
                name: pa.list_(kind.value_type) if pa.types.is_list(kind) else kind for name, kind in types.items()
            }
        has_labels = CLASS_LIST in self.config
        rows = [self._row(values.get(key), list(types), has_labels) for key in keys]
        if has_labels:
            types.pop("cls", None)
        return RawShardInput(keys, rows, column_types=types)

    def _row(self, values: dict[str, Any] | None, others: list[str], has_labels: bool) -> Row:
        if values is None:
            return Row(None, None, extra=dict.fromkeys(name for name in others if not has_labels or name != "cls"))
        extra = {name: values.get(name) for name in others}
        label = extra.pop("cls", None) if has_labels else None
        note = values["error_message"] if values["status"] == "success" else None
        return Row(values["caption"], values["url"], note=note, extra=extra, label=label)

    def _known_to_fail(self, keys: list[str], values: dict[str, dict[str, Any]]) -> dict[str, str]:
        """Key to reason of inputs whose rows are lost: those that were tried again later, and by elimination the rest.

        By elimination: when the record counts just so many inputs of one reason beside those that are known.
        """
        unknown = [key for key in keys if key not in values and key not in self.samples]
        failed = {key: reason for key, reason in self.tried_again.items() if key in unknown}
        if self.done is not None:
            left = Counter(self.done.counts)
            left.subtract("success" if row["status"] == "success" else row["error_message"] for row in values.values())
            left.subtract(failed.values())
            reasons = [reason for reason, number in left.items() if number > 0]
            rest = [key for key in unknown if key not in failed]
            if len(reasons) == 1 and reasons[0] != "success" and left[reasons[0]] == len(rest):
                failed |= dict.fromkeys(rest, reasons[0])
        return failed

    def outcomes(self, keys: list[str], values: dict[str, dict[str, Any]]) -> tuple[list[Outcome | None], set[str]]:
        """What became of each input, None where that is lost, and the keys of images that no hash proves."""
        outcomes = list[Outcome | None]()
        unproven = set[str]()
        failed = self._known_to_fail(keys, values)
        for key in keys:
            row = values.get(key)
            if key in failed:
                outcomes.append(failed[key])
            elif row is None or row["status"] == "success":
                image, is_proven = self._image(key, row)
                outcomes.append(image)
                if image is not None and not is_proven:
                    unproven.add(key)
            else:
                outcomes.append(row["error_message"])
        return outcomes, unproven

    def _image(self, key: str, row: dict[str, Any] | None) -> tuple[EncodedImage | None, bool]:
        """A sample's image, None when it is lost, and whether a hash proves its bytes."""
        if row is None:
            return None, False
        if key in self.witnesses.copies:
            return encoded_image(self.witnesses.copies[key], row), True
        data = image_of(self.samples.get(key, {}))
        if data is None:
            return None, False
        is_proven = self.tar in self.whole or self.witnesses.prove(key, data, row)
        if not is_proven and (key in self.witnesses.ids or not looks_right(data, row)):
            return None, False
        return encoded_image(data, row), is_proven


def _is_plausible(row: dict[str, Any], reasons: set[str]) -> bool:
    """Whether a row of a damaged Parquet file can be believed: its reason is one that the record counts."""
    if row.get("status") == "success":
        return True
    reason = row.get("error_message")
    return isinstance(reason, str) and (not reasons or reason in reasons)


def reasons_before_retry(root: str, shard: int) -> dict[str, str]:
    """Key to an earlier reason of the inputs that additional shards tried again, those of other whole shards excepted.

    Their records count the reasons, without saying which input had which.
    """
    keys = list[str]()
    retried = Counter[str]()
    known = dict[str, str]()
    for number in finished_shards(join(root, RAW)):
        done = sound_record(root, "ingest", number)
        table = lenient_table(raw_parquet(root, number)) if number != shard else None
        if done is None or table is None:
            continue
        if RETRY_PASS in done.inputs:
            retried.update(done.retried)
            keys += table.column("key").to_pylist()
        rows = zip(table.column("key").to_pylist(), table.column("error_message").to_pylist(), strict=True)
        known |= {key: reason for key, reason in rows if reason is not None and RETRY_PASS not in done.inputs}
    retried.subtract(known[key] for key in keys if key in known)
    reasons = sorted((+retried).elements())
    return dict(zip((key for key in keys if key not in known), reasons, strict=False))


def gather_evidence(recorded: Recorded, shard: int, *, hashes: dict[str, set[str]], keys: list[str]) -> RawEvidence:
    """Read what is left of a raw shard.

    ``hashes`` are those that records have of files (`recorded_hashes`), ``keys`` the stages that may have copies.
    """
    root = recorded.root
    done = sound_record(root, "ingest", shard)
    path = stats_path(join(root, RAW), shard)
    expected = dict[str, set[str]]()
    for name in (tar_path(RAW, shard), parquet_path(RAW, shard)):
        expected[name] = {done.outputs[name]} if done and name in done.outputs else hashes.get(name, set())
        expected[name] = expected[name] | (set() if done else hashes_in(path))
    whole = {name for name, digests in expected.items() if file_sha256(join(root, name)) in digests}
    evidence = RawEvidence(
        root=root,
        shard=shard,
        config=(done.config if done else recorded.config("ingest")) or {},
        done=done,
        stats=lenient_json(path),
        expected=expected,
        whole=whole,
        table=lenient_table(raw_parquet(root, shard)),
        samples=raw_samples(raw_tar(root, shard)),
        schema=_schema_of_others(root, shard),
    )
    if evidence.parquet not in whole:
        evidence.tried_again = reasons_before_retry(root, shard)
    if evidence.tar not in whole:
        wanted = set(evidence.keys())
        tar_hashes = expected[evidence.tar]
        evidence.witnesses = find_witnesses(root, shard, wanted=wanted, hashes=tar_hashes, keys=keys)
    return evidence


def lenient_json(path: str) -> dict[str, Any]:
    """A JSON object; of a damaged one the times and inputs of a done-record that can still be read."""
    try:
        data = read_bytes(path)
    except OSError:
        return {}
    with contextlib.suppress(DataError, UserError):
        value = parse_json(path, data)
        return value if isinstance(value, dict) else {}
    times = {name.decode(): _number(text) for name, text in TIME.findall(data)}
    inputs = {name.decode(): text.decode() for name, text in INPUT.findall(data)}
    return {**times, "clipmill": {"inputs": inputs}}


def lenient_table(path: str) -> pa.Table | None:
    """The rows of a Parquet file; None when it cannot be read, or is no table of a raw shard."""
    with contextlib.suppress(Exception):  # over damaged bytes readers raise anything
        table = read_table(path)
        keys = table.column("key").to_pylist()
        is_raw = {"key", "status", "url", "caption", "error_message"} <= set(table.column_names)
        if is_raw and len(set(keys)) == len(keys) and all(isinstance(key, str) for key in keys):
            table.to_pylist()
            return table
    return None


def _schema_of_others(root: str, shard: int) -> pa.Schema | None:
    """The columns of another raw shard, for one whose own cannot be read."""
    for other in _nearest(finished_shards(join(root, RAW)), shard):
        table = lenient_table(raw_parquet(root, other))
        if table is not None:
            return table.schema
    return None


def _nearest(numbers: Iterable[int], shard: int) -> Iterator[int]:
    yield from sorted((number for number in numbers if number != shard), key=lambda number: abs(number - shard))


def _number(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
