"""`check`: proves the format's promises, shard by shard, and names the first broken key of every file."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from pipeline.cache.incremental import ShardIndex, plan_column_update
from pipeline.check.records import (
    Findings,
    Totals,
    check_dataset,
    check_names,
    check_record,
    check_totals,
    check_vocabularies,
)
from pipeline.core.near_duplicates import EXACT_DUPLICATE, NEAR_DUPLICATE
from pipeline.core.runner import Root
from pipeline.dedup.drop_list import check_fresh
from shards_spec.content_id import content_ids
from shards_spec.files import DataError, exists, join, names, read_json, sha256_file
from shards_spec.layout import (
    CAPTIONS,
    DEDUP,
    PLAN,
    RAW,
    SHARDS,
    TEACHER,
    captions_folder,
    dataset_json,
    dedup_parquet,
    parquet_path,
    raw_tar,
    shard_name,
    sizes_json,
    stats_path,
    tar_path,
    teacher_folder,
)
from shards_spec.library_errors import short
from shards_spec.manifest import Done, finished_shards, read_done, shard_ids
from shards_spec.parquet import open_parquet
from shards_spec.sample import Sample, check_key
from shards_spec.tar import read_shard, shard_keys
from shards_spec.teacher_shard import CachedShard

NO_KEYS = np.empty(0, np.uint64)


@dataclass(frozen=True)
class CheckConfig:
    """Prove what SPEC.md promises of a dataset; exit 1 and name the first broken key of each file otherwise."""

    root: Root
    """the dataset: a folder or an fsspec URL"""


def check(config: CheckConfig) -> list[str]:
    """Problems found, each naming file and key; empty when all promises hold. Memory: one shard, 8 bytes a key."""
    root, found = config.root, Findings()
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        return [f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset"]
    keys_of = dict[str, list[np.ndarray]]()  # of raw/ and dedup/
    blocks = check_dataset(root, found)
    for folder, stage, prove in _folders(root):
        keys, totals, shards = list[np.ndarray](), Totals(), check_names(root, folder, found)
        for shard in shards:
            name, done = join(root, folder, shard_name(shard)), None
            with found.of(stats_path(join(root, folder), shard)):
                done = check_record(root, folder, stage, shard)
                totals.add(shard, done)
            with found.of(name):
                _check_hashes(root, folder, shard, done)
                keys.append(content_ids(prove(root, folder, shard)))
        check_totals(root, folder, stage, blocks, totals, len(shards), found)
        _check_unique(folder, keys, found)
        if folder in (RAW, DEDUP) and len(keys) == len(shards):
            keys_of[folder] = keys
    if len(keys_of) == 2:
        with found.of(join(root, DEDUP)):
            _check_kept(root, keys_of[RAW], keys_of[DEDUP], found)
    with found.of(sizes_json(root)):
        _check_sizes(root, blocks or {}, found)
    check_vocabularies(root, blocks or {}, found)
    return found.problems


Prove = Callable[[str, str, int], Iterator[str]]


def _folders(root: str) -> Iterator[tuple[str, str, Prove]]:
    for folder, stage, prove in (
        (RAW, "ingest", _prove_raw),
        (DEDUP, "dedup", _prove_dedup),
        (PLAN, "plan", _prove_plan),
        (SHARDS, "pack", _prove_final),
    ):
        if exists(join(root, folder)):
            yield folder, stage, prove
    for name in names(join(root, CAPTIONS)):
        yield captions_folder(name), f"caption/{name}", _prove_captions
    for name in names(join(root, TEACHER)):
        yield teacher_folder(name), f"cache/{name}", _prove_cache


def _check_hashes(root: str, folder: str, shard: int, done: Done | None) -> None:
    for path, expected in (done.outputs if done else {}).items():
        if not exists(join(root, path)):
            raise DataError(f"{join(root, path)}: is not there; delete its _stats.json and run the stage again")
        if sha256_file(join(root, path)) != expected:
            raise DataError(_changed(root, folder, shard, path))


def _changed(root: str, folder: str, shard: int, path: str) -> str:
    """A file is not what was written: say where it breaks first."""
    where = "its content changed"
    try:
        prove = next(prove for name, _, prove in _folders(root) if name == folder)
        for _ in prove(root, folder, shard):
            pass
    except DataError as error:
        where = str(error).removeprefix(f"{join(root, path)}: ")
    except Exception as error:  # over damaged bytes readers raise anything
        where = f"it cannot be read any more ({short(error)})"
    mend = f"delete {stats_path(folder, shard)} and run the stage again"
    return f"{join(root, path)}: not the file that was written: {where}; {mend}"


def _expect_keys(path: str, expected: list[str], found: list[str], other: str) -> None:
    for row, (want, have) in enumerate(zip_longest(expected, found)):
        if want != have:
            raise DataError(f"{path}: row {row} is key {have}, {other} has key {want} there")


def _rows(path: str, columns: list[str], optional: str = "") -> list[dict[str, Any]]:
    with open_parquet(path, fix="delete its _stats.json and run the stage again") as file:
        there = file.schema_arrow.names
        rows: list[dict[str, Any]] = file.read([name for name in (*columns, optional) if name in there]).to_pylist()
    if rows and (missing := [name for name in columns if name not in there]):  # a shard without rows may lack them
        raise DataError(f"{path}: no column {missing[0]}; make it again")
    return rows


def _prove_raw(root: str, folder: str, shard: int) -> Iterator[str]:
    name = join(root, folder, shard_name(shard))
    keys = shard_keys(f"{name}.tar")
    rows = _rows(f"{name}.parquet", ["key", "status"])
    _expect_keys(f"{name}.parquet", sorted(keys), sorted(r["key"] for r in rows if r["status"] == "success"), "the tar")
    stats = read_json(f"{name}_stats.json")
    if (
        stats["count"] != len(rows)
        or stats["successes"] != len(keys)
        or sum(stats["status_dict"].values()) != len(rows)
    ):
        raise DataError(
            f"{name}_stats.json: {stats['count']} inputs, {stats['successes']} successes; "
            f"the Parquet has {len(rows)} rows and the tar {len(keys)} samples"
        )
    for key in keys:
        yield check_key(key)


def _prove_captions(root: str, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(root, folder), shard), tar_path(RAW, shard)
    rows = _rows(path, ["key", "captions", "logprobs", "num_tokens"], optional="similarities")
    _expect_keys(path, shard_keys(join(root, tar)), [row["key"] for row in rows], tar)
    for row in rows:
        lists = [row[name] for name in ("captions", "logprobs", "num_tokens", "similarities") if name in row]
        if len({len(values) for values in lists}) > 1:
            raise DataError(f"{path}: key {row['key']} has {len(row['captions'])} captions, other counts of the rest")
        yield row["key"]


def _prove_final(root: str, folder: str, shard: int) -> Iterator[str]:
    name = join(root, folder, shard_name(shard))
    rows = _rows(f"{name}.parquet", ["key", "synsets"])
    _expect_keys(f"{name}.parquet", shard_keys(f"{name}.tar"), [row["key"] for row in rows], "the tar")
    sources = _raw_shards(root, shard)
    tars = [join(root, "raw", f"{source}.tar") for source in sources]
    raw = chain.from_iterable(map(read_shard, tars)) if exists(join(root, RAW)) else None
    dropped = set[str]().union(*(_dropped(root, source) for source in sources))
    for sample, row in zip(read_shard(f"{name}.tar"), rows, strict=True):
        captions, synsets = sample.captions, sample.meta.get("synsets")
        if synsets != row["synsets"] or len(synsets) != len(captions):
            raise DataError(f"{name}.tar: key {sample.key} has synsets that do not fit its captions or its Parquet row")
        if raw is not None and next(s for s in _until(raw, sample.key, name)).image != sample.image:
            raise DataError(f"{name}.tar: key {sample.key} has another image than raw/{' or '.join(sources)}.tar")
        if sample.key in dropped:
            raise DataError(f"{name}.tar: key {sample.key} is a duplicate by {DEDUP}/; run `clipmill pack` again")
        yield check_key(sample.key)


def _until(raw: Iterator[Sample], key: str, name: str) -> Iterator[Sample]:
    for sample in raw:
        if sample.key == key:
            yield sample
            return
    raise DataError(f"{name}.tar: key {key} is not in its raw shard, or not in that order")


def _raw_shards(root: str, shard: int) -> list[str]:
    """Names of the raw shards that a final shard was made of: its own number's, but where shards have equal sizes."""
    done = read_done(join(root, SHARDS), shard)
    found = [path[4:-4] for path in (done.inputs if done else {}) if path.startswith("raw/") and path.endswith(".tar")]
    return found if done else [shard_name(shard)]


def _prove_plan(root: str, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(root, folder), shard), raw_tar(root, shard)
    rows, done = _rows(path, ["key", "reason"]), read_done(join(root, folder), shard)
    if exists(join(root, RAW)):
        _expect_keys(path, shard_keys(tar), [row["key"] for row in rows], tar)
    counts = Counter(row["reason"] or "success" for row in rows)
    if done is not None and done.counts != counts:
        raise DataError(f"{path}: {dict(counts)}, its done-record says {done.counts}; run `clipmill pack` again")
    yield from (row["key"] for row in rows)


def _prove_cache(root: str, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(root, folder), shard), tar_path(SHARDS, shard)
    cached, there = CachedShard(root, folder.removeprefix(f"{TEACHER}/"), shard), ShardIndex(join(root, tar))
    for file in cached.files:
        _expect_keys(file.path, there.keys, file.keys, tar)
    names = there.column_names(cached.config["num_views"], texts=cached.find("text_0") is not None)
    for name in names:
        file = cached.file(name)
        column, vectors = plan_column_update(name, there, file), file.vectors(name)
        if column is not None and len(column.new_rows):
            raise DataError(
                f"{path}: made from another {tar}: key {there.keys[int(column.new_rows[0])]} has another "
                f"{'image' if name.startswith('image_') else 'caption'} than {name} was made from; run `clipmill "
                "cache` again, it embeds what is new"
            )
        finite = np.isfinite(vectors.as_floats()).all(axis=1) | ~vectors.present
        if not finite.all():
            raise DataError(f"{path}: key {there.keys[int(finite.argmin())]} has no {name}; run `clipmill cache` again")
    if cached.inputs.get(tar) != sha256_file(join(root, tar)):
        raise DataError(
            f"{path}: made from another {tar}, its images and captions are the same; run `clipmill cache` again, it "
            "embeds nothing"
        )
    yield from there.keys


def _prove_dedup(root: str, folder: str, shard: int) -> Iterator[str]:
    path, tar = parquet_path(join(root, folder), shard), raw_tar(root, shard)
    keys = set(shard_keys(tar)) if exists(join(root, RAW)) else None
    for row in _rows(path, ["key", "reason", "kept"]):
        if keys is not None and row["key"] not in keys:
            raise DataError(f"{path}: key {row['key']} is not in {tar}; run `clipmill dedup` again")
        if row["reason"] not in (EXACT_DUPLICATE, NEAR_DUPLICATE):
            raise DataError(f"{path}: key {row['key']} has reason {row['reason']!r}; run `clipmill dedup` again")
        yield row["key"]


def _dropped(root: str, name: str) -> set[str]:
    path = join(root, DEDUP, f"{name}.parquet")
    return {row["key"] for row in _rows(path, ["key"])} if exists(path) else set()


def _check_kept(root: str, raw: list[np.ndarray], dropped: list[np.ndarray], found: Findings) -> None:
    """The lists belong to raw/ as it is, and every sample that stays for another is there and does not go itself."""
    check_fresh(root, shard_ids(join(root, RAW)))
    there, gone = (np.sort(np.concatenate([NO_KEYS, *keys])) for keys in (raw, dropped))
    for shard in range(len(dropped)):
        path = dedup_parquet(root, shard)
        rows = _rows(path, ["key", "kept"])
        kept = content_ids(row["kept"] for row in rows)
        if (wrong := ~_among(kept, there) | _among(kept, gone)).any():
            row = rows[int(wrong.argmax())]
            found.add(
                f"{path}: key {row['key']} goes for key {row['kept']}, which is not in raw/ or goes itself; "
                "run `clipmill dedup --overwrite`"
            )


def _among(numbers: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    return np.searchsorted(ascending, numbers, "left") < np.searchsorted(ascending, numbers, "right")


def _check_unique(folder: str, keys: list[np.ndarray], found: Findings) -> None:
    hashes = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    repeated = len(hashes) - len(np.unique(hashes))
    if repeated:
        found.add(f"{folder}: {repeated} keys are there more than once; keys must be unique in a dataset")


def _check_sizes(root: str, blocks: dict[str, Any], found: Findings) -> None:
    path = sizes_json(root)
    if not exists(join(root, SHARDS)):
        return
    if not exists(path):
        raise DataError(f"{path}: is not there; `clipmill pack` has not finished")
    sizes, shards = read_json(path), finished_shards(join(root, SHARDS))
    if not isinstance(sizes, dict):
        raise DataError(f"{path}: no object of sizes; delete it and run `clipmill pack` again")
    for shard in shards:
        name, done = f"{shard_name(shard)}.tar", None
        with contextlib.suppress(DataError):  # named already
            done = read_done(join(root, SHARDS), shard)
        if done and sizes.get(name) != done.successes:
            found.add(f"{path}: {name} has {done.successes} samples, the file says {sizes.get(name)}")
        size = done.config.get("shard_size") if done else None
        if done and size and not (done.successes == size or (shard == shards[-1] and done.successes <= size)):
            found.add(f"{path}: {name} has {done.successes} samples, not {size}; run `clipmill pack` again")
    if other := sorted(set(sizes) - {f"{shard_name(shard)}.tar" for shard in shards}):
        found.add(f"{path}: {other[0]} is not there; delete the file and run `clipmill pack` again")
    planned, packed = (blocks.get(name, {}).get("counts") for name in ("plan", "pack"))
    if planned is not None and planned != packed:
        found.add(f"{dataset_json(root)}: plan says {planned}, pack {packed}; run `clipmill pack` again")
