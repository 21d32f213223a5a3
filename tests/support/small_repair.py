"""A small dataset of every stage, to damage and repair."""

import shutil
from pathlib import Path

from small_data import build_all, draw
from small_ingest import config, write_list

from pipeline.cache.export_lists import export_lists
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.stage import ingest
from pipeline.repair.stage import repair
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select

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
        select(SelectConfig(str(self.root), "some", where=("cosine > -1 and width > 50",), workers=1))
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
