"""`why`: what every stage made of one sample, whether it stays or goes."""

import shutil
from pathlib import Path

import pytest
from small_data import build_all, draw, tiny_coca

from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.why.config import WhyConfig
from pipeline.why.stage import SampleLife, why
from shards_spec.files import UserError
from shards_spec.layout import final_parquet, stats_path
from shards_spec.parquet import read_table

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=[None, 3], ids=["uneven", "equal"])
def root(tmp_path_factory, request) -> str:
    """A dataset of every stage, of which one image breaks off, one repeats another, and one caption is blank."""
    base = tmp_path_factory.mktemp("why")
    images = base / "images"
    images.mkdir()
    for index in range(6):
        data, caption = draw(f"why/{index}")
        (images / f"{index}.jpg").write_bytes(data[:100] if index == 2 else data)
        (images / f"{index}.txt").write_text(caption)
    shutil.copy(images / "0.jpg", images / "8.jpg")
    (images / "8.txt").write_text("the same again")
    root = str(base / "ds")
    ingest(IngestConfig(root, str(images), shard_size=4, workers=1))
    dedup(DedupConfig(root, workers=1))
    build_all(root, tiny_coca(base / "coca"), views=2, shard_size=request.param)
    return root


def told(root: str, key: str) -> SampleLife:
    return why(WhyConfig(root, key))


def test_a_sample_that_stays(root):
    life = told(root, "000010001")
    assert life.raw == (1, 1)
    shard, index = life.final
    row = read_table(final_parquet(root, shard)).slice(index, 1).to_pylist()[0]
    assert row["key"] == "000010001"
    text = "\n".join(life.lines)
    for expected in (draw("why/5")[1], "url: 5.jpg", "no duplicate", "nats a token", "2 views"):
        assert expected in text
    for number, caption in enumerate([row["caption"], *row["synthetic"]]):
        assert f"text_{number}: {caption!r}" in text
        assert f"text_{number}: cosine" in text
    assert row["synsets"][0][0] in text


def test_a_link_in_place_of_the_key(root):
    assert told(root, "5.jpg").lines == told(root, "000010001").lines
    with pytest.raises(UserError, match=r"no sample or row of the key or link 'http://no/such\.jpg'"):
        told(root, "http://no/such.jpg")


def test_an_image_that_was_not_taken(root):
    life = told(root, "000000002")
    assert life.raw is None
    assert life.final is None
    assert any("left out: failed_to_resize" in line for line in life.lines), life.lines


def test_a_duplicate_names_the_sample_that_stays(root):
    life = told(root, "000010002")
    text = "\n".join(life.lines)
    assert life.final is None
    assert "duplicate image, 000000000 stays instead" in text
    assert "dropped: duplicate image" in text


def test_what_is_not_made_yet_is_named(root, tmp_path):
    copy = tmp_path / "ds"
    shutil.copytree(root, copy)
    teacher = next((copy / "teacher").iterdir()).name
    shard = told(root, "000010001").final[0]
    Path(stats_path(f"{copy}/teacher/{teacher}", shard)).unlink()
    assert any("not finished" in line for line in told(str(copy), "000010001").lines)
    for folder in ("shards", "plan", "teacher"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    assert told(str(copy), "000010001").lines[-1] == f"  not packed yet: `clipmill pack {copy}` does it"
    with pytest.raises(UserError, match="not a clipmill dataset"):
        told(str(tmp_path), "000010001")
