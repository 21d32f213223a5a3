"""demo/real: what it takes for a text of people, what it draws, and the whole path on a hundred drawings."""

import csv
import json
import os
import pickle
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import skip_or_fail
from PIL import Image, ImageDraw
from small_data import tree

REPOSITORY = Path(__file__).resolve().parents[1]
SVG = """<svg xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
  xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work>
  <dc:creator><cc:Agent><dc:title>Ann Author</dc:title></cc:Agent></dc:creator><dc:title>{title}</dc:title>
  <dc:description>{description}</dc:description>
  <dc:subject><rdf:Bag><rdf:li>fruit</rdf:li><rdf:li>hash(0x8a3)</rdf:li><rdf:li>red_things</rdf:li></rdf:Bag></dc:subject>
  </cc:Work></rdf:RDF></metadata></svg>"""
COLOURS = ("crimson", "navy", "gold", "darkgreen", "purple", "black")


@pytest.fixture
def modules(monkeypatch):
    """The demo's modules drawings and world."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "demo/real"))
    import drawings
    import world

    return drawings, world


@pytest.fixture
def packages(modules, tmp_path, monkeypatch):
    """Twelve drawings and six stamps where the packages would be, and a folder with a background."""
    drawings, _ = modules
    monkeypatch.setattr(drawings, "OPENCLIPART", tmp_path / "openclipart")
    monkeypatch.setattr(drawings, "STAMPS", tmp_path / "stamps")
    for number in range(12):
        name = f"food/fruit/pear{chr(97 + number)}_01"
        svg = tmp_path / "openclipart/svg" / f"{name}.svg"
        svg.parent.mkdir(parents=True, exist_ok=True)
        title = "Part of a Collection" if number == 11 else f"Pear number {number}"
        svg.write_text(SVG.format(title=title, description="HASH(0x862bbb8)" if number else "A pear as it should be"))
        draw(tmp_path / "openclipart/png" / f"{name}.png", COLOURS[number % 6])
    for number in range(6):
        stamp = tmp_path / "stamps/animals/birds" / f"bird{number}.png"
        draw(stamp, COLOURS[number])
        stamp.with_suffix(".txt").write_text(f"A bird of kind {number}.\nde.utf8=Ein Vogel.\nen_GB.utf8=A bird.\n")
    (tmp_path / "backgrounds").mkdir()
    Image.linear_gradient("L").save(tmp_path / "backgrounds/sky.png")
    return tmp_path


def draw(path: Path, colour: str) -> None:
    """Write a disc on nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (60, 80))
    ImageDraw.Draw(image).ellipse((5, 15, 55, 65), fill=colour)
    image.save(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  pink_cake\n(small) ", "pink cake (small)"),
        ("Clipart by Nicu Buculei - head1", "head1"),
        ("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", ""),
        ("HASH(0x862bbb8)", ""),
        ("jean.victor.balin@gmail.com", ""),
        ("...", ""),
        (None, ""),
    ],
)
def test_a_text_is_one_of_people_or_none(text, said, modules):
    assert modules[0].plain(text) == said


def test_a_drawing_has_its_own_title_not_its_authors(packages, modules):
    first, *_, last = modules[0].openclipart()
    assert (first.title, first.description, first.keywords) == (
        "Pear number 0",
        "A pear as it should be",
        ("fruit", "red things"),
    )
    assert (last.title, last.description, first.label) == ("", "", "fruit")
    stamp = modules[0].stamps()[0]
    assert (stamp.title, stamp.translations, stamp.label) == ("A bird of kind 0.", {"de": "Ein Vogel."}, "bird")


def test_variants_of_a_drawing_are_on_one_side(modules):
    def sides(names):
        return {modules[0].Drawing(f"openclipart/food/{name}.png", Path()).is_held_out for name in names}

    assert all(len(sides([f"{word}_01", f"{word}_02b", word])) == 1 for word in COLOURS)
    assert sides(COLOURS) == {True, False}


def test_a_drawing_is_laid_where_it_shows(modules, tmp_path):
    black, white = tmp_path / "black.png", tmp_path / "white.png"
    Image.new("RGB", (200, 200)).save(black)
    Image.new("RGB", (200, 200), "white").save(white)
    cut = Image.new("RGBA", (50, 50), "black")
    from random import Random

    for seed in range(10):
        assert len(modules[1].compose([cut], [black, white], Random(seed)).getcolors()) > 1


def world(modules, packages: Path, out: Path, monkeypatch) -> dict:
    """Write all; return the summary."""
    arguments = ["world.py", str(out), "--backgrounds", str(packages / "backgrounds"), "--fewest", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    modules[1].main()
    return json.loads((out / "summary.json").read_text())


def test_the_list_and_its_images_are_whole_after_a_kill(packages, modules, tmp_path, monkeypatch):
    summary = world(modules, packages, tmp_path / "one", monkeypatch)
    wanted = tree(str(tmp_path / "one"))
    images = sorted((tmp_path / "one/images").iterdir())
    for image in images[::2]:
        image.unlink()
    (tmp_path / "one/list.parquet").unlink()
    (tmp_path / "one/images" / f".1-{images[0].name}").write_bytes(images[1].read_bytes()[:100])
    assert world(modules, packages, tmp_path / "one", monkeypatch) == summary
    (tmp_path / "one/images" / f".1-{images[0].name}").unlink()
    assert tree(str(tmp_path / "one")) == wanted
    rows = pq.read_table(tmp_path / "one/list.parquet").to_pylist()
    listed = {row["url"].rpartition("/")[2] for row in rows if "/images/" in row["url"]}
    assert listed == {path.name for path in images}
    with open(tmp_path / "one/heldout.csv", newline="") as file:
        _, *held_out = csv.reader(file)
    shown = {row["drawing"] for row in rows} | {row["second"] for row in rows}
    assert not {name.replace("-", "/") for name, _ in held_out} & shown
    assert (summary["drawings"], summary["rows"]) == (18, len(rows))


def test_the_taggers_pickle_is_read_as_data(modules, tmp_path, monkeypatch):
    import tagger

    file = tmp_path / tagger.FILE
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(os.getcwd))
    monkeypatch.setenv("PACKAGES", str(tmp_path))
    tagger._tagger.cache_clear()
    with pytest.raises(pickle.UnpicklingError, match="which is no data"):
        tagger.tag(["a", "dog"])


@pytest.mark.slow
def test_the_whole_path_on_a_hundred_drawings(tmp_path):
    if not Path("/usr/share/openclipart/png").is_dir() or not (REPOSITORY / "demo-run/packages").is_dir():
        skip_or_fail("the images or models are not there: `make real` installs them")
    few = {"RUN": str(tmp_path), "DRAWINGS": "100", "STEPS": "4", "CAPTIONER_STEPS": "4", "TEACHER_STEPS": "2"}
    script = ["bash", str(REPOSITORY / "demo/real/run.sh")]
    subprocess.run(script, env={**os.environ, **few}, check=True, timeout=1500)
    result = json.loads(next((tmp_path / "distilled-0/eval").glob("*kinds*.json")).read_text())
    assert 0 <= result["metrics"]["acc1"] <= 1
    assert (tmp_path / "dataset/report.html").is_file()
    before = tree(str(tmp_path / "dataset"))
    subprocess.run(script, env={**os.environ, **few}, check=True, timeout=1500)
    after = tree(str(tmp_path / "dataset"))
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}
