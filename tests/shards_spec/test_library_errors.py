"""What libraries raise becomes one short message that names the file and the fix."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards_spec.files import DataError, UserError, read_json
from shards_spec.library_errors import (
    LONGEST,
    decode_text,
    gzip_errors,
    is_out_of_memory,
    json_errors,
    parquet_errors,
    parse_json,
    short,
)
from shards_spec.parquet import open_table

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>" + b" " * 3000


def read_parquet(path, given=False):
    with parquet_errors(str(path), given), open(path, "rb") as file:
        return open_table(str(path), file, given).read().to_pylist()


@pytest.mark.parametrize(
    ("data", "said", "fix"),
    [
        (POINTER, "Git LFS pointer", "git lfs pull"),
        (PAGE, "web page", "download it again"),
        (b"", "0 bytes", "download it again"),
        (b"PAR1 not at all", "not a readable Parquet file", "download it again"),
        (gzip.compress(b"PAR1", mtime=0), "gzip", "gunzip"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, data, said, fix):
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    for given, kind in ((True, UserError), (False, DataError)):
        with pytest.raises(kind) as found:
            read_parquet(path, given)
        text = str(found.value)
        assert str(path) in text
        assert said in text
        assert fix in text or (not given and "run its stage again" in text)
        assert len(text) < len(str(path)) + 2 * LONGEST
        assert "\n" not in text


def test_a_column_name_twice_is_refused_by_name(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["key", "key"]), path)
    with pytest.raises(UserError, match="'key' more than once; rename or drop"):
        read_parquet(path, given=True)
    with pytest.raises(DataError, match="'key' more than once; delete it"):
        read_parquet(path)


def test_every_flipped_or_cut_parquet_is_read_or_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"key": [str(n) for n in range(50)], "when": list(range(50))}), path)
    whole, said = path.read_bytes(), list[str]()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        for data in (bytes(flipped), whole[:at]):
            path.write_bytes(data)
            try:
                read_parquet(path)
            except DataError as error:
                said.append(str(error))
    assert len(said) > len(whole) // 7  # at least every cut file
    assert all(str(path) in text and len(text) < len(str(path)) + 2 * LONGEST for text in said)


def test_folders_and_pipes_are_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, said in (("pipe", "no regular file"), ("folder", "is a folder")):
        with pytest.raises(UserError, match=said):
            read_parquet(tmp_path / name, given=True)
        with pytest.raises(DataError, match=said):
            read_json(str(tmp_path / name))


def test_absent_files_are_the_users_mistake_and_pass_for_the_dataset(tmp_path):
    with pytest.raises(UserError, match="is not there; check the path"):
        read_parquet(tmp_path / "absent", given=True)
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        read_json(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "data",
    [b"{", b"[" * 100_000, b"1" * 5000, b'{"a": "\xe9"}', b"\xff\xfe{\0", b"", POINTER, PAGE],
    ids=["cut", "deep", "digits", "latin-1", "utf-16", "empty", "pointer", "page"],
)
def test_json_that_is_none_is_named(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as found:
        read_json(str(path))
    assert str(path) in str(found.value)
    assert len(str(found.value)) < len(str(path)) + 2 * LONGEST
    with pytest.raises(UserError), json_errors(str(path), given=True):
        json.loads(data)


def test_a_bom_goes(tmp_path):
    assert parse_json("x", b"\xef\xbb\xbf{}") == {}
    assert decode_text("x", b"\xef\xbb\xbfcat") == "cat"


def test_text_of_another_encoding_names_line_and_encoding():
    with pytest.raises(UserError, match=r"classnames.txt: line 2 is not UTF-8 \(byte 0xe9\); if it is latin-1"):
        decode_text("classnames.txt", "cat\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError, match="is UTF-16"):
        decode_text("classnames.txt", "cat\n".encode("utf-16"))
    with pytest.raises(DataError, match="line 1 "):
        decode_text("classnames.txt", b"\xe9", given=False)


def test_cut_and_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "x.gz"
    whole = gzip.compress(os.urandom(5000))
    for data in (whole[:-10], whole[:1000] + b"\0" * 50 + whole[1050:], b"\x1f\x8b", b"plain"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a readable gzip file"), gzip_errors(str(path)):
            gzip.decompress(path.read_bytes())


def test_permissions_are_not_taken_for_damage(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"cannot be read .*; check its permissions"), json_errors(str(path)):
        raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("a message about something else"), False),
    ],
)
def test_full_memory_is_told_from_other_errors(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_long_texts_are_cut():
    assert len(short(RuntimeError("x\n" * 40_000))) < LONGEST + 5
    assert short(RuntimeError()) == "RuntimeError"
    assert short(KeyError("Field 'x'")) == "Field 'x'"


def readers(tmp_path):
    """(name, call) for every reader of a Parquet file of the dataset; the file is ``x`` in all of them."""
    from functools import partial

    from pipeline.dedup.drop_list import read_drop_list
    from pipeline.dedup.raw_images import read_raw_images
    from pipeline.ingest.img2dataset import _keys
    from pipeline.ingest.retry import _attempts
    from pipeline.labels.vocab_parts import count_labels
    from pipeline.pack.selection import read_captions
    from pipeline.report.columns import read_columns
    from shards_spec.embeddings import EmbeddingFile, read_meta

    for folder in ("raw", "shards"):
        (tmp_path / folder).mkdir()
    root, raw = str(tmp_path), tmp_path / "raw/00000.parquet"
    yield raw, lambda: _keys(str(raw.with_suffix("")))
    yield raw, partial(read_drop_list, str(raw))
    yield raw, partial(read_raw_images, root, False, 0)
    yield raw, partial(read_captions, str(raw), None, None)
    yield raw, lambda: list(_attempts(root, [0], 0))
    yield tmp_path / "shards/00000.parquet", partial(count_labels, root, 0, "all")
    yield raw, partial(EmbeddingFile, str(raw))
    yield raw, partial(read_meta, str(raw))

    def problems():
        found = list[str]()
        read_columns(str(raw), ["key"], found)
        raise DataError(*found)

    yield raw, problems


@pytest.mark.parametrize("kind", ["twice", "pointer", "cut", "empty"])
def test_every_reader_of_parquet_names_the_file(tmp_path, kind):
    names = ["key", "status", "reason", "captions", "synsets", "key"]
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table([pa.array(["a"]) for _ in names], names=names), good)
    data = {"twice": good.read_bytes(), "pointer": POINTER, "cut": good.read_bytes()[:-30], "empty": b""}[kind]
    tried = 0
    for path, read in readers(tmp_path):
        path.write_bytes(data)
        with pytest.raises(DataError) as found:
            read()
        text = str(found.value)
        assert str(path) in text
        assert {"twice": "'key' more than once", "pointer": "git lfs pull"}.get(kind, "") in text
        assert len(text) < len(str(path)) + 2 * LONGEST
        tried += 1
    assert tried == 9


def test_every_flip_in_a_teacher_cache_is_read_or_named(tmp_path):
    import numpy as np

    from shards_spec.embeddings import EmbeddingFile, Vectors, write_vectors

    path = tmp_path / "00000.parquet"
    rows = np.arange(12, dtype=np.float16).reshape(3, 4)
    vectors = Vectors(rows, None, np.array([True, True, True]))
    write_vectors(str(path), ["a", "b", "c"], {"image_0": vectors}, {}, {"dim": 4, "dtype": "float16"})
    whole, said = path.read_bytes(), list[str]()
    assert np.array_equal(EmbeddingFile(str(path)).row("image_0", 1), rows[1])
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        for data in (bytes(flipped), whole[:at]):
            path.write_bytes(data)
            try:
                EmbeddingFile(str(path)).row("image_0", 1)
            except DataError as error:
                said.append(str(error))
    assert len(said) > len(whole) // 3
    assert all(str(path) in text and len(text) < len(str(path)) + 2 * LONGEST for text in said)
