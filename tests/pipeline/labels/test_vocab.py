"""Vocabularies: counting over shards in any order, coverage, rules that do not mix, CatLIP's own pickle."""

import pickle
import random
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import skip_or_fail
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_data import covered_by, tree, write_raw
from small_parts import DAMAGES, finish, kill_task, missing, run_task

import clipmill
from pipeline.core.runner import ShardsFailed
from pipeline.labels import vocab_parts
from pipeline.labels.catlip_pickle import catlip_bytes, read_catlip
from pipeline.labels.vocab_parts import sum_counts
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.labels.wordnet import load_wordnet
from pipeline.pack.config import PackConfig
from pipeline.pack.final_shard import SCHEMA
from pipeline.pack.stage import pack
from shards_spec.files import DataError, UserError, join, read_json
from shards_spec.layout import shard_name
from shards_spec.lock import locked
from shards_spec.manifest import Done, write_stage
from shards_spec.vocab import Vocabulary, build_vocabulary, read_vocabulary, rule_of

DOG = "n02084071"
CAT = "n02121620"
WALL = "n04546855"
TENCH = "n01440764"  # a class of ImageNet-1k
RELEASED = {"wordnet": "3.0", "rule": "catlip-released"}


@pytest.fixture(autouse=True, scope="module")
def _wordnet():
    try:
        load_wordnet()
    except UserError as error:
        skip_or_fail(str(error))


def packed(root, shards, rule=RELEASED):
    """ROOT/shards as `pack` leaves it, tables alone: per shard, sample and caption a list of WNIDs."""
    Path(root, "shards").mkdir(parents=True)
    for shard, samples in enumerate(shards):
        rows = [
            {**dict.fromkeys(SCHEMA.names), "key": f"{shard}-{i}", "synsets": synsets}
            for i, synsets in enumerate(samples)
        ]
        path = join(root, f"shards/{shard_name(shard)}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=3)
        Done("pack", shard, dict(rule), {"success": len(rows)}, {}, {}).write(join(root, "shards"))
    write_stage(root, "pack", {"config": {"captioner": None, **rule}, "shards": len(shards), "counts": {}})
    return root


def made_up(seed=0, shards=4):
    draw = random.Random(seed)

    def captions():
        return [draw.choices([DOG, CAT, WALL, TENCH], k=draw.randrange(4)) for _ in range(draw.randint(1, 3))]

    return [[captions() for _ in range(draw.randint(1, 9))] for _ in range(shards)]


@pytest.mark.parametrize("source", ["all", "original", "synthetic"])
def test_counts_documents_and_coverage_are_those_of_a_plain_loop(tmp_path, source):
    shards = made_up()
    root = packed(str(tmp_path / "ds"), shards)
    piece = {"all": slice(None), "original": slice(0, 1), "synthetic": slice(1, None)}[source]
    samples = [sample[piece] for sample in chain(*shards)]
    captions = list(chain(*samples))
    counts, documents = Counter(chain(*captions)), Counter(chain(*map(set, captions)))
    made = vocab(VocabConfig(root, min_count=0, source=source))
    assert {row[0]: row[2:] for row in made.rows} == {wnid: (counts[wnid], documents[wnid]) for wnid in counts}
    assert (made.header["captions"], made.header["occurrences"]) == (len(captions), counts.total())
    small = vocab(VocabConfig(root, min_count=0, source=source, top_k=2, name="small"))
    per_sample = [set(chain(*sample)) & set(small.index) for sample in samples]
    assert covered_by(root, source, small) == {
        "samples": len(samples),
        "samples_with_label": sum(map(bool, per_sample)),
        "labels": sum(map(len, per_sample)),
        "imagenet_classes": int(TENCH in small.index),
    }
    assert read_json(join(root, "dataset.json"))["stages"]["vocab/small"]["coverage"]["samples"] == len(samples)


def test_counts_are_summed_up_a_few_tables_or_rows_at_once(monkeypatch):
    names = ["wnid", "occurrences", "documents"]
    parts = [pa.table([[DOG, f"n{i:08}"], [i, 1], [1, 1]], names=names) for i in range(50)]
    whole = sum_counts(parts)
    summed = []
    rows = vocab_parts._sum_rows
    monkeypatch.setattr(vocab_parts, "_sum_rows", lambda tables: summed.append(len(tables)) or rows(tables))
    monkeypatch.setattr(vocab_parts, "TABLES_AT_ONCE", 7)
    assert sorted(sum_counts(iter(parts)).to_pylist(), key=str) == sorted(whole.to_pylist(), key=str)
    assert max(summed) == 8
    monkeypatch.setattr(vocab_parts, "ROWS_AT_ONCE", 3)
    assert sorted(sum_counts(iter(parts)).to_pylist(), key=str) == sorted(whole.to_pylist(), key=str)
    assert {"wnid": DOG, "occurrences": sum(range(50)), "documents": 50} in whole.to_pylist()


def test_the_order_of_captions_and_shards_does_not_matter(tmp_path):  # fact 15
    shards = made_up(1)
    first = vocab(VocabConfig(packed(str(tmp_path / "a"), shards), min_count=1))
    draw = random.Random(2)
    shuffled = list(chain(*shards))
    draw.shuffle(shuffled)
    again = vocab(VocabConfig(packed(str(tmp_path / "b"), [shuffled[::2], shuffled[1::2]]), min_count=1))
    assert again == first
    assert (tmp_path / "a/vocab/all.tsv").read_bytes() == (tmp_path / "b/vocab/all.tsv").read_bytes()


def test_tasks_of_an_array_one_of_which_is_killed_make_the_bytes_of_the_plain_command(tmp_path):
    shards = made_up(3, shards=5)
    root, plain = (packed(str(tmp_path / name / "ds"), shards) for name in ("array", "plain"))
    config = VocabConfig(root, min_count=1)
    assert missing("vocab", config) == [((0, 2),), ((2, 5),)]
    assert run_task(vocab, config, range(2)).made == 2
    kill_task(vocab, config, range(2, 5))
    assert missing("vocab", config) == [((3, 4),), ((4, 5),)]
    assert run_task(vocab, config, [4]).made == 1
    outcome, left = finish(vocab, config, "vocab/.all")
    assert (outcome.made, left) == (0, [3])
    assert not Path(root, "vocab/all.tsv").exists()
    run_task(vocab, config, [3])
    outcome, left = finish(vocab, config, "vocab/.all")
    assert left == []
    assert outcome == vocab(VocabConfig(plain, min_count=1))
    assert tree(root) == tree(plain)
    assert [path.name for path in Path(root, "vocab").iterdir()] == ["all.tsv"]


def test_parts_that_a_killed_run_left_count_for_the_same_captions_of_the_same_shards_only(tmp_path):
    shards = made_up(4)
    root, plain = (packed(str(tmp_path / name / "ds"), shards) for name in ("killed", "plain"))
    run_task(vocab, VocabConfig(root, min_count=0, source="all"), range(3))
    Path(root, "shards/00001.parquet").write_bytes(Path(root, "shards/00002.parquet").read_bytes())
    Path(plain, "shards/00001.parquet").write_bytes(Path(root, "shards/00002.parquet").read_bytes())
    for source in ("all", "original"):
        found, expected = (vocab(VocabConfig(one, min_count=0, source=source)) for one in (root, plain))
        assert found == expected
    assert tree(root) == tree(plain)


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_made_again(damage, is_array, tmp_path, caplog):
    shards = made_up(4)
    root, plain = (packed(str(tmp_path / name / "ds"), shards) for name in ("killed", "plain"))
    config = VocabConfig(root, min_count=0)
    run_task(vocab, config, range(4))
    DAMAGES[damage](Path(root, "vocab/.all"))
    if is_array:
        assert finish(vocab, config, "vocab/.all")[1] == []
    else:
        vocab(config)
    assert "vocab/.all/00001_stats.json: the part that it records is damaged; it is made again" in caplog.text
    assert len(caplog.records) == 1, "the others are taken as they are"
    vocab(VocabConfig(plain, min_count=0))
    assert tree(root) == tree(plain)


def test_a_second_run_of_a_name_is_refused_and_tasks_of_an_array_are_not(tmp_path):
    config = VocabConfig(packed(str(tmp_path / "ds"), made_up()), min_count=0)
    lock, refused = join(config.root, ".vocab.all.lock"), "vocab/all.tsv is being written by process .*: wait for its"
    with locked(lock, "the vocabulary"):
        with pytest.raises(UserError, match=refused):
            vocab(config)
        with pytest.raises(UserError, match=refused):
            finish(vocab, config, "vocab/.all")
        with pytest.raises(UserError, match=refused):
            run_task(vocab, config, [0])
        vocab(VocabConfig(config.root, min_count=0, name="other"))
    with locked(lock, "the vocabulary", shared=True):
        assert run_task(vocab, config, range(2)).made == 2
        with pytest.raises(UserError, match=refused):
            vocab(config)
    vocab(config)
    assert not Path(lock).exists()


@pytest.mark.slow
def test_worker_processes_count_the_same(tmp_path):
    shards = made_up(5, shards=32)
    root, plain = (packed(str(tmp_path / name / "ds"), shards) for name in ("workers", "plain"))
    vocab(VocabConfig(root, min_count=0, workers=2))
    vocab(VocabConfig(plain, min_count=0, workers=1))
    assert tree(root) == tree(plain)


def test_a_broken_shard_is_named_and_the_others_are_not_counted_again(tmp_path):
    root = packed(str(tmp_path / "ds"), made_up(6))
    good = Path(root, "shards/00002.parquet").read_bytes()
    Path(root, "shards/00002.parquet").write_bytes(good[:50])
    said = r"(?s)vocab/all: 1 of 4 shards failed\n  00002: .*00002\.parquet: not a readable Parquet"
    with pytest.raises(ShardsFailed, match=said):
        vocab(VocabConfig(root, min_count=0))
    Path(root, "shards/00002.parquet").write_bytes(good)
    assert missing("vocab", VocabConfig(root)) == [((2, 3),)]
    assert len(vocab(VocabConfig(root, min_count=0))) == 4


def test_threshold_top_k_and_ties(tmp_path):
    root = packed(str(tmp_path / "ds"), [[[[WALL, DOG, CAT]], [[WALL, DOG, CAT, TENCH]], [[WALL]]], [[[]], [[], []]]])
    order = [WALL, DOG, CAT]  # ties by WNID
    assert [row[0] for row in vocab(VocabConfig(root, min_count=1)).rows] == order
    assert [row[0] for row in vocab(VocabConfig(root, min_count=0, top_k=2)).rows] == order[:2]
    with pytest.raises(UserError, match="--min-count 3 leaves no synset: the most frequent one counts 3"):
        vocab(VocabConfig(root, min_count=3))


def test_the_command_prints_coverage(tmp_path, monkeypatch, caplog, capsys):
    root = packed(str(tmp_path / "ds"), [[[[DOG, DOG, TENCH]], [[]]], [[[CAT]], [[DOG], [CAT]]]])
    monkeypatch.setattr(sys, "argv", ["clipmill", "vocab", root, "--min-count", "0", "--source", "all"])
    with caplog.at_level("INFO"), pytest.raises(SystemExit, match="0"):
        clipmill.main()
    said = "75.0 % of 4 samples labelled, 1.25 labels per sample, 1 of the 1000 classes of ImageNet-1k"
    assert f"vocab/all.tsv: {said}" in caplog.text
    assert "vocab: 3 synsets of 6 occurrences" in capsys.readouterr().out


def test_the_header_names_the_rule_of_the_shards(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, 1)
    pack(PackConfig(root, workers=1, collocations=True, stop_words="function"))
    made = vocab(VocabConfig(root, min_count=0))
    config = read_json(join(root, "dataset.json"))["stages"]["pack"]["config"]
    assert made.header["rule"] == config["rule"] == "catlip-released+collocations+stop"
    assert made.header["stop_words"] == config["stop_words"]
    made.check_rule(config, "it")
    with pytest.raises(UserError, match=r"rule: 'catlip-released\+collocations\+stop' before, 'catlip-released' now"):
        pack(PackConfig(root, workers=1))


def test_a_vocabulary_of_another_rule_names_both_and_the_mend():
    ours = Vocabulary(((DOG, "dog", 1, 1),), {**RELEASED, "captions": 1})
    ours.check_rule({"captioner": "x", **RELEASED}, "v.tsv")
    with pytest.raises(
        UserError,
        match=r"v\.tsv is of the label rule catlip-released \(\w{8}\) on WordNet 3\.0, the shards are of "
        r"catlip-released\+collocations \(\w{8}\) on WordNet 3\.0: take a vocabulary .*--overwrite",
    ):
        ours.check_rule({**RELEASED, "rule": "catlip-released+collocations"}, "v.tsv")
    stop = {**RELEASED, "rule": "catlip-released+stop"}
    with pytest.raises(UserError, match=r"\+stop with 1 stop word \(\w{8}\).*\+stop with 1 stop word \(\w{8}\)"):
        Vocabulary((), {**stop, "stop_words": ["a"]}).check_rule({**stop, "stop_words": ["b"]}, "v.tsv")
    assert rule_of({**stop, "stop_words": ["a"], "min_count": 1}) == {**stop, "stop_words": ["a"]}


def test_broken_vocabulary_files(tmp_path):
    path = tmp_path / "v.tsv"
    build_vocabulary({DOG: 3}, {DOG: 2}, {DOG: "dog"}, RELEASED, min_count=1).write(str(path))
    good = path.read_text()
    for text, problem in [
        (good.replace("\t3\t", "\tthree\t"), "line 4 is broken"),
        (good.replace("0\tn", "7\tn"), "line 4 is broken"),
        (good.replace("dog", "god"), "it was edited"),
        (good.replace("{", "<"), "not a clipmill vocabulary"),
        ("", "not a clipmill vocabulary"),
        ("\ud800", "line 1 is not UTF-8"),
    ]:
        path.write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(DataError, match=problem):
            read_vocabulary(str(path))


# --- CatLIP's own form --------------------------------------------------------------------------------------------

CATLIP = {"n5928118": 52_418_327, "n2084071": 9, "n7846": 30_000_000_000, "n2121620": 9}


def test_catlips_file_round_trip(tmp_path):
    root = packed(str(tmp_path / "ds"), [[[[DOG, WALL]], [[CAT]]]])
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(CATLIP))
    made = vocab(
        VocabConfig(root, import_catlip=str(tmp_path / "in.pkl"), export_catlip=str(tmp_path / "out.pkl"), top_k=3)
    )
    assert [row[:3] for row in made.rows] == [  # the file's order is that of the classes
        ("n05928118", "image", 52_418_327),
        (DOG, "dog", 9),
        ("n00007846", "person", 30_000_000_000),
    ]
    written = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert list(written.items()) == list(CATLIP.items())[:3]
    assert read_vocabulary(join(root, "vocab/all.tsv")) == made
    assert covered_by(root, "all", made)["labels"] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_catlips_file_in_every_protocol(protocol):
    expected = [(f"n{int(key[1:]):08d}", count) for key, count in CATLIP.items()]
    assert list(read_catlip(pickle.dumps(CATLIP, protocol), "x.pkl").items()) == expected
    many = {f"n{i}": i for i in range(5000)}
    assert len(read_catlip(pickle.dumps(many, protocol), "x.pkl")) == 5000


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (Path.write_text, (Path("unpickled"), "x"))


@pytest.mark.parametrize(
    "value",
    [
        Bomb(),
        {"n1": Bomb()},
        Counter(n1=1),
        {"n1": 1.5},
        {"n1": True},
        {"n1": "1"},
        {"dog": 1},
        {1: 1},
        {"n1": {}},
        {"n1": 1, "n01": 2},
        ["n1", 1],
        5,
        {("n1",): 1},
        {"n123456789": 1},
        {"n1": None},
        {"n１": 1},
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_anything_but_a_plain_dictionary_is_refused_and_never_run(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(DataError, match=r"^x\.pkl: "):
            read_catlip(pickle.dumps(value, protocol), "x.pkl")
    assert not Path("unpickled").exists()


def read_or_say(data):
    try:
        return read_catlip(data, "x.pkl")
    except DataError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 4))
@example(b"\x80\x02}r\xff\xff\xff\xff.", 0, 0)  # a memo place far away, which costs the real unpickler 64 GB
def test_damaged_pickles_are_one_clear_error(noise, at, protocol):
    data = pickle.dumps(CATLIP, protocol)
    for broken in (noise, data[:at] + noise + data[at:], data[:at] + noise, data[:at]):
        found = read_or_say(broken)
        if isinstance(found, str):
            assert found.startswith("x.pkl: ")
        else:
            assert all(type(key) is str and type(count) is int for key, count in found.items())


def test_imports_that_do_not_fit(tmp_path):
    root = packed(str(tmp_path / "ds"), [[[[DOG]]]], {**RELEASED, "rule": "catlip-released+synonyms"})
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(CATLIP))
    with pytest.raises(UserError, match=r"in\.pkl is of the label rule catlip-released .*the shards are of .*synonyms"):
        vocab(VocabConfig(root, import_catlip=str(tmp_path / "in.pkl")))
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"n1": 5}))
    with pytest.raises(DataError, match="n00000001 is no noun of WordNet 3"):
        vocab(VocabConfig(root, import_catlip=str(tmp_path / "in.pkl")))
    with pytest.raises(UserError, match=r"--import-catlip .*none cannot be read"):
        vocab(VocabConfig(root, import_catlip=str(tmp_path / "none")))


def test_the_written_pickle_is_what_catlips_code_indexes():
    made = Vocabulary((("n07846", "x", 5, 1),), {})
    keys = list(pickle.loads(catlip_bytes(made)))
    assert keys == ["n7846"]
