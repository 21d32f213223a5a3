"""All files of a dataset without the samples that go, staged: what a stage wrote, folder by folder, and its records."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.file_edits import write_like, write_without_rows, write_without_samples, write_without_vectors
from pipeline.core.taken_down import TAKEN_DOWN, TAKEN_DOWN_SAMPLES, counters_of_rest, without_content
from pipeline.dedup.drop_list import hash_raw_shards
from pipeline.pack.reshard import sample_offsets
from pipeline.takedown.matches import Matches, RawRow
from pipeline.takedown.pack_outcomes import pack_outcomes
from pipeline.takedown.records import SUCCESS, CountChange, renew_block, renew_head, renew_stats, renewed_hashes
from pipeline.takedown.staging import TakedownStaging
from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, exists, is_url, join, names, read_buffer, read_json, write_json
from shards_spec.layout import (
    DATASET,
    DEDUP,
    RAW,
    SELECT,
    SIZES,
    STAGES,
    below,
    dataset_json,
    parquet_path,
    shard_name,
    sizes_json,
    stats_path,
    tar_path,
    teacher_folder,
    vocabulary_tsv,
)
from shards_spec.manifest import SEAL, file_hash, finished_shards, head_seal, read_dataset, read_done, shard_ids
from shards_spec.parquet import read_table
from shards_spec.selection import ALL_SAMPLES, COPIES, PAIR, survey_fingerprint
from shards_spec.tar import shard_keys
from shards_spec.teacher_shard import TeacherShard
from shards_spec.vocab import read_vocabulary

VECTORS = {"image": "image vectors", "soft": "soft labels", "text": "text vectors"}  # facts of a cache
Edit = Callable[[str, int, dict[str, Any]], CountChange]  # (folder, shard, its stats) -> what its counts lose


class TakedownEdits:
    """Stages the new files of a dataset, the stages in their order."""

    def __init__(self, root: str, matches: Matches, staging: TakedownStaging) -> None:
        self._root = root
        self._keys = matches.keys
        self._key_array = pa.array(sorted(matches.keys), pa.string())
        self._matches = matches
        self._staging = staging
        self._hashes = dict[str, tuple[str, str]]()  # path below ROOT to the hashes before and after
        self._changes = dict[str, CountChange]()  # of the blocks of dataset.json
        self._final_rows = list[pa.Table]()  # rows of final shards that go
        self._sizes = Counter[str]()  # samples that final shards lose, by the names of their tars
        in_tar = defaultdict[int, set[str]](set)
        for row in matches.last_rows():
            if row.status == SUCCESS:
                in_tar[row.shard].add(row.key)
        self._in_raw_tar = dict(in_tar)
        self._pack_changes = pack_outcomes(root, self._in_raw_tar)
        self._edits: dict[str, Edit] = {
            "ingest": self._edit_raw,
            "dedup": self._edit_drop_list,
            "caption": self._edit_captions,
            "plan": self._edit_plan,
            "pack": self._edit_final,
            "cache": self._edit_cache,
            "select": self._edit_selection,
        }

    def run(self) -> None:
        """Stage everything that a stage wrote. Raises DataError for a broken file."""
        for key, folder in self._folders_in_order():
            self._edit_folder(key, folder)
        self._edit_sizes()
        self._edit_dataset()

    def _folders_in_order(self) -> list[tuple[str, str]]:
        """Each folder after those that its records name as inputs: a selection that pack obeyed is such a one."""
        folders = list(stage_folders(self._root))
        applied = read_dataset(self._root)["stages"].get("pack", {}).get("config", {}).get("select")
        before_pack = [(key, folder) for key, folder in folders if key == f"select/{applied}"]
        others = [entry for entry in folders if entry not in before_pack]
        place = next((place for place, (key, _) in enumerate(others) if key in ("plan", "pack")), len(others))
        return [*others[:place], *before_pack, *others[place:]]

    def _edit_folder(self, key: str, folder: str) -> None:
        edit = self._edits.get(key.partition("/")[0], self._edit_rows)
        total = self._changes.setdefault(key, CountChange())
        inputs = self._renewed_inputs(folder)
        for shard in finished_shards(join(self._root, folder)):
            path = stats_path(folder, shard)
            stats = read_json(join(self._root, path))
            change = edit(folder, shard, stats)
            total.add(change)
            record = stats.get("clipmill", {})
            own = {name: new for name, (old, new) in inputs.items() if record.get("inputs", {}).get(name) == old}
            own |= self._in_place_input(folder, shard, record)
            if renew_stats(stats, change, self._hashes, own):
                self._staging.stage(path, partial(write_json, value=stats))

    def _renewed_inputs(self, folder: str) -> dict[str, tuple[str, str]]:
        """Inputs of records that are no path, before and after: one hash of all shards."""
        if folder.startswith(f"{SELECT}/"):
            return self._renewed_survey(folder)
        if folder != DEDUP or not self._hashes:
            return {}
        shards = shard_ids(join(self._root, RAW))
        renewed = dict(self._hashes.values())
        return {"raw": (hash_raw_shards(self._root, shards), hash_raw_shards(self._root, shards, renewed))}

    def _renewed_survey(self, folder: str) -> dict[str, tuple[str, str]]:
        """Of a selection that looked at all samples: its hash of what it was made from."""
        records = [read_done(join(self._root, folder), shard) for shard in finished_shards(join(self._root, folder))]
        inputs = [record.inputs for record in records if record is not None]
        if not inputs or ALL_SAMPLES not in inputs[0] or records[0] is None:
            return {}
        old = [{name: digest for name, digest in own.items() if name != ALL_SAMPLES} for own in inputs]
        new = [renewed_hashes(own, self._hashes) for own in old]
        config = records[0].config
        return {ALL_SAMPLES: (survey_fingerprint(config, old), survey_fingerprint(config, new))}

    def _in_place_input(self, folder: str, shard: int, record: dict[str, Any]) -> dict[str, str]:
        """The input of a shard of img2dataset that is used where it lies: its own Parquet file."""
        path = parquet_path(RAW, shard)
        is_own = record.get("config") == {"kind": "img2dataset"} and path in self._hashes
        if folder != RAW or not is_own or not _is_own_source(self._root):
            return {}
        return {"parquet": self._hashes[path][1]}

    def _stage(self, folder: str, shard: int, path: str, write: Callable[[str], object], removed: int) -> None:
        """Stage a file that a done-record names. Raises DataError when it is not the one that the record names."""
        recorded = file_hash(self._root, folder, shard, path)
        after = self._staging.stage(path, write, removed)
        if (before := self._staging.changes[-1].before) != recorded:
            raise DataError(
                f"{join(self._root, path)}: not the file that was written (sha256 {before}, its done-record says "
                f"{recorded}); run `clipmill check {self._root}` first"
            )
        self._hashes[path] = (recorded, after)

    def _edit_raw(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        """Rows keep their key and get a reason; images go."""
        rows = self._matches.rows.get(shard, [])
        change = CountChange()
        if not rows:
            return change
        last = np.array([self._matches.is_last(row) for row in rows])
        numbers = np.array([row.number for row in rows])
        path = parquet_path(folder, shard)
        old = join(self._root, path)
        self._stage(
            folder,
            shard,
            path,
            lambda new: write_like(old, new, without_content(read_table(old), numbers, last)),
            len(rows),
        )
        gone = self._in_raw_tar.get(shard, set())
        if gone:
            tar = tar_path(folder, shard)
            self._stage(
                folder, shard, tar, lambda new: write_without_samples(join(self._root, tar), new, gone), len(gone)
            )
        for row in filter(self._matches.is_last, rows):
            change.add(_raw_change(row, stats["status_dict"]))
        return change

    def _edit_drop_list(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        """Rows go; those of duplicates of what goes stay, and name no sample that stays in their place."""
        path = parquet_path(folder, shard)
        table = read_table(join(self._root, path))
        gone = self._is_gone(table.column("key"))
        orphaned = self._is_gone(table.column("kept"))
        reasons = table.column("reason").to_pylist()
        change = CountChange()
        for row in np.flatnonzero(gone).tolist():
            change.counts[reasons[row]] -= 1
        listed = set(table.column("key").filter(pa.array(gone)).to_pylist())
        change.counts[SUCCESS] -= len(self._in_raw_tar.get(shard, set()) - listed)
        if gone.any() or orphaned.any():
            kept = ["" if lost else key for key, lost in zip(table.column("kept").to_pylist(), orphaned, strict=True)]
            place = table.schema.get_field_index("kept")
            new_table = table.set_column(place, table.schema.field(place), pa.array(kept, pa.string()))
            new_table = new_table.filter(pa.array(~gone))
            old = join(self._root, path)
            self._stage(folder, shard, path, lambda new: write_like(old, new, new_table), int(gone.sum()))
        return change

    def _edit_captions(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        change = CountChange()
        for row in self._drop_rows(folder, shard, ["captions", "reason"]).to_pylist():
            without = row.get("reason") or "picture does not decode"
            change.counts[SUCCESS if row["captions"] else without] -= 1
            change.facts["captions"] -= len(row["captions"] or ())
        if not change.facts["captions"]:
            del change.facts["captions"]
            return change
        facts = stats.get("clipmill", {}).get("facts", {})
        rest = counters_of_rest(facts, facts.get("captions", 0) + change.facts["captions"])
        change.facts.update({name: rest[name] - number for name, number in facts.items() if name != "captions"})
        return change

    def _edit_plan(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        """Rows stay without their keys, so that the ranges of final shards stay what they are; offsets are new."""
        tar = tar_path(RAW, shard)
        change = CountChange()
        if tar not in self._hashes:
            return change
        path = parquet_path(folder, shard)
        old = join(self._root, path)
        table = read_table(old)
        new_tar = self._staging.new_path(tar)
        with read_buffer(new_tar) as buffer:
            offsets = {key: (start, end) for key, _, start, end in sample_offsets(buffer, new_tar)}
        rows = list[dict[str, Any]]()
        end = 0
        for row in table.to_pylist():
            if row["key"] in self._keys:
                change.counts[row["reason"] or SUCCESS] -= 1
                row |= {"key": "", "reason": row["reason"] or TAKEN_DOWN}
            if row["key"] and row["key"] not in offsets:
                raise DataError(f"{old}: key {row['key']} is not in {tar}; run `clipmill pack` again")
            start, end = offsets[row["key"]] if row["key"] else (end, end)
            rows.append({**row, "offset": start})
        new_table = pa.Table.from_pylist(rows, table.schema)
        self._stage(folder, shard, path, lambda new: write_like(old, new, new_table), -sum(change.counts.values()))
        return change

    def _edit_final(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        change = self._pack_changes.get(shard, CountChange())
        tar = tar_path(folder, shard)
        if exists(join(self._root, parquet_path(folder, shard))):
            rows = self._drop_rows(folder, shard, ["synsets"])
            gone = set(rows.column("key").to_pylist())
            self._final_rows.append(rows)
        else:
            gone = self._keys & set(shard_keys(join(self._root, tar)))
        if gone:
            self._stage(
                folder, shard, tar, lambda new: write_without_samples(join(self._root, tar), new, gone), len(gone)
            )
            change.counts[SUCCESS] -= len(gone)
            self._sizes[f"{shard_name(shard)}.tar"] = len(gone)
            if "shard_size" in stats.get("clipmill", {}).get("config", {}):
                change.facts[TAKEN_DOWN_SAMPLES] += len(gone)
        return change

    def _edit_cache(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        change = CountChange()
        name = folder.removeprefix(teacher_folder(""))
        cached = TeacherShard(self._root, name, shard)
        gone = self._are_gone(cached.files[0].keys if cached.files else [])
        if not gone.any():
            return change
        kind = "soft" if cached.find("soft_0") is not None else "image"
        columns = [f"{kind}_{number}" for number in range(cached.config["num_views"])]
        columns += [f"text_{number}" for number in range(cached.captions)]
        has_vectors = np.zeros(len(gone), bool)
        for column in columns:
            ids = cached.file(column).ids(column)
            present = gone if ids is None else gone & (ids != 0)
            has_vectors |= present
            change.facts[VECTORS[column.partition("_")[0]]] -= int(present.sum())
        change.facts = Counter({what: number for what, number in change.facts.items() if number})
        change.counts[SUCCESS] -= int(has_vectors.sum())
        without = int((gone & ~has_vectors).sum())  # an imported cache has reasons for rows without vectors
        for reason, number in stats["status_dict"].items():
            if reason != SUCCESS and without:
                change.counts[reason] -= min(number, without)
                without -= min(number, without)
        for file in cached.files:
            self._edit_vectors(folder, shard, file)
        return change

    def _edit_vectors(self, folder: str, shard: int, file: EmbeddingFile) -> None:
        stays = np.flatnonzero(~self._are_gone(file.keys))
        path = file.path.removeprefix(below(self._root, ""))
        removed = len(file) - len(stays)
        self._stage(folder, shard, path, lambda new: write_without_vectors(file.path, new, stays), removed)

    def _edit_selection(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        """Rows go; those that name a sample that goes as the one that stays for them name none."""
        path = parquet_path(folder, shard)
        old = join(self._root, path)
        table = read_table(old)
        gone = self._is_gone(table.column("key"))
        change = CountChange()
        for row in table.select(["reason", "copies"]).filter(pa.array(gone)).to_pylist():
            change.counts[row["reason"] or SUCCESS] -= 1
            change.facts[COPIES] -= row["copies"]
        new_table = table.filter(pa.array(~gone))
        if PAIR.name in table.column_names:
            pairs = new_table.column(PAIR.name)
            named = pc.if_else(pc.is_in(pairs, self._key_array), None, pairs)
            new_table = new_table.set_column(table.schema.get_field_index(PAIR.name), PAIR, named)
        if not new_table.equals(table):
            self._stage(folder, shard, path, lambda new: write_like(old, new, new_table), int(gone.sum()))
        return change

    def _edit_rows(self, folder: str, shard: int, stats: dict[str, Any]) -> CountChange:
        """Of a folder with a row per sample: the row goes, and counts as its reason, or as a success."""
        change = CountChange()
        for row in self._drop_rows(folder, shard, ["reason"]).to_pylist():
            change.counts[row.get("reason") or SUCCESS] -= 1
        return change

    def _drop_rows(self, folder: str, shard: int, columns: list[str]) -> pa.Table:
        """Stage a shard's Parquet file without the rows that go; returns those, their key and these columns if any."""
        path = parquet_path(folder, shard)
        old = join(self._root, path)
        gone = self._is_gone(read_table(old, ["key"]).column("key"))
        if not gone.any():
            return pa.table({name: [] for name in ("key", *columns)})
        removed = read_table(old, ["key"], optional=columns).filter(pa.array(gone))
        self._stage(folder, shard, path, lambda new: write_without_rows(old, new, self._keys), len(removed))
        return removed

    def _is_gone(self, column: pa.ChunkedArray) -> np.ndarray:
        """Where a column has the key of a sample that goes, bool (n,)."""
        found: np.ndarray = pc.is_in(column, self._key_array.cast(column.type)).to_numpy()
        return found

    def _are_gone(self, keys: list[str]) -> np.ndarray:
        return self._is_gone(pa.chunked_array([keys], pa.string()))

    def _edit_sizes(self) -> None:
        if not +self._sizes or not exists(sizes_json(self._root)):
            return
        sizes = read_json(sizes_json(self._root))
        for name, number in self._sizes.items():
            sizes[name] -= number
        self._staging.stage(SIZES, lambda new: write_json(new, sizes))

    def _edit_dataset(self) -> None:
        """The blocks of ``dataset.json``."""
        if not exists(dataset_json(self._root)):
            return
        dataset = read_dataset(self._root)
        was_sound = dataset.get(SEAL) in (None, head_seal(dataset))
        for key, block in dataset["stages"].items():
            if key.startswith("vocab/"):
                self._edit_coverage(key.removeprefix("vocab/"), block)
            renew_block(block, self._changes.get(key, CountChange()))
        renew_head(dataset, was_sound)
        self._staging.stage(DATASET, lambda new: write_json(new, dataset))

    def _edit_coverage(self, name: str, block: dict[str, Any]) -> None:
        """How much a vocabulary covers; it stays as it is itself, since models and class maps name its hash."""
        path = vocabulary_tsv(self._root, name)
        if "coverage" not in block or not exists(path):
            return
        index = read_vocabulary(path).index
        source = block["config"].get("source")
        covered = block["coverage"]
        for synsets in _synsets(self._final_rows):
            chosen = {"all": synsets, "synthetic": synsets[1:]}.get(source, synsets[:1])
            labels = set[str]().union(*chosen) & index.keys()
            covered["samples"] -= 1
            covered["samples_with_label"] -= bool(labels)
            covered["labels"] -= len(labels)


def stage_folders(root: str) -> Iterator[tuple[str, str]]:
    """(key of the block in dataset.json, folder below ROOT) of all stages that make shards, in their order."""
    for info in STAGES.values():
        if not info.has_shards:
            continue
        parent, _, _ = info.writes.partition("/{name}")
        for name in names(join(root, parent)) if info.is_named else [""]:
            yield f"{info.name}/{name}" if name else info.name, info.folder(name)


def _raw_change(row: RawRow, counts: dict[str, int]) -> CountChange:
    """What a row of raw/ was counted as is counted as taken down."""
    reason = SUCCESS if row.status == SUCCESS else str(row.error_message)
    change = CountChange()
    if counts.get(reason):
        change.counts[reason] -= 1
        change.counts[TAKEN_DOWN] += 1
    if row.status == SUCCESS and row.error_message is not None:
        change.facts[row.error_message] -= 1  # the note of a row that is used
    return change


def _synsets(tables: list[pa.Table]) -> Iterator[list[list[str]]]:
    for table in tables:
        yield from (row or [[]] for row in table.column("synsets").to_pylist())


def _is_own_source(root: str) -> bool:
    """Whether the dataset's source is its own raw/, where img2dataset's shards lie."""
    source = str(read_dataset(root).get("source"))
    raw = join(root, RAW)
    if is_url(root):
        return source.rstrip("/") == raw
    return os.path.realpath(source) == os.path.realpath(raw)
