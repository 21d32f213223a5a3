"""`takedown`: what a list names is gone from every file, what stays is what it was, and no stage runs again."""

import shutil
from pathlib import Path

import pytest
from small_data import build_all, covered_by, draw, run_stage, tiny_coca, tree

from pipeline.cache.export_lists import export_lists
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from pipeline.takedown import staging as staging_module
from pipeline.takedown.config import TakedownConfig
from pipeline.takedown.stage import TakedownOutcome, takedown
from shards_spec.files import UserError, read_json, replace_file
from shards_spec.manifest import shard_ids, shard_sizes
from shards_spec.parquet import read_table
from shards_spec.tar import read_shard
from shards_spec.teacher_shard import TeacherShard
from shards_spec.vocab import read_vocabulary

pytestmark = pytest.mark.integration

GONE = {"000000000", "000000005", "000010000"}
PER_SHARD = 7


def make(base: Path, shard_size: int | None) -> None:
    """A dataset of every stage: an image breaks off, one repeats another, one caption is blank."""
    images = base / "images"
    images.mkdir()
    for index in range(12):
        data, caption = draw(f"takedown/{index}")
        (images / f"{index:02}.jpg").write_bytes(data[:100] if index == 2 else data)
        (images / f"{index:02}.txt").write_text("" if index == 8 else caption)
    shutil.copy(images / "00.jpg", images / "98.jpg")
    (images / "98.txt").write_text("the same again")
    root = str(base / "ds")
    ingest_again(base / "ds", images)
    dedup(DedupConfig(root, workers=1))
    build_all(root, tiny_coca(base / "coca"), views=2, shard_size=shard_size)
    select_twice(root)


def select_twice(root: str) -> None:
    """The lists of the cache, and selections by a rule for each sample and by one that compares all of them."""
    export_lists(root, "tea", overwrite=False)
    select(SelectConfig(root, "wide", where=("width > 52",), workers=1))
    select(SelectConfig(root, "apart", semantic_duplicates=0.5, teacher=("tea",), cells=1, workers=1))


def ingest_again(root: Path, images: Path, **options) -> None:
    ingest(IngestConfig(str(root), str(images), shard_size=PER_SHARD, workers=1, **options))


@pytest.fixture(scope="module", params=[None, 3], ids=["uneven", "equal"])
def made(tmp_path_factory, request) -> tuple[Path, int | None]:
    """The folder of a dataset, and its number of samples in a final shard."""
    base = tmp_path_factory.mktemp("takedown")
    make(base, request.param)
    return base, request.param


@pytest.fixture
def root(made, tmp_path) -> Path:
    """A copy of the dataset."""
    return shutil.copytree(made[0] / "ds", tmp_path / "ds")


def take(root: Path, *lines: str, **options) -> TakedownOutcome:
    path = root.parent / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return takedown(TakedownConfig(str(root), str(path), **options))


def dataset_tree(root: Path) -> dict[str, str]:
    return {path: digest for path, digest in tree(str(root)).items() if not path.startswith("takedown/")}


def samples(root: Path) -> dict[str, dict[str, bytes]]:
    return {s.key: s.members for tar in sorted(root.glob("shards/*.tar")) for s in read_shard(str(tar))}


def vectors(root: Path) -> dict[str, list[bytes]]:
    """Key to the bytes of all its vectors."""
    found = dict[str, list[bytes]]()
    for shard in shard_ids(f"{root}/teacher/tea"):
        for file in TeacherShard(str(root), "tea", shard).files:
            for name in file.names:
                for key, row in zip(file.keys, file.vectors(name).values, strict=True):
                    found.setdefault(key, []).append(row.tobytes())
    return found


def pairs(root: Path) -> dict[str, str | None]:
    """Key to the sample that stays in its place, by a selection."""
    rows = [row for path in sorted(root.glob("select/apart/*.parquet")) for row in read_table(str(path)).to_pylist()]
    return {row["key"]: row["pair"] for row in rows}


def test_all_is_gone_and_the_rest_is_as_it_was(made, root):
    base, shard_size = made
    before, embedded = samples(root), vectors(root)
    named = pairs(root)
    assert GONE & {pair for pair in named.values() if pair}
    sha256 = {row["key"]: row["sha256"] for row in read_table(f"{root}/raw/00001.parquet").to_pylist()}["000010000"]
    outcome = take(root, "000000000", "05.jpg", sha256, "not-here")
    assert check(CheckConfig(str(root))) == []
    report = read_json(outcome.report)
    assert set(report["samples"]) == GONE
    assert report["lines_without_a_match"] == [4]
    assert report["left"] == []
    assert set(before) >= GONE
    assert samples(root) == {key: members for key, members in before.items() if key not in GONE}
    assert vectors(root) == {key: rows for key, rows in embedded.items() if key not in GONE}
    assert pairs(root) == {key: None if pair in GONE else pair for key, pair in named.items() if key not in GONE}
    covered = covered_by(str(root), "original", read_vocabulary(f"{root}/vocab/all.tsv"))
    assert read_json(f"{root}/dataset.json")["stages"]["vocab/all"]["coverage"] == covered
    rows = {r["key"]: r for n in (0, 1) for r in read_table(f"{root}/raw/0000{n}.parquet").to_pylist()}
    for key in GONE:
        there = {name for name, value in rows[key].items() if value is not None}
        assert there == {"key", "status", "error_message"}
        assert rows[key]["error_message"] == "taken down"

    after = dataset_tree(root)
    ingest_again(root, base / "images")
    dedup(DedupConfig(str(root), workers=1))
    for stage in ("caption", "pack", "cache"):
        run_stage(stage, str(root), f"local-dir:{base}/coca", shard_size=shard_size)
    select_twice(str(root))
    assert dataset_tree(root) == after, "no stage had anything to do"


def test_it_is_the_dataset_that_is_made_without_these_rows(made, root):
    """Tars byte by byte; tables of raw/, dedup/ and shards/; captions; vectors; counts."""
    base, shard_size = made
    take(root, "000000005", "000010000")
    new = root.parent / "new"
    (new / "takedown").mkdir(parents=True)
    shutil.copy(root / "takedown/hashes.json", new / "takedown")
    ingest_again(new, base / "images")
    dedup(DedupConfig(str(new), workers=1))
    for stage in ("caption", "pack", "cache"):
        run_stage(stage, str(new), f"local-dir:{base}/coca", shard_size=shard_size)
    assert samples(new) == samples(root)
    assert vectors(new) == vectors(root)
    for path in sorted(root.glob("captions/cap/*.parquet")):
        other = str(new / path.relative_to(root))
        assert read_table(str(path), ["key", "captions"]).equals(read_table(other, ["key", "captions"]))
    folders = ("raw", "dedup") if shard_size else ("raw", "dedup", "shards")
    for path in (path for folder in folders for path in root.glob(f"{folder}/*[0-9].*")):
        other = new / path.relative_to(root)
        if path.suffix == ".tar":
            assert path.read_bytes() == other.read_bytes(), path
        elif path.suffix == ".parquet":
            assert read_table(str(path)).equals(read_table(str(other))), path
    one, other = (read_json(str(folder / "dataset.json"))["stages"] for folder in (root, new))
    for stage in ("ingest", "dedup", "pack", "cache/tea"):
        assert one[stage]["counts"] == other[stage]["counts"], stage
        facts = dict(one[stage].get("facts", {}))
        assert facts.pop("samples taken down", 0) == (2 if shard_size and stage == "pack" else 0)
        assert facts == other[stage].get("facts", {}), stage


@pytest.mark.parametrize("moment", [0, 9, 1000])
def test_killed_and_run_again(root, moment, monkeypatch):
    before = dataset_tree(root)
    whole = shutil.copytree(root, root.parent / "whole")
    take(whole, *GONE)
    calls = iter(range(moment))

    def fails(path: str, new: str) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        replace_file(path, new)

    monkeypatch.setattr(staging_module, "replace_file", fails)
    if moment < 1000:
        with pytest.raises(KeyboardInterrupt):
            take(root, *GONE)
        assert any("a takedown was interrupted" in problem for problem in check(CheckConfig(str(root))))
        with pytest.raises(UserError, match="a takedown was interrupted"):
            run_stage("pack", str(root))
        with pytest.raises(UserError, match="a takedown was interrupted"):
            shard_sizes(str(root))  # training asks first
    monkeypatch.undo()
    take(root, *GONE)
    assert dataset_tree(root) == dataset_tree(whole) != before
    assert not (root / ".takedown").exists()


def test_killed_before_anything_is_put_in_place(root, monkeypatch):
    before = dataset_tree(root)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(staging_module, "write_json", fails)
    with pytest.raises(KeyboardInterrupt):
        take(root, *GONE)
    there = {path: digest for path, digest in dataset_tree(root).items() if not path.startswith(".takedown/")}
    assert there == before
    assert check(CheckConfig(str(root))) == []
    monkeypatch.undo()
    take(root, *GONE)
    assert check(CheckConfig(str(root))) == []
