"""What `check` validates in the text files of a dataset: done-records, ``dataset.json``, names, vocabularies.

A record has a hash of itself (`SEAL`); one of an older clipmill has none, and what can be derived again is compared.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.check.files import DatasetFiles
from pipeline.check.listing import FolderListing
from shards_spec.class_names import read_labelled_classes
from shards_spec.files import DataError, UserError, exists, join, json_bytes, names, read_bytes, read_json, sha256_json
from shards_spec.layout import (
    FILE_PATTERN,
    RAW,
    SIZES,
    STATS_PATTERN,
    VOCAB,
    class_names_txt,
    dataset_json,
    is_named_folder,
    remake_advice,
    remake_folder_advice,
    resume_advice,
    shard_name,
    stage_output,
    stats_path,
)
from shards_spec.library_errors import REMAKE, short
from shards_spec.manifest import (
    REWRITE,
    SEAL,
    TIMES,
    Done,
    head_seal,
    is_count,
    read_dataset,
    seal,
    stats_seal,
)
from shards_spec.messages import counted
from shards_spec.vocab import read_vocabulary

# Fields of records and blocks without a hash of themselves. Any other is a damaged name, perhaps that of the hash.
RECORD = {"spec_version", "stage", "shard", "config", "config_sha256", "inputs", "outputs", "retried", "facts", SEAL}
BLOCK = {"config", "config_sha256", "shards", "counts", "facts", "versions", "synsets", "sha256", "coverage", SEAL}
HEAD = {"spec_version", "name", "source", "stages", SEAL}


class Findings:
    """Problems found, each once, in the order of finding."""

    def __init__(self) -> None:
        self._found = dict[str, None]()

    def add(self, problem: str) -> None:
        """Add a problem."""
        self._found[problem] = None

    @property
    def problems(self) -> list[str]:
        """All problems."""
        return list(self._found)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Around a part of the check: an exception becomes a problem, and the check continues after the block.

        Damaged bytes may raise any exception, so all are caught; ``what`` names the file for those that do not.
        """
        try:
            yield
        except (DataError, UserError) as error:
            self.add(str(error))
        except OSError as error:
            path = str(error.filename or what)
            first = "move the folder away, then " if isinstance(error, IsADirectoryError) else ""
            self.add(f"{path} cannot be read ({short(error)}); {first}{remake_advice(path, REMAKE)}")
        except Exception as error:
            text = short(error)
            self.add(text if what in text else f"{what}: damaged, it cannot be read ({type(error).__name__}: {text})")


def check_dataset(root: str, findings: Findings) -> dict[str, Any] | None:
    """Validate ``dataset.json`` and return its blocks; {} when it is not there, None when it is broken."""
    path = dataset_json(root)
    dataset = dict[str, Any]()
    if not exists(path):
        return dataset
    with findings.of(path):
        dataset = read_dataset(root)
    if not dataset:
        return None
    if SEAL in dataset and dataset[SEAL] != head_seal(dataset):
        findings.add(f"{path}: name, source or version are not as they were written; {REWRITE}")
    elif SEAL in dataset and json_bytes(read_json(path)) != read_bytes(path):
        findings.add(f"{path}: not as it was written; {REWRITE}")
    if SEAL not in dataset and (unknown := sorted(set(dataset) - HEAD)):
        findings.add(f"{path}: unknown field {unknown[0]!r}; {REWRITE}")
    for stage, block in dataset["stages"].items():
        _check_block(root, path, stage, block, findings)
    blocks: dict[str, Any] = dataset["stages"]
    return blocks


def _check_block(root: str, path: str, stage: str, block: dict[str, Any], findings: Findings) -> None:
    folder = stage_output(stage)
    if folder is None:
        findings.add(
            f"{path}: unknown stage {stage!r}; run `clipmill check {root} --repair`, which takes its block out"
        )
        return
    fix = f"run `clipmill check {root} --repair`, it writes the block again from what is there"
    if not exists(join(root, folder)):
        effect = ", which takes the block out" if is_named_folder(folder) else ""
        findings.add(
            f"{join(root, folder)} is not there, but {path} has a block of {stage}; put it back, or run "
            f"`clipmill check {root} --repair`{effect}"
        )
    config = block.get("config")
    if SEAL in block and block[SEAL] != seal(block):
        findings.add(f"{path}: the block of {stage} is not as it was written; {fix}")
    elif SEAL not in block and (unknown := sorted(set(block) - BLOCK)):
        findings.add(f"{path}: the block of {stage} has an unknown field {unknown[0]!r}; {fix}")
    elif "config_sha256" in block and block["config_sha256"] != sha256_json(config):
        findings.add(f"{path}: the config of {stage} does not fit its hash; {fix}")


@dataclass
class Totals:
    """What the done-records of a folder add up to."""

    shards: int = 0
    foreign: list[int] = field(default_factory=list)  # shards whose record is another tool's
    counts: Counter[str] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    configs: dict[str, int] = field(default_factory=dict)  # JSON to the first shard that has it

    def add(self, shard: int, done: Done | None) -> None:
        """One more shard; None where the record is another tool's."""
        self.shards += 1
        if done is None:
            self.foreign.append(shard)
        else:
            self.counts.update(done.counts)
            self.counts.subtract(done.retried)
            self.facts.update(done.counters)
            self.configs.setdefault(json.dumps(done.config, sort_keys=True), done.shard)


def check_totals(
    root: str,
    folder: str,
    stage: str,
    *,
    blocks: dict[str, Any] | None,
    totals: Totals,
    shards: int,
    is_incomplete: bool,
    findings: Findings,
) -> None:
    """Compare the block of a stage with the sums of its records; those of img2dataset in ``raw`` have neither.

    Without ``blocks`` (they cannot be read), or where a record is broken or missing, only the records are looked at.
    """
    path, block = dataset_json(root), (blocks or {}).get(stage)
    if totals.foreign and (block is not None or folder != RAW or len(totals.foreign) < shards):
        findings.add(
            f"{stats_path(join(root, folder), totals.foreign[0])}: no done-record in it "
            f"({len(totals.foreign)} such of {totals.shards}); delete it and {resume_advice(join(root, folder))}"
        )
        return
    if blocks is None or totals.shards != shards or is_incomplete:
        return
    if block is None:
        if totals.shards > len(totals.foreign):
            findings.add(
                f"{path}: no block for {stage}; it has not finished, run it again"
                if exists(path)
                else f"{path} is not there; put it back, or run `clipmill check {root} --repair`"
            )
        return
    counts = {reason: number for reason, number in totals.counts.items() if number}
    facts = {what: number for what, number in totals.facts.items() if number}
    recorded = {what: number for what, number in (block.get("facts") or {}).items() if number}
    if block.get("shards") != totals.shards or block.get("counts") != counts:
        findings.add(f"{path}: {stage} says {block.get('counts')}, its shards add up to {counts}")
    elif recorded != facts:
        findings.add(f"{path}: {stage} says {recorded}, the facts of its shards add up to {facts}")
    if "config" in block and (other := set(totals.configs) - {json.dumps(block["config"], sort_keys=True)}):
        shard = totals.configs[min(other)]
        findings.add(f"{path}: the config of {stage} is not that of {folder}/{shard_name(shard)}; run it again")


def check_record(files: DatasetFiles, folder: str, stage: str, shard: int) -> Done | None:
    """The validated done-record of a shard; None for another tool's. Raises DataError, OSError."""
    path = stats_path(join(files.root, folder), shard)
    (data, stats), done = files.stats(folder, shard), files.done(folder, shard)
    if done is None:
        _check_foreign(path, stats)
        return None
    record = stats["clipmill"]
    if SEAL in record and not _is_as_written(data, stats):
        raise DataError(f"{path}: not as it was written; {remake_advice(path, REMAKE)}")
    if SEAL not in record and (unknown := sorted(set(record) - RECORD)):
        raise DataError(f"{path}: its done-record has an unknown field {unknown[0]!r}; {remake_advice(path, REMAKE)}")
    if (done.stage, done.shard, record_hash(stats)) != (stage, shard, sha256_json(done.config)):
        advice = remake_advice(path, REMAKE)
        raise DataError(f"{path}: says {done.stage} shard {done.shard}, or its config does not fit its hash; {advice}")
    _check_counts(path, stats, done)
    return done


def _check_foreign(path: str, stats: dict[str, Any]) -> None:
    """Raise DataError unless another tool's stats have img2dataset's counts."""
    if not all(is_count(stats.get(name)) for name in ("count", "successes")):
        raise DataError(f"{path}: no count and successes in it; {remake_advice(path, REMAKE)}")
    if not isinstance(stats.get("status_dict"), dict):
        raise DataError(f"{path}: no status_dict in it; {remake_advice(path, REMAKE)}")


def _is_as_written(data: bytes, stats: dict[str, Any]) -> bool:
    """Whether a record with a hash of itself is unchanged to the byte; no hash covers the times, but their sum fits."""
    times = [stats[name] for name in TIMES if name in stats]
    return (
        stats["clipmill"][SEAL] == stats_seal(stats)
        and json_bytes(stats) == data
        and (not times or times[2] == times[1] - times[0])
    )


def record_hash(stats: dict[str, Any]) -> str:
    """The hash of the config as a record has it; that of the config itself where it has none."""
    record = stats["clipmill"]
    recorded: str = record.get("config_sha256", sha256_json(record["config"]))
    return recorded


def _check_counts(path: str, stats: dict[str, Any], done: Done) -> None:
    """Raise DataError unless img2dataset's counts are the sums of the reasons."""
    inputs, successes = stats.get("count"), stats.get("successes")
    failed: list[Any] = [stats.get("failed_to_download"), stats.get("failed_to_resize")]
    total = sum(done.counts.values())
    if (inputs, successes) != (total, done.successes) or sum(failed) != total - done.successes:
        raise DataError(
            f"{path}: inputs {inputs}, successes {successes}, {failed[0]} + {failed[1]} "
            f"failed; its reasons add up to {done.counts}; {remake_advice(path, REMAKE)}"
        )


def check_names(root: str, listing: FolderListing, unnamed: Iterable[str], findings: Findings) -> None:
    """Gaps in a folder's numbers, and files that no done-record names, are problems.

    ``unnamed`` are those files of finished shards that their records do not name (`unnamed_files`).
    """
    folder = listing.folder
    if listing.expected and not len(listing.shards):
        findings.add(
            f"{join(root, folder)} has none of its {counted(listing.expected, 'shard')}; "
            f"{remake_folder_advice(join(root, folder))}"
        )
    elif missing := listing.first_missing(5):
        findings.add(
            f"{join(root, folder)}: shards {missing} are missing or unfinished; "
            f"{remake_folder_advice(join(root, folder))}"
        )
    for name in sorted([*listing.others, *unnamed]):
        match = FILE_PATTERN.fullmatch(name)
        if match and not listing.is_missing(int(match[1])):
            findings.add(f"{join(root, folder, name)}: no done-record names it; delete it or run its stage again")
        if match is None and is_unknown(root, folder, name) and not name.endswith(".json"):
            findings.add(
                f"{join(root, folder, name)}: no stage writes it; delete it, or `clipmill check {root} --repair` moves "
                "it away"
            )
        if name.endswith(".json") and not match and f"{folder}/{name}" != SIZES:
            findings.add(f"{join(root, folder, name)}: no file of this format; delete it, readers take it for stats")


def is_unknown(root: str, folder: str, name: str) -> bool:
    """Whether a name that is no shard's is of a file that no stage writes; raw/ may be another tool's, with its own.

    JSON files count everywhere, since readers take them for stats. Hidden files and folders are nobody's shards.
    """
    if name.endswith(".json"):
        return f"{folder}/{name}" != SIZES
    return folder != RAW and not name.startswith(".") and os.path.isfile(join(root, folder, name))


def surplus_names(root: str, folder: str, present: list[str], shards: list[int]) -> set[str]:
    """The files with a shard's name that belong to none of the finished ``shards``: no record names them."""
    files, finished = DatasetFiles(root), {*shards}
    of_shards = dict[int, list[str]]()
    for name in present:
        if match := FILE_PATTERN.fullmatch(name):
            of_shards.setdefault(int(match[1]), []).append(name)
    surplus = set[str]()
    for shard, own in of_shards.items():
        surplus |= {*unnamed_files(files, folder, shard, own)} if shard in finished else {*own}
    return surplus


def unnamed_files(files: DatasetFiles, folder: str, shard: int, present: Iterable[str]) -> list[str]:
    """Those of the files with a finished shard's number that its record does not name; none where it names none.

    A killed `cache` leaves parts, and the next one takes them away.
    """
    try:
        done = files.done(folder, shard)
    except (DataError, OSError):  # `check_record` reports it
        return []
    outputs = done.outputs if done is not None else {}
    named = {path.rpartition("/")[2] for path in outputs if path.rpartition("/")[0] == folder}
    own = [(name, FILE_PATTERN.fullmatch(name)) for name in present if not STATS_PATTERN.fullmatch(name)]
    return [name for name, match in own if named and name not in named and not (match and match[3])]


def check_classes(root: str, blocks: dict[str, Any], findings: Findings) -> None:
    """Validate ``classnames.txt`` of labelled images: it is the list that the shards were labelled by."""
    for stage in ("ingest", "pack"):
        if stage in blocks:
            with findings.of(class_names_txt(root)):
                read_labelled_classes(root, stage)


def check_vocabularies(root: str, blocks: dict[str, Any], findings: Findings) -> None:
    """Validate each vocabulary: its file, the label rule of the shards, and its block of ``dataset.json``."""
    packed = blocks.get("pack", {}).get("config", {})
    for name in names(join(root, VOCAB)):
        path = join(root, VOCAB, name)
        with findings.of(path):
            vocabulary = read_vocabulary(path)
            if vocabulary.data != read_bytes(path):
                raise DataError(f"{path}: not the bytes that `clipmill vocab` writes; make it again")
            if packed:
                vocabulary.check_rule(packed, path)
            block = blocks.get(f"vocab/{name.removesuffix('.tsv')}", {})
            recorded = [block.get(key) for key in ("sha256", "synsets", "config")]
            if block and recorded != [vocabulary.sha256, len(vocabulary), vocabulary.header]:
                raise DataError(f"{path}: not the vocabulary of {dataset_json(root)}; run `clipmill vocab` again")
