"""Parquet files with the images in them."""

import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_sources import LIMIT, empty_store, parquet_bytes, plain, put, rows_of
from web_server import make_image

from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.image_bytes import ImageReadError, read_image_bytes
from pipeline.ingest.rows import ParquetRef
from shards_spec.files import UserError


@pytest.fixture
def store():
    return empty_store()


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
    assert plain(found) == [
        ("c0", "http://h/0", None),
        (None, "http://h/1", None),
        ("c2", "http://h/2", None),
        ("null", "x.parquet#3", None),
        ("empty", "x.parquet#4", None),
    ]
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
