"""Stage `ingest`: sources, the web, images, img2dataset's layout and shards, kills at any moment."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_ingest import config, rows_of, write_list
from web_server import make_image, serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import ShardAssignment, ShardsFailed
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.listing import Listing
from pipeline.ingest.raw_shard import sample_key
from pipeline.ingest.stage import ingest
from shards_spec.files import UserError
from shards_spec.tar import read_shard

GOLDEN = Path(__file__).parents[2] / "golden" / "img2dataset-1.47"  # its own output, never edited
TIMES = ("duration", "start_time", "end_time")


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def tree(root: Path) -> dict[str, object]:
    """Every file's content, the stats without their time fields; logs/ holds times only."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and "logs" not in path.parts:
            name = str(path.relative_to(root))
            found[name] = path.read_bytes()
            if name.endswith("_stats.json"):
                stats = json.loads(found[name])
                found[name] = {key: value for key, value in stats.items() if key not in TIMES}
    return found


# the web


def test_every_kind_of_answer_is_a_sample_or_a_named_reason(server, tmp_path):
    expected = {
        "good/1": "success",
        "gone": "HTTP 404",
        "status/403": "HTTP 403",
        "html": "resize: not an image",
        "empty": "empty body",
        "cut": "resize: truncated image",
        "lost": "connection lost",
        "slow/3": "timeout",
        "large": "too large",
        "unsized": "too large",
        "optout/noai": "opted out",
        "redirect//good/2": "success",
        "redirect/ftp://h/x.jpg": "not an http address",
        "redirect//redirect//redirect//redirect//redirect//redirect//good/1": "too many redirects",
        "flaky/3": "success",
        "status/500": "HTTP 500",
    }
    rows = [(f"{server.url}/{path}", f"number {n}") for n, path in enumerate(expected)]
    rows += [("http://no-such-host.invalid/x.jpg", "a"), ("http://127.0.0.1:9/x.jpg", "b"), ("http://[bad/x.jpg", "c")]
    expected |= {"host": "name not found", "port": "connection refused", "bad": "bad address"}
    source = write_list(tmp_path / "list.tsv", rows)
    summary = ingest(config(tmp_path / "D", source, shard_size=100, timeout_s=1, max_bytes=100_000))
    found = rows_of(tmp_path / "D")
    assert [row["url"] for row in found] == [url for url, _ in rows]
    reasons = [row["error_message"] or "success" for row in found]
    assert reasons == list(expected.values())
    assert sum(summary.counts.values()) == len(rows)
    assert {row["status"] for row in found} == {"success", "failed_to_download", "failed_to_resize"}
    for row in found:
        assert (row["status"] == "failed_to_resize") == (row["error_message"] or "").startswith("resize: ")
    stats = json.loads((tmp_path / "D/raw/00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (len(rows), 3, 2)
    assert server.requests["status/500"] == 2, "one retry"
    assert server.requests["gone"] == 1, "no retry where it cannot help"
    assert check(CheckConfig(str(tmp_path / "D"))) == []


def test_private_addresses_are_refused_by_default(server, tmp_path):
    port = server.server_port
    hosts = [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
    ]
    rows = [(f"http://{host}:{port}/good/900", "x") for host in hosts]
    ingest(config(tmp_path / "D", write_list(tmp_path / "l.tsv", rows), allow_private=False, timeout_s=3))
    reasons = [row["error_message"] for row in rows_of(tmp_path / "D")]
    odd = ["bad address"] * 2  # aiohttp itself refuses digits that are no address as written
    assert reasons == ["not a public address"] * 2 + odd + ["not a public address"] * 4
    assert server.requests["good/900"] == 0


# the config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "--shard-size 0: must be 1 or more"),
        ({"image_size": -1}, "--image-size -1: must be 1 or more"),
        ({"concurrency": 0}, "--concurrency 0: must be 1 or more"),
        ({"nameservers": ("dns.example",)}, "--nameservers dns.example: give IP addresses"),
        ({"nameservers": ("1.1.1.1:99999",)}, "--nameservers 1.1.1.1:99999: give IP addresses"),
        ({"nameservers": ("1.1.1",)}, "--nameservers 1.1.1: give IP addresses"),
        ({"workers": -1}, "--workers -1: must be 0 or more"),
        ({"timeout_s": 0}, "--timeout-s 0: must be seconds above 0"),
        ({"timeout_s": float("nan")}, "--timeout-s nan"),
        ({"max_bytes": 0}, "--max-bytes 0: must be 1 or more"),
        ({"retries": -1}, "--retries -1: must be 0 or more"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(UserError, match=message):
        IngestConfig("root", "list.tsv", **options)
    with pytest.raises(UserError, match="source is empty"):
        IngestConfig("root", "")


def test_rows_of_others_shards_are_read_and_left(tmp_path):
    class Second(ShardAssignment):
        def claim(self, shard: int) -> bool:
            return shard == 1

    (tmp_path / "list.tsv").write_text("".join(f"http://h/{n}.jpg\tcaption {n}\n" for n in range(5)))
    config = IngestConfig(str(tmp_path / "ds"), str(tmp_path / "list.tsv"), shard_size=2)
    listing = Listing(config, "cc12m")
    assert list(listing.tasks(Second())) == list(Listing(config, "cc12m").tasks())[1:2]
    assert (listing.read, listing.shards) == (5, 3)


@pytest.mark.parametrize("form", ["auto", "cc3m", "folder", "img2dataset"])
def test_a_source_that_is_not_there(tmp_path, form):
    with pytest.raises(UserError, match="nowhere"):
        ingest(config(tmp_path / "D", tmp_path / "nowhere", format=form))
    assert not (tmp_path / "D/dataset.json").exists()


# running again


def test_a_rerun_does_only_what_is_missing_or_changed(server, tmp_path):
    rows = [(f"{server.url}/good/{n}?rerun", f"c{n}") for n in range(25)]
    source, root = tmp_path / "l.tsv", tmp_path / "D"
    first = ingest(config(root, write_list(source, rows)))
    assert (first.shards, first.made) == (3, 3)
    before = tree(root)
    assert ingest(config(root, source)).made == 0
    (root / "raw/00001_stats.json").unlink()
    assert ingest(config(root, source, concurrency=3, timeout_s=5)).made == 1
    assert tree(root) == before
    rows[21] = (rows[21][0], "another caption")
    assert ingest(config(root, write_list(source, rows))).made == 1
    assert rows_of(root, 2)[1]["caption"] == "another caption"
    with pytest.raises(
        UserError, match=r"00000 was made with another config \(--image-size: 48 before, 32 now\).*--overwrite"
    ):
        ingest(config(root, source, image_size=32))
    assert ingest(config(root, source, image_size=32, overwrite=True)).made == 3
    before = tree(root)
    for shorter, more in (
        (7, r"2 shards more \(00001"),
        (10, r"2 shards more \(00001"),
        (13, r"1 shard more \(00002"),
    ):
        write_list(source, rows[:shorter])
        with pytest.raises(UserError, match=rf"has {more} and on\) than --source .* --overwrite"):
            ingest(config(root, source, image_size=32))
        assert tree(root) == before, "nothing is made again first, and dataset.json stays true"
    assert check(CheckConfig(str(root))) == []
    write_list(source, rows[:7])
    ingest(config(root, source, image_size=32, overwrite=True))
    assert sorted(path.name for path in (root / "raw").iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    assert check(CheckConfig(str(root))) == []


RUN = """
import sys
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
if __name__ == "__main__":
    ingest(IngestConfig(sys.argv[1], sys.argv[2], shard_size=8, image_size=48, allow_private=True, workers=1))
"""


def kill_and_compare(server, tmp_path, kills: int) -> None:
    server.delay_s = 0.03
    rows = [(f"{server.url}/good/{n}" if n % 5 else f"{server.url}/gone", f"c{n}") for n in range(120)]
    source = write_list(tmp_path / "l.tsv", rows)
    run = [sys.executable, "-c", RUN]
    start = time.monotonic()
    subprocess.run([*run, str(tmp_path / "calm/D"), source], check=True, capture_output=True)
    seconds, rng = time.monotonic() - start, random.Random(kills)
    root = tmp_path / "killed/D"
    for _ in range(kills):
        process = subprocess.Popen([*run, str(root), source], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (root / "raw").exists() and rng.random() < 0.5:  # start over now and then, so that kills hit every part
            shutil.rmtree(root)
    subprocess.run([*run, str(root), source], check=True, capture_output=True)
    server.delay_s = 0.0
    assert tree(root) == tree(tmp_path / "calm/D")
    assert check(CheckConfig(str(root))) == []


@pytest.mark.integration
def test_killed_at_any_moment(server, tmp_path):
    kill_and_compare(server, tmp_path, 4)


@pytest.mark.slow
def test_killed_at_any_moment_twenty_times(server, tmp_path):
    kill_and_compare(server, tmp_path, 20)


# img2dataset's layout, against a shard that img2dataset 1.47 itself made from the same list and the same server:
# img2dataset --url_list l.tsv --input_format tsv --url_col url --caption_col caption --output_format webdataset
#   --image_size 48 --resize_mode keep_ratio --resize_only_if_bigger True --encode_quality 95


def make_golden_twin(server, root: Path) -> None:
    rows = [(f"{server.url}/{kind}/{n}", f"good {n} ü") for n, kind in enumerate(("good", "good", "good", "exif"))]
    rows += [(f"{server.url}/html", "h"), *((f"{server.url}/gone/{n}", f"gone {n}") for n in range(99))]
    ingest(config(root, write_list(root.parent / "l.tsv", rows), shard_size=10_000))


# what SPEC.md names as ours: anything else that differs is a defect
OWN_COLUMNS = {"phash"}
OWN_STATS = ["clipmill"]


def test_layout_is_img2datasets_but_for_what_the_spec_names(server, tmp_path):
    make_golden_twin(server, tmp_path / "D")
    ours = tmp_path / "D/raw"
    assert sorted(os.listdir(ours)) == sorted(os.listdir(GOLDEN)) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    theirs_file, ours_file = pq.ParquetFile(GOLDEN / "00000.parquet"), pq.ParquetFile(ours / "00000.parquet")
    fields, their_fields = ours_file.schema_arrow, theirs_file.schema_arrow
    assert [field for field in fields if field.name not in OWN_COLUMNS] == list(their_fields), "names, types and order"
    assert {field.name for field in fields} - {field.name for field in their_fields} == OWN_COLUMNS
    for meta in (theirs_file.metadata, ours_file.metadata):
        assert [meta.row_group(n).num_rows for n in range(meta.num_row_groups)] == [100, 4]
        assert meta.row_group(0).column(0).compression == "SNAPPY"
    their_rows, our_rows = theirs_file.read().to_pylist(), ours_file.read().to_pylist()
    assert sorted(row["key"] for row in their_rows) == [row["key"] for row in our_rows], "ours in the list's order"
    for rows, own in ((their_rows, set()), (our_rows, OWN_COLUMNS)):  # what is null where
        failed = next(row for row in rows if row["status"] == "failed_to_resize")
        nulls = {"width", "height", "original_width", "original_height", "exif", "sha256"} | own
        assert {name for name, value in failed.items() if value is None} == nulls
    same = ("key", "caption", "status", "width", "height", "original_width", "original_height", "sha256")
    assert [[row[name] for name in same] for row in sorted(their_rows, key=lambda row: row["key"])] == [
        [row[name] for name in same] for row in our_rows
    ]
    theirs, mine = (next(row["exif"] for row in rows if row["key"] == "000000003") for rows in (their_rows, our_rows))
    assert json.loads(mine) == json.loads(theirs)


def test_stats_are_img2datasets_but_for_the_done_record(server, tmp_path):
    make_golden_twin(server, tmp_path / "D")
    theirs, ours = (json.loads((path / "00000_stats.json").read_text()) for path in (GOLDEN, tmp_path / "D/raw"))
    assert [*theirs, *OWN_STATS] == list(ours)
    assert [type(value) for value in theirs.values()] == [type(ours[name]) for name in theirs]
    for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
        assert ours[name] == theirs[name], name
    assert sorted(theirs["status_dict"].values()) == sorted(ours["status_dict"].values()), "reasons have other words"


def test_tar_members_are_img2datasets_but_for_what_the_spec_names(server, tmp_path):
    make_golden_twin(server, tmp_path / "D")
    with tarfile.open(GOLDEN / "00000.tar") as theirs, tarfile.open(tmp_path / "D/raw/00000.tar") as ours:
        assert sorted(theirs.getnames()) == ours.getnames(), "ours in the list's order"
        assert {member.mode for member in theirs} == {member.mode for member in ours} == {0o444}
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in ours} == {(0, 0, 0, "")}
        for name in ours.getnames():
            one, other = (tar.extractfile(name).read() for tar in (theirs, ours))
            if name.endswith("txt"):
                assert one == other
            elif name.endswith("json"):
                assert json.dumps(json.loads(one), indent=4).encode() == one
                assert json.dumps(json.loads(other), indent=4).encode() == other
                mine = [(k, type(v)) for k, v in json.loads(other).items() if k not in OWN_COLUMNS]
                assert [(k, type(v)) for k, v in json.loads(one).items()] == mine
                assert set(json.loads(other)) - set(json.loads(one)) == OWN_COLUMNS
            else:
                assert Image.open(io.BytesIO(one)).size == Image.open(io.BytesIO(other)).size
    sample = next(read_shard(str(tmp_path / "D/raw/00000.tar")))
    assert (sample.caption, sample.meta["key"]) == ("good 0 ü", "000000000")
    assert json.loads(rows_of(tmp_path / "D")[3]["exif"])["EXIF ISOSpeedRatings"] == "200"
    assert sample.meta == {**rows_of(tmp_path / "D")[0]}
    assert sample.meta["sha256"] == hashlib.sha256(make_image(0)).hexdigest()


@pytest.mark.parametrize(
    ("shard", "index", "size", "key"),
    [
        (12, 42, 10_000, "000120042"),
        (12, 42, 1000, "000120042"),
        (0, 0, 10, "000000000"),
        (3, 99_999, 100_000, "0000399999"),
        (100_000, 1, 1000, "1000000001"),
    ],
)
def test_keys(shard, index, size, key):
    assert sample_key(shard, index, size) == key


# img2dataset's shards


def foreign(folder: Path, number: int, key_from: str = "", key_to: str = "") -> None:
    """A copy of the golden shard under another number; its keys begin with the number, as img2dataset's do."""
    folder.mkdir(parents=True, exist_ok=True)
    key_from, key_to = key_from or "00000", key_to or f"{number:05d}"
    with tarfile.open(GOLDEN / "00000.tar") as source, tarfile.open(folder / f"{number:05d}.tar", "w") as target:
        for member in source:
            data = source.extractfile(member).read()
            member.name = key_to + member.name.removeprefix(key_from)
            target.addfile(member, io.BytesIO(data))
    table = pq.read_table(GOLDEN / "00000.parquet")
    keys = pa.array([key_to + key.removeprefix(key_from) for key in table["key"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", keys), folder / f"{number:05d}.parquet")
    shutil.copy(GOLDEN / "00000_stats.json", folder / f"{number:05d}_stats.json")


@pytest.mark.parametrize("workers", [1, 2])
def test_img2dataset_shards_are_copied_byte_for_byte(tmp_path, caplog, workers):
    for number in (0, 1, 3):
        foreign(tmp_path / "S", number)
    (tmp_path / "S/00002.tar").write_bytes(b"half")
    root = tmp_path / "D"
    summary = ingest(config(root, tmp_path / "S", workers=workers))
    assert "left out 1 unfinished shard (no stats): 00002" in caplog.text
    assert (summary.shards, summary.made, summary.counts["success"]) == (3, 3, 12)
    for ours, theirs in ((0, 0), (1, 1), (2, 3)):
        for ending in (".tar", ".parquet"):
            assert (root / f"raw/{ours:05d}{ending}").read_bytes() == (
                tmp_path / f"S/{theirs:05d}{ending}"
            ).read_bytes()
        stats = json.loads((root / f"raw/{ours:05d}_stats.json").read_text())
        stats.pop("clipmill")
        assert stats == json.loads((GOLDEN / "00000_stats.json").read_text())
    assert ingest(config(root, tmp_path / "S", format="img2dataset")).made == 0
    assert check(CheckConfig(str(root))) == []


def test_img2dataset_shards_are_imported_in_place(tmp_path):
    root = tmp_path / "D"
    for number in (0, 1):
        foreign(root / "raw", number)
    before = tree(root)
    assert ingest(config(root, root / "raw")).made == 2
    after = tree(root)
    for name, content in before.items():
        expected = {**content, "clipmill": after[name]["clipmill"]} if isinstance(content, dict) else content
        assert after[name] == expected
    assert ingest(config(root, root / "raw")).made == 0
    assert check(CheckConfig(str(root))) == []
    for ending in (".tar", ".parquet", "_stats.json"):
        (root / f"raw/00000{ending}").unlink()
    with pytest.raises(
        UserError, match="not numbered 00000 to 00000; let img2dataset finish, or ingest them into another"
    ):
        ingest(config(root, root / "raw"))


def test_broken_img2dataset_shards_fail_by_name_and_others_go_on(tmp_path):
    for number in range(6):
        foreign(tmp_path / "S", number)
    tar = tmp_path / "S/00001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    (tmp_path / "S/00002.parquet").unlink()
    (tmp_path / "S/00003_stats.json").write_text("{")
    (tmp_path / "S/00004.tar").unlink()
    with pytest.raises(ShardsFailed) as failed:
        ingest(config(tmp_path / "D", tmp_path / "S"))
    lines = str(failed.value).splitlines()
    assert lines[0] == "ingest: 4 of 6 shards failed"
    expected = [
        "00001.tar: truncated tar, last whole member",
        "00002.parquet is not there",
        "00003_stats.json: not a readable JSON file",
        "00004.tar: is not there",
    ]
    for line, words in zip(lines[1:], expected, strict=True):
        assert words in line
    done = sorted(path.name for path in (tmp_path / "D/raw").glob("*.json"))
    assert done == ["00000_stats.json", "00005_stats.json"]


def test_img2dataset_shards_that_do_not_fit_each_other(tmp_path):
    foreign(tmp_path / "S", 0)
    stats = json.loads((GOLDEN / "00000_stats.json").read_text())
    (tmp_path / "S/00000_stats.json").write_text(json.dumps({**stats, "successes": 5}))
    with pytest.raises(ShardsFailed, match="has 4 samples, its Parquet file 4, its stats 5"):
        ingest(config(tmp_path / "D", tmp_path / "S"))
    (tmp_path / "S/00000_stats.json").write_text("{}")
    with pytest.raises(ShardsFailed, match="lacks img2dataset's fields"):
        ingest(config(tmp_path / "D", tmp_path / "S"))


def test_a_key_in_two_img2dataset_shards(tmp_path):
    foreign(tmp_path / "S", 0)
    foreign(tmp_path / "S", 1, key_from="00000", key_to="00000")
    with pytest.raises(UserError, match=r"key 000000000 is in \S*00000.tar and in \S*00001.tar \(4 in both\)"):
        ingest(config(tmp_path / "D", tmp_path / "S"))
    assert not (tmp_path / "D").exists()


def test_no_finished_img2dataset_shard(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has no finished img2dataset shard"):
        ingest(config(tmp_path / "D", tmp_path, format="img2dataset"))


# folders


def test_a_folder_with_captions_beside(tmp_path):
    source = tmp_path / "S"
    (source / "b").mkdir(parents=True)
    for n, name in enumerate(("z.jpg", "b/x.PNG", "a.webp", "b/none.jpg")):
        (source / name).write_bytes(make_image(n, form="PNG" if name.endswith("PNG") else "JPEG"))
    (source / "z.txt").write_text("last ü\n")
    (source / "b/x.txt").write_text("in b")
    (source / "a.txt").write_bytes(b"\xff")
    (source / "empty.jpg").write_bytes(b"")
    (source / "notes.md").write_text("no picture")
    (source / "gone.jpg").symlink_to("nowhere")
    summary = ingest(config(tmp_path / "D", source))
    found = [(row["url"], row["caption"], row["error_message"]) for row in rows_of(tmp_path / "D")]
    assert found == [
        ("a.webp", "\ufffd", "caption is not UTF-8"),
        ("empty.jpg", None, "empty file"),
        ("gone.jpg", None, "file not found"),
        ("z.jpg", "last ü", None),
        ("b/none.jpg", None, None),
        ("b/x.PNG", "in b", None),
    ]
    samples = list(read_shard(str(tmp_path / "D/raw/00000.tar")))
    assert [(sample.key, sample.caption) for sample in samples] == [
        ("000000003", "last ü"),
        ("000000004", ""),
        ("000000005", "in b"),
    ]
    assert sum(summary.counts.values()) == 6
    assert check(CheckConfig(str(tmp_path / "D"))) == []


def test_a_changed_image_is_read_again_by_two_workers(tmp_path):
    source = tmp_path / "S"
    source.mkdir()
    for n in range(12):
        (source / f"{n:02d}.jpg").write_bytes(make_image(n))
        (source / f"{n:02d}.txt").write_text(f"c{n}")
    root = tmp_path / "D"
    assert ingest(config(root, source, workers=2, shard_size=4)).made == 3
    assert ingest(config(root, source, workers=2, shard_size=4)).made == 0
    (source / "05.jpg").write_bytes(make_image(77))
    assert ingest(config(root, source, workers=2, shard_size=4)).made == 1
    (tmp_path / "E").mkdir()
    with pytest.raises(UserError, match="has no row and no image in it; nothing to ingest"):
        ingest(config(root, tmp_path / "E"))


def test_a_root_on_an_object_store(tmp_path):
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    ingest(config("memory://ingest/D", tmp_path))
    assert [sample.key for sample in read_shard("memory://ingest/D/raw/00000.tar")] == ["000000000"]
    assert check(CheckConfig("memory://ingest/D")) == []
