"""DataCompDR's tars as a source: links are fetched, hashes are proved, captions are kept, damage is named."""

import json
from itertools import chain

import pytest
from small_data import tar_bytes
from small_datacompdr import Reinforced, reinforced, write_reinforced
from small_ingest import config, rows_of, write_list
from small_tars import rows_of as source_rows
from web_server import serve

from pipeline.ingest.detect import detect
from pipeline.ingest.filters import NO_SHA256, OTHER_SHA256
from pipeline.ingest.stage import ingest
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError
from shards_spec.manifest import read_dataset
from shards_spec.tar import read_shard

BASE = "http://127.0.0.1:1"


def test_rows_have_link_hash_and_captions_in_the_order_of_the_tars(tmp_path):
    tars = [[reinforced(0, BASE), reinforced(1, BASE, form="pth.gz")], [reinforced(2, BASE)]]
    source = write_reinforced(tmp_path / "dr", tars)
    assert detect(source) == "datacompdr"
    rows = source_rows(source)
    samples = list(chain.from_iterable(tars))
    assert [row.url for row in rows] == [sample.url for sample in samples]
    assert [row.extra["uid"] for row in rows] == [sample.uid for sample in samples]
    assert [row.extra["tar"] for row in rows] == ["00000000.tar", "00000000.tar", "00000001.tar"]
    assert [row.extra["syn_text"] for row in rows] == [sample.captions for sample in samples]
    assert all(row.problem is None and row.caption is None and row.image_ref is None for row in rows)


def test_a_folder_as_it_is_downloaded(tmp_path):
    """Folders of tars with a manifest in each, and links to where the files are, as huggingface_hub leaves them."""
    blobs = tmp_path / "blobs"
    write_reinforced(blobs, [[reinforced(0, BASE)], [reinforced(1, BASE)]])
    for number in range(2):
        folder = tmp_path / "snapshot" / f"0{number}"
        folder.mkdir(parents=True)
        (folder / "00000000.tar").symlink_to(blobs / f"0000000{number}.tar")
        (folder / "manifest.jsonl").write_text('{"shard": "00000000", "num_uids": 1}\n')
    (tmp_path / "snapshot" / "README.md").write_text("# card")
    assert detect(str(tmp_path / "snapshot")) == "datacompdr"
    rows = source_rows(tmp_path / "snapshot")
    assert [row.extra["tar"] for row in rows] == ["00/00000000.tar", "01/00000000.tar"]


def test_a_merged_tar_brings_captions_and_images(tmp_path):
    sample = reinforced(0, BASE)
    sample.members |= {"txt": b" the original \n", "jpg": sample.image}
    (row,) = source_rows(write_reinforced(tmp_path / "dr", [[sample]]) + "/00000000.tar")
    assert row.caption == "the original"
    assert row.image_ref is not None
    assert row.problem is None


@pytest.mark.parametrize(
    ("member", "content", "problem"),
    [
        ("url.txt", None, "no url.txt"),
        ("json", None, "no json member"),
        ("json", b"[1]", "json member is not a JSON object"),
        ("json", b'{"uid": "x"}', "no sha256 in the json member"),
        ("json", b'{"sha256": 7}', "no sha256 in the json member"),
        ("syn.json", b"{", "syn.json has no list of texts"),
        ("syn.json", b'{"syn_text": [1]}', "syn.json has no list of texts"),
        ("syn.json", None, "syn.json has no list of texts"),
        ("paug.json", None, "no paug.json"),
        ("npz", None, "no npz or pth.gz member"),
        ("url.txt", b"http://\xff", "url.txt is not UTF-8"),
    ],
)
def test_a_bad_member_is_named_and_its_neighbours_stay(tmp_path, member, content, problem):
    samples = [reinforced(number, BASE) for number in range(3)]
    if content is None:
        del samples[1].members[member]
    else:
        samples[1].members[member] = content
    rows = source_rows(write_reinforced(tmp_path / "dr", [samples]))
    assert [row.problem for row in rows] == [None, problem, None]


def test_a_truncated_tar_gives_its_whole_samples(tmp_path, caplog):
    source = tmp_path / "dr" / "00000000.tar"
    write_reinforced(source.parent, [[reinforced(number, BASE) for number in range(3)]])
    source.write_bytes(source.read_bytes()[:-9000])
    assert [row.problem for row in source_rows(source)] == [None, None, "truncated tar"]
    assert "00000000.tar breaks off after 2 whole samples (truncated tar)" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem", "warning"),
    [
        (b"", "empty file", "00000001.tar is an empty file, not a tar"),
        (b"<html>not found</html>", "a web page, not the file itself", "00000001.tar is a web page"),
        (b"x" * 1500, "damaged tar", "00000001.tar is not a tar, or breaks off in its first sample"),
    ],
)
def test_a_file_that_is_no_tar_is_named(tmp_path, caplog, content, problem, warning):
    tars = [[reinforced(0, BASE)], [reinforced(1, BASE)]]
    source = write_reinforced(tmp_path / "dr", tars)
    originals = write_originals(tmp_path / "originals", tars)
    (tmp_path / "originals" / "00000001.tar").write_bytes(content)
    rows = list(list_rows(source, "datacompdr", original_captions=originals))
    assert [row.note for row in rows] == [None, "no caption in --original-captions"]
    assert f"--original-captions {originals}/{warning}" in caplog.text
    assert "not one caption for the samples of 1 of 2 tars, such as 00000001.tar" in caplog.text
    (tmp_path / "dr" / "00000001.tar").write_bytes(content)
    assert [row.problem for row in list_rows(source, "datacompdr")] == [None, problem]
    assert f"--source {source}/{warning}" in caplog.text


def test_captions_of_which_none_matches_are_warned_of(tmp_path, caplog):
    source = write_reinforced(tmp_path / "dr", [[reinforced(0, BASE)], [reinforced(1, BASE)]])
    originals = write_originals(tmp_path / "originals", [[reinforced(7, BASE)], [reinforced(8, BASE)]])
    assert [row.caption for row in list_rows(source, "datacompdr", original_captions=originals)] == [None, None]
    assert "not one caption for the samples of any tar (2 of 2 tars)" in caplog.text


def test_images_with_another_hash_are_counted_and_captions_kept(tmp_path):
    with serve() as server:
        base = f"http://127.0.0.1:{server.server_port}"
        samples = [reinforced(number, base, form=form) for number, form in enumerate(("npz", "pth.gz", "npz"))]
        samples[1].members["url.txt"] = f"{base}/good/9".encode()
        summary = ingest(config(tmp_path / "ds", write_reinforced(tmp_path / "dr", [samples])))
    assert summary.counts == {"success": 2, OTHER_SHA256: 1}
    rows = rows_of(tmp_path / "ds")
    assert [row["status"] for row in rows] == ["success", "failed_to_download", "success"]
    assert rows[0]["syn_text"] == samples[0].captions
    assert rows[0]["source_sha256"] == rows[0]["sha256"]
    meta = next(iter(read_shard(str(tmp_path / "ds/raw/00000.tar")))).meta
    assert (meta["uid"], meta["tar"]) == (samples[0].uid, "00000000.tar")


def test_a_retried_row_is_still_proved(tmp_path):
    with serve() as server:
        base = f"http://127.0.0.1:{server.server_port}"
        samples = [reinforced(number, base) for number in range(3)]
        samples[1].members["url.txt"] = f"{base}/flaky/1".encode()  # 503 at first, then the image
        samples[2].members["url.txt"] = f"{base}/flaky/9".encode()  # then another image
        source = write_reinforced(tmp_path / "dr", [samples])
        ingest(config(tmp_path / "ds", source, retries=0))
        summary = ingest(config(tmp_path / "ds", source, retries=0, retry_failed=True))
    assert summary.counts == {"success": 2, OTHER_SHA256: 1}
    retried = next(row for row in rows_of(tmp_path / "ds", 1) if row["status"] == "success")
    assert (retried["uid"], retried["syn_text"]) == (samples[1].uid, samples[1].captions)


def test_any_list_may_bring_hashes(tmp_path):
    with serve() as server:
        base = f"http://127.0.0.1:{server.server_port}"
        good = json.loads(reinforced(0, base).members["json"])["sha256"]
        lines = [{"url": f"{base}/good/{number}", "caption": "c", "hash": good.upper()} for number in range(2)]
        lines.append({"url": f"{base}/good/0?", "caption": "c", "hash": None})
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = ingest(config(tmp_path / "ds", tmp_path / "list.jsonl", sha256_col="hash"))
    assert summary.counts == {"success": 1, OTHER_SHA256: 1, NO_SHA256: 1}


def test_hashes_that_are_not_there_are_refused(tmp_path):
    source = tmp_path / "list.csv"
    source.write_text("url,caption\nhttp://127.0.0.1:1/,c\n")
    with pytest.raises(UserError, match="--sha256-col: the list has no other column 'hash'"):
        ingest(config(tmp_path / "ds", source, sha256_col="hash"))
    with pytest.raises(UserError, match="--sha256-col means nothing for a source of form datacompdr"):
        ingest(config(tmp_path / "ds", write_reinforced(tmp_path / "dr", [[reinforced(0, BASE)]]), sha256_col="uid"))
    with pytest.raises(UserError, match="--save-additional-columns without hash"):
        config(tmp_path, write_list(tmp_path / "l.tsv", []), sha256_col="hash", save_additional_columns=("uid",))


def write_originals(folder, tars: list[list[Reinforced]]) -> str:
    """mlfoundations/DataComp-12M's tars: the same uids, with captions."""
    folder.mkdir()
    for number, samples in enumerate(tars):
        members = [(f"{sample.uid}.txt", f" original {sample.uid[:4]}\n") for sample in samples]
        (folder / f"{number:08d}.tar").write_bytes(tar_bytes(members))
    return str(folder)


def test_original_captions_come_by_tar_and_uid(tmp_path):
    tars = [[reinforced(0, BASE), reinforced(1, BASE)], [reinforced(2, BASE)]]
    source = write_reinforced(tmp_path / "dr", tars)
    originals = write_originals(tmp_path / "originals", [[tars[0][1], reinforced(7, BASE)], [tars[1][0]]])
    rows = list(list_rows(source, "datacompdr", original_captions=originals))
    expected = [f"original {tar[-1].uid[:4]}" for tar in tars]
    assert [row.caption for row in rows] == [None, *expected]
    assert [row.note for row in rows] == ["no caption in --original-captions", None, None]
    assert [row.problem for row in rows] == [None, None, None]


def test_original_captions_that_are_not_there_are_refused(tmp_path):
    tars = [[reinforced(0, BASE)], [reinforced(2, BASE)]]
    source = write_reinforced(tmp_path / "dr", tars)
    originals = write_originals(tmp_path / "originals", tars[:1])
    with pytest.raises(UserError, match=r"--original-captions .*: no 00000001\.tar is there, which --source has"):
        ingest(config(tmp_path / "ds", source, original_captions=originals))
    with pytest.raises(UserError, match=r"--original-captions .*/nothing: no such file or folder"):
        ingest(config(tmp_path / "ds", source, original_captions=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="--original-captions goes with DataCompDR's tars"):
        ingest(
            config(tmp_path / "ds", write_list(tmp_path / "l.tsv", [("http://h/1", "c")]), original_captions=originals)
        )


def test_original_captions_are_not_lost_by_a_run_without_them(tmp_path):
    """Such a run is refused; shards of before this was recorded stay valid."""
    with serve() as server:
        tars = [[reinforced(0, f"http://127.0.0.1:{server.server_port}")]]
        source = write_reinforced(tmp_path / "dr", tars)
        originals = write_originals(tmp_path / "originals", tars)
        root = tmp_path / "ds"
        assert ingest(config(root, source, original_captions=originals)).made == 1
        with pytest.raises(UserError, match="--original-captions: True before, None now"):
            ingest(config(root, source))
        moved = (tmp_path / "originals").rename(tmp_path / "moved")
        assert ingest(config(root, source, original_captions=str(moved))).made == 0
        ingest(config(root, source, overwrite=True))
        assert ingest(config(root, source, original_captions=str(moved))).made == 1  # as a version of before did
        assert rows_of(root)[0]["caption"].startswith("original")
        assert "original_captions" not in read_dataset(str(root))["stages"]["ingest"]["config"]
