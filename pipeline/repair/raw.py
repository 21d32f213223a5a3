"""A damaged raw shard made whole: restored from what is left of it, fetched again, or without what is lost.

Only lost images are fetched, and those that no hash proves when the shard does not come out as it was written. It is
made in a hidden folder of ROOT and takes the place of the damaged files only when it is complete; damaged files of
which something is lost for good are moved away, not deleted.
"""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.core.runner import ShardResult, ShardTask
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.images import EncodedImage, Outcome
from pipeline.ingest.listing import Listing, rows_hash
from pipeline.ingest.raw_shard import RawShardInput, write_raw_shard
from pipeline.ingest.retry import RETRY_PASS, task_of_pass
from pipeline.ingest.stage import LIST_FORMS, ORIGINAL_CAPTIONS, fetch_missing, source_form
from pipeline.repair.folder import Folder
from pipeline.repair.raw_evidence import LINK, RawEvidence
from pipeline.repair.recorded import Recorded, file_sha256, sound_record
from shards_spec.files import DataError, UserError, exists, join, remove
from shards_spec.layout import RAW, raw_parquet, raw_tar, shard_name
from shards_spec.manifest import TIMES, Done, finished_shards
from shards_spec.messages import counted
from shards_spec.parquet import read_table

LOST = "lost in a damaged shard"  # a reason on disk
DIGEST = re.compile(r"[0-9a-f]{64}")
RECORDED_OPTIONS = (  # names that ingest's records and its config share
    "shard_size",
    "image_size",
    "max_bytes",
    "max_pixels",
    "min_size",
    "max_aspect_ratio",
    "sane_captions",
    "min_caption_chars",
    "max_caption_chars",
    "sha256_col",
    "allow_private",
    "ignore_opt_out",
)
LINKED_FORMS = (*LIST_FORMS, "datacompdr")  # of sources whose rows have links


class RefusedError(Exception):
    """A repair that cannot be made here; the message says why and what to do."""


def ingest_config(recorded: Recorded, config: dict[str, Any], sources: tuple[str, ...]) -> IngestConfig:
    """The settings of `ingest` as a record has them; what only affects the network has its default value.

    Raises UserError for values that no version has.
    """
    caption_col, url_col = config.get("columns") or (None, None)
    options: dict[str, Any] = {name: config[name] for name in RECORDED_OPTIONS if name in config}
    if (near_bits := config.get("near_bits")) is not None:
        options["near_bits"] = near_bits
    if (kept := config.get("other_columns")) is not None:
        options["save_additional_columns"] = tuple(kept)
    duplicates: Literal["exact", "near"] = "exact" if near_bits is None else "near"
    return IngestConfig(
        recorded.root,
        sources or (recorded.root,),
        format=config.get("kind", "auto"),
        caption_col=caption_col,
        url_col=url_col,
        dedup=duplicates if config.get("duplicates") else "none",
        where=tuple(config.get("where", ())),
        workers=1,
        **options,
    )


def find_sources(recorded: Recorded, given: str | None) -> tuple[str, ...]:
    """The sources of a dataset that are still there: the one ``given``, or those that ``dataset.json`` names."""
    text = given or recorded.source
    if not text:
        return ()
    for sources in ((text,), tuple(text.split(" "))):
        with suppress(UserError, OSError):
            if all(map(exists, sources)):
                return sources
    return ()


def source_tasks(recorded: Recorded, shards: set[int], given: str | None) -> dict[int, Any]:
    """The tasks of these shards as the source has them now; empty when it cannot be read or is of another form."""
    config = recorded.config("ingest")
    sources = find_sources(recorded, given)
    if config is None or not sources or config.get("kind") == "img2dataset":
        return {}
    if ORIGINAL_CAPTIONS in config:  # where these are is not recorded, and without them the rows are others
        return {}
    try:
        settings = ingest_config(recorded, config, sources)
        form = source_form(settings)
        return {task.shard: task for task in Listing(settings, form).tasks_of(shards)}
    except (UserError, DataError, OSError):
        return {}


def retry_task(evidence: RawEvidence) -> ShardTask | None:
    """The task of an additional shard of `ingest --retry-failed`, from the shards before it; None when it is none.

    It has to have all samples that the shard has.
    """
    size = evidence.config.get("shard_size")
    if evidence.done is not None and RETRY_PASS not in evidence.done.inputs:
        return None
    for retry_pass in evidence.passes() if isinstance(size, int) else []:
        with suppress(DataError, UserError, OSError):
            task = task_of_pass(evidence.root, evidence.shard, retry_pass, size or 1)
            keys = set(task.payload.keys) if task is not None else set()
            if evidence.samples.keys() <= keys and not keys & _keys_of_pass(evidence, retry_pass):
                return task
    return None


def _keys_of_pass(evidence: RawEvidence, retry_pass: int) -> set[str]:
    """The inputs that other shards of a pass have: an input is tried once in each."""
    root, keys = evidence.root, set[str]()
    for number in finished_shards(join(root, RAW)):
        done = sound_record(root, "ingest", number)
        if done is not None and number != evidence.shard and done.inputs.get(RETRY_PASS) == str(retry_pass):
            keys |= set(read_table(raw_parquet(root, number), ["key"]).column("key").to_pylist())
    return keys


@dataclass
class RawRepair:
    """How one raw shard is made whole.

    ``known`` has what is known of each input of ``shard_input``, None for what is not; ``unproven`` are the keys of
    images that only look right. ``fetchable``: whether each input can be fetched or read again.
    """

    evidence: RawEvidence
    folder: Folder
    config: IngestConfig | None
    shard_input: RawShardInput
    values: dict[str, dict[str, Any]]
    known: list[Outcome | None]
    unproven: set[str]
    fetchable: list[bool] = field(default_factory=list)

    @classmethod
    def plan(cls, evidence: RawEvidence, folder: Folder, recorded: Recorded, sources: tuple[str, ...]) -> "RawRepair":
        """Decide from the evidence. Raises RefusedError when neither rows nor source are left of the shard."""
        keys = evidence.keys()
        if not keys:
            raise RefusedError(
                f"{raw_tar(evidence.root, evidence.shard)}: nothing of the shard can be read, and its source is not "
                "there; say where it is with --source"
            )
        values = evidence.values(keys)
        known, unproven = evidence.outcomes(keys, values)
        shard_input = evidence.shard_input(keys, values)
        config = ingest_config(recorded, evidence.config, sources) if "kind" in evidence.config else None
        repair = cls(evidence, folder, config, shard_input, values, known, unproven)
        has_links = evidence.config.get("kind") in LINKED_FORMS
        repair.fetchable = [
            config is not None and (row.image_ref is not None or bool(has_links and row.url and LINK.match(row.url)))
            for row in shard_input.rows
        ]
        unknown = [key for key in keys if key not in values]
        if unknown and evidence.task is None and sources and evidence.config.get("kind") == "datacompdr":
            raise RefusedError(
                f"{raw_parquet(evidence.root, evidence.shard)}: the links of {counted(len(unknown), 'row')} cannot be "
                "read there, and the rows of the source are not those that it was made of, as when they had their "
                f"captions from --original-captions: delete the three files of raw/{shard_name(evidence.shard)} and "
                "run `clipmill ingest` again with the same options"
            )
        if unknown and evidence.task is not None and evidence.config.get("exclusions") is not None:
            raise RefusedError(
                f"{raw_parquet(evidence.root, evidence.shard)}: which rows --exclude left out is not known any more; "
                f"delete the shard's files and run `clipmill ingest` again with the same --exclude"
            )
        return repair

    @property
    def lost(self) -> list[int]:
        """Indices of inputs whose outcome is not known."""
        return [index for index, outcome in enumerate(self.known) if outcome is None]

    def describe(self) -> str:
        """What will be done, in a few words."""
        lost = self.lost
        fetched = sum(self.fetchable[index] for index in lost)
        kept = len(self.known) - len(lost)
        parts = [f"{kept} of {counted(len(self.known), 'row')} restored from what can be read"]
        if fetched:
            verb = "is" if fetched == 1 else "are"
            parts.append(f"{fetched} {verb} fetched again")
        if len(lost) > fetched:
            parts.append(f"{len(lost) - fetched} dropped as {LOST!r}")
        if self.unproven and any(self.fetchable):
            parts.append(f"{counted(len(self.unproven), 'image')} that no hash proves fetched again if need be")
        return ", ".join(parts)

    def run(self) -> "RawOutcome":
        """Make the shard and put it in its place. Raises UserError and DataError as `ingest` does."""
        outcomes = self._fetched(self.known)
        result = self._write(outcomes)
        tar = self.evidence.tar
        if self.unproven and result.outputs[tar] not in self.evidence.expected[tar]:
            outcomes = self._prove(outcomes)
            result = self._write(outcomes)
            self.unproven = {key for key in self.unproven if not self._is_proven(key, outcomes)}
        return self._publish(result, outcomes)

    def _is_proven(self, key: str, outcomes: list[Outcome]) -> bool:
        """Whether an image was fetched again after all."""
        index = self.shard_input.keys.index(key)
        return outcomes[index] is not self.known[index]

    def _fetched(self, known: list[Outcome | None]) -> list[Outcome]:
        """The outcomes, those that are None fetched again, or `LOST` where they cannot be."""
        given: list[Outcome | None] = [
            LOST if outcome is None and not fetchable else outcome
            for outcome, fetchable in zip(known, self.fetchable, strict=True)
        ]
        if self.config is None or None not in given:
            return [outcome for outcome in given if outcome is not None]
        return fetch_missing(self.config, self.shard_input.rows, given)

    def _prove(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Fetch what no hash proves; an image of the same file as before takes the place of the doubtful one."""
        keys = self.shard_input.keys
        doubtful = [key in self.unproven and self.fetchable[index] for index, key in enumerate(keys)]
        again = self._fetched([None if doubt else own for doubt, own in zip(doubtful, outcomes, strict=True)])
        proven = list(outcomes)
        for index, (old, new) in enumerate(zip(outcomes, again, strict=True)):
            if isinstance(old, EncodedImage) and isinstance(new, EncodedImage) and old.sha256 == new.sha256:
                proven[index] = new
        return proven

    def _write(self, outcomes: list[Outcome]) -> ShardResult:
        return write_raw_shard(self.folder.scratch, self.evidence.shard, self.shard_input, outcomes)

    def _publish(self, result: ShardResult, outcomes: list[Outcome]) -> "RawOutcome":
        """Put the files that differ in their places, and the record last."""
        evidence = self.evidence
        root, shard = evidence.root, evidence.shard
        changed = self._changed(outcomes)
        done = self._record(result, outcomes)
        before = evidence.done
        is_exact = all(digest in evidence.expected[path] for path, digest in result.outputs.items())
        moved = list[str]()
        for path, digest in result.outputs.items():
            is_there = file_sha256(join(root, path))
            if is_there == digest:
                remove(join(self.folder.scratch, path))
            elif not is_exact and path not in evidence.whole and is_there is not None:
                moved.append(path)
        if before is not None and (before.outputs, before.counts) == (done.outputs, done.counts):
            for path in result.outputs:
                if exists(join(self.folder.scratch, path)):
                    self.folder.put(path)
        else:
            self.folder.note_change(shard, evidence.expected[evidence.tar], changed)
            moved = [self.folder.copy_away(path) for path in moved]
            self.folder.publish(done, RAW)
        dropped = Counter(
            outcome
            for key, outcome in zip(self.shard_input.keys, outcomes, strict=True)
            if isinstance(outcome, str) and self._was_image(key)
        )
        unproven = 0 if is_exact else len(self.unproven)
        return RawOutcome(is_exact=is_exact, dropped=dict(dropped), moved=moved, unproven=unproven)

    def _was_image(self, key: str) -> bool:
        row = self.values.get(key)
        return row is None or row["status"] == "success"

    def _changed(self, outcomes: list[Outcome]) -> list[str]:
        """Keys of images that are not known to be those of before."""
        changed = list[str]()
        for key, old, new in zip(self.shard_input.keys, self.known, outcomes, strict=True):
            row = self.values.get(key)
            is_same = row is not None and isinstance(new, EncodedImage) and row.get("sha256") == new.sha256
            if isinstance(new, EncodedImage) and old is None and not is_same:
                changed.append(key)
        return changed

    def _record(self, result: ShardResult, outcomes: list[Outcome]) -> Done:
        """The record: that of before with what changed, or one made of what can be read of it."""
        evidence = self.evidence
        stats = evidence.stats
        times = {name: stats[name] for name in TIMES if isinstance(stats.get(name), int | float)}
        is_whole = len(times) == len(TIMES) and times["duration"] == times["end_time"] - times["start_time"]
        counts = Counter("success" if isinstance(outcome, EncodedImage) else outcome for outcome in outcomes)
        if evidence.done is not None:
            return replace(
                evidence.done,
                counts=dict(counts),
                outputs=result.outputs,
                extra=times if is_whole else {},
                counters=result.counters,
            )
        inputs, retried = self._lenient_inputs()
        return Done(
            stage="ingest",
            shard=evidence.shard,
            config=evidence.config,
            counts=dict(counts),
            inputs=inputs,
            outputs=result.outputs,
            extra=times if is_whole else {},
            retried=retried,
            counters=result.counters,
        )

    def _lenient_inputs(self) -> tuple[dict[str, str], dict[str, int]]:
        """Inputs and retried reasons of a damaged record; the source tells the inputs where it is there."""
        record = self.evidence.stats.get("clipmill")
        record = record if isinstance(record, dict) else {}
        inputs, retried = record.get("inputs"), record.get("retried")
        inputs = inputs if isinstance(inputs, dict) else {}
        retried = retried if isinstance(retried, dict) else {}
        if self.evidence.task is not None:
            return self.evidence.task.inputs, self.evidence.task.payload.retried
        sound = {name: value for name, value in inputs.items() if isinstance(value, str)}
        if not DIGEST.fullmatch(sound.get("rows", "")):
            sound["rows"] = rows_hash(self.shard_input.rows)
        return sound, {reason: number for reason, number in retried.items() if type(number) is int}


@dataclass(frozen=True)
class RawOutcome:
    """What became of a raw shard: ``is_exact``, its files are as they were; else the ``dropped`` inputs by reason.

    ``moved`` are the damaged files that were moved away, below ROOT, ``unproven`` the images that only look right.
    """

    is_exact: bool
    dropped: dict[str, int]
    moved: list[str]
    unproven: int = 0

    def describe(self) -> str:
        """In a few words."""
        if self.is_exact:
            return "as it was written"
        lost = ", ".join(f"{number} {reason}" for reason, number in sorted(self.dropped.items()))
        kept = f"; the damaged files are in {', '.join(self.moved)}" if self.moved else ""
        looks = f"; {counted(self.unproven, 'image')} kept for their looks alone" if self.unproven else ""
        return (lost or "no sample lost") + looks + kept
