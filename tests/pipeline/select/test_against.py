"""`select --against`: copies of evaluation images go, each with its pair; what only looks alike stays."""

import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bench.photos import photo
from small_copies import alike, copied, drawn, mirrored, scene, shown

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report import ReportConfig, report
from pipeline.select.config import SelectConfig
from pipeline.select.evaluation_images import open_sets
from pipeline.select.stage import select
from shards_spec.files import UserError
from shards_spec.layout import select_parquet
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

pytestmark = pytest.mark.integration
EVALUATED = 12


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


def captions_of(root: str) -> list[str]:
    return pq.read_table(f"{root}/shards/00000.parquet").column("caption").to_pylist()


def pairs_of(root: str, name: str = "selected") -> dict[str, str]:
    """Caption of each sample that goes to the evaluation image that it shows."""
    rows = pq.read_table(select_parquet(root, name, 0)).to_pylist()
    gone = {row["key"] for row in rows if row["copies"] == 0}
    assert gone == {row["key"] for row in rows if row["pair"]}
    return {caption: row["pair"] for caption, row in zip(captions_of(root), rows, strict=True) if row["pair"]}


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
            truth[f"copy {number} {turn}"] = f"{evaluated}/{number}.jpg"
    seen = {shown(one) for one in scenes} | {mirrored(one) for one in scenes}
    for number, one in enumerate(scenes):
        for turn, other in enumerate(alike(one, rng)):
            if shown(other) not in seen:
                samples[f"other {number} {turn}"] = drawn(other)
    return made(base, samples), base / "eval", truth


@pytest.fixture
def root(built, tmp_path) -> str:
    return shutil.copytree(built[0], tmp_path / "ds").as_posix()


def test_copies_go_and_what_is_alike_stays(built, root):
    _, evaluated, truth = built
    summary = select(SelectConfig(root, against=(str(evaluated),), workers=1))
    found = pairs_of(root)
    assert found.items() <= truth.items()
    assert len(found) >= 0.95 * len(truth)
    assert summary.counts["near-duplicate of eval"] == len(found)
    assert check(CheckConfig(root)) == []
    again = select(SelectConfig(root, against=(str(evaluated),), workers=1))
    assert (again.made, again.counts) == (0, summary.counts)
    page = Path(report(ReportConfig(root, samples=200))).read_text()
    shown = page[page.index("<h2>Evaluation images") : page.index("<h2>Contact sheet")]
    assert shown.count("<img ") == 2 * len(found)
    with pytest.raises(UserError, match="against"):
        select(SelectConfig(root, against=(str(evaluated / "test" / "0.jpg"),), workers=1))


def test_images_without_stored_hashes_are_decoded(built, root, monkeypatch):
    _, evaluated, _ = built
    select(SelectConfig(root, name="stored", against=(str(evaluated),), workers=1))
    monkeypatch.setattr("pipeline.select.against._stored_hashes", lambda *_: None)
    select(SelectConfig(root, name="computed", against=(str(evaluated),), where=("width > 0",), workers=1))
    stored, computed = pairs_of(root, "stored"), pairs_of(root, "computed")
    assert len(stored.keys() ^ computed.keys()) <= 1  # the images were encoded once more since


def test_the_kinds_of_sets(built, root, tmp_path, caplog):
    """CLIP_benchmark's, of which the test split counts; a ROOT; folders at any depth; several at once."""
    _, evaluated, _ = built
    images = {path.stem: path.read_bytes() for path in (evaluated / "test").iterdir()}
    bench = tmp_path / "bench"
    for split, names in (("test", ["0", "1"]), ("train", ["2", "3"])):
        (bench / split).mkdir(parents=True)
        write_shard(str(bench / split / "0.tar"), [Sample(name, {"jpg": images[name], "cls": b"0"}) for name in names])
    dataset = made(tmp_path / "made", {name: images[name] for name in ("4", "5")})
    loose = tmp_path / "loose" / "deep"
    loose.mkdir(parents=True)
    (loose / "6.jpg").write_bytes(images["6"])
    (loose / "broken.jpg").write_bytes(images["7"][:50])
    (loose / "gone.jpg").symlink_to("nowhere.jpg")
    select(SelectConfig(root, against=(str(bench), dataset, str(loose.parent)), workers=1))
    rows = pq.read_table(select_parquet(root, "selected", 0)).to_pylist()
    reasons = {
        caption.split()[1]: row["reason"] for caption, row in zip(captions_of(root), rows, strict=True) if row["pair"]
    }
    assert reasons == {
        **dict.fromkeys("01", "near-duplicate of bench"),
        **dict.fromkeys("45", "near-duplicate of ds"),
        "6": "near-duplicate of loose",
    }
    assert f"{bench}/test/0.tar:1" in {row["pair"] for row in rows}
    assert f"{loose.parent}: 2 images cannot be read (first: deep/broken.jpg)" in caplog.text


@pytest.mark.slow
def test_planted_copies_and_unrelated_images_in_numbers():
    from bench import against  # it reads icons of Debian where they are

    scenes = [drawn(one) for one in against.demo_scenes(1000)]
    assert against.share_found(scenes) >= 0.98
    assert against.share_found([photo(seed, 256, 500) for seed in range(200)]) >= 0.98
    wrong, number = against.false_drops(1000, 5000)
    assert wrong == 0
    assert number > 7000
    if against.ICONS.is_dir():
        assert against.wrong_icon_pairs()[0] == []


def test_names_of_sets(tmp_path):
    for name in ("a/test", "b/test", "c/a", "d"):
        (tmp_path / name).mkdir(parents=True)
    paths = [f"{tmp_path}/{name}" for name in ("a/test/", "b/test", "c/a", "a", "d", "d/")]
    labels = [one.label for one in open_sets(tuple(paths), "elsewhere")]
    assert labels == ["a/test", "b/test", f"{tmp_path}/c/a", f"{tmp_path}/a", "d"], "each once, told apart by its path"


@pytest.mark.parametrize("kind", ["absent", "empty", "broken", "itself"])
def test_sets_that_do_not_serve(root, tmp_path, kind):
    path = tmp_path / kind
    if kind != "absent":
        path.mkdir()
    if kind == "broken":
        (path / "a.jpg").write_bytes(b"no image")
    named = root if kind == "itself" else str(path)
    with pytest.raises(UserError, match=f"--against {named} (is|has) "):
        select(SelectConfig(root, against=(named,), workers=1))
