"""Captions of others, from files: joined by any column, counted where they fit no image, obeyed by later commands."""

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import run_stage, tree, vouch, write_raw

from pipeline.caption.caption_index import UNKNOWN, CaptionIndex
from pipeline.caption.caption_lists import NO_TEXT, NOT_UTF8, ListedRow
from pipeline.caption.config import CaptionConfig, ListOptions, ServerOptions
from pipeline.caption.decoding import Decoding
from pipeline.caption.listed import ALL_OF_ONE_KIND, ALL_UNUSABLE, NO_NAME, NOT_LISTED
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.no_success import explain_no_success
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report import ReportConfig, report
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.content_id import content_ids
from shards_spec.files import UserError, join, sha256_bytes, sha256_file
from shards_spec.manifest import read_dataset, read_done, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, shard_keys, write_shard


@pytest.fixture
def root(tmp_path) -> str:
    """Two raw shards of six rows, four images each, with what DataComp's have: uid and sha256."""
    folder = str(tmp_path / "ds")
    write_raw(folder, shards=2, per_shard=6)
    for shard in range(2):
        images = {sample.key: sample.image for sample in read_shard(join(folder, f"raw/{shard:05d}.tar"))}
        path = f"raw/{shard:05d}.parquet"
        rows = pq.read_table(join(folder, path)).to_pylist()
        for row in rows:
            image = images.get(row["key"])
            row |= {"uid": f"u{row['key']}", "sha256": image and sha256_bytes(image), "number": int(row["key"])}
        pq.write_table(pa.Table.from_pylist(rows), join(folder, path))
        vouch(folder, "raw", shard, path)
    return folder


def raw_rows(root: str) -> list[dict]:
    """The rows of both shards that have an image."""
    rows = [row for shard in range(2) for row in pq.read_table(join(root, f"raw/{shard:05d}.parquet")).to_pylist()]
    return [row for row in rows if row["status"] == "success"]


def rows_of(root: str, name: str = "others") -> dict[str, dict]:
    tables = [pq.read_table(join(root, f"captions/{name}/{shard:05d}.parquet")) for shard in range(2)]
    return {row["key"]: row for row in pa.concat_tables(tables).to_pylist()}


def config(root: str, *files: Path, **options) -> CaptionConfig:
    lists = ListOptions(tuple(map(str, files)), **options)
    return CaptionConfig(root, name="others", lists=lists)


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(path: Path, rows: list[dict], form: str) -> Path:
    """The rows as a file of a form; lists of captions become a text each in forms without lists."""
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl.gz", "csv", "tsv"])
@pytest.mark.parametrize("by", ["uid", "url", "sha256", "key"])
def test_captions_of_every_form_are_joined_by_every_column(root, tmp_path, form, by):
    rows = [{"note": "n", by: row[by], "caption": f'"A", says\n{row["key"]}, twice'} for row in raw_rows(root)]
    summary = caption(config(root, packed(tmp_path / f"list.{form}", rows[::-1], form)))
    assert summary.counts == {"success": len(rows)}
    for key, row in rows_of(root).items():
        assert row["captions"] == [f'"A", says {key}, twice']
        assert row["logprobs"] == row["num_tokens"] == [None]
        assert row["reason"] is None
    assert check(CheckConfig(root)) == []


def test_what_is_unusable_or_fits_no_image_is_counted(root, tmp_path):
    keys = [row["key"] for row in raw_rows(root)]
    rows = [
        {"key": keys[0], "caption": ["  one&amp;two\n lines ", "", "one&two lines", "a a a a", None]},
        {"key": keys[1], "caption": ["1 2 3", "🙂"]},
        {"key": "000990001", "caption": "of no image here"},
        {"key": keys[2], "caption": [f"caption number {number}" for number in "abcdefg"]},
        {"key": keys[0], "caption": "a later row"},
        {"key": None, "caption": "of nothing"},
        {"key": keys[3], "caption": "x" * 40_000},
        {"key": keys[4], "caption": ["half \ud800 a pair", "whole"]},
    ]
    path = jsonl(tmp_path / "list.jsonl", rows)
    path.write_text(path.read_text() + "not json\n")
    summary = caption(config(root, path))
    stored = rows_of(root)
    assert [stored[key]["captions"] for key in keys[:5]] == [
        ["one&two lines", "a later row"],
        None,
        [f"caption number {number}" for number in "abcde"],
        None,
        ["whole"],
    ]
    assert [stored[key]["reason"] for key in keys[:6]] == [None, ALL_UNUSABLE, None, ALL_UNUSABLE, None, NOT_LISTED]
    assert summary.counts == {"success": 3, ALL_UNUSABLE: 2, NOT_LISTED: len(keys) - 5}
    assert summary.counters == {
        "above --num-captions, left out": 2,
        "captions": 8,
        "degenerate, left out": 3,
        "empty, left out": 1,
        "further rows of one image": 1,
        "not UTF-8, left out": 1,
        "repeated, left out": 1,
        "too long, left out": 1,
    }
    assert read_dataset(root)["stages"]["caption/others"]["facts"] == summary.counters
    logged = json.loads(Path(root, "logs/caption-others.jsonl").read_text())
    assert {name: logged[name] for name in logged if name.startswith("rows")} == {
        UNKNOWN: 1,
        "rows that are no JSON object": 1,
        "rows that name no image": 1,
    }
    assert check(CheckConfig(root)) == []


@pytest.mark.integration
def test_an_image_without_a_foreign_caption_stays_in_the_final_shards(root, tmp_path, model):
    rows = raw_rows(root)
    path = jsonl(tmp_path / "list.jsonl", [{"url": row["url"], "caption": "a red thing"} for row in rows[:3]])
    caption(config(root, path))
    run_stage("pack", root)
    final = [row for shard in range(2) for row in pq.read_table(join(root, f"shards/{shard:05d}.parquet")).to_pylist()]
    assert [row["key"] for row in final] == [row["key"] for row in rows]
    assert [row["synthetic"] for row in final] == [["a red thing"]] * 3 + [[]] * (len(rows) - 3)
    facts = read_dataset(root)["stages"]["pack"]["facts"]
    assert facts["samples without a synthetic caption"] == len(rows) - 3
    assert check(CheckConfig(root)) == []
    assert "  no captions: no caption in the list" in why(WhyConfig(root, rows[4]["key"])).lines
    assert "  0: 'a red thing'" in why(WhyConfig(root, rows[0]["key"])).lines
    page = Path(report(ReportConfig(root))).read_text()
    assert "caption/others" in page
    assert NOT_LISTED in page
    pack(PackConfig(root, shard_size=5, workers=1, overwrite=True))
    equal = [row for shard in range(2) for row in pq.read_table(join(root, f"shards/{shard:05d}.parquet")).to_pylist()]
    assert equal == final
    assert check(CheckConfig(root)) == []
    run_stage("caption", root, model)
    pack(PackConfig(root, captioner=("others", "cap"), workers=1, overwrite=True))
    final = pq.read_table(join(root, "shards/00000.parquet")).to_pylist()
    assert [len(row["synthetic"]) for row in final] == [3, 3, 3, 2, 2][: len(final)]


def test_a_shard_made_again_has_its_bytes_and_another_list_is_refused(root, tmp_path):
    path = jsonl(tmp_path / "list.jsonl", [{"key": row["key"], "caption": "a red thing"} for row in raw_rows(root)])
    caption(config(root, path))
    before = tree(root)
    Path(root, "captions/others/00001_stats.json").unlink()
    Path(root, "captions/others/00001.parquet").unlink()
    assert caption(config(root, path)).made == 1
    assert tree(root) == before
    assert caption(config(root, path)).made == 0
    assert set(read_done(join(root, "captions/others"), 0).inputs) == {"raw/00000.tar", "raw/00000.parquet"}
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"--from: .* before, .* now"):
        caption(config(root, path))


def test_columns_are_found_by_their_names_and_named_by_options(root, tmp_path):
    rows = raw_rows(root)
    published = [
        {
            "url": row["url"],
            "re_caption": f"of {row['key']}",
            "org_caption": "the alt-text",
            "sha256": "0" * 64,
            "key": "000000000",
            "re_clip_score": 0.3,
            "re_length": 2,
        }
        for row in rows
    ]  # as Recap-DataComp-1B's dataset card has them
    caption(config(root, packed(tmp_path / "train-00000.parquet", published, "parquet")))
    assert all(row["captions"] == [f"of {key}"] for key, row in rows_of(root).items())
    odd = [{"n": row["number"], "short": "short one", "long": ["long one", "long two"]} for row in rows]
    options = {"by": "number", "by_col": "n", "caption_col": ("long", "short")}
    caption(replace(config(root, jsonl(tmp_path / "odd.jsonl", odd), **options), name="odd"))
    assert all(row["captions"] == ["long one", "long two", "short one"] for row in rows_of(root, "odd").values())
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, row in enumerate(rows):
        packed(parts / f"{number}.parquet", [{"sha256": row["sha256"].upper(), "b": "second", "a": "first"}], "parquet")
    caption(replace(config(root, parts, caption_col=("a", "b")), name="parts"))
    assert all(row["captions"] == ["first", "second"] for row in rows_of(root, "parts").values())
    assert caption(replace(config(root, parts, caption_col=("a", "b")), name="parts")).made == 0
    (parts / "x.csv").write_text("sha256,a\n1,2\n")
    with pytest.raises(UserError, match=r"^--from \S+x.csv: no column 'b'"):
        caption(replace(config(root, parts, caption_col=("a", "b")), name="more"))
    (parts / "x.csv").write_text("")
    assert caption(replace(config(root, parts, caption_col=("a", "b")), name="more")).counts == {"success": len(rows)}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"image": "x", "caption": "y"}], {}, "no column that raw/ has too"),
        ([{"url": "x", "txt": "y"}], {}, "--caption-col"),
        ([{"url": "x", "caption": "y"}], {"caption_col": ("text",)}, "no column 'text'"),
        ([{"url": "x", "caption": "y"}], {"by": "etag"}, "raw/ has no such column"),
        ([{"url": "x", "caption": "y"}], {"by": "sha256"}, "no column 'sha256'"),
        ([{"link": "x", "caption": "y"}], {"by_col": "link"}, "say --by"),
    ],
)
def test_a_list_whose_columns_do_not_fit_is_refused(root, tmp_path, rows, options, said):
    for form in ("jsonl.gz", "parquet", "csv"):
        with pytest.raises(UserError, match=said) as error:
            caption(config(root, packed(tmp_path / f"list.{form}", rows, form), **options))
        assert "--source" not in str(error.value)
        assert not Path(root, "captions").exists()


def test_odd_files_are_refused_by_name(root, tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"key": "a", "caption": "b"}\n' * 900)[:60])
    (tmp_path / "image.csv").write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))
    (tmp_path / "folder").mkdir()
    for name in ("empty.csv", "cut.parquet", "cut.jsonl.gz", "image.csv", "folder", "absent.jsonl"):
        with pytest.raises(UserError, match=name) as error:
            caption(config(root, tmp_path / name))
        assert "--source" not in str(error.value)
        assert "--format" not in str(error.value)


def test_a_json_lines_file_that_lacks_a_column_is_refused_as_a_parquet_file_is(root, tmp_path):
    keys = [row["key"] for row in raw_rows(root)]
    parts = tmp_path / "parts"
    parts.mkdir()
    jsonl(parts / "a.jsonl", [{"key": keys[0], "caption": "a dog"}])
    jsonl(parts / "b.jsonl", [{"key": keys[1]}, {"key": keys[2], "caption": "a cat"}])
    jsonl(parts / "c.jsonl", [])
    assert caption(config(root, parts)).counts["success"] == 2
    for lacking, fields in (("caption", {"key": keys[1], "text": "x"}), ("key", {"id": keys[1], "caption": "x"})):
        jsonl(parts / "d.jsonl", [fields])
        with pytest.raises(UserError, match=rf"^--from \S+d.jsonl: no column '{lacking}'; its columns are"):
            caption(replace(config(root, parts), name="more"))
    assert not list(Path(root).glob("captions/more/*.parquet"))


def test_values_that_are_no_text_are_counted_and_told(root, tmp_path, caplog):
    keys = [row["key"] for row in raw_rows(root)]
    values = [7, {"a": 1}, [["nested"], "a dog", None, 3.5], None, "a cat"]
    rows = [{"key": key, "caption": value} for key, value in zip(keys, values, strict=False)]
    summary = caption(config(root, jsonl(tmp_path / "list.jsonl", rows)))
    no_text = ALL_OF_ONE_KIND[NO_TEXT]
    assert summary.counts == {"success": 2, no_text: 2, NOT_LISTED: len(keys) - 4}
    assert summary.counters["no text, left out"] == 4
    assert "4 values that are no text in place of captions" in caplog.text
    assert "list.jsonl, row 1)" in caplog.text
    assert "texts or lists of texts" in (explain_no_success("caption", {no_text: 3}) or "")
    assert check(CheckConfig(root)) == []


def test_a_latin_1_list_a_json_array_and_keys_without_zeros_are_told(root, tmp_path, caplog):
    rows = raw_rows(root)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("".join(["key,caption\n", *(f"{row['key']},café\n" for row in rows)]).encode("latin-1"))
    counts = caption(config(root, latin)).counts
    assert counts == {ALL_OF_ONE_KIND[NOT_UTF8]: len(rows)}
    assert "iconv -f LATIN1" in (explain_no_success("caption", counts) or "")
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"key": row["key"], "caption": "a dog"} for row in rows], indent=1))
    with pytest.raises(UserError, match=r"one JSON array.*jq -c"):
        caption(config(root, array))
    numbers = [{"key": int(row["key"]), "caption": "a dog"} for row in rows]
    for form, said in (
        ("csv", "text of 9 digits, such as 000000000; the list has 0"),
        ("parquet", r"^--from \S+: the column 'key' is int64; keys"),
    ):
        with pytest.raises(UserError, match=said):
            caption(replace(config(root, packed(tmp_path / f"numbers.{form}", numbers, form)), name=form))
    ragged = tmp_path / "ragged.csv"
    ragged.write_text(f"key,caption\n{rows[0]['key']},a dog\nalone\nother,a cat\n")
    caption(replace(config(root, ragged), name="ragged"))
    assert "rows without all columns (the first: " in caplog.text
    assert "ragged.csv, row 2)" in caplog.text
    assert f"{UNKNOWN} (the first: 'other')" in caplog.text


def test_a_list_in_raw_may_grow_by_a_retry(root):
    raw = Path(root, "raw")
    wanted = config(root, f"{root}/raw/*.parquet", by="url")
    first = caption(wanted)
    images = len(raw_rows(root))
    assert first.counts == {"success": images}
    failed = [row for row in pq.read_table(raw / "00000.parquet").to_pylist() if row["status"] != "success"]
    sample = next(read_shard(str(raw / "00000.tar")))
    key = "000020000"
    _, tar_hash = write_shard(str(raw / "00002.tar"), [Sample(key, sample.members)])
    pq.write_table(pa.Table.from_pylist([failed[0] | {"key": key, "status": "success"}]), raw / "00002.parquet")
    outputs = {"raw/00002.tar": tar_hash, "raw/00002.parquet": sha256_file(str(raw / "00002.parquet"))}
    replace(read_done(str(raw), 0), shard=2, counts={"success": 1}, outputs=outputs, inputs={"retry": "1"}).write(
        str(raw)
    )
    block = read_dataset(root)["stages"]["ingest"]
    write_stage(root, "ingest", block | {"shards": 3}, "test")
    grown = caption(wanted)
    assert grown.made == 1
    assert grown.counts == {"success": images + 1}
    assert grown.counters == {"captions": images + 1}, "the row that failed is no second one of the image"
    assert pq.read_table(join(root, "captions/others/00002.parquet"))["captions"].to_pylist() == [
        [failed[0]["caption"]]
    ]


def test_captions_that_came_in_another_way_keep_their_name(root, tmp_path):
    rows = [{"key": row["key"], "caption": "a red thing"} for row in raw_rows(root)]
    wanted = config(root, jsonl(tmp_path / "list.jsonl", rows))
    caption(wanted)
    served = ServerOptions("http://127.0.0.1:9/v1", "m")
    with pytest.raises(UserError, match=r"^captions/others came from --from, not from --server: take another --name"):
        caption(CaptionConfig(root, name="others", endpoint=served))
    with pytest.raises(UserError, match=r"use the same config, another --name or another ROOT"):
        caption(replace(wanted, num_captions=2))


def test_check_names_a_row_without_captions_and_without_a_reason(root, tmp_path):
    rows = raw_rows(root)[1:]
    wanted = jsonl(tmp_path / "list.jsonl", [{"uid": row["uid"], "caption": "a red thing"} for row in rows])
    caption(config(root, wanted))
    path = "captions/others/00000.parquet"
    table = pq.read_table(join(root, path))
    pq.write_table(table.set_column(4, "reason", pa.nulls(len(table), pa.string())), join(root, path))
    vouch(root, "captions/others", 0, path)
    (problem,) = check(CheckConfig(root))
    assert "key 000000000 has captions and a reason for having none, or neither" in problem


def test_options_of_two_writers_do_not_go_together(root):
    listed = ListOptions(("list.jsonl",))
    for empty in ((), ("list.jsonl", "")):
        with pytest.raises(UserError, match="--from"):
            ListOptions(empty)
    for wrong, said in (
        ({"lists": listed, "model": "coca_ViT-B-32"}, "--model"),
        ({"lists": listed, "similarity": True}, "--similarity"),
        ({"lists": ListOptions(by="key")}, "--by goes with --from"),
        ({"lists": listed, "endpoint": ServerOptions("http://x/v1", "m")}, "give one of them"),
        ({"lists": listed, "num_captions": 0}, "--num-captions"),
        ({"lists": listed, "device": "cpu"}, "--device is of a model, whose place --from takes"),
        ({"lists": listed, "redraws": 1}, "--redraws"),
        ({"lists": ListOptions(("parts/*.csv",))}, "--name"),
        ({"lists": listed, "decoding": Decoding(max_tokens=9)}, "--max-tokens"),
    ):
        with pytest.raises(UserError, match=said):
            CaptionConfig(root, **wrong)
    assert CaptionConfig(root, lists=ListOptions(("/data/my list.v2.jsonl.gz", "b"))).label == "my_list_v2"


def test_rows_without_a_name_in_raw_are_told_apart(root, tmp_path):
    path = "raw/00001.parquet"
    rows = pq.read_table(join(root, path)).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"uid": ""} for row in rows]), join(root, path))
    vouch(root, "raw", 1, path)
    wanted = jsonl(tmp_path / "list.jsonl", [{"uid": row["uid"], "caption": "a red thing"} for row in raw_rows(root)])
    summary = caption(config(root, wanted))
    images = len(shard_keys(join(root, "raw/00001.tar")))
    assert summary.counts == {"success": images, NO_NAME: images}


def test_the_index_keeps_known_images_alone_and_their_order():
    names = [f"name {number}" for number in range(5000)]
    index = CaptionIndex(content_ids(sorted(names))[:0])
    index.fill(ListedRow(name, [b"a"]) for name in names)
    assert index.left_out == {UNKNOWN: 5000}
    index.close()
    ids = content_ids(names)
    ids.sort()
    index = CaptionIndex(ids)
    index.fill(
        ListedRow(name, [f"{name} {time}".encode()]) for time in range(3) for name in [*names[::-1], f"other {time}"]
    )
    assert index.left_out == {UNKNOWN: 3}
    found = index.find([*names[:1200], "other 0"])
    for name in names[:1200]:
        assert [row.texts for row in found[name]] == [[f"{name} {time}"] for time in range(3)]
    assert found["other 0"] == []
    index.close()
