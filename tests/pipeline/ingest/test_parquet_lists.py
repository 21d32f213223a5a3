"""Lists in Parquet: every way Arrow stores text, lists of captions, types that are no text, sizes of pages."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_server import make_image

from pipeline.ingest.detect import detect
from pipeline.ingest.image_bytes import read_image_bytes
from pipeline.ingest.parquet_pages import largest_pages
from pipeline.ingest.rows import Row
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError
from shards_spec.parquet_footer import row_groups

URLS = ["http://h/0", "http://h/1", "http://h/2"]
TEXTS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    pa.json_(),
]


def rows(path, columns=(None, None)) -> list[Row]:
    return list(list_rows(str(path), detect(str(path), columns), columns))


def write(path, **columns) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_every_type_of_text(tmp_path, kind):
    path = tmp_path / "l.parquet"
    write(path, caption=pa.array(["a", None, "ü"], kind), url=pa.array(URLS, kind))
    assert rows(path) == [Row("a", URLS[0]), Row(None, URLS[1]), Row("ü", URLS[2])]
    write(path, caption=pa.array(["a", None, "ü"], kind), image=[{"bytes": make_image(n)} for n in range(3)])
    found = rows(path)
    assert [row.caption for row in found] == ["a", None, "ü"]
    assert [read_image_bytes(row.image_ref, 1 << 20) for row in found] == [make_image(n) for n in range(3)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_view(pa.string()),
        pa.list_(pa.string_view()),
        pa.list_(pa.binary()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ],
    ids=str,
)
def test_a_list_of_texts_is_a_caption_each(tmp_path, kind):
    path = tmp_path / "l.parquet"
    texts = [["a", None, "b"], None, []]
    write(path, caption=pa.array(texts, kind), url=URLS)
    pairs = [("a", URLS[0]), ("b", URLS[0]), (None, URLS[1]), (None, URLS[2])]
    assert rows(path) == [Row(*pair) for pair in pairs]
    write(path, caption=pa.array(texts, kind), image=[{"bytes": make_image(n)} for n in range(3)])
    found = rows(path)
    assert [(row.caption, row.url) for row in found] == [(text, f"l.parquet#{url[-1]}") for text, url in pairs]
    assert [read_image_bytes(row.image_ref, 1 << 20) for row in found] == [make_image(n) for n in (0, 0, 1, 2)]
    write(path, caption=pa.array([["a", "b"]] * 3, pa.list_(pa.string(), 2)), url=URLS)
    assert [row.caption for row in rows(path)] == ["a", "b"] * 3


@pytest.mark.parametrize("other", [pa.array([1, 2, 3]), pa.array([b"x"] * 3), pa.array([{"bytes": b"x"}] * 3)])
@pytest.mark.parametrize("image", [[{"bytes": make_image(n)} for n in range(3)], [make_image(n) for n in range(3)]])
def test_two_columns_of_images_with_one_name(tmp_path, image, other):
    """Whichever comes first, whatever the other one holds; also where it appears in a later file only."""
    path = tmp_path / "l.parquet"
    texts = pa.array(["a", "b", "c"])
    for first, second in ((pa.array(image), other), (other, pa.array(image))):
        pq.write_table(pa.table([texts, first, second], ["caption", "image", "image"]), path)
        with pytest.raises(UserError, match="has the column 'image' more than once; rename or drop one of them"):
            rows(path)
    folder = tmp_path / "d"
    folder.mkdir()
    pq.write_table(pa.table({"caption": texts, "image": image}), folder / "0.parquet")
    path.rename(folder / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet has the column 'image' more than once"):
        rows(folder)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_every_type_of_bytes_holds_images(tmp_path, kind):
    path = tmp_path / "l.parquet"
    for column in ("image", "jpg"):
        write(path, **{column: pa.array([make_image(n) for n in range(3)], kind), "caption": list("abc")})
        assert [read_image_bytes(row.image_ref, 1 << 20) for row in rows(path)] == [make_image(n) for n in range(3)]
    write(path, photo_data=pa.array([make_image(n) for n in range(3)], kind), caption=list("abc"))
    found = rows(path, (None, "photo_data"))
    assert [read_image_bytes(row.image_ref, 1 << 20) for row in found] == [make_image(n) for n in range(3)]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1, 2, 3], "int64"),
        ([1.5, float("nan"), 2.0], "double"),
        ([True, False, None], "bool"),
        ([{"en": "a"}] * 3, "struct<en: string>"),
        ([[{"raw": "a"}]] * 3, "list<element: struct<raw: string>>"),
        ([[1]] * 3, "list<element: int64>"),
        ([[["a"]]] * 3, "list<element: list<element: string>>"),
    ],
)
def test_what_is_no_text_is_refused_by_column_and_type(tmp_path, values, named):
    path = tmp_path / "l.parquet"
    write(path, caption=values, url=URLS)
    with pytest.raises(UserError) as error:
        rows(path)
    expected = f"the column 'caption' is {named}, not text or a list of texts; change --caption-col"
    assert str(error.value) == f"--source {path}: {expected}"
    write(path, caption=values, image=[{"bytes": make_image(1)}] * 3)
    with pytest.raises(UserError, match="the column 'caption' is"):
        rows(path)
    write(path, caption=list("abc"), url=values)
    with pytest.raises(UserError, match=r"the column 'url' is .*, not text; change --url-col"):
        rows(path)


def test_a_column_of_nulls_and_a_name_twice(tmp_path):
    path = tmp_path / "l.parquet"
    write(path, caption=pa.nulls(3), url=URLS)
    assert rows(path) == [Row(None, url) for url in URLS]
    table = pa.table([URLS, list("abc"), list("def")], names=["url", "caption", "caption"])
    pq.write_table(table, path)
    with pytest.raises(UserError, match="has the column 'caption' more than once; rename or drop one"):
        rows(path)
    pq.write_table(pa.table([URLS, list("abc"), [1] * 3, [2] * 3], names=["url", "caption", "n", "n"]), path)
    assert rows(path) == [Row(text, url) for text, url in zip("abc", URLS, strict=True)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_sizes_of_pages_are_those_that_were_written(version, compression, dictionary):
    file = io.BytesIO()
    cells = [f"{n:07d}" * 100 for n in range(5000)]
    pq.write_table(
        pa.table({"x": cells}),
        file,
        data_page_version=version,
        compression=compression,
        use_dictionary=dictionary,
        data_page_size=100_000,
        dictionary_pagesize_limit=1_000_000,
        write_batch_size=10,
        row_group_size=2500,
        write_statistics=True,
        write_page_checksum=True,
    )
    metadata = pq.read_metadata(file)
    for group in range(2):
        column = row_groups(file, metadata.num_row_groups)[group][0]
        most, page = largest_pages(file, column, remote=False)
        assert (1_000_000 <= most < 1_010_000) == dictionary
        assert most == 0 or dictionary
        assert 100_000 <= page < 110_000
        usual = (1 << 20, 1 << 20) if compression != "zstd" else (most, page)  # which packs these 25-fold
        assert largest_pages(file, column, remote=True) == usual
    endless = b"\x19\xf3" + b"\xff" * 8 + b"\x0f"  # a list of 2 ** 60 values of a byte
    struct = b"\x15\x04\x1c\x00\x15\x02\x00"  # where a number is expected
    for noise in (b"\xff" * 3000, b"\x19" * 3000, endless + bytes(2989), struct + bytes(2993)):
        broken = io.BytesIO(file.getvalue()[:4] + noise + file.getvalue()[3004:])
        assert largest_pages(broken, row_groups(file, metadata.num_row_groups)[0][0], False) == (
            (metadata.row_group(0).column(0).total_uncompressed_size,) * 2
        )


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_chunks_are_those_that_pyarrow_tells(codec, dictionary):
    file = io.BytesIO()
    table = pa.table(
        {
            "n": range(300),
            "t": ["a", None, "b"] * 100,
            "b": [b"x"] * 300,
            "l": [["a", "b"]] * 300,
            "s": [{"bytes": b"x", "ü": True}] * 300,
            "f": pa.array([b"xy"] * 300, pa.binary(2)),
            "none": pa.nulls(300),
        }
    )
    pq.write_table(table, file, compression=codec, use_dictionary=dictionary, row_group_size=100)
    metadata = pq.read_metadata(file)
    for group, chunks in enumerate(row_groups(file, metadata.num_row_groups)):
        expected = map(metadata.row_group(group).column, range(metadata.num_columns))
        for own, column in zip(chunks, expected, strict=True):
            assert (own.path, own.values, own.packed) == (
                column.path_in_schema,
                column.num_values,
                column.total_compressed_size,
            )
            assert own.unpacked == column.total_uncompressed_size
            assert (own.data_page, own.dictionary_page) == (column.data_page_offset, column.dictionary_page_offset)
            assert own.is_text == column.physical_type.endswith("BYTE_ARRAY")
    assert len(row_groups(file, metadata.num_row_groups)) == 3
