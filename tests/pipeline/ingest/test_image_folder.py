"""Folders of images as people have them: captions beside and in lists, links, pipes, files that are no images."""

import io
import json
import os
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_ingest import config
from small_ingest import rows_of as raw_rows

from pipeline.ingest.detect import detect
from pipeline.ingest.image_bytes import read_image_bytes
from pipeline.ingest.stage import ingest
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError

LIMIT = 1 << 30


def image(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(file, form)
    return file.getvalue()


def fill(folder, *files):
    for name, content in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def images(folder, *names):
    fill(folder, *((name, image(number)) for number, name in enumerate(names)))


def rows_of(folder, columns=(None, None)):
    return list(list_rows(str(folder), detect(str(folder), columns), columns))


def told(folder, columns=(None, None)):
    return [(row.url, row.caption, row.problem or row.note) for row in rows_of(folder, columns)]


# captions beside images


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_captions_stand_in_files_of_many_endings(tmp_path, scheme):
    images(tmp_path, *(f"{n}.jpg" for n in range(9)), "track 2.0.jpg", "track 2.1.jpg")
    fill(
        tmp_path,
        ("0.txt", "zero\n"),
        ("1.TXT", "one"),
        ("2.caption", "two"),
        ("3.Caption", "three"),
        ("4.json", '{"caption": "four", "url": "http://h/4"}'),
        ("5.text", "five"),
        ("6.jpg.txt", "six"),
        ("7.json", '{"text": "no"}'),
        ("7.txt", "seven"),
        ("8.json", '{"TEXT": ["eight", "acht"]}'),
        ("track 2.0.txt", "2.0"),
        ("track 2.1.txt", "2.1"),
    )
    assert told(scheme + str(tmp_path)) == [
        ("0.jpg", "zero", None),
        ("1.jpg", "one", None),
        ("2.jpg", "two", None),
        ("3.jpg", "three", None),
        ("4.jpg", "four", None),
        ("5.jpg", "five", None),
        ("6.jpg", "six", None),
        ("7.jpg", "seven", None),
        ("8.jpg", "eight", None),
        ("8.jpg", "acht", None),
        ("track 2.0.jpg", "2.0", None),
        ("track 2.1.jpg", "2.1", None),
    ]


def test_a_json_beside_an_image_that_cannot_be_used_costs_its_own_sample(tmp_path):
    images(tmp_path, *(f"{n}.jpg" for n in range(7)))
    deep = "[" * 5000 + "]" * 5000
    fill(
        tmp_path,
        ("0.json", '{"n": ' + "9" * 5000 + "}"),
        ("1.json", f'{{"a": {deep}}}'),
        ("2.json", "{"),
        ("3.json", "[1, 2]"),
        ("4.json", '{"boxes": []}'),
        ("5.json", '{"caption": {"a": 1}}'),
        ("6.json", '{"caption": NaN}'),
    )
    bad = "json beside the image does not parse"
    found = [(caption, why) for _, caption, why in told(tmp_path)]
    assert found == [(None, bad)] * 3 + [(None, None)] * 2 + [(None, "caption is not text")] * 2
    assert [row.problem for row in rows_of(tmp_path)] == [bad] * 3 + [None] * 4  # the images of the others are good


def test_a_caption_that_leads_out_of_the_folder_is_none(tmp_path):
    images(tmp_path / "in", "0.jpg", "1.jpg", "2.jpg")
    fill(tmp_path, ("secret", "password"), ("in/other", "inside"))
    (tmp_path / "in/0.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "in/1.txt").symlink_to("other")
    (tmp_path / "in/2.json").symlink_to("../secret")
    outside = "caption links outside of the folder"
    assert told(tmp_path / "in") == [("0.jpg", None, outside), ("1.jpg", "inside", None), ("2.jpg", None, outside)]
    summary = ingest(config(tmp_path / "root", tmp_path / "in"))
    assert summary.counts["success"] == 3
    assert [row["caption"] for row in raw_rows(tmp_path / "root")] == [None, "inside", None]


def test_pipes_are_no_images_and_no_captions(tmp_path):
    images(tmp_path, "0.jpg", "2.jpg")
    os.mkfifo(tmp_path / "0.txt")
    os.mkfifo(tmp_path / "1.jpg")
    fill(tmp_path, ("1.txt", "one"), ("2.txt", "two"))
    expected = [("0.jpg", None, "caption not readable"), ("1.jpg", "one", "no regular file"), ("2.jpg", "two", None)]
    assert told(tmp_path) == expected
    assert ingest(config(tmp_path / "root", tmp_path)).counts["success"] == 1


# what a walk sees


def test_endings_links_and_files_that_are_not_taken(tmp_path, caplog):
    endings = ["jfif", "jpe", "ico", "ppm", "bmp", "JPG", "gif"]
    images(tmp_path / "in", *(f"{n}.{ending}" for n, ending in enumerate(endings)))
    images(tmp_path / "elsewhere", "a/7.jpg")
    fill(tmp_path / "elsewhere", ("a/7.txt", "linked"))
    fill(
        tmp_path / "in",
        ("8.heic", b"x"),
        ("9.jxl", b"x"),
        ("9.txt", "nine"),
        ("notes.pdf", ""),
        ("b.pdf", ""),
        ("README", ""),
    )
    (tmp_path / "in/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop").symlink_to(tmp_path)
    expected = [(f"{n}.{ending}", None, None) for n, ending in enumerate(endings)]
    expected += [("8.heic", None, "format not decoded: heic"), ("9.jxl", "nine", "format not decoded: jxl")]
    assert told(tmp_path / "in") == [*expected, ("sub/a/7.jpg", "linked", None)]
    assert "files that are not taken: 2 .pdf, 1 .heic, 1 .jxl, 1 without an ending" in caplog.text


def test_a_folder_of_macos_and_jupyter(tmp_path):
    images(tmp_path, "0.jpg", "._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/0.jpg", ".Trash-0/1.jpg")
    fill(tmp_path, ("0.txt", "zero"), ("._0.txt", "junk"), (".DS_Store", "junk"), ("Thumbs.db", "junk"))
    assert told(tmp_path) == [("0.jpg", "zero", None)]


def test_a_folder_without_captions_says_what_it_has(tmp_path, caplog):
    images(tmp_path, "0.jpg")
    fill(tmp_path, ("0.json", '{"n": 1}'))
    assert told(tmp_path) == [("0.jpg", None, None)]
    assert "no row has a caption: files seen were .jpg, .json" in caplog.text


# lists of images


def write_metadata(folder, form, rows):
    if form == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
        fill(folder, ("metadata.csv", "\n".join(lines)))
    elif form == "jsonl":
        fill(folder, ("metadata.jsonl", "\n".join(map(json.dumps, rows))))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_row_of_metadata_is_a_row(tmp_path, form):
    images(tmp_path, "img/1.jpg", "img/2.jpg", "img/3.jpg")
    names = ["img/1.jpg", "img\\2.jpg", "img/1.jpg", "img/1.jpg"]
    write_metadata(tmp_path, form, [{"file_name": name, "text": f"c{n}"} for n, name in enumerate(names)])
    rows = rows_of(tmp_path)
    assert [(row.url, row.caption, row.problem) for row in rows] == [
        ("img/1.jpg", "c0", None),
        ("img/1.jpg", "c2", None),
        ("img/1.jpg", "c3", None),
        ("img/2.jpg", "c1", None),
        ("img/3.jpg", None, None),
    ]
    assert [read_image_bytes(row.image_ref, LIMIT) for row in rows] == [image(n) for n in (0, 0, 0, 1, 2)]


def test_file_names_of_metadata_in_other_spellings(tmp_path):
    images(tmp_path, unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "ü.jpg"), "a/b.jpg", "d/c.jpg")
    names = [
        unicodedata.normalize("NFC", "é.jpg"),
        unicodedata.normalize("NFD", "ü.jpg"),
        "./a//b.jpg",
        f"{tmp_path}/d/c.jpg",
    ]
    write_metadata(tmp_path, "jsonl", [{"file_name": name, "text": f"c{n}"} for n, name in enumerate(names)])
    rows = rows_of(tmp_path)
    assert {row.caption: read_image_bytes(row.image_ref, LIMIT) for row in rows} == {
        f"c{n}": image(n) for n in range(4)
    }
    assert [row.problem for row in rows] == [None] * 4


def test_metadata_whose_captions_are_no_texts(tmp_path):
    images(tmp_path, *(f"{n}.jpg" for n in range(7)))
    values = [["a", "b"], {"a": 1}, float("nan"), 7, True, None, ""]
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": value}) for n, value in enumerate(values)]
    fill(tmp_path, ("metadata.jsonl", "\n".join(lines)))
    wrong = "caption is not text"
    assert told(tmp_path) == [
        ("0.jpg", "a", None),
        ("0.jpg", "b", None),
        ("1.jpg", None, wrong),
        ("2.jpg", None, wrong),
        ("3.jpg", None, wrong),
        ("4.jpg", None, wrong),
        ("5.jpg", None, None),
        ("6.jpg", "", None),
    ]
    (tmp_path / "metadata.jsonl").unlink()
    table = {"file_name": ["0.jpg", "1.jpg", "2.jpg"], "text": pa.array([["a", "b"], [], None], pa.list_(pa.string()))}
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    assert told(tmp_path)[:4] == [
        ("0.jpg", "a", None),
        ("0.jpg", "b", None),
        ("1.jpg", None, None),
        ("2.jpg", None, None),
    ]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_caption_column_is_the_one_that_was_given(tmp_path, form):
    images(tmp_path, "0.jpg")
    rows = [{"file_name": "0.jpg", "text": "short", "Long": "a long one"}]
    if form == "csv":
        fill(tmp_path, ("metadata.csv", "file_name,text,Long\n0.jpg,short,a long one\n"))
    else:
        write_metadata(tmp_path, form, rows)
    assert told(tmp_path) == [("0.jpg", "short", None)]
    assert told(tmp_path, ("Long", None)) == [("0.jpg", "a long one", None)]
    with pytest.raises(
        UserError, match=r"no column 'x'; its columns are \['file_name', 'text', 'Long'\]; change --capt"
    ):
        told(tmp_path, ("x", None))


def test_the_caption_column_of_files_beside(tmp_path):
    images(tmp_path, "0.jpg", "1.jpg")
    fill(tmp_path, ("0.txt", "t"), ("0.blip", "b"), ("1.json", '{"caption": "c", "blip": "d"}'))
    assert told(tmp_path, ("blip", None)) == [("0.jpg", "b", None), ("1.jpg", "d", None)]
    (tmp_path / "1.json").unlink()
    with pytest.raises(UserError, match=r"no caption column 'x': .* its files are 2 .jpg, 1 .[a-z]+, 1 .[a-z]+"):
        told(tmp_path, ("x", None))
    with pytest.raises(UserError, match="--url-col 'u' means nothing for a folder of images"):
        told(tmp_path, (None, "u"))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_large_cell_of_metadata_costs_at_most_its_own_caption(tmp_path, form):
    images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    texts = {"0.jpg": "x" * 200_000, "1.jpg": "one", "2.jpg": "two"}
    rows = [{"file_name": name, "text": text, "more": "y" * 300_000} for name, text in texts.items()]
    if form == "csv":
        lines = ["file_name,text,more", *(f'{row["file_name"]},"{row["text"]}",{row["more"]}' for row in rows)]
        fill(tmp_path, ("metadata.csv", "\n".join(lines)))
    else:
        write_metadata(tmp_path, form, rows)
    (url, _, problem), *others = told(tmp_path)
    assert (url, problem, others) == ("0.jpg", "caption too long", [("1.jpg", "one", None), ("2.jpg", "two", None)])


def test_an_open_quote_in_metadata_takes_no_other_row(tmp_path):
    images(tmp_path, *(f"{n}.jpg" for n in range(5)))
    fill(
        tmp_path,
        ("metadata.csv", 'file_name,text\n0.jpg,"the cat\n1.jpg,a dog, too\n2.jpg,"the ""end"""\n3.jpg,\n4.jpg\n'),
    )
    assert told(tmp_path) == [
        ("0.jpg", '"the cat', None),
        ("1.jpg", "a dog, too", None),
        ("2.jpg", 'the "end"', None),
        ("3.jpg", "", None),
        ("4.jpg", None, None),
        ("metadata.csv:5", None, "missing column"),
    ]
    fill(tmp_path, ("metadata.csv", "file_name;text\r0.jpg;eins\r1.jpg;zwei\r"))
    assert told(tmp_path)[:2] == [("0.jpg", "eins", None), ("1.jpg", "zwei", None)]
    fill(tmp_path, ("metadata.csv", "file_name,text\n0.jpg,eins\n".encode("utf-16")))
    with pytest.raises(UserError, match=r"metadata.csv is UTF-16, not UTF-8"):
        told(tmp_path)


FLICKR = {
    "captions.txt": 'image,caption\n1.jpg,"A child , in a dress"\n1.jpg,A girl .\n2.jpg,"say ""hi"""\n',
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| A child , in a dress\n1.jpg| 1| A girl .\n"
    '2.jpg| 0| say "hi"\n',
    "Flickr8k.token.txt": '1.jpg#0\tA child , in a dress\n1.jpg#1\tA girl .\n2.jpg#0\tsay "hi"\n',
    "results_20130124.token": '1.jpg#0\tA child , in a dress\n1.jpg#1\tA girl .\n2.jpg#0\tsay "hi"\n',
    "my_captions.tsv": 'filepath\tcaption\n1.jpg\tA child , in a dress\n1.jpg\tA girl .\n2.jpg\tsay "hi"\n',
    "captions_val2017.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}],
            "annotations": [
                {"image_id": 7, "caption": "A child , in a dress"},
                {"image_id": 9, "caption": 'say "hi"'},
                {"image_id": 7, "caption": "A girl ."},
            ],
        }
    ),
    "dataset_flickr30k.json": json.dumps(
        {
            "images": [
                {"filename": "1.jpg", "sentences": [{"raw": "A child , in a dress"}, {"raw": "A girl ."}]},
                {"filename": "2.jpg", "sentences": [{"raw": 'say "hi"'}]},
            ]
        }
    ),
    "captions.json": json.dumps({"1.jpg": ["A child , in a dress", "A girl ."], "2.jpg": 'say "hi"'}),
    "train_captions.json": json.dumps(
        [{"image": "1.jpg", "caption": ["A child , in a dress", "A girl ."]}, {"image": "2.jpg", "caption": 'say "hi"'}]
    ),
}


@pytest.mark.parametrize("where", ["", "images/", "../images/"])
@pytest.mark.parametrize("name", FLICKR)
def test_published_lists_of_captions(tmp_path, name, where):
    """The list beside the images, above them, or in a folder beside theirs, as COCO's."""
    images(tmp_path / "lists" / where, "1.jpg", "2.jpg", "3.jpg")
    fill(tmp_path / "lists", (name, FLICKR[name]))
    rows = rows_of(tmp_path if where.startswith("..") else tmp_path / "lists")
    assert [(row.url.rpartition("/")[2], row.caption, row.problem) for row in rows] == [
        ("1.jpg", "A child , in a dress", None),
        ("1.jpg", "A girl .", None),
        ("2.jpg", 'say "hi"', None),
        ("3.jpg", None, None),
    ]


def test_a_broken_row_of_flickr30k_costs_itself(tmp_path):
    images(tmp_path, "1.jpg")
    text = "image_name| comment_number| comment\n1.jpg| 0| A dog\n1.jpg| 4   A dog runs across the grass .\n"
    fill(tmp_path, ("results.csv", text))
    assert told(tmp_path) == [("1.jpg", "A dog", None), ("results.csv:2", None, "missing column")]


def test_lists_that_are_none_of_ours_are_named_and_left_out(tmp_path, caplog):
    images(tmp_path, "1.jpg", "captions.jpg")
    elsewhere = FLICKR["captions_val2017.json"].replace("1.jpg", "8.jpg").replace("2.jpg", "9.jpg")
    fill(
        tmp_path,
        ("captions.txt", "of captions.jpg"),
        ("1.txt", "one"),
        ("my captions.txt", "just a note"),
        ("annotations/captions_train2017.json", elsewhere),
        ("annotations/instances_val2017.json", '{"images": [], "annotations": []}'),
    )
    assert told(tmp_path) == [("1.jpg", "one", None), ("captions.jpg", "of captions.jpg", None)]
    assert "my captions.txt: left out, it is not a list of captions" in caplog.text
    assert "captions_train2017.json: left out, none of its images is here" in caplog.text
    assert "files that are not taken: 1 .json" in caplog.text
    fill(tmp_path, ("captions_broken.json", '{"images": ['))
    with pytest.raises(UserError, match=r"captions_broken.json: not a readable JSON file"):
        told(tmp_path)


def test_pipes_where_lists_are_looked_for_never_hang(tmp_path, caplog):
    images(tmp_path / "in", "0.jpg")
    os.mkfifo(tmp_path / "in/metadata.csv")
    assert told(tmp_path / "in") == [("0.jpg", None, None)]
    assert "metadata.csv: left out, it is no regular file" in caplog.text
    for name in ("list.csv", "x.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is no regular file"):
            detect(str(tmp_path / name))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_metadata_without_a_caption_column_has_none(tmp_path, form, caplog):
    images(tmp_path, "0.jpg", "1.jpg")
    rows = [{"file_name": "1.jpg", "label": 3}, {"file_name": "0.jpg", "label": 4}]
    if form == "csv":
        fill(tmp_path, ("metadata.csv", "file_name,label\n1.jpg,3\n0.jpg,4\n"))
    else:
        write_metadata(tmp_path, form, rows)
    assert told(tmp_path) == [("0.jpg", None, None), ("1.jpg", None, None)]
    assert f"no row has a caption: files seen were .jpg, .{form}" in caplog.text


def test_a_list_whose_captions_are_all_empty_says_so(tmp_path, caplog):
    fill(
        tmp_path, ("list.csv", "url,caption\nhttp://h/1,\nhttp://h/2,NaN\n"), ("plain.txt", "http://h/1\nhttp://h/2\n")
    )
    pq.write_table(
        pa.table({"image": [{"bytes": image(0)}], "text": pa.array([None], pa.string())}), tmp_path / "x.parquet"
    )
    for name in ("list.csv", "x.parquet"):
        assert not any(row.caption for row in rows_of(tmp_path / name))
        assert f"{name}: no row has a caption: the caption's column has none" in caplog.text
    caplog.clear()
    rows_of(tmp_path / "plain.txt")
    assert "no row has a caption" not in caplog.text


def test_img2datasets_folders_of_files(tmp_path, caplog):
    images(tmp_path, "00000/000000000.jpg", "00000/000000001.jpg")
    for key, caption in (("000000000", "a"), ("000000001", "b")):
        fill(tmp_path / "00000", (f"{key}.txt", caption), (f"{key}.json", json.dumps({"caption": caption})))
    fill(tmp_path, ("00000_stats.json", "{}"))
    assert told(tmp_path) == [("00000/000000000.jpg", "a", None), ("00000/000000001.jpg", "b", None)]
    assert "files that are not taken: 3 .json" in caplog.text


def test_several_lists_of_the_same_images(tmp_path):
    images(tmp_path, "1.jpg", "2.jpg", "in/3.jpg")
    fill(tmp_path, ("captions_de.txt", "image,caption\n1.jpg,eins\n2.jpg,zwei\n"))
    fill(tmp_path, ("captions_en.txt", "image,caption\n1.jpg,one\n2.jpg,zwei\n"))
    fill(tmp_path, ("Flickr8k.lemma.token.txt", "1.jpg#0\tlemma\n"))
    assert told(tmp_path)[:3] == [("1.jpg", "eins", None), ("1.jpg", "one", None), ("2.jpg", "zwei", None)]
    fill(
        tmp_path,
        ("metadata.csv", "file_name,text\n1.jpg,top\nin/3.jpg,outer\n"),
        ("in/metadata.csv", "file_name,text\n3.jpg,inner\n"),
    )
    assert told(tmp_path) == [("1.jpg", "top", None), ("2.jpg", "zwei", None), ("in/3.jpg", "inner", None)]


def test_captions_of_coco_that_belong_to_no_image_are_rows(tmp_path):
    images(tmp_path, "0.jpg")
    own = [(1, "a"), ("1", "b"), (9, "c"), (None, "d")]
    annotations = [{"image_id": number, "caption": text} for number, text in own]
    fill(
        tmp_path,
        ("captions.json", json.dumps({"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": annotations})),
    )
    assert told(tmp_path) == [
        ("0.jpg", "a", None),
        *((f"captions.json:{n}", None, "metadata row without file_name") for n in (2, 3, 4)),
    ]


def test_metadata_without_a_json_object_is_told(tmp_path):
    images(tmp_path, "0.jpg")
    fill(tmp_path, ("metadata.jsonl", "\n"))
    assert told(tmp_path) == [("0.jpg", None, None)]
    fill(tmp_path, ("metadata.jsonl", '["0.jpg", "a"]\n'))
    with pytest.raises(
        UserError, match=r"metadata.jsonl: none of its first lines is a JSON object; it needs file_name"
    ):
        told(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    images(tmp_path, "0.jpg", "1.jpg")
    fill(tmp_path, ("0.txt", b"\xef\xbb\xbfa cat\r\n"), ("1.json", b'\xef\xbb\xbf{"caption": "a dog"}'))
    assert told(tmp_path) == [("0.jpg", "a cat", None), ("1.jpg", "a dog", None)]


def test_a_list_whose_names_fit_two_folders_says_which_it_takes(tmp_path, caplog):
    images(tmp_path, "a/0.jpg", "b/0.jpg")
    fill(tmp_path, ("captions.txt", "image,caption\n0.jpg,zero\n"))
    assert told(tmp_path) == [("a/0.jpg", "zero", None), ("b/0.jpg", None, None)]
    assert "files of a list here are in a/ and in b/; the first ones get its captions" in caplog.text
    caplog.clear()
    (tmp_path / "captions.txt").rename(tmp_path / "b/captions.txt")
    assert told(tmp_path) == [("a/0.jpg", None, None), ("b/0.jpg", "zero", None)]
    assert "files of a list" not in caplog.text


def test_a_raw_photo_beside_its_jpeg_is_no_row_of_its_own(tmp_path, caplog):
    images(tmp_path, "1.JPG")
    fill(tmp_path, ("1.CR2", b"raw"), ("2.CR2", b"raw"), ("1.txt", "one"))
    assert told(tmp_path) == [("1.JPG", "one", None), ("2.CR2", None, "format not decoded: cr2")]
    assert "files that are not taken: 2 .cr2" in caplog.text


def test_half_surrogates_in_lists_are_replaced(tmp_path):
    images(tmp_path, "1.jpg")
    fill(tmp_path, ("captions.json", '{"1.jpg": "one \\ud800", "\\ud800.jpg": "none"}'))
    found = told(tmp_path)
    assert [(url, why) for url, _, why in found] == [
        ("1.jpg", "caption is not UTF-8"),
        ("\ufffd\ufffd\ufffd.jpg", "file not found"),
    ]
    assert json.dumps(found, ensure_ascii=False).encode()
