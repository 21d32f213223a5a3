"""What a dataset says of itself: ``dataset.json`` and one done-record per shard and stage.

``NNNNN_stats.json`` beside a shard holds img2dataset's counts and, under ``"clipmill"``, the done-record: the
stage, its config, the hashes of what it read and of what it wrote. It is written last, so a shard that has one
is complete.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from shards_spec import SPEC_VERSION
from shards_spec.files import (
    DataError,
    UserError,
    join,
    names,
    read_json,
    remove,
    remove_stale,
    sha256_file,
    sha256_json,
    write_json,
)
from shards_spec.shown import hide_secrets

STATS_PATTERN = re.compile(r"(\d+)_stats\.json")
FILE_PATTERN = re.compile(r"(\d+)(\.tar|\.parquet|_stats\.json)")


def shard_name(shard: int) -> str:
    """Five digits, as img2dataset writes them; more when there are more than 100,000 shards."""
    return f"{shard:05d}"


@dataclass(frozen=True)
class Done:
    """The done-record of one shard of one stage.

    ``counts`` maps a status (``success`` or a reason) to a number of inputs; ``inputs`` and ``outputs`` map paths
    below ROOT to sha256. ``extra`` carries img2dataset's time fields where a stage has them. ``retried`` counts, by
    the reason they had before, the inputs that earlier shards count too: totals subtract it. ``facts`` counts what is
    not an input (captions, say).
    """

    stage: str
    shard: int
    config: dict[str, Any]
    counts: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        """Samples written."""
        return self.counts.get("success", 0)

    def write(self, folder: str) -> None:
        """Publish the record as ``folder/NNNNN_stats.json``: img2dataset's fields, then ours."""
        failed_resize = sum(n for reason, n in self.counts.items() if reason.startswith("resize: "))
        total = sum(self.counts.values())
        stats = {
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
                **({"facts": self.facts} if self.facts else {}),
            },
        }
        write_json(join(folder, f"{shard_name(self.shard)}_stats.json"), stats)


def read_done(folder: str, shard: int) -> Done | None:
    """The done-record of a shard; None when it is not there or another tool (img2dataset) made the stats.

    Raises DataError when the record is of another spec version or does not parse.
    """
    path = join(folder, f"{shard_name(shard)}_stats.json")
    try:
        stats = read_json(path)
    except FileNotFoundError:
        return None
    record = stats.get("clipmill") if isinstance(stats, dict) else None
    if record is None:
        return None
    if record.get("spec_version") != SPEC_VERSION:
        raise DataError(
            f"{path}: spec version {record.get('spec_version')}, this clipmill reads {SPEC_VERSION}; make it again"
        )
    return Done(
        record["stage"], record["shard"], record["config"], stats["status_dict"], record["inputs"], record["outputs"],
        retried=record.get("retried", {}), facts=record.get("facts", {}),
    )  # fmt: skip


def forget(folder: str, shard: int) -> None:
    """Take a shard's done-record away, before its files are written anew: it would vouch for others."""
    remove(join(folder, f"{shard_name(shard)}_stats.json"))


def remove_shards(folder: str, first: int) -> None:
    """Delete the shards from number ``first`` on, their done-records before what these vouch for."""
    for name in sorted(names(folder), key=lambda name: not STATS_PATTERN.fullmatch(name)):
        if (match := FILE_PATTERN.fullmatch(name)) and int(match[1]) >= first:
            remove(join(folder, name))


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
        raise DataError(
            f"{folder}: shards {missing[:5]} are missing or unfinished; run the stage that makes them again"
        )
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
    """``dataset.json``; an empty one when absent. Raises UserError for another spec version."""
    path = join(root, "dataset.json")
    try:
        dataset: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return {"spec_version": SPEC_VERSION, "name": root.rstrip("/").rsplit("/", 1)[-1], "source": None, "stages": {}}
    if dataset.get("spec_version") != SPEC_VERSION:
        raise UserError(f"{path}: spec version {dataset.get('spec_version')}, this clipmill reads {SPEC_VERSION}")
    return dataset


def write_stage(root: str, stage: str, block: dict[str, Any], source: str | None = None) -> None:
    """Put one finished stage's block (config, config hash, totals, versions) into ``dataset.json``."""
    remove_stale(root)
    dataset = read_dataset(root)
    dataset["source"] = hide_secrets(source) if source else dataset["source"]
    dataset["stages"] = dict(sorted({**dataset["stages"], stage: block}.items()))
    write_json(join(root, "dataset.json"), dataset)


def remove_stage(root: str, stage: str) -> None:
    """Take a stage's block out of ``dataset.json``; nothing is written when there is none."""
    dataset = read_dataset(root)
    if dataset["stages"].pop(stage, None) is not None:
        write_json(join(root, "dataset.json"), dataset)


def shard_sizes(root: str) -> list[int]:
    """Samples per final shard, in shard order, from ``shards/sizes.json`` (open_clip's file).

    Raises UserError when `pack` has not finished.
    """
    path = join(root, "shards", "sizes.json")
    try:
        sizes: dict[str, int] = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: run `clipmill pack {root}` to its end first") from error
    return [sizes[name] for name in sorted(sizes, key=lambda name: int(name.split(".")[0]))]
