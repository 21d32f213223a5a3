"""WebDataset tars made by others: how members become samples, whole, cut and damaged ones."""

import json
import tarfile
from dataclasses import astuple
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import tar_bytes
from small_sources import LIMIT, empty_store, plain, put, rows_of
from web_server import make_image

from pipeline.ingest import webdataset_source
from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.image_bytes import ImageReadError, read_image_bytes
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError, sha256_json

GOLDEN = Path(__file__).parents[2] / "golden" / "img2dataset-1.47"


@pytest.fixture
def store():
    return empty_store()


MEMBERS = [
    ("a/0.jpg", make_image(0)),
    ("a/0.txt", "zero\n"),
    ("a/0.url", "http://h/0"),
    ("1.WEBP", make_image(1)),
    ("1.json", '{"TEXT": "one", "alt": "other", "url": "http://h/1", "n": [1]}'),
    ("2.cls", "7"),
    ("2.mask.png", b"mask"),
    ("2.image.jpg", make_image(2)),
    ("2.caption.txt", "two"),
    ("x.y.json", "{}"),
    ("x.y.gif", make_image(3)),
    ("x.y.caption", b"bad \xff"),
    ("k.png", make_image(4)),
    ("k.text", "k1"),
    ("k.png", make_image(5)),
    ("k.text", "k2"),
    ("none.txt", "no image here"),
    ("README", "about"),
    ("b.json", "{"),
    ("b.bmp", make_image(6)),
    ("l.avif", make_image(7)),
    ("l.json", '{"caption": ["a", "b"]}'),
    ("e.jpg", b""),
    ("1.jpg", make_image(8)),
]
FOUND = [
    ("zero", "http://h/0", None),
    ("one", "http://h/1", None),
    ("two", "T/2", None),
    ("bad \ufffd", "T/x", "caption is not UTF-8"),
    ("k1", "T/k", None),
    ("k2", "T/k", None),
    ("no image here", "T/none", "no picture"),
    (None, "T/README", "no picture"),
    (None, "T/b", "json member is not a JSON object"),
    ("a", "T/l", None),
    ("b", "T/l", None),
    (None, "T/e", None),
    (None, "T/1", None),
]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_made_by_others(tmp_path, store, form, remote):
    folder = store if remote else str(tmp_path)
    put(folder, "T", tar_bytes(MEMBERS, form))
    assert detect(f"{folder}/T") == "webdataset"
    rows = rows_of(f"{folder}/T")
    assert plain(rows) == FOUND
    seeds = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 8: 6, 9: 7, 10: 7, 12: 8}
    for index, seed in seeds.items():
        assert read_image_bytes(rows[index].image_ref, LIMIT) == make_image(seed)
    with pytest.raises(ImageReadError, match=r"^empty file$"):
        read_image_bytes(rows[11].image_ref, LIMIT)
    with pytest.raises(ImageReadError, match=r"^too large$"):
        read_image_bytes(rows[0].image_ref, 100)
    assert len({row.stamp for row in rows}) == 1


@pytest.mark.parametrize("remote", [False, True])
def test_tars_of_a_folder_with_a_broken_one(tmp_path, store, remote):
    folder = store if remote else str(tmp_path)
    for number in range(4):
        images = [make_image(10 * number + n) for n in range(3)]
        members = with_captions(images, [f"c{number}{n}" for n in range(3)])
        data = tar_bytes(members)
        inside = data.index(make_image(10 * number + 2)) + 50  # in the last image
        put(folder, f"{number}.tar", {1: data[:inside], 2: b"x" + data[1:]}.get(number, data))
    rows = rows_of(folder)
    assert [row.caption for row in rows] == ["c00", "c01", "c02", "c10", "c11", None, None, "c30", "c31", "c32"]
    assert [(row.url, row.problem) for row in rows[5:7]] == [("1.tar", "truncated tar"), ("2.tar", "damaged tar")]
    urls = [row.url for row in rows_of(f"{folder}/[03]*.tar")]
    assert urls == ["0.tar/0", "0.tar/1", "0.tar/2", "3.tar/0", "3.tar/1", "3.tar/2"]


def with_captions(images: list[bytes], captions: list[str]) -> list[tuple[str, bytes | str]]:
    """Members of a tar: ``0.jpg``, ``0.txt``, ``1.jpg`` ..."""
    members: list[tuple[str, bytes | str]] = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        members += [(f"{number}.jpg", image), (f"{number}.txt", caption)]
    return members


def whole_tar() -> tuple[bytes, list[int]]:
    """A tar of 5 samples, and where each ends."""
    data = tar_bytes(with_captions([make_image(n) for n in range(5)], [f"c{n}" for n in range(5)]))
    ends = [data.index(f"c{n}".encode() + bytes(500)) + 2 for n in range(5)]
    return data, ends


@pytest.mark.parametrize("remote", [False, True])
def test_a_tar_cut_anywhere_gives_its_whole_samples_and_one_problem(tmp_path, store, remote):
    data, ends = whole_tar()
    folder = store if remote else str(tmp_path)
    for cut in {0, 1, 511, 512, *range(300, ends[-1] + 1500, 411), *ends, ends[-1] + 510, ends[0] + 510}:
        put(folder, "x.tar", data[:cut])
        rows = rows_of(f"{folder}/x.tar")
        whole = sum(end <= cut for end in ends)
        if whole == 1 and cut < ends[1]:  # nothing before it tells what a whole sample has
            assert plain(rows)[-1][2] == "truncated tar"
            continue
        assert [row.caption for row in rows] == [*(f"c{n}" for n in range(whole)), None]
        assert [row.problem for row in rows] == [*[None] * whole, "truncated tar"]
    put(folder, "x.tar", data[: ends[-1] + 510 + 1024])
    assert [row.problem for row in rows_of(f"{folder}/x.tar")] == [None] * 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6000), st.binary(min_size=1, max_size=40))
def test_a_damaged_tar_never_breaks_the_lister(tmp_path_factory, position, noise):
    data, _ = whole_tar()
    path = tmp_path_factory.mktemp("t") / "x.tar"
    path.write_bytes(data[:position] + noise + data[position + len(noise) :])
    rows = list(list_rows(str(path), "webdataset"))
    assert sha256_json([astuple(row) for row in rows])
    assert sum(row.problem in ("truncated tar", "damaged tar") for row in rows) <= 1


def test_columns_of_a_tars_json(tmp_path):
    fields = {"caption": "c", "long": "l", "where": "http://h/w"}
    put(
        tmp_path,
        "x.tar",
        tar_bytes(
            [
                ("0.jpg", make_image(1)),
                ("0.json", json.dumps(fields)),
                ("0.txt", "t"),
                ("0.blip", "b"),
                ("1.jpg", make_image(2)),
                ("1.json", "{}"),
            ]
        ),
    )
    path = f"{tmp_path}/x.tar"
    assert plain(rows_of(path)) == [("t", "x.tar/0", None), (None, "x.tar/1", None)]
    assert plain(rows_of(path, ("long", "where"))) == [("l", "http://h/w", None), (None, "x.tar/1", None)]
    assert plain(rows_of(path, ("blip", None)))[0] == ("b", "x.tar/0", None)
    with pytest.raises(UserError, match=r"no column 'x'; its samples have \['json', 'txt', 'blip', 'caption'"):
        rows_of(path, ("x", None))


def test_img2datasets_tars_are_webdataset_too(tmp_path):
    rows = rows_of(GOLDEN / "00000.tar")
    listed = pq.read_table(GOLDEN / "00000.parquet").to_pylist()
    made = {(row["caption"], row["url"], None) for row in listed if row["status"] == "success"}
    assert len(rows) == len(made)
    assert set(plain(rows)) == made
    estimate, exact = estimate_rows(f"{GOLDEN}/00000.tar", "webdataset")
    assert not exact
    assert len(made) <= estimate <= 2 * len(made)  # the end of a small tar is mostly padding


def test_a_member_that_is_too_long_for_a_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset_source, "MAX_TEXT_BYTES", 100)
    put(tmp_path, "x.tar", tar_bytes([("0.jpg", make_image(1)), ("0.txt", "x" * 101)]))
    assert plain(rows_of(tmp_path / "x.tar")) == [(None, "x.tar/0", "caption too long")]


def test_images_of_a_remote_tar_are_not_fetched_by_the_lister(tmp_path):
    """A real web server that counts the bytes it gives."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    pytest.importorskip("aiohttp")
    data = tar_bytes(with_captions([b"j" * 900_000] * 5, [f"c{n}" for n in range(5)]))
    sent = [0]

    class Handler(BaseHTTPRequestHandler):
        ranges = True

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(b"", {"Content-Length": str(len(data)), "Accept-Ranges": "bytes" if self.ranges else "none"})

        def do_GET(self) -> None:
            wanted = self.headers.get("Range") if self.ranges else None
            start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(data) - 1)
            piece = data[start : end + 1]
            sent[0] += len(piece)
            headers = {"Content-Length": str(len(piece))}
            if wanted:
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.answer(piece, headers, 206 if wanted else 200)

        def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/x.tar"
        rows = list(list_rows(url, "webdataset"))
        assert [row.caption for row in rows] == [f"c{n}" for n in range(5)]
        assert sent[0] < len(data) / 4
        assert read_image_bytes(rows[2].image_ref, LIMIT) == b"j" * 900_000
        assert rows_of(url) == rows
        Handler.ranges = False
        with pytest.raises(UserError, match="its server gives whole files only"):
            list(list_rows(url, "webdataset"))
    finally:
        server.shutdown()
        server.server_close()
