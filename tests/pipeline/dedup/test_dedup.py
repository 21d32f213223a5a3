"""Stage `dedup`: planted copies, random rows against the rule, reruns, and what pack and check make of its lists."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import tree, vouch, write_raw
from small_duplicates import expected_drops, jpeg, make_image, opened, random_rows
from small_parts import DAMAGES, finish, kill_task, missing, run_task

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.near_duplicates import (
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
    find_duplicates,
)
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.core.runner import ShardsFailed
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report.stages import mismatches, ordered
from shards_spec.files import UserError, join, json_bytes, read_bytes, read_json, sha256_bytes, sha256_file, write_bytes
from shards_spec.layout import shard_name
from shards_spec.lock import locked
from shards_spec.manifest import Done, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, shard_keys, write_shard

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Item:
    """One row of a raw shard: ``data`` None for a failed one."""

    url: str
    data: bytes | None


def raw(root: str, shards: list[list[Item]], columns: tuple[str, ...] = ("sha256", "phash")) -> None:
    """ROOT/raw as ingest writes it; with fewer columns, as img2dataset does."""
    counts: dict[str, int] = {}
    for shard, items in enumerate(shards):
        samples, rows = [], []
        for index, item in enumerate(items):
            key, data = f"{shard:05d}{index:04d}", item.data
            status = "failed_to_download" if data is None else "success"
            row = {"url": item.url, "caption": f"a dog {index}", "key": key, "status": status}
            if data is not None:
                image = opened(data)
                samples.append(Sample(key, {"jpg": data, "txt": row["caption"].encode(), "json": json_bytes(row)}))
                row |= {"sha256": sha256_bytes(data), "phash": perceptual_hash(image)}
            rows.append({name: row.get(name) for name in ("url", "caption", "key", "status", *columns)})
        name = f"raw/{shard_name(shard)}"
        _, tar_hash = write_shard(join(root, f"{name}.tar"), samples)
        types = pa.schema([(name, pa.string()) for name in rows[0]])
        pq.write_table(pa.Table.from_pylist(rows, types), join(root, f"{name}.parquet"))
        outputs = {f"{name}.tar": tar_hash, f"{name}.parquet": sha256_file(join(root, f"{name}.parquet"))}
        done = {"success": len(samples), "HTTP 404": len(rows) - len(samples)}
        Done("ingest", shard, {}, done, {}, outputs).write(join(root, "raw"))
        counts = {reason: counts.get(reason, 0) + number for reason, number in done.items()}
    write_stage(root, "ingest", {"config": {}, "shards": len(shards), "counts": counts}, "test")


PER_SHARD, SHARDS = 20, 6


def planted(seed: int = 0) -> tuple[list[list[Item]], dict[str, str]]:
    """Shards of different images with copies of some, exact and encoded anew, anywhere later; and key to reason."""
    rng = random.Random(seed)
    originals: list[tuple[str, bytes]] = []
    items: list[Item] = []
    truth: dict[str, str] = {}
    for position in range(PER_SHARD * SHARDS):
        key = f"{position // PER_SHARD:05d}{position % PER_SHARD:04d}"
        kind = rng.choice(["new", "new", "new", "exact", "near", "caption", "failed"]) if originals else "new"
        if kind == "new":
            originals.append((f"http://h/{position}", jpeg(make_image(f"{seed}/{position}", (120, 90)))))
            items.append(Item(*originals[-1]))
            continue
        url, data = rng.choice(originals)
        if kind == "caption":
            items.append(Item(url, data))
        elif kind == "failed":
            items.append(Item(url, None))
        else:
            truth[key] = {"exact": EXACT_DUPLICATE, "near": NEAR_DUPLICATE}[kind]
            copy = data if kind == "exact" else jpeg(opened(data), 60 + position % 30, 0.7 + position / 200)
            items.append(Item(f"http://copies/{position}", copy))
    return [items[start : start + PER_SHARD] for start in range(0, len(items), PER_SHARD)], truth


def listed(root: str) -> dict[str, tuple[str, str]]:
    """Key to (reason, kept) of all lists."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(Path(root, "dedup").glob("*.parquet"))])
    return {row["key"]: (row["reason"], row["kept"]) for row in table.to_pylist()}


def run(root: str, **options) -> object:
    return dedup(DedupConfig(root, **{"workers": 1, **options}))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[str, dict[str, str]]:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    shards, truth = planted()
    raw(root, shards)
    assert len(truth) > 20
    return root, truth


@pytest.fixture
def root(world, tmp_path) -> str:
    """A copy that a test may break."""
    return shutil.copytree(world[0], tmp_path / "ds").as_posix()


def test_planted_copies_are_found_and_nothing_else(root, world):
    summary, truth = run(root), world[1]
    found = listed(root)
    assert {key: reason for key, (reason, _) in found.items()} == truth
    assert all(kept < key and kept not in found for key, (_, kept) in found.items())
    assert summary.counts[EXACT_DUPLICATE] + summary.counts[NEAR_DUPLICATE] == len(truth)
    ingested = read_json(join(root, "dataset.json"))["stages"]["ingest"]
    assert summary.counts["success"] + len(truth) == ingested["counts"]["success"]
    assert len(list(Path(root, "dedup").iterdir())) == 2 * SHARDS


def test_recall_over_many_images(tmp_path):
    root = str(tmp_path / "ds")
    found = 0
    wanted = 0
    false = 0
    for seed in range(1, 5):
        shards, truth = planted(seed)
        raw(root, shards)
        run(root, overwrite=True)
        keys = set(listed(root))
        found += len(keys & set(truth))
        wanted += len(truth)
        false += len(keys - set(truth))
    assert found / wanted >= 0.99
    assert false == 0


def test_equal_files_only(root, world):
    run(root, near_bits=-1)
    assert set(listed(root)) == {key for key, reason in world[1].items() if reason == EXACT_DUPLICATE}


@pytest.mark.parametrize("columns", [(), ("sha256",)])
def test_shards_of_img2dataset_are_read_from_their_images(root, world, tmp_path, columns):
    run(root)
    other = str(tmp_path / "other")
    raw(other, planted()[0], columns)
    run(other, workers=2)
    assert listed(other) == listed(root)
    for path in Path(other, "raw").glob("*_stats.json"):  # without our done-records, as img2dataset left them
        stats = read_json(str(path))
        stats.pop("clipmill")
        write_bytes(str(path), json_bytes(stats))
    shutil.rmtree(join(other, "dedup"))
    run(other)
    assert listed(other) == listed(root)


@pytest.mark.parametrize("images_in_memory", [3, 7, 40, 1000])
def test_passes_over_buckets_find_the_same(root, world, images_in_memory):
    run(root)
    expected = tree(join(root, "dedup"))
    dedup(DedupConfig(root, workers=1, overwrite=True), images_in_memory=images_in_memory)
    assert tree(join(root, "dedup")) == expected


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 4), st.sampled_from([-1, 0, 3, 6]), st.integers(1, 80))
def test_lists_of_random_rows_follow_the_rule(tmp_path_factory, seed, count, shards, near_bits, images_in_memory):
    root, rows = str(tmp_path_factory.mktemp("random") / "ds"), random_rows(seed, count * shards)
    keys = [f"{i // count:05d}{i % count:04d}" for i in range(count * shards)]
    for shard in range(shards):
        part, name = slice(shard * count, (shard + 1) * count), f"raw/{shard_name(shard)}"
        urls, sha256s, hashes = (column[part] for column in rows)
        status = ["success" if text else "failed_to_download" for text in sha256s]
        table = {"key": keys[part], "status": status, "url": urls, "sha256": sha256s, "phash": hashes}
        Path(root, "raw").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({c: pa.array(v, pa.string()) for c, v in table.items()}), join(root, f"{name}.parquet"))
        outputs = {f"{name}.tar": "no image is read", f"{name}.parquet": "x"}
        Done("ingest", shard, {}, {}, {}, outputs).write(join(root, "raw"))
    write_stage(root, "ingest", {"config": {}, "shards": shards, "counts": {}}, "test")
    with pytest.MonkeyPatch.context() as patch:  # there are no images: signatures alone decide
        patch.setattr(
            "pipeline.dedup.verification._fingerprints", lambda *given: ((entry, entry) for entry in given[3].tolist())
        )
        patch.setattr("pipeline.dedup.verification.fingerprints_match", lambda *_: True)
        dedup(DedupConfig(root, near_bits, workers=1), images_in_memory=images_in_memory)
    limit = near_bits if near_bits >= 0 else None
    found, expected = listed(root), expected_drops(*rows, limit)
    assert {key: reason for key, (reason, _) in found.items()} == {
        keys[i]: EXACT_DUPLICATE if exact else NEAR_DUPLICATE for i, exact in expected.items()
    }
    assert {key: kept for key, (_, kept) in found.items()} == {
        keys[i]: keys[j] for i, j in find_duplicates(*rows, limit).items()
    }


def test_a_rerun_makes_nothing_and_a_changed_raw_makes_it_again(root):
    assert run(root).made == SHARDS
    before = tree(root)
    assert run(root).made == 0
    assert tree(root) == before
    Path(root, "dedup", "00003_stats.json").unlink()  # killed
    assert run(root).made == 1
    assert tree(root) == before
    shards = planted()[0]
    shards[0][0], lost = Item("http://h/other", jpeg(make_image("other"))), listed(root)
    raw(root, shards)
    assert run(root).made == SHARDS
    assert listed(root) != lost
    shutil.rmtree(join(root, "raw"))
    raw(root, shards[:4])
    assert run(root).shards == 4
    assert len(list(Path(root, "dedup").iterdir())) == 8
    with pytest.raises(UserError, match="--near-bits: 3 before, 2 now"):
        run(root, near_bits=2)


def test_tasks_of_an_array_one_of_which_is_killed_make_the_bytes_of_the_plain_command(root, tmp_path):
    plain = shutil.copytree(root, tmp_path / "plain" / "ds").as_posix()
    config = DedupConfig(root, workers=1)
    assert missing("dedup", config) == [((0, 3),), ((3, 6),)]
    assert run_task(dedup, config, range(3)).made == 3
    kill_task(dedup, config, range(3, 6))
    assert missing("dedup", config) == [((4, 5),), ((5, 6),)]
    assert run_task(dedup, config, [5]).made == 1
    assert finish(dedup, config, "dedup/.signatures")[1] == [4]
    assert list(Path(root, "dedup").iterdir()) == [Path(root, "dedup/.signatures")]
    run_task(dedup, config, [4])
    outcome, left = finish(dedup, config, "dedup/.signatures")
    assert left == []
    assert outcome.counts == run(plain).counts
    assert tree(root) == tree(plain)
    assert missing("dedup", config) == [()]  # one job, which sees that the lists are as they should be
    assert run_task(dedup, config, range(6)).made == 0
    assert tree(root) == tree(plain)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_made_again(damage, root, tmp_path, caplog):
    plain = shutil.copytree(root, tmp_path / "plain" / "ds").as_posix()
    config = DedupConfig(root, workers=1)
    run_task(dedup, config, range(SHARDS))
    DAMAGES[damage](Path(root, "dedup/.signatures"))
    finish(dedup, config, "dedup/.signatures")
    assert "dedup/.signatures/00001_stats.json: the part that it records is damaged; it is made again" in caplog.text
    run(plain)
    assert tree(root) == tree(plain)


def test_a_second_run_is_refused_and_tasks_of_an_array_are_not(root):
    lock, refused = join(root, ".dedup.lock"), "/dedup is being written by process .*: wait for its end"
    with locked(lock, "the lists"), pytest.raises(UserError, match=refused):
        run(root)
    with locked(lock, "the lists", shared=True):
        assert run_task(dedup, DedupConfig(root, workers=1), range(2)).made == 2
        with pytest.raises(UserError, match=refused):
            run(root)


def test_a_part_counts_for_the_very_raw_shard_it_was_made_of(root, tmp_path):
    shards = planted()[0]
    run_task(dedup, DedupConfig(root, workers=1), range(SHARDS))
    shards[2][0] = Item("http://h/other", jpeg(make_image("other")))
    raw(root, shards)
    assert run_task(dedup, DedupConfig(root, workers=1), range(SHARDS)).made == 1
    assert run_task(dedup, DedupConfig(root, near_bits=-1, workers=1), range(SHARDS)).made == SHARDS  # no signatures
    run(root)
    plain = str(tmp_path / "plain" / "ds")
    raw(plain, shards)
    run(plain)
    assert tree(root) == tree(plain)


def test_it_runs_on_a_url(root):
    import fsspec

    fs = fsspec.filesystem("memory")
    if fs.exists("/dd"):
        fs.rm("/dd", recursive=True)
    for path in Path(root).rglob("*.*"):
        write_bytes(f"memory://dd/{path.relative_to(root)}", path.read_bytes())
    run(root)
    run("memory://dd")
    assert read_bytes("memory://dd/dedup/00002.parquet") == Path(root, "dedup", "00002.parquet").read_bytes()
    assert check(CheckConfig("memory://dd")) == []


def test_pack_leaves_them_out_and_check_proves_it(root, world):
    truth = world[1]
    before = pack(PackConfig(root, workers=1)).counts
    run(root)
    found = check(CheckConfig(root))
    assert len(found) == SHARDS
    assert "is a duplicate by dedup/; run `clipmill pack` again" in found[0]
    summary = pack(PackConfig(root, workers=1))
    assert (summary.made, summary.counts[EXACT_DUPLICATE] + summary.counts[NEAR_DUPLICATE]) == (SHARDS, len(truth))
    assert sum(summary.counts.values()) == before["success"]
    assert check(CheckConfig(root)) == []
    keys = [set(shard_keys(join(root, f"shards/{shard_name(shard)}.tar"))) for shard in range(SHARDS)]
    assert not set().union(*keys) & set(truth)
    raw_keys = set[str]()
    for shard in range(SHARDS):
        raw_keys |= {sample.key for sample in read_shard(join(root, f"raw/{shard_name(shard)}.tar"))}
    assert set().union(*keys) == raw_keys - set(truth)
    assert pack(PackConfig(root, workers=1)).made == 0
    stages = read_json(join(root, "dataset.json"))["stages"]
    assert list(ordered(stages)) == ["ingest", "dedup", "pack"]
    assert mismatches({name: block["counts"] for name, block in stages.items()}) == []


def test_pack_again_remakes_only_what_a_new_list_changes(root, world):
    run(root)
    pack(PackConfig(root, workers=1))
    run(root, near_bits=-1, overwrite=True)
    changed = {key[:5] for key, reason in world[1].items() if reason == NEAR_DUPLICATE}
    assert pack(PackConfig(root, workers=1)).made == len(changed)
    assert check(CheckConfig(root)) == []
    shutil.rmtree(join(root, "dedup"))
    assert pack(PackConfig(root, workers=1)).counts.keys() == {"success"}


def test_pack_refuses_a_list_of_other_raw_shards(root):
    run(root)
    Path(root, "dedup", "00005_stats.json").unlink()
    with pytest.raises(UserError, match=r"dedup has 5 shards, raw/ has 6: run `clipmill dedup"):
        pack(PackConfig(root))
    run(root)
    shards = planted()[0]
    shards[5][0] = Item("http://h/other", jpeg(make_image("other")))
    raw(root, shards)
    with pytest.raises(UserError, match=r"dedup/00000 was made from other raw shards: run `clipmill dedup"):
        pack(PackConfig(root))
    assert any("was made from other raw shards" in problem for problem in check(CheckConfig(root)))


def test_pack_refuses_a_list_that_does_not_fit_or_is_broken(root):
    run(root)
    path = join(root, "dedup/00000.parquet")
    schema = pq.read_schema(path)
    pq.write_table(
        pa.Table.from_pylist([{"key": "nope", "reason": EXACT_DUPLICATE, "kept": "000000000"}], schema), path
    )
    with pytest.raises(ShardsFailed, match=r"dedup/00000.parquet: key nope is not in raw/00000.tar; run dedup"):
        pack(PackConfig(root, workers=1))
    Path(path).write_bytes(b"half")
    with pytest.raises(ShardsFailed, match=r"dedup/00000.parquet: not a readable Parquet file"):
        pack(PackConfig(root, workers=1))


def forged(root: str, shard: int, **changes: str) -> None:
    """Change the first row of a list and vouch for it in the done-record."""
    path = f"dedup/{shard_name(shard)}.parquet"
    table = pq.read_table(join(root, path))
    rows = table.to_pylist()
    rows[0] |= changes
    pq.write_table(pa.Table.from_pylist(rows, table.schema), join(root, path))
    vouch(root, "dedup", shard, path)


def test_check_finds_every_lie_of_a_list(root):
    run(root)
    pack(PackConfig(root, workers=1))
    assert check(CheckConfig(root)) == []
    first = pq.read_table(join(root, "dedup/00002.parquet")).to_pylist()[0]
    for changes, complaint in (
        ({"kept": "999999999"}, "goes for key 999999999, which is not in raw/ or goes itself"),
        ({"kept": first["key"]}, "which is not in raw/ or goes itself"),
        ({"reason": "ugly"}, "has reason 'ugly'"),
        ({"key": "999999999"}, "key 999999999 is not in"),
    ):
        forged(root, 2, **{**first, **changes})
        problems = check(CheckConfig(root))
        assert any(complaint in problem and "dedup/00002" in problem for problem in problems), problems
    Path(root, "dedup/00002.parquet").write_bytes(b"half")
    assert any("dedup/00002.parquet" in problem for problem in check(CheckConfig(root)))


def test_a_broken_raw_shard_is_named(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, 2)
    assert run(root).counts["success"] > 0  # neither sha256 nor phash
    path = Path(root, "raw", "00001.tar")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ShardsFailed, match=r"raw/00001.tar: truncated tar"):
        run(root, overwrite=True)
    Path(root, "raw", "00001.parquet").write_bytes(b"half")
    with pytest.raises(ShardsFailed, match=r"raw/00001.parquet: not a readable Parquet file"):
        run(root, overwrite=True)


def test_a_foreign_phash_column_is_refused(root):
    path = join(root, "raw/00000.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("phash")
    pq.write_table(table.set_column(place, "phash", pa.array(["x"] * len(table))), path)
    with pytest.raises(ShardsFailed, match=r"raw/00000.parquet: its column phash has no 64-bit hashes"):
        run(root)


def test_bad_options_name_field_and_value():
    with pytest.raises(UserError, match="--near-bits 9: must be -1"):
        DedupConfig("x", 9)
    with pytest.raises(UserError, match="--near-bits -2"):
        DedupConfig("x", -2)
    with pytest.raises(UserError, match="workers 0"):
        DedupConfig("x", workers=0)
    with pytest.raises(UserError, match="--memory-gb 0"):
        DedupConfig("x", memory_gb=0)
    with pytest.raises(UserError, match="has no finished shards: run `clipmill ingest"):
        run("/nowhere")
