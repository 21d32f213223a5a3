"""A damaged ``dataset.json`` is named with the fix that fits it, and that fix works."""

import json
from pathlib import Path

import pytest
from small_data import tree, write_raw

from pipeline.core.runner import upstream_shards
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import DataError, UserError, write_bytes
from shards_spec.manifest import read_dataset

SOUND = {"spec_version": 1, "name": "x", "source": None, "stages": {"ingest": {"shards": 1, "counts": {"success": 2}}}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"spec_version": 1, "sta',
        "not JSON",
        "[]",
        "{}",
        "\x00\x01\x02\x03" * 50,
        json.dumps({**SOUND, "spec_version": "1"}),
        json.dumps({**SOUND, "stages": []}),
        json.dumps({**SOUND, "stages": {"ingest": 3}}),
        json.dumps({**SOUND, "stages": {"ingest": {"shards": "many"}}}),
        json.dumps({**SOUND, "stages": {"ingest": {"shards": None}}}),
        json.dumps({**SOUND, "stages": {"ingest": {"config": []}}}),
        json.dumps({**SOUND, "stages": {"ingest": {"counts": {"success": "2"}}}}),
    ],
)
def test_a_damaged_one_says_how_it_is_written_anew(tmp_path, text):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(DataError) as found:
        read_dataset(str(tmp_path))
    assert str(found.value).startswith(str(path))
    assert "; delete the file and run the stages again, each writes its part from what is there" in str(found.value)


def test_one_of_another_version_is_no_damage(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({**SOUND, "spec_version": 2}))
    with pytest.raises(UserError, match="spec version 2, this clipmill reads 1; use the one that wrote it"):
        read_dataset(str(tmp_path))


def test_the_stages_write_it_anew(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, shards=2, per_shard=3)
    config = PackConfig(root, captioner=("none",), workers=1)
    pack(config)
    block, files = read_dataset(root)["stages"]["pack"], tree(root)
    Path(root, "dataset.json").unlink()
    with pytest.raises(UserError, match="ingest has not finished"):
        upstream_shards(root, "raw", "ingest")
    write_raw(root, shards=2, per_shard=3)
    assert pack(config).made == 0
    assert read_dataset(root)["stages"]["pack"] == block
    assert {name for name, digest in tree(root).items() if digest != files[name]} <= {"logs/pack.jsonl"}


def test_a_file_that_cannot_be_replaced_is_named_and_not_its_temporary_one(tmp_path):
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(IsADirectoryError) as found:
        write_bytes(str(target), b"x")
    assert (found.value.filename, found.value.filename2) == (str(target), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]
    long = tmp_path / ("x" * 250)
    with pytest.raises(OSError, match="File name too long") as found:
        write_bytes(str(long), b"x")
    assert found.value.filename == str(long)
