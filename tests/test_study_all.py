"""`make study-all`: its inputs, what it says of rows that were measured, and the script in its smallest form."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import skip_or_fail
from PIL import Image

from shards_spec.files import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = str(REPOSITORY / "demo")
SCRIPT = ["bash", str(REPOSITORY / "demo/study_all.sh")]


@pytest.fixture
def page_module(monkeypatch):
    """The script of the page."""
    monkeypatch.syspath_prepend(DEMO)
    import study_all

    return study_all


def write_row(study: Path, name: str, seed: int, accuracy: float, parameters: int, **config) -> None:
    """A run whose accuracy on the kinds of things was measured while training, and what it costs."""
    run = study / "rows" / f"{name}-{seed}"
    fields = {"recipe": "clip", "model": "tiny", "batch_size": 8, "seed": seed, "eval_data": "/e/kinds"}
    write_json(str(run / "config.json"), fields | config)
    line = {"step": 4, "samples_seen": 32, "loss": 1.0, "seconds": 60.0, "eval": {"acc1": accuracy}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    speed = {"device": "cpu", "images_per_s": {"1": 2e8 / parameters, "64": 900.0}}
    cost = {"task": "cost", "parameters": {"total": parameters}, "macs": {"image": 5e6}, "speed": [speed]}
    write_json(str(run / "eval/cost.json"), cost)


@pytest.fixture
def study(tmp_path) -> Path:
    """Two seeds of CLIP from scratch, a better TinyCLIP, and two classifiers of which the tied one is smaller."""
    labels = {"recipe": "minivit", "eval_data": "", "data": "/e/kinds"}
    for seed in (0, 1):
        write_row(tmp_path, "scratch", seed, 0.20 + 0.02 * seed, 900_000)
        write_row(tmp_path, "manual", seed, 0.50 + 0.02 * seed, 900_000, recipe="tinyclip")
        write_row(tmp_path, "untied", seed, 0.60 + 0.04 * seed, 450_000, **labels)
        write_row(tmp_path, "tied", seed, 0.62 + 0.04 * seed, 240_000, **labels)
    return tmp_path


def test_numbers_of_near_dots_do_not_cover_each_other(page_module):
    dots = [(100.0, 50.0), (100.0, 52.0), (101.0, 55.0), (108.0, 50.0), (300.0, 50.0)]
    marks = page_module.place_marks(dots)
    wide, tall = page_module.MARK_WIDTH, page_module.MARK_HEIGHT
    for place, (x, y) in enumerate(marks):
        assert all(abs(x - other) >= wide or abs(y - down) >= tall for other, down in marks[:place])
        assert abs(x - dots[place][0]) < 30
        assert abs(y - dots[place][1]) < 40
    assert marks[-1] == (300 + page_module.DOT + 3, 53)


def test_what_is_said_follows_from_the_ranges_of_the_seeds(study, page_module):
    methods = page_module.read_methods(study, ["scratch", "manual", "untied", "tied", "siclip"], ["0", "1"])
    rows = {row.name: row for row in map(page_module.read_row, methods)}
    assert list(rows) == ["scratch", "manual", "untied", "tied"]
    claims = page_module.claims_table(rows).splitlines()[2:]
    assert [claim.split("|")[-2].strip() for claim in claims] == [
        "as in the paper",
        "not ahead in the mean, ranges overlap",
    ]
    advice = page_module.advice(rows).splitlines()
    assert "**Halve a CLIP that you have**: TinyCLIP, manual inheritance, zero-shot 51.0 (50.0–52.0)." in advice[0]
    assert advice[2].endswith("fine-tuned 64.0 (62.0–66.0); not told apart from it: classifier from scratch.")
    assert "240 k parameters, fine-tuned 64.0" in advice[3]
    assert page_module.verdict([0.1, 0.2], [0.3, 0.4]) == "**the other way round**"
    assert page_module.verdict([0.3], [0.1]) == "ahead, of one seed"


def test_the_scatter_has_a_dot_for_each_row_that_was_measured(study, page_module):
    methods = page_module.read_methods(study, ["scratch", "manual", "untied", "tied"], ["0", "1"])
    rows = [page_module.read_row(method) for method in methods]
    costs = {row.name: row.parameters for row in rows} | {"manual": float("nan")}
    drawn = page_module.scatter(rows, costs, "parameters")
    assert drawn.count("<circle") == 3
    assert "1 CLIP from scratch: zero-shot" in drawn
    assert "4 MiniViT, tied in pairs: fine-tuned" in drawn


def test_images_are_copied_small_under_their_names(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DEMO)
    import study_all_inputs

    for name, size in {"labelled/test/cat/a.png": (400, 200), "heldout/b.png": (20, 30)}.items():
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True)
        Image.new("RGBA", size, (200, 10, 10, 0)).save(path)
    study_all_inputs.write_images(tmp_path / "web", tmp_path / "out")
    with Image.open(tmp_path / "out/labelled/test/cat/a.png") as image:
        assert (image.size, image.mode, image.getpixel((0, 0))) == ((128, 64), "RGB", (200, 10, 10))
    with Image.open(tmp_path / "out/heldout/b.png") as image:
        assert image.size == (20, 30)


@pytest.mark.slow
def test_two_rows_from_the_packages_to_the_page(tmp_path):
    if not Path("/usr/share/openclipart/png").is_dir() or not (REPOSITORY / "demo-run/packages").is_dir():
        skip_or_fail("the images or models are not there: `make real-data` installs them")
    few = {"DRAWINGS": "100", "STEPS": "4", "CAPTIONER_STEPS": "4", "TEACHER_STEPS": "2", "SEEDS": "0"}
    environment = {**os.environ, **few, "RUN": str(tmp_path), "ROWS": "scratch tied"}
    subprocess.run(SCRIPT, env=environment, check=True, timeout=1800)
    page = (tmp_path / "all/methods.md").read_text()
    assert "| CLIP from scratch |" in page
    assert "**Smallest file**: MiniViT, tied in pairs" in page
    assert (tmp_path / "all/methods.html").is_file()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all/done").iterdir()}
    subprocess.run(SCRIPT, env=environment, check=True, timeout=600)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all/done").iterdir()} == before
