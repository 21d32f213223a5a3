"""What is recorded of a dataset, read from files some of which are damaged.

Nothing here raises for damage: what cannot be trusted is left out. A record or a block counts when its hash of itself
fits; of older ones, without that hash, what can be derived again has to fit.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.check.files import DatasetFiles
from pipeline.check.records import check_record
from pipeline.check.validators import VALIDATORS, stage_keys
from shards_spec import SPEC_VERSION
from shards_spec.files import DataError, UserError, exists, join, names, read_bytes, sha256_file, sha256_json
from shards_spec.layout import RAW, STAGES, VOCAB, dataset_json, is_named_folder, stage_output, stats_path
from shards_spec.library_errors import parse_json
from shards_spec.manifest import SEAL, Done, finished_shards, head_seal, seal

HASH = re.compile(rb"[0-9a-f]{64}")
TAR = re.compile(r"(\d+)\.tar")
HEAD_TEXT = rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")'  # a text of the head of dataset.json, in bytes that do not parse
RecordedBlock = dict[str, Any]


def sound_record(root: str, key: str, shard: int) -> Done | None:
    """The done-record of a shard of a stage's ``key``; None when it is damaged, absent or another tool's."""
    try:
        return check_record(DatasetFiles(root), stage_output(key) or "", key, shard)
    except (DataError, UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def is_foreign(root: str, shard: int) -> bool:
    """Whether the stats of a raw shard are another tool's (img2dataset's), as far as they can be read."""
    path = stats_path(join(root, RAW), shard)
    try:
        stats = parse_json(path, read_bytes(path))
    except (DataError, UserError, OSError):
        return False
    return isinstance(stats, dict) and "clipmill" not in stats and isinstance(stats.get("status_dict"), dict)


@dataclass
class Recorded:
    """What ``dataset.json`` says, as far as it is sound.

    ``blocks`` are the blocks that are as they were written, ``configs`` the configs of stages (also of blocks of which
    only another field is damaged). ``is_sound``: the whole file is as it was written. ``is_there``: there is a file.
    """

    root: str
    name: str
    source: str | None = None
    blocks: dict[str, RecordedBlock] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_sound: bool = False
    is_there: bool = False

    def config(self, key: str) -> dict[str, Any] | None:
        """The config of a stage, by its sound records or else by its block; None when neither can be read."""
        folder = stage_output(key) or ""
        for shard in finished_shards(join(self.root, folder)):
            if (done := sound_record(self.root, key, shard)) is not None:
                return done.config
        return self.configs.get(key)

    def number_of_shards(self, key: str) -> int:
        """How many shards a stage has made: by its block, else by what was made of them or they were made of."""
        if key in self.blocks:
            return int(self.blocks[key].get("shards", 0))
        kind = key.partition("/")[0]
        if kind in ("cache", "cache-lists"):
            return self.number_of_shards("pack")
        if kind not in ("ingest", "pack"):
            return self.number_of_shards("ingest")
        of_same_number = ("dedup", "caption", "plan") if kind == "ingest" else ("cache",)
        folders = [stage_output(other) or "" for other in self.stages() if other.partition("/")[0] in of_same_number]
        numbers = finished_shards(join(self.root, STAGES[kind].writes))
        for folder in folders:
            numbers += finished_shards(join(self.root, folder))
        present = names(join(self.root, STAGES[kind].writes))
        numbers += [int(match[1]) for name in present if (match := TAR.fullmatch(name))]
        return max(numbers, default=-1) + 1

    def stages(self) -> list[str]:
        """The keys of all stages with shards that are there or were, in the order of the stages."""
        keys = list[str]()
        for stage in STAGES.values():
            recorded = {key for key in {*self.blocks, *self.configs} if key.partition("/")[0] == stage.name}
            there = {key for key in stage_keys(self.root, stage) if exists(join(self.root, stage_output(key) or ""))}
            keys += sorted(recorded | there) if stage.name in VALIDATORS else []
        return keys

    def forget(self, key: str) -> None:
        """Leave a stage out."""
        self.blocks.pop(key, None)
        self.configs.pop(key, None)

    def vocabularies(self) -> list[str]:
        """The names of the vocabularies that are there or were."""
        recorded = {key.removeprefix("vocab/") for key in {*self.blocks, *self.configs} if key.startswith("vocab/")}
        present = {name.removesuffix(".tsv") for name in names(join(self.root, VOCAB)) if name.endswith(".tsv")}
        return sorted(recorded | present)


def read_recorded(root: str, path: str = "") -> Recorded:
    """Read ``dataset.json``, however damaged it is; ``path`` is where it lies when not in its place."""
    recorded = Recorded(root, root.rstrip("/").rsplit("/", 1)[-1])
    path = path or dataset_json(root)
    try:
        data = read_bytes(path)
    except OSError:
        return recorded
    recorded.is_there = True
    try:
        dataset = parse_json(path, data)
    except (DataError, UserError):
        dataset = None
    if not isinstance(dataset, dict):
        _read_head_of_bytes(recorded, data)
        return recorded
    recorded.name = _text(dataset.get("name")) or recorded.name
    recorded.source = _text(dataset.get("source"))
    stages = dataset.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    for key, block in stages.items():
        if isinstance(block, dict) and stage_output(key) is not None:
            _read_block(recorded, key, block)
    is_head_sound = dataset.get("spec_version") == SPEC_VERSION and dataset.get(SEAL) in (None, head_seal(dataset))
    recorded.is_sound = is_head_sound and recorded.blocks.keys() == stages.keys()
    return recorded


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read_block(recorded: Recorded, key: str, block: RecordedBlock) -> None:
    """Take a block that is as it was written; of a damaged one its config, where the config's own hash fits."""
    config = block.get("config")
    fits = isinstance(config, dict) and block.get("config_sha256", sha256_json(config)) == sha256_json(config)
    numbers = isinstance(block.get("shards", 0), int) and isinstance(block.get("counts", {}), dict)
    if block.get(SEAL, seal(block)) == seal(block) and fits and numbers:
        recorded.blocks[key] = block
    if fits and ("config_sha256" in block or key in recorded.blocks):
        recorded.configs[key] = dict(config or {})


def _read_head_of_bytes(recorded: Recorded, data: bytes) -> None:
    """Name and source of a file that is no JSON any more, where they can still be read."""
    texts = dict[str, str | None]()
    for name in ("name", "source"):
        found = re.search(HEAD_TEXT % name.encode(), data)
        with contextlib.suppress(DataError, UserError):
            texts[name] = _text(parse_json(dataset_json(recorded.root), found[1])) if found else None
    recorded.name = texts.get("name") or recorded.name
    recorded.source = texts.get("source")


def is_gone(root: str, folder: str) -> bool:
    """Whether a folder below ROOT that a stage made under a name was deleted as a whole, which is no damage."""
    return is_named_folder(folder) and not names(join(root, folder.removesuffix("/lists")))


def hashes_in(path: str) -> set[str]:
    """All sha256 that stand in the bytes of a file, whole or damaged: no accident writes the hash of a file."""
    try:
        return {found.decode() for found in HASH.findall(read_bytes(path))}
    except OSError:
        return set()


def records_of(root: str, keys: list[str]) -> Iterator[Done]:
    """All sound done-records of these stages."""
    for key in keys:
        for shard in finished_shards(join(root, stage_output(key) or "")):
            if (done := sound_record(root, key, shard)) is not None:
                yield done


def recorded_hashes(root: str, keys: list[str]) -> dict[str, set[str]]:
    """Path below ROOT to the hashes that sound records of these stages have of it, as an output or an input."""
    hashes = dict[str, set[str]]()
    for done in records_of(root, keys):
        for path, digest in (*done.inputs.items(), *done.outputs.items()):
            hashes.setdefault(path, set()).add(digest)
    return hashes


def file_sha256(path: str) -> str | None:
    """The sha256 of a file; None when it is not there or no file."""
    try:
        return sha256_file(path)
    except OSError:
        return None
