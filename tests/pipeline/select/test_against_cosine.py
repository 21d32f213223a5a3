"""`select --against-cosine`: copies that a hash misses are found by a teacher's embeddings; their pixels decide."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from small_copies import drawn, jpeg, scene
from small_data import tiny_coca

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.cropped_copies import is_copy, small_copy
from pipeline.core.image_match import fingerprint
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.repair.settings import select_config
from pipeline.select.against import EvaluationIndex
from pipeline.select.against_cosine import NearestImages, recorded_or_given
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from shards_spec.files import UserError
from shards_spec.images import decode_rgb
from shards_spec.layout import select_parquet
from shards_spec.manifest import read_done

pytestmark = pytest.mark.integration
LOW = 0.1  # by a model with random weights every sample is so like an evaluation image


def gradient() -> Image.Image:
    """An image without structure for the hash."""
    ramp = np.linspace(60, 200, 96)
    return Image.fromarray(
        np.stack([np.broadcast_to(own, (96, 96)) for own in (ramp, ramp, 255 - ramp)], -1).astype("u1")
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A dataset with copies and other images, cached as float16 and int8; evaluation images; the model, and another."""
    base = tmp_path_factory.mktemp("cosine")
    for folder in ("images", "eval"):
        (base / folder).mkdir()
    for number in range(3):
        (base / "eval" / f"{number}.jpg").write_bytes(drawn(scene(f"eval {number}")))
    (base / "eval" / "ramp.jpg").write_bytes(jpeg(gradient()))
    shown = Image.open(io.BytesIO(drawn(scene("eval 1"))))
    samples = {
        "copy": jpeg(shown.resize((70, 70)), 60),
        "mirrored": jpeg(ImageOps.mirror(shown), 80),
        "ramp": jpeg(gradient().resize((120, 120)), 70),
        "other ramp": jpeg(ImageOps.flip(gradient().rotate(90))),
        **{f"other {number}": drawn(scene(f"other {number}")) for number in range(4)},
    }
    for name, data in samples.items():
        (base / "images" / f"{name}.jpg").write_bytes(data)
        (base / "images" / f"{name}.txt").write_text(name)
    root = str(base / "ds")
    ingest(IngestConfig(root, str(base / "images"), shard_size=50, workers=1))
    pack(PackConfig(root, captioner=("none",), workers=1))
    model = tiny_coca(base / "coca")
    tiny_coca(base / "other" / "coca", seed=1)
    cache(CacheConfig(root, model, name="half", views=2))
    cache(CacheConfig(root, model, name="bytes", views=2, dtype="int8"))
    return base


@pytest.fixture
def root(base, tmp_path) -> str:
    return shutil.copytree(base / "ds", tmp_path / "ds").as_posix()


def pairs_of(base: Path, root: str, **options) -> dict[str, str]:
    """Caption of each sample that goes to the name of the evaluation image that it shows."""
    options = {"against_model": f"local-dir:{base}/coca", "teacher": ("half",), "overwrite": True} | options
    select(SelectConfig(root, against=(str(base / "eval"),), workers=1, **options))
    rows = pq.read_table(select_parquet(root, "selected", 0)).to_pylist()
    captions = pq.read_table(f"{root}/shards/00000.parquet").column("caption").to_pylist()
    assert {row["reason"] for row in rows if row["pair"]} <= {"near-duplicate of eval"}
    return {caption: Path(row["pair"]).stem for caption, row in zip(captions, rows, strict=True) if row["pair"]}


def test_an_image_without_a_hash_is_found(base, root):
    by_hash = pairs_of(base, root, against_model=None)
    assert by_hash == {"copy": "1", "mirrored": "1"}
    assert pairs_of(base, root, against_cosine=LOW) == {**by_hash, "ramp": "ramp"}
    assert check(CheckConfig(root)) == []
    record = read_done(f"{root}/select/selected", 0).config
    assert (record["against_cosine"], record["teacher"]) == (LOW, ["half"])
    with pytest.raises(UserError, match=r"against, against_cosine.* have to be given again"):
        select_config(root, "selected", record)


@pytest.mark.parametrize("teacher", ["half", "bytes"])
def test_copies_are_found_without_any_hash(base, root, monkeypatch, teacher):
    compared = []
    confirm = EvaluationIndex.confirm
    monkeypatch.setattr(EvaluationIndex, "candidates", lambda *_: {})
    monkeypatch.setattr(EvaluationIndex, "confirm", lambda *args: compared.append(args[1]) or confirm(*args))
    found = pairs_of(base, root, against_cosine=LOW, teacher=(teacher,))
    assert len(compared) == 8, "every sample was like an evaluation image"
    assert sum(map(len, compared)) > 8
    assert found == {"copy": "1", "mirrored": "1", "ramp": "ramp"}, "what only looks alike stays"
    assert pairs_of(base, root, against_cosine=0.99999, teacher=(teacher,)) == {}


def test_skies_of_other_colours_are_no_copies():
    """A cosine makes candidates of images without details, in which gain and offset would fit everything."""
    fades = [np.linspace(low, high, 96) for low, high in ((90, 130), (140, 160), (200, 215))]
    sky = np.broadcast_to(np.stack(fades, -1)[:, None], (96, 96, 3))
    copy = small_copy(Image.fromarray(sky.astype("u1")))
    for shift, is_one in ((0, True), (2, True), (9, False), (-15, False)):
        other = Image.fromarray((sky + shift).astype("u1"))
        assert is_copy(copy, fingerprint(decode_rgb(jpeg(other, 60)))) == is_one, shift


@pytest.mark.slow
def test_no_pair_of_other_scenes_is_confirmed():
    from bench import against

    wrong, number = against.wrong_scene_pairs(40, 100)
    assert wrong == 0
    assert number > 5000


def test_the_model_has_to_be_the_recorded_one(base, root):
    with pytest.raises(UserError, match="differs in weights_sha256; name that one with --against-model"):
        pairs_of(base, root, against_cosine=LOW, against_model=f"local-dir:{base}/other/coca")
    with pytest.raises(UserError, match=r"teacher/half is not at hand .* name it with --against-model"):
        pairs_of(base, root, against_cosine=LOW, against_model=None)
    with pytest.raises(UserError, match="one teacher, there are: bytes, half; say --teacher"):
        pairs_of(base, root, against_cosine=LOW, teacher=())


def test_a_model_or_its_weights_can_be_given(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    record = {"model": "ViT-S-32-alt", "pretrained": "tag", "library": "open_clip"}
    assert recorded_or_given(record, None) == ("ViT-S-32-alt", "tag")
    assert recorded_or_given(record, str(weights)) == ("ViT-S-32-alt", str(weights))
    assert recorded_or_given(record, "hf-hub:a/b") == ("hf-hub:a/b", None)
    assert recorded_or_given(record, "local-dir:/a") == ("local-dir:/a", None)
    assert recorded_or_given(record, "ViT-S/32-alt") == ("ViT-S/32-alt", "tag")


def test_the_nearest_images_stay_over_blocks():
    rng = np.random.default_rng(0)
    cosines = rng.random((5, 40), np.float32)
    for least in (0.0, 0.95, 1.5):
        nearest = NearestImages(5, 3, least)
        for first in range(0, 40, 7):
            nearest.add(cosines[:, first : first + 7], first)
        expected = [[image for image in np.argsort(-own)[:3].tolist() if own[image] >= least] for own in cosines]
        assert dict(nearest.found()) == {row: images for row, images in enumerate(expected) if images}


def test_options_that_belong_together(tmp_path):
    with pytest.raises(UserError, match="--against-cosine goes with --against SET"):
        SelectConfig(str(tmp_path), against_cosine=0.8)
    with pytest.raises(UserError, match="--against-model goes with --against-cosine"):
        SelectConfig(str(tmp_path), against=("a",), against_model="m")
    with pytest.raises(UserError, match=r"against-cosine.*above 0 and below 1"):
        SelectConfig(str(tmp_path), against=("a",), against_cosine=1.0)
