"""All files of a dataset before a repair: hashes, times, which are damaged, which lie in another's place."""

import os
from dataclasses import dataclass, field
from typing import Any

from pipeline.check.files import DatasetFiles
from pipeline.check.records import check_record, is_unknown, surplus_names
from pipeline.repair.folder import Folder, move
from pipeline.repair.recorded import Recorded, file_sha256, is_foreign, sound_record
from shards_spec.files import DataError, UserError, exists, is_url, join, names, read_bytes
from shards_spec.layout import (
    CLASS_NAMES,
    DATASET,
    FILE_PATTERN,
    REPAIRED,
    SIZES,
    STATS_PATTERN,
    VOCAB,
    dataset_json,
    shard_name,
    stage_output,
    stats_path,
)
from shards_spec.library_errors import parse_json, short
from shards_spec.manifest import SEAL, head_seal, stats_seal

LARGEST_RECORD = 1 << 22  # bytes of a file that may be a record
SWAP = "swap"  # below the hidden folder: files on the way to their places


@dataclass
class Inventory:
    """The files of a dataset, by their paths below ROOT.

    ``hashes`` and ``times`` (mtime in ns, of local files) are those of files before the repair. ``damage`` maps a stage
    and a shard to what is wrong with its own files, ``wanted`` a file that is not as it was written to its hash,
    ``strays`` are files that are not what their names say, ``assumed_whole`` stages and shards to pass over.
    """

    root: str
    hashes: dict[str, str | None] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    damage: dict[str, dict[int, str]] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    assumed_whole: set[tuple[str, int]] = field(default_factory=set)
    hidden: list[str] = field(default_factory=list)

    def add(self, path: str) -> str | None:
        """Note a file; returns its hash, None when it is not there or no file."""
        full = join(self.root, path)
        self.hashes[path] = file_sha256(full)
        if not is_url(full) and os.path.exists(full):
            self.times[path] = os.stat(full).st_mtime_ns
        return self.hashes[path]

    def keep_times(self) -> None:
        """Give files that were written again with the same bytes the time that they had."""
        for path, before in self.times.items():
            full = join(self.root, path)
            if os.path.isfile(full) and os.stat(full).st_mtime_ns != before and self.hashes[path] == file_sha256(full):
                os.utime(full, ns=(os.stat(full).st_atime_ns, before))

    def take_as_whole(self, places: dict[str, str]) -> None:
        """For a dry run: files that would be put back in their ``places``, or make place, are not damaged.

        What else is damaged in their shards is in ``hidden``.
        """
        paths = {*places, *places.values()}
        self.strays -= paths
        for key in self.damage:
            folder = stage_output(key) or ""
            for path in paths:
                match = FILE_PATTERN.fullmatch(path.removeprefix(f"{folder}/"))
                if match is not None and path.startswith(folder):
                    self.assumed_whole.add((key, int(match[1])))
        passed_over = {f"{stage_output(key)}/{shard_name(shard)}" for key, shard in self.assumed_whole}
        for path in sorted(self.wanted.keys() - paths):
            if path.partition(".")[0] in passed_over:
                self.hidden.append(f"{path} is not the file that was written")

    def forget_shard_of(self, path: str) -> None:
        """A record of no shard was moved away: no shard of its number is to be made."""
        for key in self.damage:
            match = STATS_PATTERN.fullmatch(path.removeprefix(f"{stage_output(key)}/"))
            if match is not None:
                self.assumed_whole.add((key, int(match[1])))

    def damaged(self, key: str) -> dict[int, str]:
        """Shards of a stage to what is wrong with their files."""
        damage = self.damage.get(key, {})
        return {shard: problem for shard, problem in damage.items() if (key, shard) not in self.assumed_whole}


def take_inventory(recorded: Recorded) -> Inventory:
    """Read all files. Memory: a hash per file."""
    inventory = Inventory(recorded.root)
    inventory.add(DATASET)
    if not recorded.is_sound and exists(dataset_json(recorded.root)):
        inventory.strays.add(DATASET)
    for key in recorded.stages():
        _add_stage(inventory, recorded, key)
    for name in names(join(recorded.root, VOCAB)):
        inventory.add(f"{VOCAB}/{name}")
    for path in (SIZES, CLASS_NAMES):
        inventory.add(path)
    for name in names(join(recorded.root, REPAIRED, SWAP)):  # of a run that was killed over them
        inventory.add(f"{REPAIRED}/{SWAP}/{name}")
        inventory.strays.add(f"{REPAIRED}/{SWAP}/{name}")
    return inventory


def _add_stage(inventory: Inventory, recorded: Recorded, key: str) -> None:
    root, folder = recorded.root, stage_output(key) or ""
    present = names(join(root, folder))
    shards = sorted(int(match[1]) for name in present if (match := STATS_PATTERN.fullmatch(name)))
    for shard in shards:
        _add_shard(inventory, key, shard)
    missing = set(range(recorded.number_of_shards(key))) - set(shards)
    for shard in missing:
        inventory.damage.setdefault(key, {})[shard] = f"{stats_path(folder, shard)} is not there"
    for name in present:
        path = f"{folder}/{name}"
        if path not in inventory.hashes and FILE_PATTERN.fullmatch(name):
            inventory.add(path)
    inventory.strays |= {f"{folder}/{name}" for name in surplus_names(root, folder, present, shards)}


def _add_shard(inventory: Inventory, key: str, shard: int) -> None:
    """One shard that has a record."""
    root, folder = inventory.root, stage_output(key) or ""
    stats = stats_path(folder, shard)
    inventory.add(stats)
    problem = ""
    try:
        done = check_record(DatasetFiles(root), folder, key, shard)
    except (DataError, UserError) as error:
        problem, done = str(error).removeprefix(f"{root}/").partition("; ")[0], None
        inventory.strays.add(stats)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem, done = f"{stats}: damaged ({short(error)})", None
        inventory.strays.add(stats)
    if done is None and not problem and not (key == "ingest" and is_foreign(root, shard)):
        problem = f"{stats} has no done-record in it"
        inventory.strays.add(stats)
    for path, expected in (done.outputs if done else {}).items():
        found = inventory.add(path)
        if found != expected:
            inventory.wanted[path] = expected
            problem = problem or f"{path} {'is not there' if found is None else 'is not the file that was written'}"
            if found is not None:
                inventory.strays.add(path)
    if problem:
        inventory.damage.setdefault(key, {})[shard] = problem


def misplaced(inventory: Inventory) -> dict[str, str]:
    """Strays to the places where they belong: by the hash that a record has, or by what a record says of itself."""
    places = dict[str, str]()
    missing = {digest: path for path, digest in inventory.wanted.items()}
    for path in sorted(inventory.strays):
        digest = inventory.hashes.get(path)
        place = missing.get(digest or "") or _place_of_record(inventory.root, path)
        if place is not None and place != path and place not in places.values() and _is_free(inventory, place):
            places[path] = place
    return places


def _is_free(inventory: Inventory, place: str) -> bool:
    """Whether no whole file is in a place."""
    return place in inventory.strays or not exists(join(inventory.root, place))


def _place_of_record(root: str, path: str) -> str | None:
    """Where a sound record, or a sound ``dataset.json``, belongs; None for any other file."""
    full = join(root, path)
    try:
        if os.path.isfile(full) and os.path.getsize(full) > LARGEST_RECORD:
            return None
        value: Any = parse_json(full, read_bytes(full))
        if "stages" in value and value.get(SEAL) == head_seal(value):
            return DATASET
        record = value["clipmill"]
        folder = stage_output(record["stage"])
        if folder is not None and record[SEAL] == stats_seal(value):
            return stats_path(folder, record["shard"])
    except (DataError, UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return None


def put_back(root: str, places: dict[str, str], folder: Folder) -> None:
    """Move files to their places; those that lie there, when they are not of these, are moved away."""
    waiting = dict[str, str]()
    for number, path in enumerate(places):
        waiting[path] = f"{REPAIRED}/{SWAP}/{number}"
        move(join(root, path), join(root, waiting[path]))
    for path, place in places.items():
        if exists(join(root, place)):
            folder.move_away(place)
        move(join(root, waiting[path]), join(root, place))


def surplus(recorded: Recorded) -> list[str]:
    """Files with a shard's name that belong to no shard, and files that no stage writes."""
    found = list[str]()
    for key in recorded.stages():
        folder = stage_output(key) or ""
        total = recorded.number_of_shards(key)
        present = names(join(recorded.root, folder))
        shards = sorted(int(match[1]) for name in present if (match := STATS_PATTERN.fullmatch(name)))
        unnamed = surplus_names(recorded.root, folder, present, shards)
        missing = set(range(total)) - set(shards)
        for name in present:
            match = FILE_PATTERN.fullmatch(name)
            path = f"{folder}/{name}"
            if match is None:
                found += [path] if is_unknown(recorded.root, folder, name) else []
            elif STATS_PATTERN.fullmatch(name):
                is_sound = sound_record(recorded.root, key, int(match[1])) is not None
                found += [path] if int(match[1]) >= total and key in recorded.blocks and not is_sound else []
            elif name in unnamed and int(match[1]) not in missing:
                found.append(path)
    return found
