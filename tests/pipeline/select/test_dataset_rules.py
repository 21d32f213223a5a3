"""Rules of `select` over all samples at once, and lists of samples: against plain loops, and planted in a dataset."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import tree, vouch
from small_parts import run_task

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import ShardAssignment, ShardsFailed
from pipeline.select import cells as cells_module
from pipeline.select import semantic_duplicates
from pipeline.select.balance import EntryCounts, count_entries
from pipeline.select.cells import Embeddings, divide
from pipeline.select.config import SelectConfig
from pipeline.select.export_list import write_uids
from pipeline.select.facts import ShardFacts, find_sources
from pipeline.select.sample_lists import name_ids, read_sample_list, uid_halves, uid_ids
from pipeline.select.semantic_duplicates import DuplicateRule, first_alike, repeated_rows
from pipeline.select.stage import select
from pipeline.select.top_share import find_top_share
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.embeddings import read_embeddings
from shards_spec.files import DataError, UserError
from shards_spec.layout import raw_parquet, teacher_parquet
from shards_spec.manifest import read_done, remove_shards
from shards_spec.parquet import read_table, write_table
from shards_spec.selection import read_selection

VALUES = st.sampled_from([math.nan, -1.0, 0.0, 0.25, 0.3, 1.0])


@given(st.lists(VALUES, max_size=40), st.sampled_from([0.01, 0.3, 0.5, 0.7, 1.0]), st.integers(1, 7), st.randoms())
def test_the_top_share_is_that_of_a_sorted_list(values, share, part, rng):
    keys = [f"{number:03d}" for number in range(len(values))]
    rng.shuffle(keys)
    ranked = sorted(
        (key for key, value in zip(keys, values, strict=True) if not math.isnan(value)),
        key=lambda key: (-values[keys.index(key)], key),
    )
    expected = ranked[: math.ceil(Fraction(str(share)) * len(values))]
    parts = [(np.array(values[i : i + part]), keys[i : i + part]) for i in range(0, len(values), part)]
    top = find_top_share(share, lambda: parts)
    kept = [[key for key, own in zip(keys, top.keeps(values, keys), strict=True) if own] for values, keys in parts]
    assert sorted(chain.from_iterable(kept)) == sorted(expected)
    assert (top.kept, top.samples) == (len(expected), len(values))


def test_balance_thins_out_frequent_entries():
    entries = [["dog"]] * 4000 + [["dog", "rare"]] * 50 + [["cat"]] * 1000 + [[]] * 10
    keys = [f"{number:09d}" for number in range(len(entries))]
    counts = EntryCounts(count_entries([pa.array(entries[:100]), pa.array(entries[100:])]), wanted=1000, seed=0)
    assert counts.counts == {"cat": 1000, "dog": 4050, "rare": 50}
    kept = counts.keeps(entries, keys)
    assert kept[4000:5050].all()
    assert not kept[5050:].any()
    share = 1000 / 4050
    assert abs(kept[:4000].mean() - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert np.array_equal(kept[100:200], counts.keeps(entries[100:200], keys[100:200]))


def test_an_entry_that_misses_leaves_the_others_their_chance():
    """MetaCLIP's loop: the first entry whose draw succeeds keeps the text."""
    counts = EntryCounts({"a": 2000, "b": 4000}, wanted=1000, seed=3)
    kept = counts.keeps([["a", "b"]] * 4000, [str(number) for number in range(4000)])
    assert kept.mean() == pytest.approx(1 - 0.5 * 0.75, abs=0.03)


def greedy(embeddings: np.ndarray, rows: list[int], above: float) -> dict[int, int]:
    """What goes of the rows of a cell, in order, and the first that stays for it."""
    kept, gone = [], {}
    for row in rows:
        for other in kept:
            if embeddings[row] @ embeddings[other] > above:
                gone[row] = other
                break
        else:
            kept.append(row)
    return gone


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 1000))
def test_what_is_alike_is_what_a_plain_loop_finds(number, block, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (number, 4)).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
    with patch.multiple(semantic_duplicates, BLOCK=block, TILE=max(1, block // 2)):
        found = first_alike(vectors.__getitem__, number, 0.75)
    assert {row: int(other) for row, other in enumerate(found) if other >= 0} == greedy(vectors, range(number), 0.75)


@pytest.mark.parametrize("seen", [1 << 18, 1000])
def test_cells_divide_and_planted_copies_are_found(tmp_path, seen, monkeypatch):
    monkeypatch.setattr(cells_module, "MOST_SEEN", seen)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 16)).astype(np.float32)
    copies = rng.permutation(3000)[:200].reshape(2, 100)
    vectors[copies[1]] = vectors[copies[0]] + 0.01 * rng.standard_normal((100, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    embeddings = Embeddings(str(tmp_path / "embeddings"))
    embeddings.append(vectors[:1000])
    embeddings.append(vectors[1000:])
    cells = list(divide(embeddings, 30))
    assert np.array_equal(np.sort(np.concatenate(cells)), np.arange(3000))
    assert 20 <= len(cells) <= 30
    assert max(map(len, cells)) < 600
    expected = {}
    for rows in cells:
        expected |= greedy(embeddings.take(np.arange(3000)), rows.tolist(), 0.99)
        centre = embeddings.take(rows).sum(0)
        similarities = embeddings.take(rows) @ centre / np.linalg.norm(centre)
        assert np.corrcoef(similarities, np.arange(len(rows)))[0, 1] > 0.8  # the most alike come last
    repeated = repeated_rows(embeddings, DuplicateRule("", 0.99, 30))
    assert {int(row): int(repeated[row]) for row in np.flatnonzero(repeated >= 0)} == expected
    pairs = {frozenset(pair) for pair in copies.T.tolist()}
    assert sum(frozenset(pair) in pairs for pair in expected.items()) >= 90  # others are divided by a cell's border


def selected(root: str, name: str = "selected") -> dict[str, str | None]:
    """Key to reason of all samples."""
    selections = [read_selection(root, name, shard) for shard in range(2)]
    keys = chain.from_iterable(one.keys for one in selections)
    return dict(zip(keys, chain.from_iterable(one.reasons for one in selections), strict=True))


def kept(root: str, name: str = "selected") -> list[str]:
    return [key for key, reason in selected(root, name).items() if reason is None]


def test_the_best_of_all_shards(root):
    sources = find_sources(root, (), None, [0])
    cosines = {}
    for shard in range(2):
        facts = ShardFacts(root, shard, sources)
        cosines |= dict(zip(facts.keys, facts.of_samples("cosine").to_pylist(), strict=True))
    summary = select(SelectConfig(root, where=("similarity >= 0.1",), top=0.4, by="cosine", workers=1))
    meeting = [key for key in cosines if key != "000000000"]
    best = sorted(meeting, key=lambda key: -cosines[key])[:3]  # of 7, rounded up
    assert {key for key, reason in selected(root).items() if reason is None} == {*best}
    not_best = f"not in the top 0.4 by cosine, which begins at {cosines[best[-1]]:.4g}"
    assert summary.counts == {"success": 3, not_best: 4, "not similarity >= 0.1": 1}
    assert check(CheckConfig(root)) == []
    assert ".survey" not in os.listdir(f"{root}/select/selected")
    assert select(SelectConfig(root, where=("similarity >= 0.1",), top=0.4, by="cosine", workers=1)).made == 0


def test_a_shard_that_is_made_again_agrees_with_the_others(root):
    config = SelectConfig(root, top=0.5, by="similarity", workers=1)
    select(config)
    whole = selected(root)
    assert kept(root) == [f"00001000{index}" for index in range(4)]
    remove_shards(f"{root}/select/selected", 1)
    assert select(config).made == 1
    assert selected(root) == whole


def test_what_a_killed_run_left_counts_for_the_same_rules_alone(root):
    config = SelectConfig(root, top=0.5, by="similarity", workers=1)
    with patch("pipeline.select.survey.write_json", side_effect=OSError), pytest.raises(OSError):
        select(config)  # after the drafts, before the verdict
    drafts = f"{root}/select/selected/.survey/00000.parquet"
    before = os.stat(drafts).st_mtime_ns
    with (
        patch("pipeline.select.stage.write_selection", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        select(config)  # after the verdict
    assert os.stat(drafts).st_mtime_ns == before
    select(SelectConfig(root, top=0.25, by="similarity", balance=1, workers=1))
    left = tree(f"{root}/select")
    shutil.rmtree(f"{root}/select")
    select(SelectConfig(root, top=0.25, by="similarity", balance=1, workers=1))
    assert tree(f"{root}/select") == left


def copy_draft(survey: Path) -> None:
    shutil.copy(survey / "00000.parquet", survey / "00001.parquet")


def lose_repeated(survey: Path) -> None:
    file = max(survey.glob("*-1.parquet"))
    write_table(str(file), read_table(str(file)).slice(1))


def raise_threshold(survey: Path) -> None:
    file = survey / "verdict.json"
    verdict = json.loads(file.read_text())
    verdict["top"]["threshold"] += 0.01
    file.write_text(json.dumps(verdict))


def truncate_verdict(survey: Path) -> None:
    file = survey / "verdict.json"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (copy_draft, "00001.parquet: not the file that was written; delete .*\\.survey and run"),
        (lose_repeated, "-1.parquet: not the file that was written; delete .*\\.survey and run"),
        (raise_threshold, None),
        (truncate_verdict, None),
    ],
)
def test_a_survey_that_was_damaged_after_a_kill_is_made_again(root, damage, message):
    """An array's job looks at its own shards alone: what is damaged there is a message."""
    config = SelectConfig(root, semantic_duplicates=0.9, top=0.5, by="similarity", workers=1)
    select(config)
    undisturbed = tree(f"{root}/select")
    shutil.rmtree(f"{root}/select")
    with (
        patch("pipeline.select.stage.write_selection", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        select(config)
    survey = Path(root, "select/selected/.survey")
    damage(survey)
    if message is not None:
        with pytest.raises(ShardsFailed, match=message):
            run_task(select, config, [0, 1])
    select(config)
    assert tree(f"{root}/select") == undisturbed


def test_killed_at_random_and_run_again(root):
    config = SelectConfig(root, semantic_duplicates=0.9, top=0.5, by="similarity", balance=2, workers=1)
    start = time.monotonic()
    select(config)
    duration = time.monotonic() - start
    undisturbed = tree(f"{root}/select")
    rng = random.Random(0)
    for _ in range(5):
        shutil.rmtree(f"{root}/select")
        child = multiprocessing.get_context("fork").Process(target=select, args=(config,))
        child.start()
        time.sleep(rng.uniform(0, duration))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        select(config)
        assert tree(f"{root}/select") == undisturbed


@given(st.lists(st.text("0123456789abcdefABCDEF", min_size=1, max_size=2).map(lambda text: text * 16), max_size=20))
def test_names_of_a_list_are_those_of_its_samples(names):
    ids = name_ids([*names, None, ""])
    assert ids[len(names) :].tolist() == [0, 0]
    known = [name.lower() if len(name) == 32 else name for name in names]
    for name, own in zip(known, ids.tolist(), strict=False):
        assert {other for other, number in zip(known, ids.tolist(), strict=False) if number == own} == {name}
    halves = np.array([uid_halves(name) for name in names if len(name) == 32], np.uint64).reshape(-1, 2)
    assert uid_ids(halves).tolist() == [own for name, own in zip(names, ids.tolist(), strict=False) if len(name) == 32]


def test_a_job_of_an_array_waits_for_the_survey_of_another(root):
    class Half(ShardAssignment):
        is_complete = False

        def __init__(self, shard: int) -> None:
            self.shard = shard

        def claim(self, shard: int) -> bool:
            return shard == self.shard

    config = SelectConfig(root, top=0.5, by="similarity", workers=1)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda shard: select(config, Half(shard)).made, range(2)))
    assert made == [1, 1]
    assert select(config).made == 0
    assert [key for key, reason in selected(root).items() if reason is None] == [
        f"00001000{index}" for index in range(4)
    ]


def test_other_rules_under_the_same_name(root):
    select(SelectConfig(root, top=0.5, by="similarity", workers=1))
    with pytest.raises(UserError, match=r"--top: 0.5 before, 0.25 now.*--overwrite"):
        select(SelectConfig(root, top=0.25, by="similarity", workers=1))
    assert select(SelectConfig(root, top=0.25, by="similarity", workers=1, overwrite=True)).counts["success"] == 2
    with pytest.raises(UserError, match="--from"):
        select(SelectConfig(root, from_=(raw_parquet(root, 0),), workers=1))


def test_lists_of_others(root, tmp_path):
    urls = read_table(raw_parquet(root, 0), ["url", "sha256", "key"]).to_pylist()
    text = tmp_path / "list.txt"
    text.write_text("\n".join([urls[0]["url"], urls[1]["sha256"].upper(), "000010003", "nobody's"]))
    summary = select(SelectConfig(root, from_=(str(text),), drop=(raw_parquet(root, 1),), workers=1))
    assert kept(root) == ["000000000", "000000001"]
    assert summary.counts == {"success": 2, "not in the list of --from": 2, "in the list of --drop": 4}
    hashes = read_done(f"{root}/select/selected", 0).config["from"]
    assert [len(digest) for digest in hashes] == [64]


def test_semantic_duplicates_across_shards(root):
    """The images of a key of each shard get the vectors of one of the other."""
    copied = {"000010001": "000000002", "000010003": "000000000"}
    path = teacher_parquet(root, "tea", 0)
    keys, vectors, _ = read_embeddings(path, ["image_0", "image_1"])
    other = teacher_parquet(root, "tea", 1)
    table = read_table(other)
    for view in range(2):
        column = table.column(f"image_{view}").to_pylist()
        for key, source in copied.items():
            column[table.column("key").to_pylist().index(key)] = vectors[f"image_{view}"][keys.index(source)].tobytes()
        place = table.schema.get_field_index(f"image_{view}")
        table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.types[place]))
    write_table(other, table, compression="none", use_dictionary=False, write_statistics=False)
    vouch(root, "teacher/tea", 1, "teacher/tea/00001.parquet")
    summary = select(SelectConfig(root, semantic_duplicates=0.9999, cells=1, workers=1))
    assert summary.counts == {"success": 6, "semantic duplicate": 2}
    pairs = {}
    for shard in range(2):
        one = read_selection(root, "selected", shard)
        pairs |= {key: pair for key, pair in zip(one.keys, one.pairs, strict=True) if pair}
    assert {frozenset(pair) for pair in pairs.items()} == {frozenset(pair) for pair in copied.items()}
    assert check(CheckConfig(root)) == []
    gone = min(pairs)
    assert f"left out: semantic duplicate ({pairs[gone]})" in "\n".join(why(WhyConfig(root, gone)).lines)


def test_a_list_that_is_published_and_applied(root, tmp_path):
    for by, name in (("sha256", "list.txt"), ("url", "list.parquet")):
        path = str(tmp_path / name)
        select(SelectConfig(root, top=0.3, by="similarity", workers=1, export_list=path, export_by=by, overwrite=True))
        select(SelectConfig(root, "again", from_=(path,), workers=1, overwrite=True))
        assert kept(root, "again") == ["000010001", "000010002", "000010003"]


def test_an_exported_list_replaces_no_file_of_the_dataset(root, tmp_path):
    before = read_table(raw_parquet(root, 0))
    (tmp_path / "link").symlink_to(root)
    for path in (raw_parquet(root, 0), f"{tmp_path}/link/raw/00000.parquet", f"{root}/new.txt", root):
        with pytest.raises(UserError, match=r"--export-list .* lies in the dataset"):
            select(SelectConfig(root, top=0.3, by="similarity", workers=1, export_list=path))
    with pytest.raises(UserError, match="is a folder; give a file"):
        select(SelectConfig(root, top=0.3, by="similarity", workers=1, export_list=str(tmp_path)))
    assert read_table(raw_parquet(root, 0)).equals(before)


def test_another_table_in_the_place_of_a_raw_one_is_named(root, tmp_path):
    text = tmp_path / "list.txt"
    text.write_text(f"{read_table(raw_parquet(root, 0), ['url']).column('url')[0].as_py()}\n")
    write_table(raw_parquet(root, 0), pa.table({"key": ["000000000"]}))
    with pytest.raises(DataError, match=r"raw/00000.parquet: no column status.*clipmill ingest"):
        select(SelectConfig(root, from_=(str(text),), workers=1))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", 'note,key\n"a, b",000000001\n,000010002\n'),
        ("list.tsv", 'KEY\tnote\n000000001\t"a\n000010002\tb\n'),
        ("list", '"url","key"\n"","000000001"\n"","000010002"\n'),
    ],
)
def test_a_table_is_known_by_its_header(root, tmp_path, name, text):
    (tmp_path / name).write_text(text.replace('"url"', '"uri"'))
    select(SelectConfig(root, from_=(str(tmp_path / name),), workers=1))
    assert kept(root) == ["000000001", "000010002"]


def test_lists_that_are_none(root, tmp_path):
    (tmp_path / "list.csv").write_text("id,note\n000000001,a\n")
    with pytest.raises(UserError, match=r"--from .*list.csv: none of the columns uid, url, sha256, key"):
        select(SelectConfig(root, from_=(str(tmp_path / "list.csv"),), workers=1))
    with pytest.raises(UserError, match=r"--drop .*: is a folder; give the file of the list"):
        select(SelectConfig(root, drop=(str(tmp_path),), workers=1))


def test_uids_as_datacomp_publishes_them(tmp_path):
    uids = ["0a" * 16, "f" * 32, "1" * 32, "00" * 15 + "01", "0" * 32]
    path = tmp_path / "subset.npy"
    write_uids(str(path), iter([uids[:2], uids[2:]]))
    array = np.load(path)
    assert array.dtype == np.dtype("u8,u8")
    assert array["f0"].tolist() == sorted(int(uid[:16], 16) for uid in uids)
    listed = np.load(read_sample_list((str(path),), "--from", str(tmp_path)).path)
    assert set(name_ids(uids).tolist()) == set(listed.tolist())
    assert len(listed) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 1.5, "by": "cosine"}, "--top 1.5"),
        ({"top": 0.5}, "belong together"),
        ({"top": 0.5, "by": "cosin"}, "did you mean cosine"),
        ({"top": 0.5, "by": "nothing"}, "nothing: no fact of that name; [^;]*$"),
        ({"top": 0.5, "by": "NSFW"}, "no sample has a number"),
        ({"top": 0.5, "by": "caption"}, "no sample has a number"),
        ({"from_": ("/nowhere",)}, "--from /nowhere: no such file"),
        ({"top": 0.5, "by": "cosine", "export_list": "x", "export_by": "uid"}, "no such column"),
        ({"top": 0.5, "by": "cosine", "export_list": "x.npy"}, "--export-by uid"),
        ({}, "needs a rule"),
        ({"where": ("words >",)}, "is no condition"),
        ({"captions_where": ("words >",)}, "is no condition"),
        ({"weight": "words >"}, "is no condition"),
    ],
)
def test_what_cannot_be_selected(root, options, message):
    with pytest.raises(UserError, match=message):
        select(SelectConfig(root, workers=1, **options))
    assert not os.path.exists(f"{root}/select/selected")
