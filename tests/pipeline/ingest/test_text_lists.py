"""Lists that are text, as people really write them: quotes, delimiters, line ends, encodings, no caption, files."""

import csv
import gzip
import io
import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from small_ingest import config
from small_ingest import rows_of as raw_rows
from web_server import make_image, serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.rows import Row
from pipeline.ingest.stage import ingest
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError
from shards_spec.tar import read_shard


def rows(folder: Path, data: str | bytes, name: str = "list.tsv", columns=(None, None)) -> list[Row]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(list_rows(str(path), detect(str(path), columns), columns))


def captions(folder: Path, data: str | bytes, name: str = "list.tsv") -> list[tuple[str | None, str | None]]:
    found = rows(folder, data, name)
    assert [row.problem for row in found] == [None] * len(found)
    return [(row.caption, row.url) for row in found]


# quotes


RAW = [
    '"the cat',
    "a dog",
    'the "end"',
    '"quoted" at first',
    'at last "quoted"',
    '5" x 7"',
    '"a" and "b"',
    'a ""b',
    '"',
]


@pytest.mark.parametrize("delimiter", list("\t,;|"))
@pytest.mark.parametrize("url_first", [False, True])
def test_raw_quotes_mean_nothing(tmp_path, delimiter, url_first):
    lines = [("caption", "url"), *((text, f"http://h/{n}") for n, text in enumerate(RAW))]
    text = "".join(delimiter.join(pair[::-1] if url_first else pair) + "\n" for pair in lines)
    expected = [(text, f"http://h/{n}") for n, text in enumerate(RAW)]
    assert captions(tmp_path, text) == expected
    assert captions(tmp_path, text.replace("\n", "\r\n")[:-2]) == expected


@pytest.mark.parametrize("url_first", [False, True])
def test_a_list_without_a_header_is_read_as_one_with_it(tmp_path, url_first):
    lines = [*RAW, '"wholly quoted"', '"with ""quotes"" inside"', '"two\tdogs"', "more\tdogs", ""]
    pairs = [(text, f"http://h/{n}") for n, text in enumerate(lines)]
    text = "".join("\t".join(pair[::-1] if url_first else pair) + "\n" for pair in pairs)
    header = "url\tcaption\n" if url_first else "caption\turl\n"
    expected = [*RAW, "wholly quoted", 'with "quotes" inside', "two\tdogs", "more\tdogs", ""]
    assert [caption for caption, _ in captions(tmp_path, text)] == expected
    assert [caption for caption, _ in captions(tmp_path, header + text)] == expected


@pytest.mark.parametrize("at", [0, 2500, 4999])
@pytest.mark.parametrize("closed", [False, True])
def test_an_open_quote_takes_no_other_row(tmp_path, at, closed):
    for delimiter in "\t,":
        lines = [f"caption {n}{delimiter}http://h/{n}" for n in range(5000)]
        lines[at] = f'"caption {at}{delimiter}http://h/{at}'
        if closed:
            lines[(at + 40) % 5000] = f'size 12"{delimiter}http://h/{(at + 40) % 5000}'
        found = captions(tmp_path, "\n".join([f"caption{delimiter}url", *lines]))
        assert [url for _, url in found] == [f"http://h/{n}" for n in range(5000)]
        assert found[at][0] == f'"caption {at}'


WRITTEN = [
    "plain",
    "with, comma",
    'with "quotes"',
    '"wholly"',
    '"',
    '""',
    "two\nlines",
    "two\r\nlines",
    "a\tb; c| d",
    'x "y",\n"z"',
    "\n\nlead",
    "trail \n",
    " spaces ",
    "comma,",
    '12"\nsize, "b"',
    "x" * 30_000,
    "ü\n日本",
    *(["line"] * 3),
    "\n".join("abc" * 20),
]


@pytest.mark.parametrize("delimiter", list(",\t;|"))
@pytest.mark.parametrize("names", [["caption", "url"], ["url", "caption"], ["id", "url", "caption", "score"]])
def test_what_csv_and_pandas_write_is_read_as_they_read_it(tmp_path, delimiter, names):
    table = pd.DataFrame({"caption": WRITTEN, "url": [f"http://h/{n}" for n in range(len(WRITTEN))]})
    table["id"], table["score"] = range(len(WRITTEN)), 0.5
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        text = table[names].to_csv(sep=delimiter, index=False, quoting=quoting)
        assert captions(tmp_path, text) == list(zip(WRITTEN, table["url"], strict=True))
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([names, *table[names].values.tolist()])
        assert captions(tmp_path, file.getvalue()) == list(zip(WRITTEN, table["url"], strict=True))


def test_a_quoted_field_spans_a_bounded_number_of_lines(tmp_path):
    text = 'caption,url\n"' + "line\n" * 99 + 'end",http://h/1\nnext,http://h/2\n'
    assert captions(tmp_path, text)[-1] == ("next", "http://h/2")
    assert len(rows(tmp_path, text)) == 2
    found = rows(tmp_path, text.replace("line\n", "line\n" * 2))
    assert len(found) == 200
    assert found[-1] == Row("next", "http://h/2")
    assert {row.problem for row in found[:-2]} == {"missing column"}


def test_delimiters_too_many_belong_to_the_caption(tmp_path):
    assert captions(tmp_path, "caption\turl\ta\ntwo\tdogs\there\thttp://h/3\tx\n") == [
        ("two\tdogs\there", "http://h/3")
    ]
    assert captions(tmp_path, "a\turl\tcaption\n1\thttp://h/3\ttwo\tdogs\n") == [("two\tdogs", "http://h/3")]
    assert captions(tmp_path, "url\tcaption\tb\nhttp://h/3\ttwo\tdogs\t7\n") == [("two\tdogs", "http://h/3")]
    assert captions(tmp_path, "caption,url\na cat, asleep,http://h/1\nb,http://h/2,\n") == [
        ("a cat, asleep", "http://h/1"),
        ("b", "http://h/2"),
    ]


# line ends, delimiters, encodings


@pytest.mark.parametrize(
    "data",
    [
        "caption\turl\na\thttp://h/1\nb\thttp://h/2\n",
        "a\thttp://h/1\nb\thttp://h/2",
        '{"url": "http://h/1", "caption": "a"}\n{"url": "http://h/2", "caption": "b"}\n',
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_a_mark(tmp_path, data, end, mark):
    text = mark + data.replace("\n", end).encode()
    assert captions(tmp_path, text) == [("a", "http://h/1"), ("b", "http://h/2")]
    assert captions(tmp_path, gzip.compress(text)) == [("a", "http://h/1"), ("b", "http://h/2")]
    rows_there, _ = estimate_rows(str(tmp_path / "list.tsv"), detect(str(tmp_path / "list.tsv")))
    assert rows_there == 2


def test_a_carriage_return_in_a_caption_is_no_line_end(tmp_path):
    text = "caption\turl\none\rtwo\rthree\rfour\rfive\thttp://h/1\nb\thttp://h/2\n"
    assert captions(tmp_path, text) == [("one\rtwo\rthree\rfour\rfive", "http://h/1"), ("b", "http://h/2")]


@pytest.mark.parametrize(("delimiter", "word"), [(",", "commas"), (";", "semicolons"), ("|", "bars")])
def test_a_list_without_header_and_tabs_is_told_why(tmp_path, delimiter, word):
    for lines in (("a cat", "http://h/1"), ("http://h/1", "a cat")):
        with pytest.raises(UserError, match=rf"its fields are cut by {word}.*put a first line such as (caption|url)"):
            rows(tmp_path, f"{delimiter.join(lines)}\n" * 5)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("form", ["auto", "cc3m", "csv", "jsonl", "txt"])
def test_utf_16_is_named(tmp_path, encoding, form):
    (tmp_path / "l.tsv").write_bytes("caption\turl\nein Bär\thttp://h/1\n".encode(encoding))
    with pytest.raises(UserError, match=r"l.tsv is UTF-(16|32).*iconv -f UTF-(16|32) -t UTF-8"):
        ingest(config(tmp_path / "D", tmp_path / "l.tsv", format=form))


def test_latin_1_is_named_and_its_rows_are_counted(tmp_path, caplog):
    text = "caption\turl\nein Bär\thttp://127.0.0.1:9/1\n"
    (tmp_path / "l.tsv").write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        summary = ingest(config(tmp_path / "D", tmp_path / "l.tsv"))
    assert "if it is latin-1, `iconv -f LATIN1 -t UTF-8 " in caplog.text
    assert summary.counts == {"caption is not UTF-8": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + b"x" * 100, "a zip file"),
        (b"BZh91AY", "packed with bzip2"),
        (b"\x28\xb5\x2f\xfd..", "packed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>gone</body></html>\n", "is a web page"),
        (b",".join(b"c%d" % n for n in range(9000)) + b",url\n1\n", "its columns are .* and 8981 more; it needs url"),
    ],
)
def test_what_is_no_list_is_named_shortly(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        rows(tmp_path, data)
    assert len(str(error.value)) < 800


# no caption


@pytest.mark.parametrize("cell", ["\\N", "NaN", "nan", ""])
def test_what_databases_and_pandas_write_for_nothing_is_no_caption(tmp_path, cell):
    for text in (f"{cell}\thttp://h/1\n", f"caption\turl\n{cell}\thttp://h/1\n", f'url,caption\nhttp://h/1,"{cell}"\n'):
        assert [(caption or None, url) for caption, url in captions(tmp_path, text)] == [(None, "http://h/1")]


def test_json_captions_that_are_no_text_lose_no_row(tmp_path):
    values = [None, float("nan"), 3, 2.5, True, {"en": "a"}, [1], [], "text", ["one", 2, "two"]]
    with serve() as server:
        lines = [{"url": f"{server.url}/good/{n}", "caption": value} for n, value in enumerate(values)]
        (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = ingest(config(tmp_path / "D", tmp_path / "l.jsonl", shard_size=20))
    note = "caption is not text"
    found = [(row["caption"], row["status"], row["error_message"]) for row in raw_rows(tmp_path / "D")]
    expected = [(None, None), *[(None, note)] * 6, (None, None), ("text", None), ("one", None), ("two", None)]
    assert found == [(caption, "success", noted) for caption, noted in expected]
    assert (summary.counts, summary.counters) == ({"success": 11}, {note: 6})
    assert [sample.caption for sample in read_shard(str(tmp_path / "D/raw/00000.tar"))][-3:] == ["text", "one", "two"]
    assert check(CheckConfig(str(tmp_path / "D"))) == []


# addresses and files


def test_an_ampersand_of_a_web_page_is_one(tmp_path):
    with serve() as server:
        (tmp_path / "l.tsv").write_text(
            f"{server.url}/good/1?a=1&amp;b=2&AMP;c=3\tx\n{server.url}/good/2?a=1&b=&amp\ty\n"
        )
        ingest(config(tmp_path / "D", tmp_path / "l.tsv"))
        assert server.requests["good/1?a=1&b=2&c=3"] == 1
        assert server.requests["good/2?a=1&b=&amp"] == 1
    assert raw_rows(tmp_path / "D")[0]["url"].endswith("&amp;b=2&AMP;c=3"), "the list's own text"


def test_plain_addresses(tmp_path):
    for text in ("http://h/1\nhttps://h/2?a,b;c\n\nx y\n", "url\nhttp://h/1\nhttps://h/2?a,b;c\n\nx y\n"):
        found = [Row(None, "http://h/1"), Row(None, "https://h/2?a,b;c"), Row(None, None, "no URL"), Row(None, "x y")]
        path = tmp_path / "urls.txt"
        path.write_text(text)
        assert list(list_rows(str(path), "txt")) == found
        assert rows(tmp_path, text.replace("\n\nx y", "")) == found[:2]
    (tmp_path / "S").mkdir()
    (tmp_path / "S/b.txt").write_text("http://h/3\n")
    (tmp_path / "S/a.txt").write_text("http://h/1\nhttp://h/2\n")
    assert [row.url for row in list_rows(f"{tmp_path}/S", "txt")] == ["http://h/1", "http://h/2", "http://h/3"]
    assert detect(f"{tmp_path}/S/*.txt") == "txt"


def test_addresses_with_remarks_between_them(tmp_path):
    text = "# mine\nhttp://h/1\n\nwww.h/2\n  http://h/3 \r\n"
    found = [("# mine", None), ("http://h/1", None), (None, "no URL"), ("www.h/2", None), ("http://h/3", None)]
    assert [(row.url, row.problem) for row in rows(tmp_path, text, "l.txt")] == found
    (tmp_path / "l.txt").write_text("www.h/1\nhttp://h/2\n")
    assert [row.url for row in list_rows(f"{tmp_path}/l.txt", "txt")] == ["www.h/1", "http://h/2"], "no header"
    with pytest.raises(UserError, match="cannot tell its form"):
        rows(tmp_path, text, "l.tsv")


def test_addresses_below_a_header_of_their_own(tmp_path):
    for text in ("link\nhttp://h/1\n", '"link"\r\n"http://h/1"\r\n'):
        assert [row.url for row in rows(tmp_path, text, "l.csv", (None, "link"))] == ["http://h/1"]
    with pytest.raises(UserError, match="no column 'other'; its first line is 'link'; change --url-col"):
        list(list_rows(f"{tmp_path}/l.csv", "txt", (None, "other")))


def test_a_csv_without_a_header_is_no_list_of_addresses(tmp_path):
    for name in ("l.csv", "l.csv.gz"):
        with pytest.raises(UserError, match=r"no header with a column url; put a first line such as url,caption"):
            rows(tmp_path, "http://h/1,cat\nhttp://h/2,dog\n", name)
    assert next(row.url for row in rows(tmp_path, "http://h/1,cat\nhttp://h/2,dog\n", "l.txt")) == "http://h/1,cat"
    assert [row.url for row in rows(tmp_path, "url\nhttp://h/w_1,h_2/a\n", "l.csv")] == ["http://h/w_1,h_2/a"]


def test_line_ends_of_several_kinds(tmp_path):
    text = "url,caption\r\nhttp://h/1,a\nhttp://h/2,b\rhttp://h/3,c\r\nhttp://h/4,d\re\n"
    expected = [("a", "http://h/1"), ("b", "http://h/2"), ("c", "http://h/3"), ("d\re", "http://h/4")]
    assert captions(tmp_path, text) == expected


def test_a_caption_that_comes_late_in_json_lines(tmp_path):
    text = '{"url": "http://h/0"}\n' * 50 + '{"url": "http://h/1", "caption": "a"}\n'
    found = rows(tmp_path, text, "l.jsonl")
    assert len(found) == 51
    assert found[0] == Row(None, "http://h/0")
    assert found[-1] == Row("a", "http://h/1")


def test_a_first_line_that_does_not_parse_is_one_row(tmp_path):
    good = '{"url": "http://h/1", "caption": "a"}\n'
    for first in (
        '{"url": "http://h/0", "caption": "open\n',
        '{"x": ' + "[" * 5000 + "\n",
        '{"x": ' + "9" * 5000 + "}\n",
    ):
        found = rows(tmp_path, first + good, "l.jsonl")
        assert [row.problem for row in found] == ["not a JSON object", None]
        assert found[1] == Row("a", "http://h/1")


def test_captions_of_another_encoding_are_captions(tmp_path, caplog):
    assert [row.problem for row in rows(tmp_path, b"url,caption\nhttp://h/1,\xe4\n", "l.csv")] == [
        "caption is not UTF-8"
    ]
    assert "iconv -f LATIN1" in caplog.text
    assert "no row has a caption" not in caplog.text


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "parquet"])
def test_lists_of_files_as_open_clip_reads_them(tmp_path, form):
    source, away = tmp_path / "S", tmp_path / "away.jpg"
    (source / "img").mkdir(parents=True)
    (source / "img/1.jpg").write_bytes(make_image(1))
    away.write_bytes(make_image(2))
    table = pd.DataFrame(
        {"filepath": ["img/1.jpg", str(away), "img/no.jpg", "img"], "title": ["one", "two", "three", "four"]}
    )
    path = source / f"list.{form}"
    if form == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif form == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if form == "tsv" else ",", index=False)
    summary = ingest(config(tmp_path / "D", path))
    assert summary.counts == {"success": 2, "file not found": 1, "file not readable": 1}
    samples = list(read_shard(str(tmp_path / "D/raw/00000.tar")))
    assert [(sample.caption, sample.meta["url"]) for sample in samples] == [("one", "img/1.jpg"), ("two", str(away))]
    (source / "img/1.jpg").write_bytes(make_image(3))
    assert ingest(config(tmp_path / "D", path)).made == 1, "a changed image is read again"
    table["image"] = table.pop("filepath")
    table["caption"] = table.pop("title")
    table.to_csv(source / "other.csv", index=False)
    assert [row.image_ref is not None for row in list_rows(str(source / "other.csv"), "csv")] == [
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
@pytest.mark.parametrize("depth", [50, 600, 3000])
def test_a_line_that_is_nested_deep_costs_itself(tmp_path, opening, closing, depth):
    """Its other columns are written again as JSON; Python parses deeper than it writes."""
    deep = opening * depth + "1" + closing * depth
    lines = [f'{{"url": "http://127.0.0.1:9/{n}", "caption": "a", "x": {x}}}\n' for n, x in enumerate(("1", deep, "2"))]
    (tmp_path / "l.jsonl").write_text("".join(lines))
    counts = ingest(config(tmp_path / "R", tmp_path / "l.jsonl")).counts
    assert sum(counts.values()) == 3
    assert counts.get("not a JSON object", 0) == (depth > 100)
