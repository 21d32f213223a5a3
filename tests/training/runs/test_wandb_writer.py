"""`train --report-to wandb` with the real package, in its offline mode, which needs no network."""

import json
import struct
from importlib import util
from pathlib import Path

import pytest
from small_training import read_metrics, tiny_config, write_clip_root
from wandb.proto import wandb_internal_pb2

from shards_spec.files import UserError
from training.trainer import train

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4  # kinds of the parts of a record


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_clip_root(tmp_path_factory.mktemp("data"))


def records(path: Path):
    """What wandb has stored for one start of a run: a log in LevelDB's format behind a header of seven bytes."""
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> list[dict[str, float]]:
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_curves_and_config_of_a_run_that_is_resumed(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "small-run"
    train("clip", tiny_config("clip", root, str(out), steps=2, report_to="wandb"))
    train("clip", tiny_config("clip", root, str(out), steps=3, report_to="wandb"))
    first, second = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name  # one run
    rows = history(first) + history(second)
    lines = read_metrics(out)
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([line["loss"] for line in lines])
    assert [row["loss/contrastive"] for row in rows] == pytest.approx([line["loss"] for line in lines])
    (run,) = [record.run for record in records(first) if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == ("small-run", "clipmill")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["recipe"], config["batch_size"]) == ("clip", 4)


def test_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    real = util.find_spec
    monkeypatch.setattr("training.runs.wandb_writer.find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(UserError, match="pip install wandb"):
        train("clip", tiny_config("clip", str(tmp_path), str(tmp_path / "out"), report_to="wandb"))
    assert not (tmp_path / "out").exists()
