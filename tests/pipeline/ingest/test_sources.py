"""Sources of `ingest`: lists of every form, several files as one, images in folders, tars and Parquet files."""

import gzip
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import tar_bytes
from web_server import make_image

from pipeline.ingest import image_bytes, webdataset_source
from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.image_bytes import ImageReadError, clear_read_cache, read_image_bytes
from pipeline.ingest.image_folder import folder_rows
from pipeline.ingest.rows import FileRef, ParquetRef, Row, TarRef
from pipeline.ingest.source_files import source_files
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError, sha256_json, write_bytes

GOLDEN = Path(__file__).parents[2] / "golden" / "img2dataset-1.47"
LIMIT = 1 << 20
CC3M = "a cat on a mat\thttp://h/1.jpg\ntwo\tdogs\thttps://h/2.jpg\n"
CC12M = "http://h/1.jpg\ta cat on a mat\nhttps://h/2.jpg\ttwo\tdogs\n"
CSV = 'id,URL,TEXT\n1,http://h/1.jpg,a cat on a mat\n2,https://h/2.jpg,"two\tdogs"\n'
JSONL = '{"URL": "http://h/1.jpg", "TEXT": "a cat on a mat"}\n{"TEXT": "two\\tdogs", "URL": "https://h/2.jpg"}\n'
ROWS = [Row("a cat on a mat", "http://h/1.jpg"), Row("two\tdogs", "https://h/2.jpg")]


@pytest.fixture
def store():
    """An empty place on an object store."""
    fs, name = fsspec.filesystem("memory"), "sources"
    fs.rm(f"/{name}", recursive=True) if fs.exists(f"/{name}") else None
    return f"memory://{name}"


def rows_of(source: object, columns=(None, None)) -> list[Row]:
    """What `ingest` sees; every row can be hashed as it does."""
    form = detect(str(source), columns)
    rows = list(list_rows(str(source), form, columns))
    assert sha256_json([astuple(row) for row in rows])
    assert len(set(rows)) == len(rows)
    return rows


def plain(rows: list[Row]) -> list[tuple[str | None, str | None, str | None]]:
    return [(row.caption, row.url, row.problem) for row in rows]


# one list


@pytest.mark.parametrize(("form", "text"), [
    ("cc3m", CC3M), ("cc12m", CC12M), ("csv", CSV), ("cc3m", CC3M.replace("\n", "\r\n")), ("cc12m", "\ufeff" + CC12M),
    ("csv", "caption\turl\na cat on a mat\thttp://h/1.jpg\n\"two\tdogs\"\thttps://h/2.jpg\n"), ("cc3m", CC3M[:-1]),
    ("jsonl", JSONL), ("jsonl", "\ufeff" + JSONL[:-1]), ("csv", CSV.replace("URL,TEXT", "image,alt")),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_forms_of_lists(tmp_path, form, text, packed):
    path = tmp_path / ("list.gz" if packed else "list")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert detect(str(path)) == form
    assert list(list_rows(str(path), form)) == ROWS


@pytest.mark.parametrize("columns", [("url", "caption"), ("URL", "TEXT"), ("image_url", "alt_text"), ("image", "alt")])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_lists(tmp_path, columns, kind):
    path = str(tmp_path / "list.parquet")
    table = {"id": [1, 2, 3], columns[0]: pa.array([row.url for row in ROWS] + [None], kind),
             columns[1]: pa.array([row.caption for row in ROWS] + [None], kind)}  # fmt: skip
    pq.write_table(pa.table(table), path)
    assert detect(path) == "parquet"
    assert list(list_rows(path, "parquet")) == [*ROWS, Row(None, None, "no URL")]
    assert estimate_rows(path, "parquet") == (3, True)


def test_caption_comes_before_text_and_given_columns_before_both(tmp_path):
    fields = {"text": "t", "caption": "c", "url": "u", "image_url": "i", "label": "l", "where": "w"}
    (tmp_path / "a.jsonl").write_text(json.dumps(fields))
    (tmp_path / "a.csv").write_text(f"{','.join(fields)}\n{','.join(fields.values())}\n")
    (tmp_path / "a.tsv").write_text("{}\n{}\n".format("\t".join(fields), "\t".join(fields.values())))
    pq.write_table(pa.Table.from_pylist([fields]), tmp_path / "a.parquet")
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        path = tmp_path / f"a.{ending}"
        assert rows_of(path) == [Row("c", "u")]
        assert rows_of(path, ("label", "where")) == [Row("l", "w")]
        assert rows_of(path, (None, "image_url")) == [Row("c", "i")]
        for columns, words in ((("Label", None), "no column 'Label'.*--caption-col"), ((None, "x"), "'x'.*--url-col")):
            with pytest.raises(UserError, match=words) as error:
                rows_of(path, columns)
            assert f"its columns are {list(fields)}" in str(error.value)


def test_columns_given_for_a_list_without_a_header(tmp_path):
    (tmp_path / "l.tsv").write_text(CC12M)
    with pytest.raises(UserError, match=r"no column 'alt'; its columns are \['http://h/1.jpg', 'a cat on a mat'\]"):
        detect(str(tmp_path / "l.tsv"), ("alt", None))
    (tmp_path / "l.csv").write_text("a,b,c\n1,http://h/1,x\n")
    with pytest.raises(UserError, match="or its columns with --url-col"):
        detect(str(tmp_path / "l.csv"))
    assert rows_of(tmp_path / "l.csv", ("c", "b")) == [Row("x", "http://h/1")]


def test_broken_rows_are_rows_with_a_problem(tmp_path):
    path = tmp_path / "list.tsv"
    lines = [
        b"http://h/1\tok",
        b"http://h/2\tbad \xff utf",
        b"http://h/3",
        b"just words",
        b"",
        b"\tno url",
        b"http://h/7\t",
    ]
    lines.append(b"http://h/8\t" + b"x" * 3_000_000)
    lines.append(b"http://h/9\tlast")
    path.write_bytes(b"\n".join(lines))
    rows = list(list_rows(str(path), "cc12m"))
    problems = [None, "caption is not UTF-8", *["missing column"] * 3, "no URL", None, "caption too long", None]
    assert [row.problem for row in rows] == problems
    assert rows[1].caption == "bad \ufffd utf"
    assert (rows[2].url, rows[3].url, rows[6].caption, rows[8].caption) == ("http://h/3", None, "", "last")
    assert rows[7].caption == "x" * 1000


def test_broken_csv_rows(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(
        b"url,caption\nhttp://h/1,ok\nhttp://h/2\n\nhttp://h/3,\xe9t\xe9\n"
        + b'http://h/4,"'
        + b"x" * 200_000
        + b'"\nhttp://h/5,last\n'
    )
    rows = list(list_rows(str(path), "csv"))
    assert [row.problem for row in rows][:4] == [None, "missing column", "missing column", "caption is not UTF-8"]
    assert (rows[4].url, rows[4].problem, rows[4].caption) == ("http://h/4", "caption too long", "x" * 1000)
    assert rows[-1] == Row("last", "http://h/5")


def test_broken_jsonl_rows(tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [
        b'{"url": "http://h/1", "caption": "ok", "more": [1]}',
        b'{"url": "http://h/2", "caption": null}',
        b'{"caption": "no url"}',
        b'{"url": 3, "caption": "c"}',
        b'{"url": "http://h/5", "caption": ["a", "b"]}',
        rb'{"url": "http://h/6", "caption": "half \ud800"}',
        b'{"url": "http://h/7", "caption": "bad \xff"}',
        b'{"url": "http://h/8", "caption": "cut',
        b"",
        b"[1]",
        b"[" * 200_000,
        b'{"url": "http://h/12", "caption": "' + b"x" * 2_000_000 + b'"}',
        b'{"url": "http://h/13", "caption": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = list(list_rows(str(path), detect(str(path))))
    bad = "not a JSON object"
    expected = [None, None, "no URL", "no URL", None, None, "caption is not UTF-8", *[bad] * 6, None]
    assert [row.problem for row in rows] == expected
    assert rows[0] == Row("ok", "http://h/1")
    assert (rows[1].caption, rows[6].caption, rows[-1].caption) == (None, "half \ufffd\ufffd\ufffd", "last")
    assert [row.caption for row in rows[4:6]] == ["a", "b"], "a caption each"
    assert sha256_json([astuple(row) for row in rows])


@pytest.mark.parametrize(("data", "message"), [
    (b"", "is empty; give a list with a URL and a caption per line"),
    (b"\n\n", "is empty; give a list with a URL and a caption per line"),
    (b"one\ntwo\n", "cannot tell its form from its first lines .'one'.*--format"),
    (b"http://h/1 cat\nhttp://h/2 dog\n", "cannot tell its form from its first lines"),
    (b"http://h/1\thttp://h/2\n", "cannot tell its form from its first lines"),
    (b"url,title\nhttp://h/1,x\n", r"its columns are \['url', 'title'\]; it needs url .* and caption"),
    (b'{"url": "http://h/1", "title": "x"}\n', r"its columns are \['url', 'title'\]; it needs url .* and caption"),
    (b'[{"url": "http://h/1",\n "caption": "x"}]\n', "JSON, but not one object per line"),
    (b'{\n"url": "http://h/1",\n "caption": "x"}\n', "JSON, but not one object per line"),
    (gzip.compress(CC12M.encode() * 99, mtime=0)[:-20], "broken gzip file"),
    (gzip.compress(JSONL.encode() * 99, mtime=0)[:-20], "broken gzip file"),
    (b"PAR1 is not enough", "not a readable Parquet file"),
    (gzip.compress(b"x" * 257 + b"ustar", mtime=0), "a tar packed with gzip"),
])  # fmt: skip
def test_lists_that_cannot_be_used(tmp_path, data, message):
    path = tmp_path / "list.tsv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"--source \S*list.tsv:? ?{message}"):
        rows_of(path)


def test_a_parquet_list_without_text_columns(tmp_path):
    path = str(tmp_path / "list.parquet")
    pq.write_table(pa.table({"url": ["http://h/1"], "caption": [[1, 2]]}), path)
    with pytest.raises(UserError, match=r"the column 'caption' is list<element: int64>, not text or a list of texts"):
        rows_of(path)
    pq.write_table(pa.table({"url": ["http://h/1"]}), path)
    with pytest.raises(UserError, match=r"its columns are \['url'\]"):
        rows_of(path)


NOT_THERE = r"no such file|no file matches|nope://h/x: Protocol|with a wildcard"


def test_sources_that_are_not_there(tmp_path, store):
    for source in (tmp_path / "x", tmp_path / "*.tsv", f"{store}/x", f"{store}/*.tsv", "nope://h/x", "memory://*.tsv"):
        with pytest.raises(UserError, match=NOT_THERE):
            detect(str(source))
        with pytest.raises(UserError, match=NOT_THERE):
            list(list_rows(str(source), "cc3m"))
        assert estimate_rows(str(source), "cc3m") is None
    with pytest.raises(UserError, match="not a folder"):
        list(list_rows(str(tmp_path / "x"), "folder"))
    (tmp_path / "x.jpg").write_bytes(make_image(1))
    with pytest.raises(UserError, match="an image; give its folder"):
        detect(str(tmp_path / "x.jpg"))


# several files as one list


def put(folder: object, name: str, data: str | bytes) -> None:
    content, path = data.encode() if isinstance(data, str) else data, f"{folder}/{name}"
    if path.startswith("memory://"):
        fsspec.filesystem("memory").pipe_file(path, content)
    else:
        write_bytes(path, content)


def parquet_bytes(rows: list[dict], schema: pa.Schema | None = None, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, **options)
    return file.getvalue()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("form", "ending"), [
    ("cc12m", "tsv"), ("cc12m", "tsv.gz"), ("csv", "csv"), ("csv", "csv.gz"), ("jsonl", "jsonl"), ("jsonl", "json.gz"),
    ("parquet", "parquet"),
])  # fmt: skip
def test_files_of_a_folder_and_of_a_glob_are_one_list(tmp_path, store, form, ending, remote):
    folder = store if remote else str(tmp_path / "S")
    rows = [{"url": f"http://h/{n}", "caption": f"c{n}"} for n in range(9)]

    def encoded(part: list[dict]) -> bytes:
        if form == "parquet":
            return parquet_bytes(part)
        if form == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in part)
        else:
            sign = "," if form == "csv" else "\t"
            text = ("url,caption\n" if form == "csv" else "") + "".join(f"{sign.join(row.values())}\n" for row in part)
        return gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()

    for name, part in (("part-2", rows[6:]), ("part-0", rows[:2]), ("deeper/part-1", rows[2:6])):
        put(folder, f"{name}.{ending}", encoded(part))
    put(folder, f"_metadata.{ending}", b"")  # as Spark writes
    put(folder, "README.md", b"about")
    in_order = [Row(rows[n]["caption"], rows[n]["url"]) for n in (2, 3, 4, 5, 0, 1, 6, 7, 8)]
    top = [row for row in in_order if row.url[-1] not in "2345"]
    for source, expected in ((folder, in_order), (f"{folder}/part-*.{ending}", top), (f"{folder}/*.{ending}", top),
                             (f"{folder}/**/part-?.{ending}" if not remote else folder, in_order)):  # fmt: skip
        assert detect(source) == form
        assert rows_of(source) == expected
    assert list(list_rows(folder, form)) == in_order
    if form == "parquet":
        assert estimate_rows(folder, form) == (9, True)


def test_an_empty_part_has_no_rows_and_a_broken_one_is_named(tmp_path):
    put(tmp_path, "0.csv", b"")
    put(tmp_path, "1.csv", CSV)
    put(tmp_path, "2.csv", "caption,url\na,http://h/3\n")
    assert rows_of(tmp_path) == [*ROWS, Row("a", "http://h/3")]
    put(tmp_path, "3.csv", "1,http://h/4,no header\n")
    with pytest.raises(UserError, match=r"3.csv: its columns are \['1', 'http://h/4', 'no header'\]"):
        rows_of(tmp_path)


def test_folders_whose_form_is_not_clear(tmp_path):
    put(tmp_path / "a", "x.csv", CSV)
    put(tmp_path / "a", "data/x.parquet", parquet_bytes([{"url": "http://h/1", "caption": "c"}]))
    with pytest.raises(UserError, match=r"has files of several kinds \(csv, parquet\); name one with a glob"):
        detect(f"{tmp_path}/a")
    with pytest.raises(UserError, match="several kinds"):
        detect(f"{tmp_path}/a/**/x.*")
    assert rows_of(f"{tmp_path}/a/*.csv") == ROWS
    assert list(list_rows(f"{tmp_path}/a", "parquet")) == [Row("c", "http://h/1")]
    with pytest.raises(UserError, match=r"no file for --format jsonl \(.jsonl"):
        list(list_rows(f"{tmp_path}/a", "jsonl"))
    put(tmp_path / "a", "assets/figure.png", make_image(1))
    with pytest.raises(UserError, match=r"has images .assets/figure.png. and data/x.parquet; name what is meant"):
        detect(f"{tmp_path}/a")
    put(tmp_path / "b", "x.csv", CSV)
    put(tmp_path / "b", "train/x.jpg", make_image(1))
    assert detect(f"{tmp_path}/b") == "folder"
    (tmp_path / "empty").mkdir()
    assert detect(f"{tmp_path}/empty") == "folder"
    assert detect(str(GOLDEN)) == "img2dataset"
    assert detect(f"{GOLDEN}/*.tar") == "webdataset"


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    put(tmp_path, "list[1].tsv", CC12M)
    assert rows_of(tmp_path / "list[1].tsv") == ROWS


# estimates


def test_estimates(tmp_path, store):
    lines = [f"http://h/{n % 977}/{n}.jpg\tcaption number {n}\n" for n in range(60_000)]
    put(tmp_path, "a.tsv", "".join(lines))
    rows, exact = estimate_rows(f"{tmp_path}/a.tsv", "cc12m")
    assert not exact
    assert abs(rows - 60_000) < 3000
    put(tmp_path, "a.tsv.gz", gzip.compress("".join(lines).encode(), 1))
    rows, exact = estimate_rows(f"{tmp_path}/a.tsv.gz", "cc12m")
    assert abs(rows - 60_000) < 3000
    put(tmp_path, "s.tsv", "".join(lines[:7])[:-1])
    assert estimate_rows(f"{tmp_path}/s.tsv", "cc12m") == (7, True)
    put(store, "s.csv", CSV)
    assert estimate_rows(f"{store}/s.csv", "csv") == (2, False)
    put(tmp_path, "two.gz", gzip.compress(CC12M.encode()) * 2)
    assert estimate_rows(f"{tmp_path}/two.gz", "cc12m") == (4, False)
    assert estimate_rows(str(tmp_path), "folder") is None
    put(tmp_path, "broken.parquet", b"PAR1")
    assert estimate_rows(f"{tmp_path}/broken.parquet", "parquet") is None


def test_an_estimate_over_many_parquet_files_reads_some(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.ingest.estimate.MAX_FOOTERS", 3)
    for n in range(10):
        put(tmp_path, f"{n}.parquet", parquet_bytes([{"url": "http://h/1", "caption": "c"}] * 5))
    assert estimate_rows(str(tmp_path), "parquet") == (50, False)


# folders of images


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_with_captions_beside(tmp_path, store, remote):
    folder = store if remote else str(tmp_path)
    for n, name in enumerate(("z.jpg", "b/x.PNG", "a.webp", "b/none.jpg", "[1]*.jpg")):
        put(folder, name, make_image(n))
    put(folder, "z.txt", "last ü\n")
    put(folder, "b/x.txt", "in b")
    put(folder, "a.txt", b"\xff")
    put(folder, "[1]*.txt", "odd")
    put(folder, "empty.jpg", b"")
    put(folder, "notes.md", "no picture")
    if not remote:
        (tmp_path / "gone.jpg").symlink_to("nowhere")
        (tmp_path / "zz.jpg").write_bytes(make_image(3))
        (tmp_path / "zz.txt").symlink_to("nowhere")
    rows = rows_of(folder)
    expected = [("odd", "[1]*.jpg", None), ("\ufffd", "a.webp", "caption is not UTF-8"), (None, "empty.jpg", None)]
    expected += [] if remote else [(None, "gone.jpg", "file not found")]
    expected += [("last ü", "z.jpg", None)]
    expected += [] if remote else [(None, "zz.jpg", "caption not readable")]
    expected += [(None, "b/none.jpg", None), ("in b", "b/x.PNG", None)]
    assert plain(rows) == expected
    assert all(row.stamp and row.image_ref == FileRef(f"{folder}/{row.url}") for row in rows if row.url != "gone.jpg")
    by_url = {row.url: row.image_ref for row in rows}
    assert read_image_bytes(by_url["z.jpg"], LIMIT) == make_image(0)
    with pytest.raises(ImageReadError, match=r"^empty file$"):
        read_image_bytes(by_url["empty.jpg"], LIMIT)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_with_metadata(tmp_path, store, form, remote):
    folder = store if remote else str(tmp_path)
    for name in ("1.jpg", "2.jpg", "other.jpg"):
        put(folder, f"train/{name}", make_image(1))
    listed = [
        ("train/2.jpg", "two"),
        ("train/1.jpg", 'one, "quoted"'),
        ("train/3.jpg", "not there"),
        ("../x.jpg", "up"),
    ]
    if form == "csv":
        lines = ["file_name,text", *('{},"{}"'.format(n, c.replace('"', '""')) for n, c in listed)]
    else:
        lines = [json.dumps({"file_name": n, "caption": c}) for n, c in listed] + ["no json", '{"text": "x"}', ""]
    put(folder, f"metadata.{form}", "\n".join(lines))
    assert detect(folder) == "folder"
    rows = [(row.url, row.caption, row.problem) for row in folder_rows(folder)]
    expected = [
        ("train/1.jpg", 'one, "quoted"', None), ("train/2.jpg", "two", None), ("train/other.jpg", None, None),
        ("../x.jpg", "up", "file not found"),
    ]  # fmt: skip
    if form == "jsonl":
        expected += [(f"metadata.jsonl:{n}", None, "metadata row without file_name") for n in (5, 6)]
    assert rows == [*expected, ("train/3.jpg", "not there", "file not found")]


def test_metadata_that_cannot_be_used(tmp_path):
    (tmp_path / "metadata.csv").write_text("name,text\nx,y\n")
    with pytest.raises(UserError, match=r"metadata.csv: its columns are \['name', 'text'\]; it needs file_name"):
        rows_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\nx.jpg,y\n")
    assert rows_of(tmp_path) == [Row("y", "x.jpg", "file not found")]
    (tmp_path / "metadata.csv").write_text(CSV)
    assert rows_of(tmp_path) == ROWS


def test_a_image_whose_name_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(make_image(1))
    assert rows_of(tmp_path) == [Row(None, "\ufffd.jpg", "file name is not UTF-8")]


def test_a_changed_image_changes_its_stamp(tmp_path, store):
    for folder in (tmp_path, store):
        put(folder, "x.jpg", make_image(1))
        (before,) = folder_rows(str(folder))
        assert list(folder_rows(str(folder))) == [before]
        put(folder, "x.jpg", make_image(1) + b"more")
        (after,) = folder_rows(str(folder))
        assert before.stamp != after.stamp


# tars made by others


MEMBERS = [
    ("a/0.jpg", make_image(0)), ("a/0.txt", "zero\n"), ("a/0.url", "http://h/0"),
    ("1.WEBP", make_image(1)), ("1.json", '{"TEXT": "one", "alt": "other", "url": "http://h/1", "n": [1]}'),
    ("2.cls", "7"), ("2.mask.png", b"mask"), ("2.image.jpg", make_image(2)), ("2.caption.txt", "two"),
    ("x.y.json", "{}"), ("x.y.gif", make_image(3)), ("x.y.caption", b"bad \xff"),
    ("k.png", make_image(4)), ("k.text", "k1"), ("k.png", make_image(5)), ("k.text", "k2"),
    ("none.txt", "no image here"), ("README", "about"),
    ("b.json", "{"), ("b.bmp", make_image(6)), ("l.avif", make_image(7)), ("l.json", '{"caption": ["a", "b"]}'),
    ("e.jpg", b""), ("1.jpg", make_image(8)),
]  # fmt: skip
FOUND = [
    ("zero", "http://h/0", None), ("one", "http://h/1", None), ("two", "T/2", None),
    ("bad \ufffd", "T/x", "caption is not UTF-8"), ("k1", "T/k", None), ("k2", "T/k", None),
    ("no image here", "T/none", "no picture"), (None, "T/README", "no picture"),
    (None, "T/b", "json member is not a JSON object"), ("a", "T/l", None), ("b", "T/l", None), (None, "T/e", None),
    (None, "T/1", None),
]  # fmt: skip


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
        members = [(f"{n}.{ending}", data) for n in range(3)
                   for ending, data in (("jpg", make_image(10 * number + n)), ("txt", f"c{number}{n}"))]  # fmt: skip
        data = tar_bytes(members)
        inside = data.index(make_image(10 * number + 2)) + 50  # in the last image
        put(folder, f"{number}.tar", {1: data[:inside], 2: b"x" + data[1:]}.get(number, data))
    rows = rows_of(folder)
    assert [row.caption for row in rows] == ["c00", "c01", "c02", "c10", "c11", None, None, "c30", "c31", "c32"]
    assert [(row.url, row.problem) for row in rows[5:7]] == [("1.tar", "truncated tar"), ("2.tar", "damaged tar")]
    assert [row.url for row in rows_of(f"{folder}/[03]*.tar")] == [f"{n}.tar/{m}" for n in (0, 3) for m in range(3)]


def whole_tar() -> tuple[bytes, list[int]]:
    """A tar of 5 samples, and where each ends."""
    members = [(f"{n}.{ending}", data) for n in range(5)
               for ending, data in (("jpg", make_image(n)), ("txt", f"c{n}"))]  # fmt: skip
    data = tar_bytes(members)
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
    put(tmp_path, "x.tar", tar_bytes([("0.jpg", make_image(1)), ("0.json", json.dumps(fields)), ("0.txt", "t"),
                                      ("0.blip", "b"), ("1.jpg", make_image(2)), ("1.json", "{}")]))  # fmt: skip
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
    data = tar_bytes([(f"{n}.{e}", d) for n in range(5) for e, d in (("jpg", b"j" * 900_000), ("txt", f"c{n}"))])
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


# Parquet files with images in them


def image_rows(count: int) -> list[dict]:
    return [{"image": {"bytes": make_image(n), "path": f"{n}.jpg"}, "text": f"c{n}", "label": n} for n in range(count)]


@pytest.mark.parametrize("remote", [False, True])
def test_parquet_files_with_images(tmp_path, store, remote):
    folder = store if remote else str(tmp_path)
    rows = image_rows(25)
    put(folder, "data/train-0.parquet", parquet_bytes(rows[:20], row_group_size=7))
    put(folder, "data/train-1.parquet", parquet_bytes(rows[20:], row_group_size=2))
    for source in (folder, f"{folder}/data/train-*.parquet"):
        assert detect(source) == "hf-parquet"
        assert estimate_rows(source, "hf-parquet") == (25, True)
    found = rows_of(folder)
    assert [row.caption for row in found] == [f"c{n}" for n in range(25)]
    assert [row.url for row in found][19:21] == ["data/train-0.parquet#19", "data/train-1.parquet#0"]
    assert found[8].image_ref == ParquetRef(f"{folder}/data/train-0.parquet", "image.bytes", 1, 1)
    assert [read_image_bytes(row.image_ref, LIMIT) for row in found] == [make_image(n) for n in range(25)]
    assert [read_image_bytes(row.image_ref, LIMIT) for row in found[::-1]] == [make_image(n) for n in range(25)][::-1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_binary_column_of_images_and_a_url(tmp_path, kind):
    schema = pa.schema([("jpg", kind), ("caption", pa.string()), ("url", pa.string())])
    rows = [{"jpg": make_image(n), "caption": None if n == 1 else f"c{n}", "url": f"http://h/{n}"} for n in range(3)]
    rows += [{"jpg": None, "caption": "null", "url": ""}, {"jpg": b"", "caption": "empty", "url": None}]
    put(tmp_path, "x.parquet", parquet_bytes(rows, schema))
    found = rows_of(tmp_path / "x.parquet")
    assert plain(found) == [("c0", "http://h/0", None), (None, "http://h/1", None), ("c2", "http://h/2", None),
                            ("null", "x.parquet#3", None), ("empty", "x.parquet#4", None)]  # fmt: skip
    assert read_image_bytes(found[2].image_ref, LIMIT) == make_image(2)
    for row in found[3:]:
        with pytest.raises(ImageReadError, match=r"^empty file$"):
            read_image_bytes(row.image_ref, LIMIT)
    with pytest.raises(ImageReadError, match=r"^too large$"):
        read_image_bytes(found[2].image_ref, 100)
    with pytest.raises(UserError, match=r"no column 'x' beside its images jpg; it has \['caption', 'url'\]"):
        rows_of(tmp_path / "x.parquet", ("x", None))
    with pytest.raises(UserError, match=r"no column 'x' beside.*--url-col"):
        rows_of(tmp_path / "x.parquet", (None, "x"))


def test_null_structs_other_structs_and_no_caption(tmp_path):
    rows = [{"mask": {"bytes": b"m", "path": ""}, **row} for row in image_rows(2)] + [{"text": "null"}]
    put(tmp_path, "x.parquet", parquet_bytes(rows))
    found = rows_of(tmp_path / "x.parquet")
    assert [row.image_ref.column for row in found] == ["image.bytes"] * 3
    with pytest.raises(ImageReadError, match=r"^empty file$"):
        read_image_bytes(found[2].image_ref, LIMIT)
    for row in rows:
        row["label"] = row.pop("text")
    put(tmp_path, "x.parquet", parquet_bytes(rows))
    with pytest.raises(UserError, match=r"no caption column beside .*; it has \['mask', 'label'\]; give --caption-col"):
        rows_of(tmp_path / "x.parquet")


def test_a_rewritten_parquet_file_is_read_anew(tmp_path):
    path = f"{tmp_path}/x.parquet"
    for seed in (0, 50):
        put(tmp_path, "x.parquet", parquet_bytes([{"image": make_image(seed + n), "text": "c"} for n in range(3)]))
        assert [read_image_bytes(row.image_ref, LIMIT) for row in rows_of(path)] == [
            make_image(seed + n) for n in range(3)
        ]


def test_a_broken_parquet_file_of_images(tmp_path):
    noise = [{"image": os.urandom(2000), "text": f"c{n}"} for n in range(300)]
    data = parquet_bytes(noise, row_group_size=100, compression="zstd", use_dictionary=False)
    middle = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    put(tmp_path, "x.parquet", data[:middle] + b"\xff" * 3000 + data[middle + 3000 :])
    outcomes = []
    for row in rows_of(tmp_path / "x.parquet"):
        try:
            outcomes.append(read_image_bytes(row.image_ref, LIMIT) == noise[len(outcomes)]["image"])
        except ImageReadError as error:
            outcomes.append(str(error))
    assert set(outcomes) == {True, "file not readable"}
    assert outcomes[:100] + outcomes[200:] == [True] * 200
    put(tmp_path, "x.parquet", data[:-100])
    with pytest.raises(UserError, match=r"x.parquet: not a readable Parquet file"):
        rows_of(tmp_path / "x.parquet")


# places


def test_places_that_are_not_there(tmp_path, store):
    put(tmp_path, "x.bin", b"0123456789")
    put(tmp_path, "x.parquet", parquet_bytes([{"image": b"a", "text": "c"}]))
    (tmp_path / "dir").mkdir()
    reasons = {
        FileRef(f"{tmp_path}/no"): "file not found",
        FileRef(f"{store}/no"): "file not found",
        FileRef(f"{tmp_path}/dir"): "file not readable",
        FileRef(f"{tmp_path}/x.bin/x"): "file not readable",
        FileRef(f"{tmp_path}/a\0b"): "file not readable",
        TarRef(f"{tmp_path}/no", 0, 5): "file not found",
        TarRef(f"{tmp_path}/x.bin", 8, 5): "file not readable",
        TarRef(f"{tmp_path}/x.bin", 8, 0): "empty file",
        ParquetRef(f"{tmp_path}/no", "image", 0, 0): "file not found",
        ParquetRef(f"{store}/no", "image", 0, 0): "file not found",
        ParquetRef(f"{tmp_path}/x.bin", "image", 0, 0): "file not readable",
        ParquetRef(f"{tmp_path}/x.parquet", "image", 1, 0): "file not readable",
        ParquetRef(f"{tmp_path}/x.parquet", "image", 0, 1): "file not readable",
        ParquetRef(f"{tmp_path}/x.parquet", "img", 0, 0): "file not readable",
    }
    for place, reason in reasons.items():
        with pytest.raises(ImageReadError, match=f"^{reason}$"):
            read_image_bytes(place, LIMIT)
    assert read_image_bytes(ParquetRef(f"{tmp_path}/x.parquet", "image", 0, 0), LIMIT) == b"a"
    assert read_image_bytes(FileRef(f"{tmp_path}/x.bin"), 10) == b"0123456789"
    with pytest.raises(UserError, match="Protocol not known"):  # no image is to blame
        read_image_bytes(FileRef("nope://x/y"), LIMIT)
    with pytest.raises(ImageReadError, match="too large"):
        read_image_bytes(FileRef(f"{tmp_path}/x.bin"), 9)


def test_many_threads_read_a_row_group_once_and_hold_little(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bytes, "KEEP_BYTES", 4 << 20)
    monkeypatch.setattr(image_bytes, "BATCH_BYTES", 1 << 18)
    images = [bytes([n % 256]) * 10_000 + n.to_bytes(4) for n in range(4000)]
    rows = [{"image": data, "text": "c"} for data in images]
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    put(tmp_path, "x.parquet", parquet_bytes(rows, schema, row_group_size=2500, use_dictionary=False))
    opened = []
    decode = image_bytes._decode_row_group
    monkeypatch.setattr(image_bytes, "_decode_row_group", lambda ref: opened.append(ref) or decode(ref))
    clear_read_cache()
    found = [row.image_ref for row in list_rows(f"{tmp_path}/x.parquet", "hf-parquet")]
    with ThreadPoolExecutor(32) as pool:
        for start in range(0, 4000, 64):
            read = pool.map(lambda place: read_image_bytes(place, LIMIT), found[start : start + 64])
            assert list(read) == images[start : start + 64]
            groups = image_bytes._row_groups.groups.values()
            held = sum(batch.images.nbytes for group in groups for batch in group.batches)
            assert held <= 4 << 20
    assert len(opened) == 2
    clear_read_cache()
    assert not image_bytes._row_groups.groups


def test_a_remote_row_group_that_failed_is_read_from_its_start(tmp_path, store, monkeypatch):
    monkeypatch.setattr(image_bytes, "BATCH_BYTES", 1 << 15)
    images = [n.to_bytes(2) * 500 for n in range(200)]
    rows = [{"image": data, "text": "c"} for data in images]
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    put(store, "x.parquet", parquet_bytes(rows, schema, use_dictionary=False))
    decode = image_bytes._decode_row_group
    opened = []

    def fail_once(ref):
        opened.append(ref)
        batches = decode(ref)
        yield next(batches)
        if len(opened) == 1:
            raise OSError("connection lost")
        yield from batches

    monkeypatch.setattr(image_bytes, "_decode_row_group", fail_once)
    clear_read_cache()
    found = [row.image_ref for row in list_rows(f"{store}/x.parquet", "hf-parquet")]
    failed = []
    for row, ref in enumerate(found):
        try:
            assert read_image_bytes(ref, LIMIT) == images[row]
        except ImageReadError as error:
            failed.append((row > 0, str(error)))
    assert failed == [(True, "file not readable")]
    assert len(opened) == 2


def test_source_files_have_sizes_and_stamps(tmp_path, store):
    for folder in (str(tmp_path), store):
        put(folder, "b.tsv", "x")
        put(folder, "a.tsv", "xy")
        assert [(file.path, file.below, file.size) for file in source_files(folder)] == [
            (f"{folder}/a.tsv", "a.tsv", 2), (f"{folder}/b.tsv", "b.tsv", 1)]  # fmt: skip
        assert all(file.stamp.split()[1] for file in source_files(folder))
