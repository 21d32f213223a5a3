"""What a dataset says of itself: ``dataset.json`` and one done-record per shard and stage.

``NNNNN_stats.json`` beside a shard holds img2dataset's counts and, under ``"clipmill"``, the done-record: the
stage, its config, the hashes of what it read and of what it wrote. It is written last, so a shard that has one
is complete. Records, and the blocks of ``dataset.json``, have a hash of themselves (`SEAL`), which shows damage to
fields that cannot be derived again; older ones have none and are valid.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from shards_spec import SPEC_VERSION
from shards_spec.display import hide_secrets
from shards_spec.files import (
    DataError,
    UserError,
    exists,
    join,
    names,
    read_json,
    remove,
    remove_files,
    remove_stale,
    remove_tree,
    sha256_file,
    sha256_json,
    write_json,
)
from shards_spec.layout import (
    FILE_PATTERN,
    JOURNAL,
    RAW,
    STAGING,
    STATS_PATTERN,
    dataset_json,
    remake_advice,
    remake_folder_advice,
    shard_name,
    sizes_json,
    stats_path,
)

SEAL = "self_sha256"  # of a JSON object: the hash of all its other fields
REWRITE = "delete the file and run the stages again, each writes its part from what is there"
BLOCK_TYPES = {"config": dict, "counts": dict, "facts": dict, "shards": int}  # of fields of a stage's block
TIMES = ("start_time", "end_time", "duration")  # img2dataset's: the third is the difference of the others


def seal(value: dict[str, Any]) -> str:
    """What the object's `SEAL` has to be."""
    return sha256_json({name: own for name, own in value.items() if name != SEAL})


def stats_seal(stats: dict[str, Any]) -> str:
    """What the `SEAL` of a done-record has to be: the hash of all of the stats but itself and the times.

    No other run repeats the times.
    """
    record = {name: own for name, own in stats["clipmill"].items() if name != SEAL}
    return sha256_json({name: own for name, own in {**stats, "clipmill": record}.items() if name not in TIMES})


@dataclass(frozen=True)
class Done:
    """The done-record of one shard of one stage.

    ``counts`` maps a status (``success`` or a reason) to a number of inputs; ``inputs`` and ``outputs`` map paths
    below ROOT to sha256. ``extra`` carries img2dataset's time fields where a stage has them. ``retried`` counts, by
    the reason they had before, the inputs that earlier shards count too: totals subtract it. ``counters`` count what is
    not an input (captions, say); on disk they are ``facts``.
    """

    stage: str
    shard: int
    config: dict[str, Any]
    counts: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        """Samples written."""
        return self.counts.get("success", 0)

    @property
    def raw_shards(self) -> list[int]:
        """The raw shards whose tars are among the inputs, ascending."""
        tars = [path.removeprefix(f"{RAW}/").removesuffix(".tar") for path in self.inputs if path.startswith(f"{RAW}/")]
        return sorted(int(stem) for stem in tars if stem.isdigit())

    def write(self, folder: str) -> None:
        """Publish the record as ``folder/NNNNN_stats.json``: img2dataset's fields, then ours."""
        failed_resize = sum(n for reason, n in self.counts.items() if reason.startswith("resize: "))
        total = sum(self.counts.values())
        stats: dict[str, Any] = {
            "count": total,
            "successes": self.successes,
            "failed_to_download": total - self.successes - failed_resize,
            "failed_to_resize": failed_resize,
            **self.extra,
            "status_dict": dict(sorted(self.counts.items())),
            "clipmill": {
                "spec_version": SPEC_VERSION,
                "stage": self.stage,
                "shard": self.shard,
                "config": self.config,
                "config_sha256": sha256_json(self.config),
                "inputs": self.inputs,
                "outputs": self.outputs,
                **({"retried": self.retried} if self.retried else {}),
                **({"facts": self.counters} if self.counters else {}),
            },
        }
        stats["clipmill"] |= {SEAL: stats_seal(stats)}
        write_json(stats_path(folder, self.shard), stats)


def read_done(folder: str, shard: int) -> Done | None:
    """The done-record of a shard; None when it is not there or another tool (img2dataset) made the stats.

    Raises DataError when the record is of another spec version or does not parse.
    """
    path = stats_path(folder, shard)
    try:
        stats = read_json(path)
    except FileNotFoundError:
        return None
    return done_of(path, stats)


def read_intact(root: str, folder: str, shard: int) -> Done | None:
    """The done-record of a shard in ``root/folder`` if it, and the files that it names, are as they were written.

    Reads these files. None for anything else: no record, a damaged one, that of another shard, other bytes.
    """
    path = stats_path(join(root, folder), shard)
    try:
        stats = read_json(path)
        done = done_of(path, stats)
        if done is None or done.shard != shard or stats["clipmill"].get(SEAL) != stats_seal(stats):
            return None
        is_same = all(sha256_file(join(root, name)) == digest for name, digest in done.outputs.items())
    except (OSError, DataError):
        return None
    return done if done.outputs and is_same else None


def done_of(path: str, stats: Any) -> Done | None:
    """The done-record in the JSON of the stats file ``path``, as `read_done` gives it."""
    if not isinstance(stats, dict):
        raise DataError(f"{path}: no object of stats in it; {remake_advice(path)}")
    record = stats.get("clipmill")
    if record is None:
        return None
    version = record.get("spec_version") if isinstance(record, dict) else None
    if version != SPEC_VERSION:
        raise DataError(f"{path}: spec version {version}, this clipmill reads {SPEC_VERSION}; {remake_advice(path)}")
    try:
        done = Done(
            record["stage"],
            record["shard"],
            record["config"],
            stats["status_dict"],
            record["inputs"],
            record["outputs"],
            retried=record.get("retried", {}),
            counters=record.get("facts", {}),
        )
    except KeyError as error:
        raise DataError(f"{path}: its done-record has no {error}; {remake_advice(path)}") from error
    if not _is_sound(done):
        raise DataError(f"{path}: its done-record is damaged; {remake_advice(path)}")
    return done


def _is_sound(done: Done) -> bool:
    """Whether the tables of a record are tables, and its numbers numbers."""
    counted: list[Any] = [done.counts, done.retried, done.counters]
    tables: list[Any] = [done.config, done.inputs, done.outputs, *counted]
    if not all(isinstance(table, dict) for table in tables):
        return False
    return all(type(number) is int for number in chain.from_iterable(table.values() for table in counted))


def forget(folder: str, shard: int) -> None:
    """Delete a shard's done-record before its files are written again: a stale one would validate the wrong files."""
    remove(stats_path(folder, shard))


def remove_shards(folder: str, first: int) -> None:
    """Delete the shards from number ``first`` on, their done-records before the files that these name."""
    for name in sorted(names(folder), key=lambda name: not STATS_PATTERN.fullmatch(name)):
        if (match := FILE_PATTERN.fullmatch(name)) and int(match[1]) >= first:
            remove(join(folder, name))


def remove_parts(folder: str) -> None:
    """Delete a folder of parts (`StageInfo.parts`): no record of a part that is gone is left by a kill."""
    remove_files([join(folder, name) for name in names(folder) if STATS_PATTERN.fullmatch(name)])
    remove_tree(folder)


def finished_shards(folder: str) -> list[int]:
    """Ids of the shards of a folder that are complete (their stats exist), ascending; there may be gaps."""
    return sorted(int(match[1]) for name in names(folder) if (match := STATS_PATTERN.fullmatch(name)))


def shard_ids(folder: str) -> list[int]:
    """As `finished_shards`.

    Raises DataError when the numbers have gaps: brace lists such as ``{00000..00331}.tar`` assume none.
    """
    found = finished_shards(folder)
    if found != list(range(len(found))):
        missing = sorted(set(range(found[-1] + 1)) - set(found))
        raise DataError(f"{folder}: shards {missing[:5]} are missing or unfinished; {remake_folder_advice(folder)}")
    return found


def file_hash(root: str, folder: str, shard: int, path: str) -> str:
    """sha256 of ``root/path``: from the done-record of ``root/folder``, else (foreign shards) of the bytes."""
    return file_hashes(root, folder, shard, [path])[0]


def file_hashes(root: str, folder: str, shard: int, paths: list[str]) -> list[str]:
    """`file_hash` of several files of a shard, its done-record read once."""
    done = read_done(join(root, folder), shard)
    outputs = done.outputs if done else {}
    return [outputs[path] if path in outputs else sha256_file(join(root, path)) for path in paths]


def read_dataset(root: str) -> dict[str, Any]:
    """``dataset.json``; an empty one when absent.

    Raises UserError for another spec version, DataError for a damaged file.
    """
    path = dataset_json(root)
    try:
        dataset = read_json(path, REWRITE)
    except FileNotFoundError:
        return {"spec_version": SPEC_VERSION, "name": root.rstrip("/").rsplit("/", 1)[-1], "source": None, "stages": {}}
    version, stages = (dataset.get(name) if isinstance(dataset, dict) else None for name in ("spec_version", "stages"))
    if type(version) is int and version != SPEC_VERSION:
        raise UserError(
            f"{path}: spec version {version}, this clipmill reads {SPEC_VERSION}; use the one that wrote it"
        )
    if version != SPEC_VERSION or not isinstance(stages, dict):
        raise DataError(f"{path}: no spec_version and stages in it; {REWRITE}")
    if damaged := [stage for stage, block in stages.items() if not _is_block(block)]:
        raise DataError(f"{path}: the block of {damaged[0]} is damaged; {REWRITE}")
    for name in ("name", "source"):
        dataset.setdefault(name, None)
    found: dict[str, Any] = dataset
    return found


def _is_block(block: Any) -> bool:
    """Whether it is a stage's block, as far as its fields are of the right types and counts are numbers."""
    if not isinstance(block, dict):
        return False
    if not all(isinstance(block.get(name, kind()), kind) for name, kind in BLOCK_TYPES.items()):
        return False
    return all(type(number) is int for number in block.get("counts", {}).values())


def write_stage(root: str, stage: str, block: dict[str, Any], source: str | None = None) -> None:
    """Put one finished stage's block (config, config hash, totals, versions) into ``dataset.json``."""
    remove_stale(root)
    dataset = read_dataset(root)
    sound = dataset.get(SEAL) in (None, head_seal(dataset))
    dataset["source"] = hide_secrets(source) if source else dataset["source"]
    dataset["stages"] = dict(sorted({**dataset["stages"], stage: {**block, SEAL: seal(block)}}.items()))
    if sound:  # else the damage stays visible
        dataset[SEAL] = head_seal(dataset)
    write_json(dataset_json(root), dataset)


def head_seal(dataset: dict[str, Any]) -> str:
    """What the `SEAL` of ``dataset.json`` has to be: of all but its stages, which have their own."""
    return seal({name: own for name, own in dataset.items() if name != "stages"})


def remove_stage(root: str, stage: str) -> None:
    """Take a stage's block out of ``dataset.json``; nothing is written when there is none."""
    dataset = read_dataset(root)
    if dataset["stages"].pop(stage, None) is not None:
        write_json(dataset_json(root), dataset)


def check_no_takedown(root: str) -> None:
    """Raise UserError where a takedown was interrupted while it put its files in place."""
    if exists(join(root, JOURNAL)):
        raise UserError(
            f"{join(root, STAGING)}: a takedown was interrupted; run `clipmill takedown {root} --list FILE` again"
        )


def shard_sizes(root: str) -> list[int]:
    """Samples per final shard, in shard order, from ``shards/sizes.json`` (open_clip's file).

    Raises UserError when `pack` or a takedown has not finished, DataError for a damaged file.
    """
    check_no_takedown(root)
    path = sizes_json(root)
    fix = f"delete it and run `clipmill pack {root}` again"
    try:
        sizes = read_json(path, fix)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: run `clipmill pack {root}` to its end first") from error
    expected = [f"{shard_name(shard)}.tar" for shard in range(len(sizes))] if isinstance(sizes, dict) else []
    if not expected or sizes.keys() != {*expected} or not all(map(is_count, sizes.values())):
        raise DataError(f"{path}: not a number of samples for each of 00000.tar, 00001.tar ...; {fix}")
    return [sizes[name] for name in expected]


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file can be the number of a shard's samples."""
    return type(value) is int and 0 <= value < 1 << 31
