"""The second look at near-duplicates: planted copies are found, and what only shares a signature stays."""

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.image_match import fingerprint, fingerprints_match
from pipeline.core.near_duplicates import MAX_COMPARED, NEAR_DUPLICATE, confirm_duplicates
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.report import ReportConfig, report
from shards_spec.files import read_json

pytestmark = pytest.mark.integration

DEMO = Path(__file__).parents[3] / "demo" / "images"
WORDS = "the quick brown fox jumps over a lazy dog while engineers compare images and write tests".split()  # noqa: SIM905


def encoded(image: Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def stored(image: Image.Image, quality: int = 92) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality))).convert("RGB")


def scene(seed: object) -> Image.Image:
    """Many objects before a sky: as busy as a photograph."""
    rng, image = random.Random(f"scene {seed}"), Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    tint = Image.new("RGB", image.size, tuple(rng.randrange(256) for _ in range(3)))
    image = Image.blend(image, tint, 0.5)
    pen = ImageDraw.Draw(image)
    for _ in range(40):
        x = rng.randrange(400)
        y = rng.randrange(300)
        w = rng.randrange(10, 120)
        h = rng.randrange(10, 120)
        shape = rng.choice([pen.ellipse, pen.rectangle])
        shape((x - w // 2, y - h // 2, x + w // 2, y + h // 2), tuple(rng.randrange(256) for _ in range(3)))
    return image


def icon(name: str, ground: str = "white") -> Image.Image:
    glyph = Image.open(DEMO / name).convert("RGBA").resize((220, 220), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (300, 300), ground)
    image.alpha_composite(glyph, (40, 40))
    return image.convert("RGB")


def recoloured(image: Image.Image, turn: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda v: (v + turn) % 256), saturation, value)).convert("RGB")


def product(colour: str, label: str, text: str) -> Image.Image:
    image = Image.new("RGB", (400, 400), "white")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((130, 40, 270, 370), 30, fill=colour)
    pen.rectangle((145, 150, 255, 260), fill=label)
    pen.text((150, 180), text, fill="black", font=ImageFont.load_default(34))
    return image


def page(seed: int, size: int = 22) -> Image.Image:
    rng, image = random.Random(f"page {seed}"), Image.new("RGB", (640, 480), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 640, 40), fill=(50, 60, 90))
    pen.rectangle((0, 40, 120, 480), fill=(235, 235, 240))
    for y in range(60, 460, int(1.7 * size)):
        line = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 7)))
        pen.text((140, y), line, fill=(20, 20, 20), font=ImageFont.load_default(size))
    return image


def disc(ground: str, colour: str) -> Image.Image:
    image = Image.new("RGB", (300, 300), ground)
    ImageDraw.Draw(image).ellipse((90, 90, 210, 210), fill=colour)
    return image


def copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """What the web makes of an image."""
    wide, high = image.size
    for quality in (30, 60, 90):
        yield f"quality {quality}", stored(image, quality)
    for scale in (0.4, 0.7, 1.6):
        yield f"scale {scale}", stored(image.resize((round(scale * wide), round(scale * high)), 1))
    for left, top, right, bottom in (
        (0.01, 0, 0, 0),
        (0.01, 0.02, 0.02, 0.01),
        (0, 0.03, 0, 0),
        (0.02, 0.02, 0.02, 0.02),
    ):
        box = (left * wide, top * high, wide - right * wide, high - bottom * high)
        yield f"crop {box}", stored(image.crop(tuple(map(round, box))))
    for factor in (0.8, 0.9, 1.1):
        yield f"brightness {factor}", stored(ImageEnhance.Brightness(image).enhance(factor))
    yield "contrast", stored(ImageEnhance.Contrast(image).enhance(0.85))
    yield "colour", stored(ImageEnhance.Color(image).enhance(0.8))


ORIGINALS = {
    **{f"scene {seed}": scene(seed) for seed in range(25)},
    **{name: icon(name) for name in ("apple.png", "bus.png", "butterfly.png", "cactus.png")},
    "product": product("darkgreen", "khaki", "TEA"),
    "page": page(0),
    "disc": disc("tan", "navy"),
}


def near(one: Image.Image, other: Image.Image, bits: int = 3) -> bool:
    """By signature alone."""
    hashes = [perceptual_hash(image) for image in (one, other)]
    return None not in hashes and (int(hashes[0], 16) ^ int(hashes[1], 16)).bit_count() <= bits


def test_copies_that_the_signature_finds_are_confirmed():
    found, wanted = list[str](), 0
    for name, image in ORIGINALS.items():
        original = fingerprint(stored(image))
        for what, copy in copies(image):
            if near(stored(image), copy):
                wanted += 1
                assert fingerprints_match(original, original)
                changed = fingerprint(copy)
                if not (fingerprints_match(original, changed) and fingerprints_match(changed, original)):
                    found.append(f"{name}: {what}")
    assert wanted > 300
    assert len(found) <= 0.015 * wanted, found


NEGATIVES = {
    "one glyph in other colours": [recoloured(icon("apple.png"), turn) for turn in range(0, 256, 43)],
    "one glyph on other grounds": [icon("car.png", ground) for ground in ("white", "lightyellow", "lightblue", "pink")],
    "products of other colours": [product(c, "white", "TEA") for c in ("maroon", "navy", "darkgreen", "purple")],
    "products with other labels": [product("#404048", c, "TEA") for c in ("khaki", "salmon", "skyblue", "palegreen")],
    "pages with other words": [page(seed) for seed in range(12)],
    "pages in large type": [page(seed, 40) for seed in range(12)],
    "discs of other colours": [disc("white", c) for c in ("red", "green", "blue", "orange", "purple")],
    "discs on other grounds": [disc(c, "black") for c in ("tan", "skyblue", "palegreen", "pink")],
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_what_only_shares_a_signature_is_not_confirmed(kind):
    images = [stored(image) for image in NEGATIVES[kind]]
    prints = [fingerprint(image) for image in images]
    pairs = itertools.combinations(range(len(images)), 2)
    wrong = [(one, other) for one, other in pairs if fingerprints_match(prints[one], prints[other])]
    assert wrong == []


def test_the_negatives_do_share_signatures():
    """Else the test above would say nothing."""
    shared = [
        sum(near(*pair, bits=8) for pair in itertools.combinations(map(stored, images), 2))
        for images in NEGATIVES.values()
    ]
    assert sum(number > 0 for number in shared) >= 5
    assert sum(shared) > 25


def test_rows_go_for_the_first_that_stays_and_is_the_same():
    kinds = {0: "a", 1: "b", 2: "a", 3: "b", 4: "c", 5: "b", 6: "c"}
    places = {row: row for row in kinds}

    def same(one: int, other: int) -> bool:
        return kinds[one] == kinds[other]

    assert confirm_duplicates([(row, 0) for row in (5, 4, 3, 2, 1, 6)], places, same) == {2: 0, 3: 1, 5: 1, 6: 4}
    assert confirm_duplicates([(1, 0), (3, 0)], {0: 0, 1: 1, 3: 1}, same) == {}, "of one link: captions of one image"
    assert confirm_duplicates([], {}, same) == {}
    asked = list[int]()
    many = confirm_duplicates(
        [(row, 0) for row in range(1, 500)], {row: row for row in range(500)}, lambda *_: bool(asked.append(1))
    )
    assert many == {}
    assert len(asked) < 500 * MAX_COMPARED


@pytest.fixture
def folder(tmp_path) -> tuple[Path, dict[str, str]]:
    """Images and where each copy came from; what shares a signature stands among them."""
    images, truth = tmp_path / "images", {}
    images.mkdir()
    for number, (_, image) in enumerate(list(ORIGINALS.items())[:10]):
        (images / f"a{number:02}.jpg").write_bytes(encoded(image))
        (images / f"b{number:02}.jpg").write_bytes(encoded(image.resize((image.width // 2, image.height // 2)), 70))
        truth[f"b{number:02}"] = f"a{number:02}"
    for number, image in enumerate(itertools.chain.from_iterable(NEGATIVES.values())):
        (images / f"c{number:02}.jpg").write_bytes(encoded(image))
    for path in images.glob("*.jpg"):
        path.with_suffix(".txt").write_text(path.stem)
    return images, truth


def rows_of(folder: Path) -> list[dict]:
    """The rows of all Parquet files of a folder."""
    return pa.concat_tables([pq.read_table(path) for path in folder.glob("*.parquet")]).to_pylist()


@pytest.mark.parametrize("memory", [0.6, 1e-6])
def test_dedup_over_all_shards(folder, tmp_path, memory):
    images, truth = folder
    root = str(tmp_path / "ds")
    ingest(IngestConfig(root, str(images), shard_size=9, workers=1))
    dedup(DedupConfig(root, workers=1, memory_gb=memory))
    names = {row["key"]: row["caption"] for row in rows_of(Path(root, "raw"))}
    lists = rows_of(Path(root, "dedup"))
    assert {names[row["key"]]: names[row["kept"]] for row in lists} == truth
    assert {row["reason"] for row in lists} == {NEAR_DUPLICATE}
    assert check(CheckConfig(root)) == []
    page = Path(report(ReportConfig(root, samples=40))).read_text()
    shown = page[page.index("<h2>Near-duplicates") : page.index("<h2>Contact sheet")]
    assert shown.count("<img ") == 2 * len(truth)
    assert all(f"{row['kept']} stays" in shown and f"{row['key']} goes" in shown for row in lists)


def test_ingest_within_a_shard(folder, tmp_path):
    images, truth = folder
    root = str(tmp_path / "ds")
    ingest(IngestConfig(root, str(images), dedup="near", workers=1))
    assert read_json(f"{root}/dataset.json")["stages"]["ingest"]["counts"][NEAR_DUPLICATE] == len(truth)
    rows = pq.read_table(f"{root}/raw/00000.parquet").to_pylist()
    assert {row["caption"] for row in rows if row["status"] != "success"} == set(truth)


def test_an_image_that_does_not_decode_stays(tmp_path):
    """It may be any other."""
    images, root = tmp_path / "images", str(tmp_path / "ds")
    images.mkdir()
    for name in "ab":
        (images / f"{name}.jpg").write_bytes(encoded(scene(1), 90 - (name == "b")))
        (images / f"{name}.txt").write_text(name)
    ingest(IngestConfig(root, str(images), workers=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.dedup.verification._fingerprints", lambda *_: iter(()))
        assert dedup(DedupConfig(root, workers=1)).counts == {"success": 2}
    assert dedup(DedupConfig(root, workers=1, overwrite=True)).counts == {"success": 1, NEAR_DUPLICATE: 1}
