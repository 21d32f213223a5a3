"""Sources of `ingest`: lists of every form, several files as one, folders of images."""

import gzip
import json
import os
from dataclasses import astuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_sources import LIMIT, empty_store, parquet_bytes, plain, put, rows_of
from web_server import make_image

from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.image_bytes import ImageReadError, read_image_bytes
from pipeline.ingest.image_folder import folder_rows
from pipeline.ingest.rows import FileRef, Row
from pipeline.ingest.source_files import source_files
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError, sha256_json

GOLDEN = Path(__file__).parents[2] / "golden" / "img2dataset-1.47"
CC3M = "a cat on a mat\thttp://h/1.jpg\ntwo\tdogs\thttps://h/2.jpg\n"
CC12M = "http://h/1.jpg\ta cat on a mat\nhttps://h/2.jpg\ttwo\tdogs\n"
CSV = 'id,URL,TEXT\n1,http://h/1.jpg,a cat on a mat\n2,https://h/2.jpg,"two\tdogs"\n'
JSONL = '{"URL": "http://h/1.jpg", "TEXT": "a cat on a mat"}\n{"TEXT": "two\\tdogs", "URL": "https://h/2.jpg"}\n'
ROWS = [Row("a cat on a mat", "http://h/1.jpg"), Row("two\tdogs", "https://h/2.jpg")]


@pytest.fixture
def store():
    return empty_store()


# one list


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("cc3m", CC3M),
        ("cc12m", CC12M),
        ("csv", CSV),
        ("cc3m", CC3M.replace("\n", "\r\n")),
        ("cc12m", "\ufeff" + CC12M),
        ("csv", 'caption\turl\na cat on a mat\thttp://h/1.jpg\n"two\tdogs"\thttps://h/2.jpg\n'),
        ("cc3m", CC3M[:-1]),
        ("jsonl", JSONL),
        ("jsonl", "\ufeff" + JSONL[:-1]),
        ("csv", CSV.replace("URL,TEXT", "image,alt")),
    ],
)
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
    table = {
        "id": [1, 2, 3],
        columns[0]: pa.array([row.url for row in ROWS] + [None], kind),
        columns[1]: pa.array([row.caption for row in ROWS] + [None], kind),
    }
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
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
    ],
)
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


NOT_THERE = r"no such file|nothing is there|no file matches|nope://h/x: Protocol|with a wildcard"


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
    with pytest.raises(UserError, match="image; give its folder"):
        detect(str(tmp_path / "x.jpg"))


# several files as one list


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("cc12m", "tsv"),
        ("cc12m", "tsv.gz"),
        ("csv", "csv"),
        ("csv", "csv.gz"),
        ("jsonl", "jsonl"),
        ("jsonl", "json.gz"),
        ("parquet", "parquet"),
    ],
)
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
    for source, expected in (
        (folder, in_order),
        (f"{folder}/part-*.{ending}", top),
        (f"{folder}/*.{ending}", top),
        (f"{folder}/**/part-?.{ending}" if not remote else folder, in_order),
    ):
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


def test_source_files_have_sizes_and_stamps(tmp_path, store):
    for folder in (str(tmp_path), store):
        put(folder, "b.tsv", "x")
        put(folder, "a.tsv", "xy")
        assert [(file.path, file.below, file.size) for file in source_files(folder)] == [
            (f"{folder}/a.tsv", "a.tsv", 2),
            (f"{folder}/b.tsv", "b.tsv", 1),
        ]
        assert all(file.stamp.split()[1] for file in source_files(folder))


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
        ("train/1.jpg", 'one, "quoted"', None),
        ("train/2.jpg", "two", None),
        ("train/other.jpg", None, None),
        ("../x.jpg", "up", "file not found"),
    ]
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
