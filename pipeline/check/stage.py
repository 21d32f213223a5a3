"""`clipmill check`: validates a dataset shard by shard and names the first broken key of every broken file."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.check.config import CheckConfig
from pipeline.check.records import (
    Findings,
    Totals,
    check_classes,
    check_dataset,
    check_names,
    check_record,
    check_totals,
    check_vocabularies,
)
from pipeline.check.validators import ShardFolder, check_widths, read_rows, shard_folders
from pipeline.core.taken_down import TAKEN_DOWN_SAMPLES, check_takedown_hashes, read_takedown_hashes
from pipeline.dedup.drop_list import check_fresh
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, exists, join, read_json, sha256_file
from shards_spec.layout import (
    DEDUP,
    RAW,
    SHARDS,
    TAKEDOWN,
    dataset_json,
    dedup_parquet,
    remake_advice,
    resume_advice,
    shard_name,
    sizes_json,
    stage_output,
    stats_path,
    tar_path,
)
from shards_spec.library_errors import short
from shards_spec.manifest import Done, check_no_takedown, finished_shards, read_done, shard_ids
from shards_spec.messages import counted

NO_KEYS = np.empty(0, np.uint64)


def check(config: CheckConfig) -> list[str]:
    """Problems found, each naming file and key; empty for a valid dataset. Memory: one shard, 8 bytes a key."""
    root, findings = config.root, Findings()
    with findings.of(join(root, TAKEDOWN)):
        check_no_takedown(root)
        check_takedown_hashes(root)
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        return [f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset"]
    keys_of = dict[str, list[np.ndarray]]()  # of raw/ and dedup/
    blocks = check_dataset(root, findings)
    for shard_folder in shard_folders(root):
        keys, complete = _check_folder(root, shard_folder, blocks, findings)
        if complete and shard_folder.folder in (RAW, DEDUP):
            keys_of[shard_folder.folder] = keys
    if len(keys_of) == 2:
        with findings.of(join(root, DEDUP)):
            _check_kept(root, keys_of[RAW], keys_of[DEDUP], findings)
    with findings.of(sizes_json(root)):
        _check_sizes(root, blocks or {}, findings)
    check_classes(root, blocks or {}, findings)
    check_vocabularies(root, blocks or {}, findings)
    return findings.problems


def _check_folder(
    root: str, shard_folder: ShardFolder, blocks: dict[str, Any] | None, findings: Findings
) -> tuple[list[np.ndarray], bool]:
    """Each valid shard's keys as content ids, and whether all shards are valid."""
    folder, stage, _ = shard_folder
    shards = check_names(root, folder, findings)
    keys, totals = list[np.ndarray](), Totals()
    outdated = outdated_shards(root, stage, shards, blocks or {})
    if outdated:
        findings.add(_describe_outdated(root, stage, len(outdated), len(shards)))
    for shard in shards:
        own = shard_folder._replace(validate=_validate_none) if shard in outdated else shard_folder
        shard_keys = _check_shard(root, own, shard, totals, findings)
        if shard_keys is not None:
            keys.append(shard_keys)
    if stage.startswith("cache/"):
        with findings.of(join(root, folder)):
            check_widths(root, folder, shards)
    check_totals(root, folder, stage, blocks=blocks, totals=totals, shards=len(shards), findings=findings)
    _check_unique(folder, keys, findings)
    return keys, len(keys) == len(shards)


def outdated_shards(root: str, stage: str, shards: list[int], blocks: dict[str, Any]) -> set[int]:
    """Of a cache or selection that `pack` made other final shards after: all that no final shard there is made for.

    A single one that has its final shard, with another content, is none: its validator says what differs.
    """
    kind, _, name = stage.partition("/")
    packed = blocks.get("pack", {})
    is_applied = kind == "select" and packed.get("config", {}).get("select") == name  # it is of shards before `pack`
    if kind not in ("cache", "select") or is_applied or not isinstance(packed.get("shards"), int):
        return set()
    surplus = {shard for shard in shards if shard >= packed["shards"]}
    changed = {shard for shard in shards if shard not in surplus and _is_outdated(root, stage, shard)}
    return surplus | changed if surplus or len(changed) > 1 else set()


def _is_outdated(root: str, stage: str, shard: int) -> bool:
    """Whether the records of a shard and of its final shard name different tars; False where one cannot be read."""
    tar = tar_path(SHARDS, shard)
    with contextlib.suppress(Exception):  # damaged records raise anything; `check_record` reports them
        done, final = read_done(join(root, stage_output(stage) or ""), shard), read_done(join(root, SHARDS), shard)
        if done is None or final is None or done.shard != shard:  # one of another shard lies in its place
            return False
        return done.inputs.get(tar) != final.outputs.get(tar)
    return False


def _describe_outdated(root: str, stage: str, outdated: int, shards: int) -> str:
    """One line for all shards of a folder that are of other final shards, with what to do."""
    folder = join(root, stage_output(stage) or "")
    what = f"{folder}: made from other shards than those in {join(root, SHARDS)} ({outdated} of {shards})"
    if stage.startswith("cache/"):
        return f"{what}; {resume_advice(folder)}, it copies the vectors of samples that stay in their shard"
    name = stage.partition("/")[2]
    return (
        f"{what}: it is of the shards before `clipmill pack`; delete the folder, or run "
        f"`clipmill select {root} --name {name} --overwrite` with its rules again"
    )


def _validate_none(root: str, folder: str, shard: int) -> Iterator[str]:
    """In place of the validator of a shard whose contents are not compared with anything."""
    return iter(())


def _check_shard(
    root: str, shard_folder: ShardFolder, shard: int, totals: Totals, findings: Findings
) -> np.ndarray | None:
    """Validate one shard and add its record to ``totals``; its keys as content ids, None when its files are broken."""
    folder, stage, validate = shard_folder
    done: Done | None = None
    with findings.of(stats_path(join(root, folder), shard)):
        done = check_record(root, folder, stage, shard)
        totals.add(shard, done)
    with findings.of(join(root, folder, shard_name(shard))):
        _check_hashes(root, shard_folder, shard, done)
        return content_ids(validate(root, folder, shard))
    return None


def shard_problems(root: str, shard_folder: ShardFolder, shard: int) -> list[str]:
    """What is wrong with one finished shard: its record, its files, or how they fit what they were made from."""
    findings = Findings()
    _check_shard(root, shard_folder, shard, Totals(), findings)
    return findings.problems


def shard_damage(root: str, shard_folder: ShardFolder, shard: int) -> list[str]:
    """As `shard_problems`, of the shard's own files alone: a record that is no more as written, files that differ."""
    folder, stage, _ = shard_folder
    findings = Findings()
    with findings.of(stats_path(join(root, folder), shard)):
        _check_hashes(root, shard_folder, shard, check_record(root, folder, stage, shard))
    return findings.problems


def _check_hashes(root: str, shard_folder: ShardFolder, shard: int, done: Done | None) -> None:
    """Raise DataError for a file that is not the one in the done-record."""
    for path, expected in (done.outputs if done else {}).items():
        if not exists(join(root, path)):
            raise DataError(f"{join(root, path)}: is not there; {remake_advice(join(root, path))}")
        if sha256_file(join(root, path)) != expected:
            raise DataError(_describe_change(root, shard_folder, shard, path))


def _describe_change(root: str, shard_folder: ShardFolder, shard: int, path: str) -> str:
    """The message for a file that is not what was written; it says where the file breaks first."""
    where = "its content changed"
    try:
        for _ in shard_folder.validate(root, shard_folder.folder, shard):
            pass
    except DataError as error:
        where = str(error).removeprefix(join(root, path)).lstrip(": ").partition("; ")[0]  # the advice follows
    except Exception as error:  # over damaged bytes readers raise anything
        where = f"it cannot be read any more ({short(error)})"
    return f"{join(root, path)}: not the file that was written: {where}; {remake_advice(join(root, path))}"


def _check_kept(root: str, raw: list[np.ndarray], dropped: list[np.ndarray], findings: Findings) -> None:
    """The lists belong to raw/ as it is; the sample kept for a duplicate is in raw/ and is no duplicate itself."""
    check_fresh(root, shard_ids(join(root, RAW)))
    takedowns = bool(read_takedown_hashes(root).hashes)
    raw_keys, dropped_keys = (np.sort(np.concatenate([NO_KEYS, *keys])) for keys in (raw, dropped))
    for shard in range(len(dropped)):
        path = dedup_parquet(root, shard)
        rows = read_rows(path, ["key", "kept"])
        kept = content_ids(row["kept"] for row in rows)
        wrong = ~_is_among(kept, raw_keys) | _is_among(kept, dropped_keys)
        if takedowns:  # what stayed in a duplicate's place may be gone since
            wrong &= np.array([bool(row["kept"]) for row in rows], bool)
        if wrong.any():
            row = rows[int(wrong.argmax())]
            findings.add(
                f"{path}: key {row['key']} goes for key {row['kept']}, which is not in raw/ or goes itself; "
                "run `clipmill dedup --overwrite`"
            )


def _is_among(numbers: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each number is one of the ascending ones: bool [numbers]."""
    return np.searchsorted(ascending, numbers, "left") < np.searchsorted(ascending, numbers, "right")


def _check_unique(folder: str, keys: list[np.ndarray], findings: Findings) -> None:
    hashes = np.concatenate([NO_KEYS, *keys])
    repeated = len(hashes) - len(np.unique(hashes))
    if repeated:
        verb = "is" if repeated == 1 else "are"
        findings.add(
            f"{folder}: {counted(repeated, 'key')} {verb} there more than once; keys must be unique in a dataset"
        )


def _check_sizes(root: str, blocks: dict[str, Any], findings: Findings) -> None:
    """``shards/sizes.json`` against the final shards. Raises DataError when it is not there or no table of sizes."""
    path = sizes_json(root)
    if not exists(join(root, SHARDS)):
        return
    if not exists(path):
        raise DataError(f"{path}: is not there; `clipmill pack` has not finished")
    sizes, shards = read_json(path), finished_shards(join(root, SHARDS))
    if not isinstance(sizes, dict):
        raise DataError(f"{path}: no object of sizes; delete it and run `clipmill pack` again")
    tars = {shard: tar_path(SHARDS, shard).removeprefix(f"{SHARDS}/") for shard in shards}
    for shard, tar in tars.items():
        done: Done | None = None
        with contextlib.suppress(DataError):  # `check_record` has reported it
            done = read_done(join(root, SHARDS), shard)
        if done is not None:
            _check_size(path, tar, done, listed=sizes.get(tar), is_last=shard == shards[-1], findings=findings)
    if unknown := sorted(set(sizes) - set(tars.values())):
        findings.add(f"{path}: {unknown[0]} is not there; delete the file and run `clipmill pack` again")
    planned, packed = (blocks.get(name, {}).get("counts") for name in ("plan", "pack"))
    if planned is not None and planned != packed:
        findings.add(f"{dataset_json(root)}: plan says {planned}, pack {packed}; run `clipmill pack` again")


def _check_size(path: str, tar: str, done: Done, *, listed: Any, is_last: bool, findings: Findings) -> None:
    """One final shard: what ``sizes.json`` lists, and the size that `pack --shard-size` asked for."""
    samples = done.successes
    places = samples + done.counters.get(TAKEN_DOWN_SAMPLES, 0)
    if listed != samples:
        findings.add(f"{path}: {tar} has {counted(samples, 'sample')}, the file says {listed}")
    wanted = done.config.get("shard_size")
    if not wanted or places == wanted or (is_last and places <= wanted):
        return
    findings.add(f"{path}: {tar} has {counted(samples, 'sample')}, not {wanted}; run `clipmill pack` again")
