"""`takedown` of datasets and lists of many kinds, and what ingest makes of the same source afterwards."""

import gzip
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import draw, run_stage, tree, write_raw
from small_ingest import config, rows_of, write_list
from small_parts import run_task
from web_server import serve

import clipmill
from pipeline.check.config import CheckConfig, CheckJobConfig
from pipeline.check.divided import check_array
from pipeline.check.stage import check
from pipeline.core.taken_down import counters_of_rest
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.search.index import FeatureIndex
from pipeline.search.sources import ImageEntry, TarListing
from pipeline.takedown.config import TakedownConfig
from pipeline.takedown.request import read_request
from pipeline.takedown.stage import TakedownOutcome, takedown
from shards_spec.files import DataError, UserError, read_json, sha256_bytes, write_json
from shards_spec.manifest import read_dataset
from shards_spec.tar import read_shard, shard_keys

pytestmark = pytest.mark.integration

PER_SHARD = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of images, one of them twice and one of them smaller, ingested, with its duplicates, packed."""
    base = tmp_path_factory.mktemp("cases")
    images = base / "images"
    images.mkdir()
    for index in range(9):
        data, caption = draw(f"case/{index}")
        (images / f"{index:02}.jpg").write_bytes(data)
        (images / f"{index:02}.txt").write_text(caption)
    (images / "99.heic").write_bytes(b"a format that is not decoded")
    shutil.copy(images / "01.jpg", images / "97.jpg")
    (images / "97.txt").write_text("the same again")
    root = str(base / "ds")
    ingest_images(base / "ds", images)
    dedup(DedupConfig(root, workers=1))
    run_stage("pack", root)
    assert check(CheckConfig(root)) == []
    return base


def ingest_images(root: Path, images: Path, **options) -> None:
    ingest(IngestConfig(str(root), str(images), shard_size=PER_SHARD, workers=1, **options))


@pytest.fixture
def root(made, tmp_path) -> Path:
    return shutil.copytree(made / "ds", tmp_path / "ds")


def take(root: object, *lines: str, folder: Path | None = None, **options) -> TakedownOutcome:
    path = (folder or Path(str(root)).parent) / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return takedown(TakedownConfig(str(root), str(path), **options))


def sound(root: object) -> bool:
    return check(CheckConfig(str(root))) == []


def raw_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "raw").glob("*[0-9].*"))}


def test_ingest_makes_the_same_again(root, made):
    """All shards anew: what was taken down stays away, and all else is what the takedown left."""
    take(root, "000000001", "07.jpg", "99.heic", sha256_bytes((made / "images/04.jpg").read_bytes()))
    after = raw_files(root)
    counts = read_dataset(str(root))["stages"]["ingest"]["counts"]
    ingest_images(root, made / "images", overwrite=True)
    assert raw_files(root) == after
    assert read_dataset(str(root))["stages"]["ingest"]["counts"] == counts == {"success": 7, "taken down": 4}


def test_what_a_killed_dedup_and_a_killed_check_left_goes(root):
    """Their parts name the keys of all images; what is not searched cannot stay."""
    run_task(dedup, DedupConfig(str(root), workers=1, overwrite=True), [0])
    assert len(list((root / "dedup/.signatures").iterdir())) == 2
    run_task(check_array, CheckJobConfig(str(root), 1).of_run("killed"), [0])
    assert len(list((root / ".check/killed").iterdir())) == 2
    take(root, "000000001")
    assert not list((root / "dedup").glob(".signatures/*"))
    assert not list(root.glob(".check/*/*"))
    assert sound(root)


def test_an_image_under_another_link_stays_away(root, made, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(made / "images", images)
    digest = sha256_bytes((images / "03.jpg").read_bytes())
    take(root, digest)
    (images / "03.jpg").rename(images / "98.jpg")
    (images / "98.txt").write_text("a new caption")
    ingest_images(root, images, overwrite=True)
    rows = [row for shard in (0, 1) for row in rows_of(root, shard)]
    assert [row["key"] for row in rows if row["error_message"] == "taken down"] == ["000010003"]
    assert digest not in str(rows)
    assert "a new caption" not in str(rows)


def test_a_sha256_takes_every_copy_and_duplicates_are_named_or_taken(root, made, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    report = read_json(take(root, "000000001").report)
    assert report["same_link_or_image"] == report["near_duplicates"] == {"000010003": "000000001"}
    assert sound(root)
    rows = pq.read_table(root / "dedup/00001.parquet").to_pylist()
    assert [(row["key"], row["kept"]) for row in rows] == [("000010003", "")]
    report = read_json(take(root, "000010003").report)
    assert report["near_duplicates"] == {}
    assert sound(root)
    for options, lines in (
        ({"duplicates": True}, ["000000001"]),
        ({}, [sha256_bytes((made / "images/01.jpg").read_bytes())]),
    ):
        copy = shutil.copytree(other, tmp_path / f"copy{len(options)}")
        report = read_json(take(copy, *lines, **options).report)
        assert set(report["samples"]) == {"000000001", "000010003"}
        assert sound(copy)


def test_an_image_by_the_bytes_that_are_stored(root):
    sample = next(s for s in read_shard(str(root / "raw/00000.tar")) if s.key == "000000002")
    table = pq.read_table(root / "raw/00000.parquet")
    assert set(read_json(take(root, sha256_bytes(sample.image)).report)["samples"]) == {"000000002"}
    assert "sha256" in table.column_names
    assert sound(root)


def test_what_was_taken_down_before_and_what_never_was(root):
    take(root, "000000000", "02.jpg")
    before = tree(str(root))
    report = read_json(take(root, "000000000", "02.jpg", "none.jpg").report)
    assert report["lines_taken_down_before"] == [1, 2]
    assert report["lines_without_a_match"] == [3]
    assert report["samples"] == {}
    changed = {path for path, digest in tree(str(root)).items() if before.get(path) != digest}
    assert changed == {"takedown/hashes.json", "takedown/report-2.json"}


def test_a_row_that_failed_and_was_tried_again(tmp_path):
    """Each of its rows loses its content; the last one has the new reason."""
    root = tmp_path / "ds"
    with serve() as server:
        rows = [(f"{server.url}/flaky/{n}?t", f"flaky {n}") for n in range(4)]
        rows += [(f"{server.url}/good/{n}?t", f"good {n}") for n in range(4)] + [(f"{server.url}/gone?t", "gone")]
        run = config(root, write_list(tmp_path / "l.tsv", rows), retries=0)
        ingest(run)
        again = config(root, run.source, retries=0, retry_failed=True)
        ingest(again)
        pack(PackConfig(str(root), captioner=("none",), workers=1))
        asked = dict(server.requests)
        report = read_json(take(root, rows[1][0], rows[5][0], rows[8][0]).report)
        assert sorted(report["samples"]) == ["000000001", "000000005", "000000008"]
        assert report["rows_without_an_image"] == ["000000008"]
        assert sound(root)
        assert read_dataset(str(root))["stages"]["ingest"]["counts"] == {"success": 6, "taken down": 3}
        first, second = rows_of(root, 0), rows_of(root, 1)
        assert (first[1]["url"], first[1]["caption"], first[1]["error_message"]) == (None, None, "HTTP 503")
        assert (second[1]["url"], second[1]["error_message"]) == (None, "taken down")
        ingest(run)
        ingest(again)
        assert dict(server.requests) == asked, "nothing was fetched again"
        ingest(config(root, run.source, overwrite=True))
        fetched = {path for path, number in server.requests.items() if number > asked.get(path, 0)}
        assert not {url.removeprefix(f"{server.url}/") for url, _ in (rows[1], rows[5], rows[8])} & fetched
    assert read_dataset(str(root))["stages"]["ingest"]["counts"] == {"success": 6, "taken down": 3}


def foreign_raw(root: Path) -> None:
    """ROOT/raw as img2dataset leaves it."""
    write_raw(str(root))
    for path in (root / "raw").glob("*_stats.json"):
        stats = read_json(str(path))
        del stats["clipmill"]
        write_json(str(path), stats)
    (root / "dataset.json").unlink()


def test_shards_of_img2dataset_as_they_are(tmp_path):
    """Nobody has ingested them: their stats have counts alone."""
    root = tmp_path / "ds"
    foreign_raw(root)
    run_stage("pack", str(root))
    take(root, "http://h/000000001", "http://h/000010004")
    assert sound(root)
    stats = read_json(str(root / "raw/00000_stats.json"))
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (6, 4, 2)
    assert stats["status_dict"] == {"HTTP 404": 1, "success": 4, "taken down": 1}
    assert [row["url"] for row in rows_of(root, 1)][3:] == ["http://h/000010003", None, "http://h/000010005"]


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (pa.string(), "secret"),
        (pa.large_string(), "secret"),
        (pa.list_(pa.float32()), [1.5]),
        (pa.struct({"a": pa.int8()}), {"a": 3}),
        (pa.binary(2), b"ab"),
    ],
    ids=str,
)
def test_columns_of_any_type_lose_what_goes(kind, cell, tmp_path):
    root = tmp_path / "ds"
    foreign_raw(root)
    path = root / "raw/00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("more", pa.array([cell] * len(table), kind)), path)
    take(root, "http://h/000000001")
    after = pq.read_table(path)
    assert after.column("more").type == kind
    assert after.column("more").null_count == 1
    assert (
        after.take([0, 2, 3, 4, 5])
        .drop_columns("error_message")
        .drop_columns("more")
        .equals(table.take([0, 2, 3, 4, 5]))
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_shards_of_img2dataset(in_place, tmp_path):
    """They are taken over again without what was taken down, or stay as the takedown left them."""
    root = tmp_path / "ds"
    source = root if in_place else tmp_path / "other"
    foreign_raw(source)
    run = IngestConfig(str(root), str(source / "raw"), workers=1)
    ingest(run)
    run_stage("pack", str(root))
    take(root, "http://h/000000001", "000010003", by="url")
    take(root, "000010003", by="key")
    assert sound(root)
    after = raw_files(root)
    assert ingest(run).made == 0
    ingest(IngestConfig(str(root), str(source / "raw"), workers=1, overwrite=True))
    assert raw_files(root) == after
    assert read_dataset(str(root))["stages"]["ingest"]["counts"] == {"HTTP 404": 2, "success": 8, "taken down": 2}
    assert sound(root)


def test_final_shards_without_raw(root):
    shutil.rmtree(root / "raw")
    shutil.rmtree(root / "dedup")
    dataset = read_json(str(root / "dataset.json"))
    take(root, "000000000", "05.jpg")
    assert "000000000" not in shard_keys(str(root / "shards/00000.tar"))
    assert "000000005" not in shard_keys(str(root / "shards/00000.tar"))
    counts = read_json(str(root / "dataset.json"))["stages"]["pack"]["counts"]
    assert counts["success"] == dataset["stages"]["pack"]["counts"]["success"] - 2


def test_pages_logs_and_the_search_index(root):
    page = root / "report.html"
    page.write_text('<meta name="generator" content="clipmill report">000000003')
    (root / "logs/caption.log").write_text("W key 000000003 does not decode\nW key 000000004 does not decode\n")
    index = FeatureIndex(str(root / ".clipmill-search/model"), {})
    names = [f"raw/00000.tar:00000000{row}" for row in range(6)]
    features = np.eye(6, 8, dtype=np.float32)
    (root / ".clipmill-search/model").mkdir(parents=True)
    index.add(names, np.arange(1, 7, dtype=np.uint64), features)
    listing = TarListing(str(root / ".clipmill-search/tars.parquet"))
    listing.put("raw/00000.tar", "stamp", [ImageEntry(name, row) for row, name in enumerate(names)])
    listing.save()
    outcome = take(root, "000000003")
    assert not page.exists()
    assert any("`clipmill report" in line for line in outcome.lines)
    assert (root / "logs/caption.log").read_text() == "W key 000000004 does not decode\n"
    left = FeatureIndex(str(root / ".clipmill-search/model"), {}).files[0]
    assert left.opened.keys == [name for name in names if not name.endswith("3")]
    assert left.opened.vectors("image_0").values.tobytes() == features[[0, 1, 2, 4, 5]].tobytes()
    assert pq.read_table(root / ".clipmill-search/tars.parquet").column("key").to_pylist() == [
        f"00000000{row}" for row in (0, 1, 2, 4, 5)
    ]


def test_a_shard_that_a_killed_ingest_left(root, made):
    """It has no record: its files go, and are made again without what was taken down."""
    for folder in ("dedup", "shards"):
        shutil.rmtree(root / folder)
    (root / "raw/00001_stats.json").unlink()
    report = read_json(take(root, "07.jpg").report)
    assert report["lines_without_a_match"] == [1]
    assert sorted(path.name for path in root.glob("raw/00001*")) == []
    ingest_images(root, made / "images")
    assert [row["url"] for row in rows_of(root, 1)] == ["06.jpg", None, "08.jpg", "97.jpg", "99.heic"]
    assert len(shard_keys(str(root / "raw/00001.tar"))) == 3


def test_a_lost_or_damaged_list_of_hashes_is_named(root, made):
    take(root, "000000003")
    path = root / "takedown/hashes.json"
    content = path.read_text()
    path.write_text(content.replace('"salt": "', '"salt": "0'))
    assert any("not as it was written; put it back" in problem for problem in check(CheckConfig(str(root))))
    with pytest.raises(DataError, match="put it back"):
        ingest_images(root, made / "images")
    path.unlink()
    assert any("is not there, but 1 row" in problem for problem in check(CheckConfig(str(root))))
    path.write_text(content)
    assert sound(root)


def test_a_file_that_cannot_be_searched_is_said_and_blocks_nothing(root):
    (root / "other.parquet").write_bytes(b"none")
    (root / "other.tar").write_bytes(b"none" * 1000)
    with pytest.raises(
        DataError, match=r"2 places.*other\.parquet: cannot be searched.*other\.tar: cannot be searched"
    ):
        take(root, "000000003")
    assert sound(root)


@pytest.mark.parametrize("name", ["notes.txt", "copy.parquet", "copy.tar", "photo.jpg"])
def test_what_is_left_in_other_files_is_said(root, made, name):
    if name == "notes.txt":
        (root / name).write_text("see 000000003, a nice one\n")
    elif name == "photo.jpg":
        shutil.copy(made / "images/03.jpg", root / name)
    else:
        shutil.copy(root / f"shards/00000.{name.rpartition('.')[2]}", root / name)
    with pytest.raises(DataError, match=f"1 place.*{name}.*delete or edit"):
        take(root, "000000003")
    assert sound(root)
    assert read_json(str(root / "takedown/report-1.json"))["left"]
    (root / name).unlink()
    take(root, "000000003")


def test_a_damaged_file_stops_it_before_anything_changes(root):
    path = root / "raw/00000.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    before = tree(str(root))
    with pytest.raises(DataError, match=r"raw/00000\.tar: not the file that was written.*clipmill check"):
        take(root, "000000003")
    there = {name: digest for name, digest in tree(str(root)).items() if not name.startswith(".takedown/")}
    assert there == before


def test_on_an_object_store(root, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.put(str(root), "/bucket/ds", recursive=True)
    outcome = take("memory://bucket/ds", "000000003", "07.jpg", folder=tmp_path)
    take(root, "000000003", "07.jpg")
    assert sound("memory://bucket/ds")
    own = {path: digest for path, digest in tree(str(root)).items() if not path.startswith("takedown/")}
    there = {path.removeprefix("/bucket/ds/") for path in fs.find("/bucket/ds")}
    assert {path for path in there if not path.startswith(("takedown/", "logs/"))} == set(own)
    assert {path: sha256_bytes(fs.cat_file(f"/bucket/ds/{path}")) for path in own if path != "dataset.json"} == {
        path: digest for path, digest in own.items() if path != "dataset.json"
    }
    assert outcome.report == "memory://bucket/ds/takedown/report-1.json"
    fs.rm("/bucket", recursive=True)


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("name", "content", "by", "expected"),
    [
        ("l.txt", f"000120042\nhttp://a/b.jpg\n{SHA.upper()}\n\nsub/5.jpg\n", "auto", (1, 2, 1)),
        ("l.txt", "\ufeffkey\t000120042\r\nurl\thttp://a/b c\r\n", "auto", (1, 1, 0)),
        ("l.txt", "000120042\n000120042\nx\n", "url", (0, 2, 0)),
        ("l.tsv", "uid\tcaption\nabc\ta dog\ndef\ta cat\n", "auto", (2, 0, 0)),
        ("l.tsv", "key\turl\n000120042\thttp://a/b\n", "url", (0, 1, 0)),
        ("l.tsv", "key\treason\n000120042\tasked\n", "auto", (1, 0, 0)),
        ("l.tsv", "key\tabc\nkey\tdef\n", "auto", (2, 0, 0)),
        ("l.txt", "key\n000120042\n", "auto", (1, 0, 0)),
    ],
)
def test_lists(name, content, by, expected, tmp_path):
    path = tmp_path / name
    path.write_text(content, newline="")
    request = read_request(str(path), by)
    assert (len(request.keys), len(request.urls), len(request.images)) == expected
    packed = tmp_path / "l.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_request(str(packed), by) == request


def test_a_parquet_list(tmp_path):
    path = str(tmp_path / "l.parquet")
    pq.write_table(pa.table({"sha256": [SHA, None], "caption": ["a", "b"]}), path)
    assert read_request(path, "auto").images == {SHA: 1}
    with pytest.raises(UserError, match=r"no column key, uid, url or sha256 to go by, it has sha256, caption"):
        read_request(path, "url")


@pytest.mark.parametrize(
    ("content", "by", "message"),
    [
        (b"", "auto", "names nothing"),
        (b"\n\n", "auto", "names nothing"),
        (b"abc\n", "sha256", "line 1 is no sha256"),
        (b"http://a/b.jpg # asked by mail\n", "auto", "line 1 has a comment"),
        (b'{"key": "000120042"}\n', "auto", "line 1 is JSON"),
        (b"key,url\n000120042,http://a/b\n", "auto", "separate columns by tabs"),
        (b"PK\x03\x04" + bytes(60), "auto", "--list .*l.txt is "),
        (b"abc\tdef\n", "auto", "line 1 has a tab and does not begin with key, url, sha256"),
        (b"abc\n\xff\xfe\xfd\n", "auto", "line 2 is not UTF-8"),
        (b"key\turl\n1\thttp://a\n", "auto", "has the columns key, url: say --by"),
        (gzip.compress(b"abc\n" * 99, mtime=0)[:-12], "auto", "l.txt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(1, 90)), "auto", "not text"),
    ],
)
def test_lists_that_cannot_be_used(content, by, message, tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_request(str(path), by)


def test_a_dry_run_writes_nothing(root):
    before = tree(str(root))
    outcome = take(root, "000000001", "99.heic", "none.jpg", dry_run=True)
    assert tree(str(root)) == before
    text = "\n".join(outcome.lines)
    for expected in ("1 sample and 1 row without an image would go", "000000001, 000010004", "1 line of the list (3)"):
        assert expected in text, text
    assert "000010003; --duplicates" in text


def test_no_dataset_no_list(root, tmp_path):
    with pytest.raises(UserError, match="not a clipmill dataset"):
        take(tmp_path, "000000003")
    with pytest.raises(UserError, match=r"--list .*no such file"):
        takedown(TakedownConfig(str(root), str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match=r"--list .*; give a text or Parquet file"):
        takedown(TakedownConfig(str(root), str(tmp_path)))


def test_a_list_of_nothing_exits_with_1_and_a_uid_is_told_as_taken_down_before(tmp_path, capsys):
    (tmp_path / "0.jpg").write_bytes(draw("uid")[0])
    (tmp_path / "1.jpg").write_bytes(draw("other uid")[0])
    rows = [{"path": f"{number}.jpg", "caption": "a box", "uid": f"u{number}"} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source.parquet")
    root, names = tmp_path / "ds", tmp_path / "names.txt"
    ingest(IngestConfig(str(root), str(tmp_path / "source.parquet"), workers=1, save_additional_columns=("uid",)))
    names.write_text("u0\n")
    assert clipmill._run(["takedown", str(root), "--list", str(names)]) == 0
    assert clipmill._run(["takedown", str(root), "--list", str(names), "--dry-run"]) == 0
    assert "taken down before: 1 line of the list (1)" in capsys.readouterr().out
    names.write_text("u7\n")
    assert clipmill._run(["takedown", str(root), "--list", str(names)]) == 1
    assert "no line of the list names anything here" in capsys.readouterr().out


def test_counters_of_captions_do_not_exceed_the_captions_that_are_left():
    counters = {"captions": 600, "cut at max_tokens": 600, "redrawn": 700, "repeated": 3}
    expected = {"captions": 592, "cut at max_tokens": 592, "redrawn": 700, "repeated": 3}
    assert counters_of_rest(counters, 592) == expected
