"""Reading images that need no download: files, members of tars, cells of Parquet files."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from small_sources import LIMIT, empty_store, parquet_bytes, put

from pipeline.ingest import image_bytes
from pipeline.ingest.image_bytes import ImageReadError, clear_read_cache, read_image_bytes
from pipeline.ingest.rows import FileRef, ParquetRef, TarRef
from pipeline.ingest.url_lists import list_rows
from shards_spec.files import UserError


@pytest.fixture
def store():
    return empty_store()


def test_images_that_cannot_be_read(tmp_path, store):
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
    for ref, reason in reasons.items():
        with pytest.raises(ImageReadError, match=f"^{reason}$"):
            read_image_bytes(ref, LIMIT)
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
    refs = [row.image_ref for row in list_rows(f"{tmp_path}/x.parquet", "hf-parquet")]
    with ThreadPoolExecutor(32) as pool:
        for start in range(0, 4000, 64):
            read = pool.map(lambda ref: read_image_bytes(ref, LIMIT), refs[start : start + 64])
            assert list(read) == images[start : start + 64]
            held = 0
            for group in image_bytes._row_groups.groups.values():
                held += sum(batch.images.nbytes for batch in group.batches)
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
    refs = [row.image_ref for row in list_rows(f"{store}/x.parquet", "hf-parquet")]
    failed = []
    for row, ref in enumerate(refs):
        try:
            assert read_image_bytes(ref, LIMIT) == images[row]
        except ImageReadError as error:
            failed.append((row > 0, str(error)))
    assert failed == [(True, "file not readable")]
    assert len(opened) == 2
