"""`check --repair`: every damage is named, and repaired or refused; what is whole is not touched."""

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
