"""`select`: rules over facts, what train and pack make of a selection, and what check says of it."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_data import draw

from clipmill import _stage_line
from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report import ReportConfig, report
from pipeline.report.stages import stage_row
from pipeline.select.config import SelectConfig
from pipeline.select.facts import ShardFacts, find_sources
from pipeline.select.stage import select, workers_of
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.embeddings import read_embeddings
from shards_spec.files import DataError, UserError, sha256_file
from shards_spec.layout import final_parquet, final_tar, raw_parquet, teacher_parquet
from shards_spec.manifest import read_dataset
from shards_spec.parquet import read_table, write_table
from shards_spec.selection import CAPTIONS_LEFT_OUT, COPIES, read_selection, selected_sizes
from slurm.step import parse_steps

pytestmark = pytest.mark.integration
SHARDS = 2


@pytest.fixture
def model(built) -> str:
    return f"local-dir:{built.removesuffix('ds')}coca"


def keys_of(root: str, name: str = "selected") -> list[str]:
    selections = [read_selection(root, name, shard) for shard in range(SHARDS)]
    return [key for one in selections for key, copies in zip(one.keys, one.copies, strict=True) if copies]


def test_columns_of_the_list(root):
    summary = select(SelectConfig(root, where=('similarity > 0.28 and NSFW == "UNLIKELY"',), workers=1))
    assert keys_of(root) == ["000010000", "000010002"]
    assert summary.counts == {"success": 2, "not similarity > 0.28": 3, "not NSFW == 'UNLIKELY'": 3}
    assert check(CheckConfig(root)) == []
    assert "select/selected\n  selected" in told(root, "000010002")
    assert "select/selected\n  left out: not NSFW == 'UNLIKELY'" in told(root, "000010001")


def test_cosines_are_the_means_over_views(root):
    facts = ShardFacts(root, 0, find_sources(root, (), None, [0]))
    _, vectors, _ = read_embeddings(teacher_parquet(root, "tea", 0), ["image_0", "image_1", "text_0", "text_2"])
    image = (vectors["image_0"].astype(np.float64) + vectors["image_1"]) / 2
    expected = (image * vectors["text_0"]).sum(1)
    assert np.allclose(facts.of_samples("cosine").to_numpy(), expected, atol=1e-3)
    third = facts.of_captions("cosine").to_numpy()[facts.numbers == 2]
    assert np.allclose(third, (image * vectors["text_2"]).sum(1), atol=1e-3)


def told(root: str, key: str) -> str:
    return "\n".join(why(WhyConfig(root, key)).lines)


def test_pack_writes_a_selection(root, model):
    best = ShardFacts(root, 0, find_sources(root, (), None, [0])).of_captions("cosine").to_numpy().mean()
    select(SelectConfig(root, where=("similarity >= 0.2",), captions_where=(f"cosine > {best}",), workers=1))
    kept = {}
    for shard in range(SHARDS):
        one = read_selection(root, "selected", shard)
        table = read_table(final_parquet(root, shard)).to_pylist()
        for row, copies, captions in zip(table, one.copies, one.captions, strict=True):
            texts = [row["caption"], *row["synthetic"]]
            if copies:
                kept[row["key"]] = [texts[number] for number in (captions or range(len(texts)))]
    pack(PackConfig(root, select="selected", workers=1, overwrite=True))
    found = {
        row["key"]: [text for text in [row["caption"], *row["synthetic"]] if text]
        for shard in range(SHARDS)
        for row in read_table(final_parquet(root, shard)).to_pylist()
    }
    assert found == kept
    assert "select/selected\n  selected" in told(root, "000010000") or "made from other shards" in told(
        root, "000010000"
    )
    assert "dropped: not similarity >= 0.2" in told(root, "000000000")
    remade = cache(CacheConfig(root, model, name="tea", views=2))
    assert remade.made == SHARDS
    assert not remade.measurements.get("new_image_vectors")
    assert check(CheckConfig(root)) == []
    with pytest.raises(UserError, match="take another name"):
        select(SelectConfig(root, where=("width > 1",), workers=1))


def test_an_empty_selection_replaces_no_shards(root):
    select(SelectConfig(root, where=("similarity > 2",), workers=1))
    before = sha256_file(final_tar(root, 0))
    with pytest.raises(UserError, match=r"--select selected: no sample is selected.*--overwrite` with weaker rules"):
        pack(PackConfig(root, select="selected", workers=1, overwrite=True))
    assert sha256_file(final_tar(root, 0)) == before
    assert check(CheckConfig(root)) == []


@pytest.mark.parametrize("words", [["--where", "words >"], []])
def test_wrong_rules_are_not_submitted(root, words):
    with pytest.raises(UserError, match=r"is no condition|needs a rule"):
        parse_steps(["select", root, *words])


def test_captions_left_out_are_counted(root):
    """In the line, in the record and in the report, by rules of one sample and of all."""
    written = sum(len(ShardFacts(root, shard, find_sources(root, (), None, [0])).owners) for shard in range(SHARDS))
    for rule in ({}, {"top": 1.0, "by": "words"}):
        summary = select(SelectConfig(root, captions_where=("number == 0",), workers=1, overwrite=True, **rule))
        assert summary.counters == {CAPTIONS_LEFT_OUT: written - 8, COPIES: 8}
    assert f"{written - 8} captions left out by --captions-where, 8 samples of an epoch" in _stage_line("x", summary)
    assert "1 sample of an epoch" in _stage_line("x", replace(summary, counters={COPIES: 1}))
    assert check(CheckConfig(root)) == []
    report(ReportConfig(root))
    assert f"{written - 8} captions left out by --captions-where" in Path(root, "report.html").read_text()


def test_a_selection_of_none_in_the_report(root):
    select(SelectConfig(root, where=("similarity > 2",), workers=1))
    row = stage_row(root, "select/selected", read_dataset(root)["stages"]["select/selected"])
    assert (row.samples, row.lost) == (0, 8)


def test_another_evaluation_set_is_named(root, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.jpg").write_bytes(draw("other/a")[0])
    select(SelectConfig(root, against=(str(tmp_path / "sets"),), workers=1))
    (tmp_path / "sets" / "b.jpg").write_bytes(draw("other/b")[0])
    with pytest.raises(UserError, match=r"--against sets: '.*' before, '.*' now"):
        select(SelectConfig(root, against=(str(tmp_path / "sets"),), workers=1))


def test_cells_of_hardly_a_sample(root, caplog):
    select(SelectConfig(root, semantic_duplicates=0.99, cells=5, workers=1))
    assert "--cells 5 of 8 samples: most are alone in their cell" in caplog.text


def test_selections_that_are_not_there(root):
    select(SelectConfig(root, "good", where=("similarity > 0.2",), workers=1))
    os.makedirs(f"{root}/select/begun")
    for name in ("begun", "nosuch"):
        with pytest.raises(UserError, match=f"'{name}': no such selection .*; there are: good; .* --name {name}`"):
            pack(PackConfig(root, select=name, workers=1, overwrite=True))
        with pytest.raises(UserError, match=f"'{name}': no such selection .*; there are: good; .* --name {name}`"):
            selected_sizes(root, name, SHARDS)
    os.remove(f"{root}/select/good/00001_stats.json")
    with pytest.raises(UserError, match=r"select/good/00001.parquet is not finished: .* --name good`"):
        selected_sizes(root, "good", SHARDS)


def test_columns_whose_names_are_none_of_pythons(root):
    for shard in range(SHARDS):
        table = read_table(raw_parquet(root, shard))
        for name in ("my-col", "2 x", "class"):
            table = table.append_column(name, table.column("similarity"))
        write_table(raw_parquet(root, shard), table)
    select(SelectConfig(root, where=("my_col > 0.2 and _2_x > 0.3", "_class > 0.4"), workers=1))
    assert keys_of(root) == ["000010001", "000010002", "000010003"]
    select(SelectConfig(root, "best", top=0.25, by="my-col", workers=1))
    assert keys_of(root, "best") == ["000010002", "000010003"]


def test_options_that_no_rule_reads_are_refused(root):
    for words, said in [
        ("--where 'width > 1' --seed 3", "--seed 3 would not be used without --balance or --weight"),
        ("--where 'width > 1' --cells 3", "--cells 3 would not be used without --semantic-duplicates"),
        ("--where 'width > 1' --export-by url", "--export-by url would not be used without --export-list"),
        ("--balance 3 --teacher tea", "--teacher tea would not be used without --where"),
        ("--balance 3 --captioner cap", "--captioner cap would not be used without --where"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_steps(shlex.split(f"select {root} {words}"))
    parse_steps(shlex.split(f"select {root} --semantic-duplicates 0.9 --teacher tea --cells 2"))


def test_processes_are_started_where_they_are_worth_it():
    for rule, workers in [
        ({"where": ("width > 1",)}, 1),
        ({"balance": 2}, 1),
        ({"where": ('language == "en"',)}, 3),
        ({"against": ("evalset",)}, 3),
    ]:
        assert workers_of(SelectConfig("ds", workers=8, **rule), shards=3) == workers


def test_a_file_in_the_place_of_the_selection_is_named(root):
    path = Path(root, "select/q")
    path.parent.mkdir()
    path.touch()
    for rule in ({"where": ("width > 1",)}, {"top": 0.5, "by": "width"}):
        with pytest.raises((UserError, DataError), match=rf"^{path}: a file is where a folder should be; delete it"):
            select(SelectConfig(root, name="q", workers=1, **rule))
