"""`check --repair`: every damage is named, and repaired or refused; what is whole is not touched."""

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest
from small_damage import damage, is_named, states
from small_data import build_all, draw
from small_ingest import config, write_list
from web_server import serve

from pipeline.cache.export_lists import export_lists
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.stage import ingest
from pipeline.repair.stage import repair
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.manifest import read_dataset

pytestmark = pytest.mark.integration

ROWS = 14
FAILED, COPY = 5, 9  # rows whose link is dead, and whose image is that of row 2


class Dataset:
    """A small dataset of every stage, whose images a server has; ``copy`` gives one to damage."""

    def __init__(self, folder: Path, url: str, model: str, shard_size: int | None) -> None:
        self.folder, self.model = folder, model
        rows = [(f"{url}/scene/{number}", draw(str(number))[1]) for number in range(ROWS)]
        rows[FAILED] = (f"{url}/status/404", "gone")
        rows[COPY] = (f"{url}/scene/2", "the same again")
        self.root = folder / "whole"
        ingest(config(self.root, write_list(folder / "list.tsv", rows), shard_size=5))
        dedup(DedupConfig(str(self.root), workers=1))
        build_all(str(self.root), model, views=2, shard_size=shard_size)
        export_lists(str(self.root), "tea", overwrite=False)
        assert check(CheckConfig(str(self.root))) == []

    def copy(self) -> Path:
        """A copy with the same times."""
        shutil.rmtree(self.folder / "ds", ignore_errors=True)
        return shutil.copytree(self.root, self.folder / "ds")

    def repair(self, root: Path, **options) -> tuple[list[str], list[str]]:
        """The lines of a repair, and the problems that are left."""
        lines = list[str]()
        left = repair(CheckConfig(str(root), repair=True, **{"models": (self.model,), **options}), lines.append)
        return lines, left


@pytest.fixture(scope="module")
def server():
    with serve() as own:
        yield own


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, server, model) -> Dataset:
    return Dataset(tmp_path_factory.mktemp("uneven"), server.url, model, None)


@pytest.fixture(scope="module")
def equal(tmp_path_factory, server, model) -> Dataset:
    return Dataset(tmp_path_factory.mktemp("equal"), server.url, model, 4)


def assert_repaired(dataset: Dataset, seed: int, count: int) -> None:
    """Damage a copy ``count`` times and repair it; all is as before but what cannot be known any more."""
    root, rng = dataset.copy(), random.Random(seed)
    before = states(root)
    damages = [damage(root, rng) for _ in range(count)]
    touched = {name for _, names in damages for name in names}
    problems = check(CheckConfig(str(root)))
    for name in touched:
        assert is_named(problems, name), (damages, problems)
    damaged = states(root)
    said, left = dataset.repair(root, dry_run=True)
    assert said, damages
    assert states(root) == damaged, "a dry run wrote something"
    assert left == problems
    lines, left = dataset.repair(root)
    assert left == [], (damages, lines)
    assert set(said) <= set(lines), damages
    after = states(root)
    assert after.keys() == before.keys(), (damages, lines)
    assert [name for name in before.keys() - touched if after[name] != before[name]] == [], (damages, lines)
    different = {name for name in touched & before.keys() if after[name][0] != before[name][0]}
    # the times of a download are in its record alone, the source and versions in dataset.json
    lossy = {name for name in touched if name.startswith("raw/") and name.endswith("_stats.json")} | {"dataset.json"}
    assert different <= lossy | ({name for name in touched if name.startswith("raw/")} if len(damages) > 1 else set())


def test_a_dozen_random_damages_are_named_and_repaired(uneven):
    for seed in range(12):
        assert_repaired(uneven, seed, 1)


@pytest.mark.slow
def test_200_random_damages_are_named_and_repaired(uneven, equal):
    for seed in range(200):
        assert_repaired((uneven, equal)[seed % 2], seed, 1)


@pytest.mark.slow
def test_several_damages_at_once_are_repaired(uneven, equal):
    for seed in range(1000, 1040):
        assert_repaired((uneven, equal)[seed % 2], seed, 2 + seed % 3)


def spoil_image(root: Path, key: str) -> None:
    """Overwrite the image of a sample in its raw tar, and delete the final shard that has a copy."""
    tar = root / "raw" / f"{key[:5]}.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(f"{key}.jpg".encode()) + 512
    data[start + 100 : start + 400] = bytes(300)
    tar.write_bytes(data)
    (root / "shards" / f"{key[:5]}.tar").unlink()


def test_a_lost_image_is_fetched_again_and_no_other(uneven, server):
    root = uneven.copy()
    before = states(root)
    spoil_image(root, "000000001")
    server.requests.clear()
    lines, left = uneven.repair(root, models=())
    assert left == []
    assert dict(server.requests) == {"scene/1": 1}
    assert states(root) == before | {name: states(root)[name] for name in ("raw/00000.tar", "shards/00000.tar")}
    assert {name: own for name, (own, _) in states(root).items()} == {name: own for name, (own, _) in before.items()}
    assert (
        "raw/00000.tar is not the file that was written; 4 of 5 rows restored from what can be read, 1 is fetched again"
        in lines
    )


@contextlib.contextmanager
def gone(server, *paths: str):
    """The server answers 404 for some paths."""
    server.gone.update(paths)
    yield
    server.gone.clear()


def test_what_is_lost_for_good_is_cut_out_of_all_that_was_made_of_it(uneven, server):
    root = uneven.copy()
    before = states(root)
    spoil_image(root, "000000001")
    with gone(server, "scene/1"):
        lines, left = uneven.repair(root, models=())  # rows only vanish, so no model is needed
    assert left == []
    assert "raw/00000: 1 HTTP 404; the damaged files are in .repair/moved/raw/00000.tar" in lines
    assert (root / ".repair/moved/raw/00000.tar").exists()
    after = states(root)
    others = {name for name in before if "00000" not in name}
    assert {name for name in others if after[name][0] != before[name][0]} == {
        *(f"dedup/{shard}_stats.json" for shard in ("00001", "00002")),  # each list depends on all shards
        "dataset.json",
        "shards/sizes.json",
    }
    life = why(WhyConfig(str(root), "000000001"))
    assert "  left out: failed_to_download, HTTP 404" in life.lines
    assert read_dataset(str(root))["stages"]["ingest"]["counts"] == {"HTTP 404": 2, "success": ROWS - 2}


class KilledError(BaseException):
    """In place of a signal."""


def die_at(monkeypatch, step: int) -> list[int]:
    """Let the process end before its ``step``-th change of a file; the list counts the changes."""
    changes = list[int]()

    def counting(change):
        def changed(*args, **options):
            changes.append(1)
            if len(changes) == step:
                raise KilledError
            return change(*args, **options)

        return changed

    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    for name in ("rename", "unlink"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))
    return changes


def hashes(root: Path) -> dict[str, str]:
    return {name: own for name, (own, _) in states(root).items()}


def damaged_copy(dataset: Dataset) -> Path:
    """A copy that lost an image for good, a record, a list of duplicates, and has two files in each other's place."""
    root = dataset.copy()
    spoil_image(root, "000000001")
    (root / "raw/00002_stats.json").write_bytes((root / "raw/00002_stats.json").read_bytes()[:-20])
    (root / "dedup/00001.parquet").write_bytes(b"")
    one, other = root / "teacher/tea/00001.parquet", root / "captions/cap/00001.parquet"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return root


def assert_a_kill_changes_nothing(dataset: Dataset, server, steps: range) -> None:
    with gone(server, "scene/1"):
        root = damaged_copy(dataset)
        with pytest.MonkeyPatch.context() as patch:
            changes = die_at(patch, 0)
            assert dataset.repair(root)[1] == []
        expected = hashes(root)
        assert len(changes) > max(steps)
        for step in steps:
            root = damaged_copy(dataset)
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, step)
                with pytest.raises(KilledError):
                    dataset.repair(root)
            assert dataset.repair(root)[1] == [], step
            assert hashes(root) == expected, step


def test_a_killed_repair_ends_as_if_it_had_not_been_killed(uneven, server):
    assert_a_kill_changes_nothing(uneven, server, range(4, 24, 9))


@pytest.mark.slow
def test_a_repair_may_be_killed_at_any_change_of_a_file(uneven, server):
    assert_a_kill_changes_nothing(uneven, server, range(1, 60))
