"""The packed shards are read with no code of ours: webdataset 1.x and 0.2.86, open_clip's own data code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import skip_or_fail
from PIL import Image
from small_data import build_all, tiny_coca, write_raw

from shards_spec.files import join, read_json

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
