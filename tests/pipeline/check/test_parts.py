"""`check` in parts: the same problems by any number of processes, and of keys that do not fit into memory."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_data import write_raw

from pipeline.check import stage as check_stage
from pipeline.check.config import CheckConfig
from pipeline.check.files import DatasetFiles
from pipeline.check.key_ranges import KeyRanges, ranges
from pipeline.check.listing import FolderListing
from pipeline.check.parts import KEYS, Part, PartCheck, PartNames, key_tables
from pipeline.check.stage import DatasetParts, check
from pipeline.check.total import KEPT, count_repeated
from pipeline.check.validators import shard_folders
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.content_id import content_ids, is_among
from shards_spec.files import UserError, read_json, write_json
from shards_spec.manifest import SEAL, stats_seal

SHARDS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Raw shards, lists of duplicates and final shards."""
    root = str(tmp_path_factory.mktemp("parts") / "ds")
    write_raw(root, shards=SHARDS, per_shard=4)
    dedup(DedupConfig(root, near_bits=-1, workers=1))
    pack(PackConfig(root, ("none",), workers=1))
    assert check(CheckConfig(root, workers=1)) == []
    return Path(root)


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory) -> Path:
    """The same with a problem of each kind: of one shard, of a folder's names, of a sum."""
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "ds"))
    tar = root / "raw/00001.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    (root / "shards/00003.parquet").write_bytes(b"PAR1")
    (root / "shards/00004.tar").unlink()
    (root / "shards/00009.tar").write_bytes(b"")
    (root / "dedup/notes.json").write_text("{}")
    dataset = read_json(str(root / "dataset.json"))
    dataset["stages"]["pack"]["counts"] = {"success": 99}
    dataset["stages"]["pack"].pop(SEAL)
    write_json(str(root / "dataset.json"), dataset)
    return root


def test_any_number_of_processes_says_the_same(damaged, monkeypatch):
    alone = check(CheckConfig(str(damaged), workers=1))
    for said in (
        "raw/00001.tar: not the file",
        "00003.parquet",
        "00004.tar: is not there",
        "00009.tar: no done-record",
        "notes.json: no file of this format",
        "pack says {'success': 99}",
    ):
        assert any(said in problem for problem in alone), (said, alone)
    monkeypatch.setattr(check_stage, "SAMPLES_PER_WORKER", 1)
    assert DatasetParts(str(damaged), None).processes(3) == 3
    assert check(CheckConfig(str(damaged), workers=3)) == alone


def test_processes_are_started_only_where_they_are_worth_it(whole):
    blocks = {"ingest": {"counts": {"success": 9_000, "failed": 11_000}}}
    assert DatasetParts(str(whole), blocks).processes(8) == 4
    assert DatasetParts(str(whole), {"ingest": {"counts": {"success": 10**6}}}).processes(8) == SHARDS
    assert DatasetParts(str(whole), {}).processes(8) == 1
    with pytest.raises(UserError, match="--workers 0: must be 1 or more"):
        CheckConfig("R", workers=0)


def test_a_part_comes_back_from_its_file(damaged):
    parts = DatasetParts(str(damaged), {})
    made = list(map(parts.check, parts.names()))
    assert [part.shard for part in made] == list(range(SHARDS))
    assert made[1].folders["raw"].problems
    for part in made:
        again = Part.from_bytes(part.shard, part.to_bytes())
        assert again.folders == part.folders
        assert np.array_equal(again.kept, part.kept)
        assert all(np.array_equal(one, other) for one, other in zip(again.keys, part.keys, strict=True))
    assert made[0].keys[0].dtype == KEYS
    assert len(made[0].keys[0]) == 4, "a key that raw/ and shards/ have is one"


def test_a_key_twice_in_a_folder_is_counted_whether_in_one_shard_or_in_two(whole, tmp_path):
    """The same raw shard under two numbers: every key of it is there twice, in raw/ and in shards/."""
    root = Path(shutil.copytree(whole, tmp_path / "ds"))
    for folder in ("raw", "dedup", "shards"):
        for path in (root / folder).glob("00002*"):
            shutil.copy(path, path.with_name(path.name.replace("00002", "00000")))
        record = str(root / folder / "00000_stats.json")
        stats = read_json(record)
        stats["clipmill"]["shard"] = 0
        stats["clipmill"][SEAL] = stats_seal(stats)
        write_json(record, stats)
    problems = check(CheckConfig(str(root), workers=1))
    for folder in ("raw", "shards"):
        assert f"{folder}: 4 keys are there more than once; keys must be unique in a dataset" in problems
    tables = key_tables({0: content_ids(["a", "b", "a"]), 1: content_ids(["b"])}, 2)
    assert count_repeated(tables[0]) == {0: 1}
    both = np.sort(np.concatenate([tables[0], *key_tables({1: content_ids(["b", "c"])}, 2)]), order="id")
    assert count_repeated(both) == {0: 1, 1: 1}


def test_more_folders_than_a_mask_has_bits():
    ids = content_ids(["a", "b"])
    first, second = key_tables({0: ids, 63: ids, 64: ids, 69: ids[:1]}, 70)
    assert sorted(first["mask"].tolist()) == [1 | 1 << 63] * 2
    assert dict(zip(second["id"].tolist(), second["mask"].tolist(), strict=True)) == {
        int(ids[0]): 1 | 1 << 5,
        int(ids[1]): 1,
    }


def test_keys_beyond_memory_are_counted_by_ranges(tmp_path, monkeypatch):
    """The ranges on disk give what all records in memory give, of two stores of different lengths in step."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 1 << 64, 4_000, np.uint64)
    stores = {}
    for name, in_memory in (("disk", 300), ("memory", 10**6)):
        monkeypatch.setattr("pipeline.check.key_ranges.RECORDS_IN_MEMORY", in_memory)
        keys = KeyRanges(str(tmp_path / f"{name}-keys"), KEYS)
        kept = KeyRanges(str(tmp_path / f"{name}-kept"), KEPT)
        for part in np.split(np.concatenate([ids, ids[:77]]), range(100, 4_077, 100)):
            keys.add(key_tables({2: part}, 3)[0])
        records = np.zeros(9, KEPT)
        records["id"][:8] = ids[:8]
        kept.add(records)
        stores[name] = list(ranges(keys, kept))
    assert len(stores["memory"]) == 1
    assert len(stores["disk"]) == 256
    assert sum(len(keys) for keys, _ in stores["disk"]) == 4_077
    assert sum(count_repeated(keys).get(2, 0) for keys, _ in stores["disk"]) == 77
    assert count_repeated(stores["memory"][0][0]) == {2: 77}
    found = [is_among(kept["id"], keys["id"]) for keys, kept in stores["disk"]]
    assert sum(map(np.count_nonzero, found)) == 8, "0 is no id"
    assert not is_among(ids[:3], np.empty(0, np.uint64)).any()


def test_a_kept_key_that_is_not_there_is_named_by_its_first_row(whole, tmp_path, monkeypatch):
    root = Path(shutil.copytree(whole, tmp_path / "ds"))
    raw = pq.read_table(root / "raw/00001.parquet").column("key").to_pylist()
    listed = {"key": raw[:3], "reason": ["duplicate image"] * 3, "kept": [raw[3], "nowhere", raw[0]]}
    from pipeline.dedup.drop_list import DroppedSample, write_drop_list
    from shards_spec.manifest import Done, read_done

    before = read_done(str(root / "dedup"), 1)
    rows = [DroppedSample(*row) for row in zip(*listed.values(), strict=True)]
    outputs = write_drop_list(str(root), 1, rows)
    Done("dedup", 1, before.config, {"success": 1, "duplicate image": 3}, before.inputs, outputs).write(
        str(root / "dedup")
    )
    said = f"{root}/dedup/00001.parquet: key {raw[1]} goes for key nowhere, which is not in raw/ or goes itself"
    problems = check(CheckConfig(str(root), workers=1))
    assert any(problem.startswith(said) for problem in problems), problems
    monkeypatch.setattr("pipeline.check.key_ranges.RECORDS_IN_MEMORY", 3)
    assert check(CheckConfig(str(root), workers=1)) == problems


def test_names_of_a_folder_by_shard(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in (
        "00000_stats.json",
        "00000.tar",
        "00000.parquet",
        "00003_stats.json",
        "00003.tar",
        "00003-1.parquet",
        "00001.tar",
        "00007.tar",
        "0003.parquet",
        "x.txt",
        "123456_stats.json",
    ):
        (folder / name).touch()
    listing = FolderListing(str(tmp_path), "raw")
    assert listing.shards.tolist() == [0, 3, 123456]
    assert listing.names_of(0) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    assert set(listing.names_of(3)) == {"00003-1.parquet", "00003.tar", "00003_stats.json", "0003.parquet"}
    assert listing.names_of(123456) == ["123456_stats.json"]
    assert listing.others == ["00001.tar", "00007.tar", "x.txt"]
    assert listing.first_missing(5) == [1, 2, 4, 5, 6]
    assert [listing.is_missing(shard) for shard in (0, 1, 7, 123456, 123457)] == [False, True, True, False, False]


def test_every_object_of_a_store_is_fetched_once(whole, monkeypatch):
    """All of it but the small JSON files; its root is not written to."""
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem(skip_instance_cache=True)
    store.put(str(whole), "/once", recursive=True)
    before = store.find("/once")
    fetched = list[str]()
    cat_file, opened = MemoryFileSystem.cat_file, MemoryFileSystem.open
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda self, path, **more: (fetched.append(path), cat_file(self, path, **more))[1]
    )
    monkeypatch.setattr(
        MemoryFileSystem,
        "open",
        lambda self, path, *more, **named: (fetched.append(path), opened(self, path, *more, **named))[1],
    )
    assert check(CheckConfig("memory://once", workers=1)) == []
    monkeypatch.undo()
    data = [path for path in before if not path.endswith(".json") and "/logs/" not in path]
    assert len(data) == 5 * SHARDS
    assert {path: fetched.count(path) for path in data} == dict.fromkeys(data, 1)
    assert store.find("/once") == before
    store.rm("/once", recursive=True)


def test_every_file_is_read_once_for_a_shard(whole, monkeypatch):
    """Hashes come from one pass over the bytes, and nothing else opens a tar or a Parquet file again."""
    from pipeline.check import files as check_files

    hashed, mapped = [], []
    sha256_file, read_buffer = check_files.sha256_file, check_files.read_buffer
    monkeypatch.setattr(check_files, "sha256_file", lambda path: (hashed.append(path), sha256_file(path))[1])
    monkeypatch.setattr(check_files, "read_buffer", lambda path: (mapped.append(path), read_buffer(path))[1])
    root = str(whole)
    parts = PartCheck(root, tuple(shard_folders(root)), {})
    names = {folder: FolderListing(root, folder).names_of(2) for folder in ("raw", "dedup", "shards")}
    part = parts(PartNames(2, names))
    assert [own.problems for own in part.folders.values()] == [[]] * 3
    data = [f"{root}/raw/00002.tar", f"{root}/shards/00002.tar"]
    data += [f"{root}/{folder}/00002.parquet" for folder in names]
    assert sorted(hashed) == sorted(data)
    assert sorted(mapped) == sorted(data)
    files = DatasetFiles(root)
    assert files.tar(f"{root}/raw/00002.tar") is files.tar(f"{root}/raw/00002.tar")
