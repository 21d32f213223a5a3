"""The whole chain on a real Slurm and on the demo's data: a list with faults, over HTTP, to a distilled student."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_scenes import served_scenes
from small_data import tiny_coca, tree
from small_slurm import clipmill, log_of, losses, submit
from small_training import tiny_clip

pytestmark = pytest.mark.integration

SCENES = 90


@pytest.fixture
def web(tmp_path) -> Iterator[Path]:
    """The demo's scenes, their list and its faults, served as the demo serves them."""
    with served_scenes(tmp_path / "web", count=SCENES, eval_count=0):
        yield tmp_path / "web"


@pytest.mark.slow
def test_the_chain_has_the_bytes_of_the_local_commands(slurm, web, tmp_path):
    """Ingest to train in one call; then the same commands one by one."""
    coca, student = tiny_coca(tmp_path / "coca"), tiny_clip(tmp_path / "clip")
    there, here = str(tmp_path / "there" / "scenes"), str(tmp_path / "here" / "scenes")
    stages = {
        "ingest": ["--source", str(web / "list.tsv"), "--shard-size", "16", "--allow-private"],
        "caption": ["--model", coca, "--name", "cap", "--num-captions", "2", "--max-tokens", "8", "--threads", "1"],
        "pack": ["--workers", "1"],
        "vocab": ["--min-count", "2"],
        "cache": ["--model", coca, "--name", "tea", "--views", "2", "--threads", "1"],
    }
    train = ["--model", student, "--steps", "6", "--batch-size", "16", "--workers", "0", "--log-every", "1"]
    chain = [word for stage, words in stages.items() for word in ("--", stage, *words)]
    made = submit(
        slurm,
        "pipeline",
        there,
        "--array",
        "3",
        "--time",
        "5",
        *chain,
        "--",
        "train",
        "tinyclip",
        "--out",
        str(tmp_path / "run"),
        *train,
    )
    clipmill(
        slurm,
        "submit",
        "pipeline",
        here,
        "--cluster",
        "debug",
        *chain,
        "--",
        "train",
        "tinyclip",
        "--out",
        str(tmp_path / "run-here"),
        *train,
    )
    for (_, last), stage in zip(made, [*stages, "train"], strict=True):
        states = slurm.ended(last, 180)
        assert set(states.values()) == {"COMPLETED"}, (stage, log_of(there, last))
    mine, theirs = ({path: d for path, d in tree(r).items() if not _timed(path)} for r in (here, there))
    assert mine == theirs
    counts = json.loads(Path(there, "dataset.json").read_text())["stages"]["ingest"]["counts"]
    print(counts, {folder: sum(path.startswith(f"{folder}/") for path in mine) for folder in os.listdir(there)})
    assert counts["success"] == SCENES
    assert sum(counts.values()) == json.loads((web / "summary.json").read_text())["rows"] > SCENES + 6
    for folder in ("raw", "captions/cap", "shards", "teacher/tea"):
        assert len([path for path in mine if path.startswith(folder) and path.endswith(("tar", "parquet"))]) >= 6
    assert losses(tmp_path / "run") == losses(tmp_path / "run-here")


def _timed(path: str) -> bool:
    return path.startswith("raw/") and path.endswith("_stats.json")
