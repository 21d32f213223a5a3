"""A small CLIP is trained on walls of four colours; a search must find those that were asked for."""

import io
import json
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_page import Page
from small_data import COLOURS, write_final
from small_training import tiny_clip, tiny_config

import clipmill
from pipeline.search.config import SearchConfig
from pipeline.search.index import FeatureIndex
from pipeline.search.page import write_search_page
from pipeline.search.stage import search
from shards_spec.files import UserError
from shards_spec.images import decode_rgb
from shards_spec.sample import Sample
from training.evaluation.features import load_embedding_model
from training.export import ExportConfig, export
from training.trainer import train


def wall(colour: str, seed: int, form: str = "JPEG") -> bytes:
    """A wall of about that colour, with a stripe that is none of the four."""
    rng = random.Random(f"{colour}/{seed}")
    shade = tuple(min(255, max(0, value + rng.randrange(-25, 26))) for value in COLOURS[colour])
    image = Image.new("RGB", (40, 40), shade)
    left = rng.randrange(36)
    image.paste((128, 128, 128), (left, 0, left + 4, 40))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the clip recipe that has learnt the four colours."""
    root = tmp_path_factory.mktemp("run")
    colours = 12 * list(COLOURS)
    samples = [
        Sample(f"{0:05d}{i:04d}", {"jpg": wall(colour, i), "txt": f"a {colour} wall".encode(), "json": b"{}"})
        for i, colour in enumerate(colours)
    ]
    write_final(str(root), [samples])
    tiny_clip(root / "models" / "clip")
    config = tiny_config("clip", str(root), str(root / "out"), steps=60, batch_size=16, lr=5e-3, warmup=5)
    return train("clip", config)


@pytest.fixture(scope="module")
def model(run):
    return load_embedding_model(run)


def write_walls(folder: Path, each: int = 4) -> None:
    for colour in COLOURS:
        for seed in range(each):
            path = folder / f"{seed % 2}" / f"{colour}-{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wall(colour, 1000 + seed, "PNG"))


def find(model, images: Path, **options):
    return search(SearchConfig("run", images=str(images), **options), model)


def colours_of(result) -> list[str]:
    return [Path(hit.name).name.split("-")[0] for hit in result.hits]


def test_a_trained_student_finds_what_is_asked_for(model, tmp_path):
    write_walls(tmp_path)
    texts = tuple(f"a {colour} wall" for colour in COLOURS)
    found = find(model, tmp_path, text=texts, image=(str(tmp_path / "1" / "blue-3.png"),), top=4)
    for colour, result in zip([*COLOURS, "blue"], found.results, strict=True):
        assert colours_of(result) == [colour] * 4
        scores = [hit.score for hit in result.hits]
        assert scores == sorted(scores, reverse=True)
    assert found.results[-1].hits[0].name == "1/blue-3.png"
    assert found.results[-1].hits[0].score == pytest.approx(1, abs=1e-5)


class Counting:
    """A model that counts the images it embeds; it may fail after some, as a killed search does."""

    def __init__(self, model, limit=10_000):
        self._model = model
        self.limit = limit
        self.embedded = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def embed_images(self, prepared):
        if self.embedded + len(prepared) > self.limit:
            raise KeyboardInterrupt
        self.embedded += len(prepared)
        return self._model.embed_images(prepared)


def index_files(images: Path) -> list[Path]:
    return sorted(images.glob(".clipmill-search/*/*.parquet"))


def test_only_what_is_new_or_changed_is_embedded(model, tmp_path):
    write_walls(tmp_path)
    counting = Counting(model)
    assert find(counting, tmp_path).images == 16
    assert counting.embedded == 16
    assert find(counting, tmp_path, text=("a red wall",), top=99).images == 16
    assert counting.embedded == 16

    (tmp_path / "0" / "red-0.png").unlink()
    (tmp_path / "0" / "red-2.png").write_bytes(wall("blue", 5))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "red-9.jpg").write_bytes(wall("red", 9))
    found = find(counting, tmp_path, text=("a red wall",), top=3)
    assert counting.embedded == 18
    assert found.images == 16
    assert {hit.name for hit in found.results[0].hits} == {"1/red-1.png", "1/red-3.png", "new/red-9.jpg"}
    everything = find(counting, tmp_path, text=("x",), top=99).results[0].hits
    names = [hit.name for hit in everything]
    assert len(names) == len(set(names)) == 16
    assert "0/red-0.png" not in names


def test_small_files_of_the_index_are_merged_with_the_same_features(model, tmp_path):
    write_walls(tmp_path, each=2)
    before = find(model, tmp_path, text=("a red wall",), top=8).results[0].hits
    for number in range(3):
        path = tmp_path / f"extra-{number}.png"
        path.write_bytes(wall("green", number, "PNG"))
        find(model, tmp_path)
        assert len(index_files(tmp_path)) == 1
    after = find(model, tmp_path, text=("a red wall",), top=11).results[0].hits
    assert [hit for hit in after if not hit.name.startswith("extra")] == before


def test_a_killed_search_resumes_where_it_was(model, tmp_path, monkeypatch):
    write_walls(tmp_path)
    monkeypatch.setattr("pipeline.search.stage.WRITE_ROWS", 4)
    small = Counting(model, limit=12)
    small.batch_size = 4
    with pytest.raises(KeyboardInterrupt):
        find(small, tmp_path)
    kept = sum(len(FeatureIndex(str(path.parent), {}).files) for path in index_files(tmp_path)[:1])
    assert kept == 3
    rest = Counting(model)
    assert find(rest, tmp_path).images == 16
    assert rest.embedded == 4


def test_a_kill_while_files_are_merged_leaves_each_image_once(model, tmp_path, monkeypatch):
    write_walls(tmp_path, each=1)
    find(model, tmp_path)
    (tmp_path / "more.png").write_bytes(wall("red", 3, "PNG"))

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.search.index.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        find(model, tmp_path)
    monkeypatch.undo()
    assert len(index_files(tmp_path)) == 3
    found = find(model, tmp_path, text=("a red wall",), top=9, update=False)
    assert sorted(hit.name for hit in found.results[0].hits) == [
        "0/blue-0.png",
        "0/green-0.png",
        "0/red-0.png",
        "0/yellow-0.png",
        "more.png",
    ]
    assert find(model, tmp_path).images == 5
    assert len(index_files(tmp_path)) == 1


def test_a_damaged_file_of_the_index_is_made_again(model, tmp_path, caplog):
    write_walls(tmp_path, each=1)
    find(model, tmp_path)
    (path,) = index_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    counting = Counting(model)
    assert find(counting, tmp_path).images == 4
    assert counting.embedded == 4
    assert "embedded again" in caplog.text


def test_one_index_folder_serves_several_folders_of_images(model, tmp_path):
    counting = Counting(model)
    for name in ("one", "two", "one"):
        write_walls(tmp_path / name, each=1)
        found = find(counting, tmp_path / name, text=("a red wall",), top=9, index=str(tmp_path / "index"))
        assert len(found.results[0].hits) == 4
    assert not list((tmp_path / "one").glob(".clipmill-search"))
    assert len(list((tmp_path / "index").glob("*/*/*.parquet"))) == 2


def test_another_model_has_an_index_of_its_own(model, run, tmp_path):
    write_walls(tmp_path, each=1)
    find(model, tmp_path)
    other = Counting(load_embedding_model(run, precision="bf16"))
    find(other, tmp_path)
    assert other.embedded == 4
    assert len({path.parent for path in index_files(tmp_path)}) == 2


def write_samples(root: Path, colours: list[str]) -> None:
    shard = [
        Sample(f"{0:05d}{i:04d}", {"jpg": wall(colour, i), "txt": f"{colour} {i}".encode(), "json": b"{}"})
        for i, colour in enumerate(colours)
    ]
    write_final(str(root), [shard[:3], shard[3:]])


def test_samples_of_a_dataset_are_embedded_by_their_bytes(model, tmp_path):
    write_samples(tmp_path, ["red", "green", "blue", "yellow", "red"])
    counting = Counting(model)
    found = find(counting, tmp_path, text=("a red wall",), top=2)
    assert sorted(hit.name for hit in found.results[0].hits) == ["00000.tar:000000000", "00001.tar:000000004"]
    assert found.source.path("00001.tar:000000004") == f"{tmp_path}/shards/00001.tar:000000004"
    assert not found.source.other_files
    write_samples(tmp_path, ["red", "green", "blue", "red", "red"])  # the fourth image is another one
    found = find(counting, tmp_path, text=("a red wall",), top=3)
    assert counting.embedded == 6
    assert "00001.tar:000000003" in [hit.name for hit in found.results[0].hits]
    os.utime(tmp_path / "shards" / "00000.tar")
    find(counting, tmp_path)
    assert counting.embedded == 6


def write_tar(folder: Path) -> Path:
    write_final(str(folder), [[Sample(f"s{i}", {"jpg": wall("red", i)}) for i in range(3)]])
    return folder / "shards" / "00000.tar"


def test_odd_files_are_counted_with_reasons(model, tmp_path, tmp_path_factory, caplog):
    caplog.set_level(logging.INFO)
    write_walls(tmp_path, each=1)
    (tmp_path / "torn.jpg").write_bytes(wall("red", 1)[:-200])
    (tmp_path / "page.png").write_bytes(b"<html>")
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / ".hidden.jpg").write_bytes(wall("red", 2))
    tar = tmp_path / "some.tar"
    data = write_tar(tmp_path_factory.mktemp("made")).read_bytes()
    tar.write_bytes(data[: data.rindex(b"s2.jpg") + 600])
    found = find(model, tmp_path)
    assert found.images == 4 + 1
    assert found.source.left_out == {
        "does not decode: broken image": 1,
        "does not decode: not an image": 1,
        "format not decoded: heic": 1,
        "file not found": 1,
        "damaged tar": 1,
    }
    assert found.source.other_files == {".txt": 1}
    assert "torn.jpg: does not decode" in caplog.text


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(UserError, match=r"--images .*nowhere is not there"):
        find(model, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no image to search \(left out: none; other files: 1 .txt\)"):
        find(model, tmp_path, text=("x",))
    with pytest.raises(UserError, match="no embeddings of this model: leave --no-update out"):
        find(model, tmp_path, text=("x",), update=False)
    with pytest.raises(UserError, match=r"--image .*none.png: no such file"):
        find(model, tmp_path, image=(str(tmp_path / "none.png"),))
    write_walls(tmp_path, each=1)
    with pytest.raises(UserError, match=r"--image .*notes.txt: does not decode: not an image"):
        find(model, tmp_path, image=(str(tmp_path / "notes.txt"),))
    with pytest.raises(UserError, match=r"--html .* is a folder"):
        find(model, tmp_path, text=("x",), html=str(tmp_path))
    with pytest.raises(UserError, match="nothing to show"):
        SearchConfig("run", images="x", html="x.html")
    with pytest.raises(UserError, match="--top 0"):
        SearchConfig("run", images="x", top=0)


def test_output_is_lines_or_json(model, tmp_path):
    write_walls(tmp_path, each=1)
    found = find(model, tmp_path, text=("a red wall", "a blue wall"), top=2)
    text = list(found.lines(as_json=False))
    assert len(text) == 6
    assert text[0] == "a red wall"
    assert text[1].split()[::2] == ["1", f"{tmp_path}/0/red-0.png"]
    rows = [json.loads(line) for line in found.lines(as_json=True)]
    assert [(row["query"], row["rank"]) for row in rows[1:3]] == [("a red wall", 2), ("a blue wall", 1)]
    assert rows[2]["image"] == f"{tmp_path}/0/blue-0.png"
    assert rows[2]["score"] == pytest.approx(found.results[1].hits[0].score, abs=1e-6)


@pytest.mark.slow
def test_an_onnx_export_finds_the_same(model, run, tmp_path):
    folder = str(tmp_path / "onnx")
    export(ExportConfig(run, to=folder, format="onnx"))
    images = tmp_path / "images"
    write_walls(images)
    exported = load_embedding_model(folder)
    options = {"text": ("a green wall",), "image": (str(images / "0" / "red-0.png"),), "top": 4}
    own, other = find(model, images, **options), find(exported, images, **options)
    for result, counterpart in zip(own.results, other.results, strict=True):
        assert colours_of(counterpart) == colours_of(result)
        scores = [[hit.score for hit in one.hits] for one in (result, counterpart)]
        np.testing.assert_allclose(*scores, atol=1e-4)
    assert exported.identity["weights_sha256"] != model.identity["weights_sha256"]
    with pytest.raises(UserError, match="--best would not be used"):
        load_embedding_model(f"local-dir:{folder}", best=True)
    with pytest.raises(UserError, match="runs on the CPU here"):
        load_embedding_model(folder, device="cuda")


def test_the_page_shows_queries_and_images_by_themselves(model, tmp_path):
    write_walls(tmp_path / "walls")
    query = tmp_path / "query <b>.png"
    query.write_bytes(wall("blue", 3, "PNG"))
    found = find(model, tmp_path / "walls", text=("a red wall",), image=(str(query),), top=3)
    (tmp_path / "walls" / found.results[0].hits[2].name).unlink()  # between search and page
    page = Page(write_search_page(str(tmp_path / "found.html"), found))
    assert "a red wall" in page.text
    assert "query <b>.png" in page.text
    assert page.text.count("cosine 0.") + page.text.count("cosine 1.") == 6
    assert page.text.count("no image to show") == 1
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") and image["alt"] for image in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe")]
    assert "http" not in page.source.replace("http-equiv", "")


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size():
    image = Image.effect_noise((1200, 800), 60).convert("RGB").resize((1800, 1200))
    file = io.BytesIO()
    image.save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    assert decode_rgb(file.getvalue(), shorter_side=448).size == (600, 900)
    assert decode_rgb(file.getvalue(), shorter_side=700).size == (1200, 1800)


def test_the_command_prints_what_it_found_and_where_the_page_is(run, tmp_path, monkeypatch, capsys):
    write_walls(tmp_path / "walls", each=1)
    words = ["search", run, "--images", str(tmp_path / "walls"), "--text", "a red wall", "--top", "1"]
    page = str(tmp_path / "found.html")
    monkeypatch.setattr(sys, "argv", ["clipmill", *words, "--text", "a blue wall", "--html", page])
    with pytest.raises(SystemExit, match=r"^0$"):
        clipmill.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1::2]] == [f"{tmp_path}/walls/0/{c}-0.png" for c in ("red", "blue")]
    assert lines[::2] == ["a red wall", "a blue wall", page]
    assert Path(page).stat().st_size > 2000


def test_cosines_are_those_of_the_features(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = FeatureIndex(str(tmp_path), {})
    for start in range(0, 300, 100):
        ids = np.arange(start + 1, start + 101, dtype=np.uint64)
        index.add([str(number) for number in range(start, start + 100)], ids, features[start : start + 100])
    opened = FeatureIndex(str(tmp_path), {})
    living = np.flatnonzero(np.arange(300) % 3 > 0)
    opened.keep(living.astype(np.uint64) + 1)
    assert len(opened) == len(living) == 200
    queries = features[[7, 11]]
    for hits, scores in zip(opened.search(queries, 5), queries @ features[living].T, strict=True):
        order = np.argsort(-scores)[:5]
        assert [int(hit.name) for hit in hits] == living[order].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], rtol=1e-5)
