"""`select --against`: copies of evaluation images go, each with its pair; what only looks alike stays."""

import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_copies import alike, copied, drawn, mirrored, scene, shown

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from shards_spec.layout import select_parquet

pytestmark = pytest.mark.integration
EVALUATED = 20


def made(base: Path, samples: dict[str, bytes], **options) -> str:
    """A packed dataset whose captions are the images' names, in one shard."""
    images = base / "images"
    images.mkdir(parents=True)
    for name, data in samples.items():
        (images / f"{name}.jpg").write_bytes(data)
        (images / f"{name}.txt").write_text(name)
    root = str(base / "ds")
    ingest(IngestConfig(root, str(images), shard_size=500, workers=1, **options))
    pack(PackConfig(root, captioner=("none",), workers=1))
    return root


def pairs_of(root: str, name: str = "selected") -> dict[str, str]:
    """Caption of each sample that goes to the evaluation image that it shows."""
    captions = pq.read_table(f"{root}/shards/00000.parquet").column("caption").to_pylist()
    rows = pq.read_table(select_parquet(root, name, 0)).to_pylist()
    gone = {row["key"] for row in rows if row["copies"] == 0}
    assert gone == {row["key"] for row in rows if row["pair"]}
    return {caption: row["pair"] for caption, row in zip(captions, rows, strict=True) if row["pair"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, Path, dict[str, str]]:
    """A dataset with copies of evaluation images and with scenes that are like them; the set; what the copies show."""
    base, rng = tmp_path_factory.mktemp("against"), random.Random(0)
    evaluated = base / "eval" / "test"
    evaluated.mkdir(parents=True)
    scenes = [scene(f"eval {number}") for number in range(EVALUATED)]
    samples, truth = {}, {}
    for number, one in enumerate(scenes):
        (evaluated / f"{number}.jpg").write_bytes(drawn(one))
        for turn in range(2):
            samples[f"copy {number} {turn}"] = copied(drawn(one), rng)
            truth[f"copy {number} {turn}"] = f"eval/test/{number}.jpg"
    seen = {shown(one) for one in scenes} | {mirrored(one) for one in scenes}
    for number, one in enumerate(scenes):
        for turn, other in enumerate(alike(one, rng)):
            if shown(other) not in seen:
                samples[f"other {number} {turn}"] = drawn(other)
    return made(base, samples), base / "eval", truth


def test_copies_go_and_what_is_alike_stays(built, tmp_path):
    root, evaluated, truth = built
    root = shutil.copytree(root, tmp_path / "ds").as_posix()
    summary = select(SelectConfig(root, against=(str(evaluated),), workers=1))
    found = pairs_of(root)
    assert found.items() <= truth.items()
    assert len(found) >= 0.95 * len(truth)
    assert summary.counts["near-duplicate of eval"] == len(found)
    assert check(CheckConfig(root)) == []
