"""A small dataset with all that `select` can look at."""

import json
import shutil

import pytest
from small_data import build_all, draw, tiny_coca

from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> str:
    """Two shards of a list with columns of its own, captioned, packed and cached."""
    base = tmp_path_factory.mktemp("select")
    (base / "images").mkdir()
    rows = []
    for index in range(8):
        data, caption = draw(f"select/{index}")
        (base / "images" / f"{index}.jpg").write_bytes(data)
        safe = ["UNLIKELY", "UNSURE"][index % 2]
        row = {"path": f"images/{index}.jpg", "caption": caption, "similarity": index / 10, "NSFW": safe}
        rows.append(json.dumps(row))
    (base / "list.jsonl").write_text("\n".join(rows) + "\n")
    root = str(base / "ds")
    model = tiny_coca(base / "coca")
    ingest(IngestConfig(root, str(base / "list.jsonl"), shard_size=4, workers=1, save_additional_columns=("*",)))
    build_all(root, model, views=2)
    return root


@pytest.fixture
def root(built, tmp_path) -> str:
    return shutil.copytree(built, tmp_path / "ds").as_posix()
