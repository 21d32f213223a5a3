"""What we write is read with no code of ours, without a network: webdataset, open_clip, datasets, DuckDB, pandas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from conftest import skip_or_fail
from PIL import Image
from small_data import build_all, tiny_coca, write_raw

from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import join, read_json
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard

pytestmark = pytest.mark.integration

SHARDS, SAMPLES = 3, 15
OLD_WEBDATASET = Path(sys.prefix) / "webdataset-0.2.86"  # open_clip's pin, installed beside by `make test`

OPEN_CLIP = """
import sys
from types import SimpleNamespace
import open_clip, webdataset
from open_clip_train.data import get_data
urls, split = sys.argv[1:]
args = SimpleNamespace(
    train_data=urls if split == "train" else None, val_data=urls, dataset_type="webdataset", train_num_samples=None,
    val_num_samples=15, train_data_upsampling_factors=None, dataset_resampled=False, seed=0, batch_size=5, workers=0,
    world_size=1, imagenet_val=None, imagenet_v2=None,
)
transform = open_clip.image_transform(32, is_train=False)
loader = get_data(args, (transform, transform), tokenizer=open_clip.get_tokenizer("ViT-B-32"))[split].dataloader
print(webdataset.__version__, loader.num_samples, [(*images.shape, *tokens.shape) for images, tokens in loader])
"""
WEBDATASET = """
import sys
import webdataset as wds
urls, _ = sys.argv[1:]
read = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json"))
print(wds.__version__, len(read), all(text == meta["caption"] for _, _, text, meta in read), read[0][0])
"""
DATASETS = """
import json, sys
import datasets
urls, types = sys.argv[1:]
features = eval(types, vars(datasets)) if types else None
for streaming in (False, True):
    read = datasets.load_dataset(
        "webdataset", data_files={"train": urls}, split="train", streaming=streaming, features=features
    )
    rows = list(read)
    assert all(row["jpg"].convert("RGB").size == (row["json"]["width"], row["json"]["height"]) for row in rows)
    print(json.dumps([[row["__key__"], row["txt"], row["json"]] for row in rows]))
"""
TYPES = """Features({
    "jpg": Image(), "txt": Value("string"), "__key__": Value("string"), "__url__": Value("string"),
    "json": {
        **{name: Value("string") for name in ("url", "caption", "key", "status", "syn_0", "syn_1")},
        "width": Value("int32"), "height": Value("int32"), "synsets": List(List(Value("string"))),
    },
})"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, SHARDS)
    build_all(root, tiny_coca(tmp_path_factory.mktemp("models") / "coca"), 1)
    return root


def run(code: str, root: str, split: str, old: bool) -> str:
    if old and not OLD_WEBDATASET.is_dir():
        skip_or_fail(f"{OLD_WEBDATASET} is not there; `make test` installs it")
    environment = {**os.environ, **({"PYTHONPATH": str(OLD_WEBDATASET)} if old else {})}
    urls = f"{root}/shards/{{00000..0000{SHARDS - 1}}}.tar"
    done = subprocess.run([sys.executable, "-c", code, urls, split], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_webdataset_reads_them(built):
    import webdataset as wds

    urls = [join(built, f"shards/0000{i}.tar") for i in range(SHARDS)]
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json"))
    assert len(read) == sum(read_json(join(built, "shards/sizes.json")).values()) == SAMPLES
    key, image, text, meta = read[0]
    assert (key, text) == (meta["key"], meta["caption"])
    assert isinstance(image, Image.Image)


def test_webdataset_0_2_86_reads_them(built):
    assert run(WEBDATASET, built, "", old=True).split() == ["0.2.86", "15", "True", "000000000"]


def test_open_clips_loader_reads_them_with_current_webdataset(built):
    """Its evaluation path; its training path does not run with webdataset above 0.2.86 on any data."""
    out = run(OPEN_CLIP, built, "val", old=False)
    assert out.split(maxsplit=2)[2].strip() == str([(5, 3, 32, 32, 5, 77)] * 3)


def test_open_clips_training_loader_reads_them_with_its_pinned_webdataset(built):
    out = run(OPEN_CLIP, built, "train", old=True)
    assert out.split(maxsplit=2) == ["0.2.86", "15", str([(5, 3, 32, 32, 5, 77)] * 3) + "\n"]


def load_dataset(root: str, home: Path, types: str = "") -> list[list[list]]:
    """Rows (key, txt, json) as `datasets` gives them, loaded and streamed, with an empty cache and no network."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    urls = f"{root}/shards/*.tar"
    done = subprocess.run(
        [sys.executable, "-c", DATASETS, urls, types], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(root: str) -> list[list]:
    samples = [s for shard in range(SHARDS) for s in read_shard(join(root, f"shards/0000{shard}.tar"))]
    return [[sample.key, sample.caption, sample.meta] for sample in samples]


def test_hugging_faces_datasets_loads_them(built, tmp_path):
    loaded, streamed = load_dataset(built, tmp_path)
    assert loaded == streamed == expected(built)


def test_hugging_faces_datasets_takes_types_where_the_first_samples_do_not_show_them(tmp_path):
    """It takes the first five samples for the types of all: an empty list is null for ever (its issue 7549)."""
    root = str(tmp_path / "ds")
    write_raw(root, SHARDS, per_shard=12)
    samples = list(read_shard(join(root, "raw/00000.tar")))
    plain = [Sample(s.key, {**s.members, "txt": b"zzz"}) for s in samples[:7]]
    write_shard(join(root, "raw/00000.tar"), [*plain, *samples[7:]])
    pack(PackConfig(root, workers=1))
    wanted = [[key, text, {"syn_0": None, "syn_1": None, **meta}] for key, text, meta in expected(root)]
    assert [meta["synsets"] for _, _, meta in wanted[:7]] == [[[]]] * 7
    loaded, streamed = load_dataset(root, tmp_path / "home", TYPES)
    assert loaded == streamed == wanted


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_shard_without_samples_is_read_over(tmp_path, lost):
    """Where the first one has none, `datasets` cannot guess the types from it and wants them."""
    root = str(tmp_path / "ds")
    write_raw(root, SHARDS, lost=lost)
    pack(PackConfig(root, ("none",), workers=1))
    rows = expected(root)
    assert [len(list(read_shard(join(root, f"shards/0000{i}.tar")))) for i in range(SHARDS)].index(0) == lost
    for old in (True, False):
        assert run(WEBDATASET, root, "", old).split()[1:] == ["10", "True", rows[0][0]]
    batches = str([(5, 3, 32, 32, 5, 77)] * 2)
    assert run(OPEN_CLIP, root, "train", old=True).split(maxsplit=2)[2].strip() == batches
    assert run(OPEN_CLIP, root, "val", old=False).split(maxsplit=2)[2].strip() == batches
    types = TYPES.replace(', "syn_0", "syn_1"', "") if lost == 0 else ""
    loaded, streamed = load_dataset(root, tmp_path, types)
    assert loaded == streamed == rows
    assert duckdb.sql(f"SELECT key FROM '{root}/shards/*.parquet' ORDER BY key").fetchall() == [(r[0],) for r in rows]
    frames = pd.concat([pd.read_parquet(f"{root}/shards/0000{i}.parquet") for i in range(SHARDS)])
    assert frames["key"].tolist() == [key for key, _, _ in rows]


def test_duckdb_joins_the_side_files(built):
    query = f"""
        SELECT s.key, r.url, s.caption, c.captions = s.synthetic AS same, octet_length(t.image_0::BLOB) AS bytes
        FROM '{built}/shards/*.parquet' s JOIN '{built}/raw/*.parquet' r USING (key)
        JOIN '{built}/captions/cap/*.parquet' c USING (key) JOIN '{built}/teacher/tea/*.parquet' t USING (key)
        ORDER BY s.key
    """
    found = duckdb.sql(query).fetchall()
    wanted = [(key, meta["url"], text, True, 2 * 32) for key, text, meta in expected(built)]
    assert found == wanted
    lost = f"SELECT status, count(*) FROM '{built}/raw/*.parquet' GROUP BY status ORDER BY status"
    assert duckdb.sql(lost).fetchall() == [("failed_to_download", 3), ("success", SAMPLES)]


def test_duckdb_counts_synsets_as_the_vocabulary_does(built):
    query = f"""
        SELECT wnid, count(*) FROM (
            SELECT unnest(flatten(synsets)) AS wnid FROM '{built}/shards/*.parquet'
        ) GROUP BY wnid HAVING count(*) > 2
    """
    tsv = f"SELECT wnid, count FROM read_csv('{built}/vocab/all.tsv', delim = '\t', comment = '#', header = true)"
    assert sorted(duckdb.sql(query).fetchall()) == sorted(duckdb.sql(tsv).fetchall())


def test_pandas_reads_the_side_files(built):
    wanted = expected(built)
    shards, raw, captions, teacher = (
        pd.concat([pd.read_parquet(f"{built}/{folder}/0000{i}.parquet") for i in range(SHARDS)])
        for folder in ("shards", "raw", "captions/cap", "teacher/tea")
    )
    assert shards["key"].tolist() == teacher["key"].tolist() == [key for key, _, _ in wanted]
    assert [[list(one) for one in row] for row in shards["synsets"]] == [meta["synsets"] for _, _, meta in wanted]
    assert raw["status"].value_counts().to_dict() == {"success": SAMPLES, "failed_to_download": 3}
    joined = shards.merge(captions, on="key")
    assert all(list(a) == list(b) for a, b in zip(joined["synthetic"], joined["captions"], strict=True))
    vectors = np.stack([np.frombuffer(row, "<f2") for row in teacher["image_0"]]).astype(np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
