"""`clipmill plan` on a list that a real server serves, and on a dataset of which stages have been run."""

import shlex
from pathlib import Path

import pytest
from small_data import write_raw
from web_server import serve

import pipeline.plan.stage as stage
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.plan.config import PlanConfig
from pipeline.plan.costs import Costs
from pipeline.plan.estimate import Choices, Corpus, stage_costs
from pipeline.plan.probe import device_ceiling, view_milliseconds
from pipeline.plan.stage import plan
from shards_spec.files import UserError

pytestmark = pytest.mark.integration
ROWS = 50


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.plan.probe.PRODUCT_SIDE", {"cuda": 256, "cpu": 64})


def hours_of(text: str, name: str) -> list[str]:
    """The words of a stage's line."""
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def write_list(path: Path, url: str, rows: int = ROWS) -> str:
    """A list of which every fifth link is dead."""
    kinds = ["status/404" if index % 5 == 0 else f"good/{index:07}" for index in range(rows)]
    path.write_text("".join(f"thing {index:07}\t{url}/{kind}\n" for index, kind in enumerate(kinds)))
    return str(path)


def test_a_list_is_tried(tmp_path):
    with serve() as server:
        source = write_list(tmp_path / "list.tsv", server.url)
        text = plan(PlanConfig(source, probe_rows=20, allow_private=True, dtype="int8", cores=3))
    assert f"cc3m, {ROWS} rows" in text
    assert "its first 20 rows: 16 samples (80.0%)" in text
    assert "else most often HTTP 404" in text
    assert "3 cores" in text
    assert f"clipmill ingest ROOT --source {source} --allow-private" in text
    assert "--views 8 --ops 2 --dtype int8" in text
    assert sorted(tmp_path.iterdir()) == [Path(source)]


def test_without_a_try_all_rows_count(tmp_path):
    source = write_list(tmp_path / "list.tsv", "http://no.where", rows=100_000)
    text = plan(PlanConfig(source, probe_rows=0, views=4, captions=0, cores=16))
    costs = stage_costs(Corpus("list", 100_000, 100_000, 1000), Choices(4, 0, epochs=6), 16, Costs())
    ingest = next(stage for stage in costs if stage.name == "ingest")
    assert hours_of(text, "ingest")[1:4] == ["0.03", f"{ingest.written / 1e9:.1f}", "network"]
    assert not [line for line in text.splitlines() if "caption " in line]


def test_a_list_of_which_nothing_succeeds_is_an_error(tmp_path):
    with serve() as server:
        source = tmp_path / "list.tsv"
        source.write_text("".join(f"thing {index}\t{server.url}/status/404\n" for index in range(8)))
        with pytest.raises(UserError, match=r"none of the first 8 rows of .* most often 'HTTP 404'"):
            plan(PlanConfig(str(source), allow_private=True))


def test_a_dataset_by_its_records_and_what_is_done_costs_nothing(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, 2)
    dedup(DedupConfig(root, workers=1))
    before = sorted(tmp_path.rglob("*"))
    text = plan(PlanConfig(root))
    assert sorted(tmp_path.rglob("*")) == before
    assert "in 2 shards" in text
    assert hours_of(text, "dedup")[1] == "done"
    assert f"clipmill dedup {root}" not in text
    assert f"clipmill pack {root}" in text


def test_a_name_with_spaces_is_quoted_and_pack_follows_what_is_still_to_be_found(tmp_path):
    root = str(tmp_path / "ds one")
    write_raw(root, 1)
    pack(PackConfig(root, captioner=("none",), workers=1))
    text = plan(PlanConfig(root, captions=0))
    assert hours_of(text, "pack")[1] == "done"
    commands = [line for line in text.splitlines() if line.startswith("clipmill ")]
    assert [shlex.split(line)[1:3] for line in commands[:2]] == [["dedup", root], ["pack", root]]
    assert commands[-1].endswith("--out 'runs/ds one'")
    dedup(DedupConfig(root, workers=1))
    assert "clipmill pack" not in plan(PlanConfig(root, captions=0))


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    source = write_list(tmp_path / "list.tsv", "http://no.where", rows=2000)
    assert "does not fit" not in plan(PlanConfig(source, probe_rows=0))
    monkeypatch.setattr(stage, "MUCH_DISK", 1e-9)
    assert "that does not fit: fewer --views" in plan(PlanConfig(source, probe_rows=0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": 0}, "--views 0"),
        ({"probe_rows": -1}, "--probe-rows -1"),
        ({"student": "ViT-H"}, "operations are known of"),
        ({"gbit": 0.0}, "--gbit 0"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(UserError, match=message):
        PlanConfig("list.tsv", **fields)


def test_what_is_no_source(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        plan(PlanConfig(str(tmp_path / "none.tsv")))
    (tmp_path / "ds" / "raw").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished shards"):
        plan(PlanConfig(str(tmp_path / "ds")))
    with pytest.raises(UserError, match="--device 'gpu'"):
        device_ceiling("gpu")


def test_no_image_gives_no_speed():
    assert view_milliseconds([("key", b"no image")], 2) is None
