"""When a run used a sample: what is said of it against the samples that the run's reader gives."""

import json
import shutil
from pathlib import Path

import pytest
from small_training import tiny_clip, tiny_config, write_packed, write_teacher

from shards_spec.files import UserError
from training.config import DataConfig, TeacherCacheConfig
from training.data.samples import open_samples
from training.runs.student import load_run
from training.runs.uses import uses_of
from training.trainer import train

pytestmark = pytest.mark.integration
BATCH = 4
STEPS = 9


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, str, list[list[str]]]:
    """A dataset of 5, 3 and 6 samples, a TinyCLIP run on it, and the keys of its shards."""
    root = tmp_path_factory.mktemp("uses")
    keys = write_packed(str(root), [5, 3, 6])
    write_teacher(str(root), keys)
    tiny_clip(root / "models" / "clip")
    config = tiny_config("tinyclip", str(root), str(root / "out"), steps=STEPS, batch_size=BATCH)
    return str(root), train("tinyclip", config), keys


def test_steps_views_and_captions_are_those_of_the_reader(run):
    root, out, keys = run
    config = json.loads((Path(out) / "config.json").read_text())
    data = DataConfig(root, batch_size=BATCH, streams=config["streams"], window=config["window"])
    student, _ = load_run(out)
    samples = open_samples(data, TeacherCacheConfig(config["teacher"]), student, config["seed"])
    expected = dict[str, list[str]]()
    for position in range(BATCH * STEPS):
        item = samples[position]
        place = f"epoch {item['epoch']}: step {position // BATCH + 1}, view {item['epoch'] % 2}, text_"
        expected.setdefault(item["key"], []).append(place)
    for shard, of_shard in enumerate(keys):
        for index, key in enumerate(of_shard):
            lines = uses_of(out, root, {"raw": None, "shards": (shard, index)})
            used = [line for line in lines[1:] if not line.endswith("not yet")]
            assert len(used) == len(expected[key])
            for line, start in zip(used, sorted(expected[key]), strict=True):
                assert line.startswith(start)


def test_an_order_that_was_another_one_is_said(run, tmp_path):
    root, out, _ = run
    copy = tmp_path / "ds"
    shutil.copytree(root, copy)
    sizes = json.loads((copy / "shards" / "sizes.json").read_text())
    (copy / "shards" / "sizes.json").write_text(json.dumps({**sizes, "00002.tar": 5}))
    moved = tmp_path / "run"
    shutil.copytree(out, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "data": str(copy)}))
    for place in ((0, 0), None):
        (line,) = uses_of(str(moved), str(copy), {"raw": None, "shards": place})
        assert line.startswith("cannot be told: shards/, or what is selected of it, is another")


def test_what_no_run_could_have_used(run, tmp_path):
    root, out, _ = run
    assert uses_of(out, root, {"raw": (0, 0), "shards": None}) == ["not used: it is not in shards/"]
    with pytest.raises(UserError, match=r"was trained on .*, not on"):
        uses_of(out, str(tmp_path), {"raw": None, "shards": (0, 0)})
    with pytest.raises(UserError, match="no RUN folder"):
        uses_of(str(tmp_path), root, {"raw": None, "shards": (0, 0)})
