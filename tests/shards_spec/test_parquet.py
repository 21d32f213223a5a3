"""One writer of a shard's files and one reader of Parquet; the 64-bit id; tables as text."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from shards_spec.content_id import content_id, content_ids
from shards_spec.files import DataError, UserError, join, sha256_file, write_bytes
from shards_spec.layout import parquet_path, stats_path, tar_path
from shards_spec.parquet import column_names, open_parquet, read_table, write_table
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tsv import TsvFormat, read_tsv

FORMAT = TsvFormat("toy", "name\tnumber", command="toys", error=DataError)


def test_a_writer_deletes_the_old_record_first_and_tells_what_it_wrote(tmp_path):
    root = str(tmp_path)
    write_bytes(stats_path(join(root, "raw"), 7), b"{}")
    files = ShardWriter(root, "raw", 7)
    assert not (tmp_path / "raw" / "00007_stats.json").exists()
    files.write_tar([Sample("000070000", {"txt": b"a dog"})])
    files.write_parquet(pa.table({"key": ["000070000"]}), row_group_size=1)
    paths = [tar_path("raw", 7), parquet_path("raw", 7)]
    assert files.outputs == {path: sha256_file(join(root, path)) for path in paths}


@pytest.mark.parametrize(("given", "kind", "advice"), [(True, UserError, "check the path"), (False, DataError, "do x")])
def test_reading_says_what_is_wrong_and_what_to_do(tmp_path, given, kind, advice):
    path = str(tmp_path / "x.parquet")
    fix = "" if given else "do x"
    for read in (read_table, column_names):
        with pytest.raises(kind, match=f"x.parquet is not there; {advice}"):
            read(path, given=given, fix=fix)
    assert write_table(path, pa.table({"key": ["a", "b"], "n": [1, 2]})) == sha256_file(path)
    assert column_names(path) == ["key", "n"]
    assert read_table(path, ["n"], optional=["key", "other"]).column_names == ["n", "key"]
    with pytest.raises(kind, match=f"x.parquet: no column other; {'download it again' if given else 'do x'}"):
        read_table(path, ["n", "other"], given=given, fix=fix)
    with pytest.raises(kind, match="not a readable Parquet file"), open_parquet(path, given, fix):
        raise pa.ArrowInvalid("damaged page")


def test_content_ids_are_the_first_64_bits_of_the_sha256():
    texts = ["a dog", "", None, "ein Hund, 犬"]
    expected = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) if text else 0 for text in texts]
    found = content_ids(texts)
    assert found.dtype == np.uint64
    assert found.tolist() == expected
    assert content_id(b"a dog") == expected[0]
    assert content_ids(iter(["\ud800"]))[0] == content_id("\ud800".encode(errors="surrogatepass"))


def test_tables_as_text(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text(FORMAT.head('{"a": 1}', "sha256 0", "b") + "# dog\t3\ncat\t4\n")
    table = read_tsv(str(path), FORMAT)
    assert (table.header, table.notes) == ({"a": 1}, ["sha256 0", "b"])
    assert table.rows == [(5, ["# dog", "3"]), (6, ["cat", "4"])]
    assert str(FORMAT.broken(str(path), 6, ["cat", "4"], "do x")) == f"{path}: line 6 is broken: 'cat\\t4'; do x"
    for text in (
        "",
        "# clipmill toy []\nname\tnumber\n",
        "# clipmill toy {}\nother\n",
        "# clipmill pet {}\nname\tnumber\n",
    ):
        path.write_text(text)
        with pytest.raises(DataError, match="not a clipmill toy; make it with `clipmill toys`"):
            read_tsv(str(path), FORMAT)
