#!/usr/bin/env python3
"""Make a small world of captioned images, with the faults of a list scraped from the web.

    python demo/scenes.py OUT --count 3000 --seed 0 --base-url http://127.0.0.1:8000 --eval-count 400

A scene is a 96 x 96 px JPEG: one to three things (the glyphs of `demo/images`) on one of 8 backgrounds. Things
stand on a grid of 3 x 3 cells in two sizes: that makes the world small enough to be learnt in a minute on two cores.
What is in it is known, so captions can be checked. OUT receives:

    images/000000.jpg ...   the scenes, and a few files no reader can use
    list.tsv                `caption<TAB>url` a line, as Conceptual Captions does; scenes and bad rows mixed
    truth.jsonl             one line per scene: file, caption, kind of caption, background, things
    summary.json            how many rows of each kind the list holds
    eval/zeroshot           held-out one-thing scenes, every class equally often (CLIP_benchmark's WebDataset layout);
                            with --train-count also others to train a classifier on
    eval/retrieval          held-out scenes of two or three things, two captions each (the same layout)

Scene i depends on the seed and on i only, never on the count.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random

from PIL import Image

IMAGES = Path(__file__).resolve().parent / "images"
SIDE = 96  # px, width and height of a scene
GRID = 3  # things stand on a grid of GRID x GRID cells, which are the patches of the demo's ViTs
CELL = SIDE // GRID  # px
CELLS = {"small": 1, "large": 2}  # longest side of a thing, in cells
JPEG_QUALITY = 90
SHORT_SHARE = 0.50  # captions that leave out the background
JUNK_SHARE = 0.03  # captions that say nothing about the scene
MISSING_SHARE = 0.01  # extra rows whose URL does not exist
# extra rows whose file is no image
HTML_FILES = 3
TRUNCATED_FILES = 2
EMPTY_FILES = 2

THINGS = tuple(sorted(path.stem for path in IMAGES.glob("*.png")))

STYLES = ("{}", "{}", "a photo of {}", "a picture of {}")
JUNK = (
    "IMG_{n:04d}",
    "DSC{n:05d}.JPG",
    "click to enlarge",
    "image may contain",
    "stock photo {n}",
    "untitled",
    "logo",
    "photo by the author",
    "share this on social media",
    "add to cart",
)
TEMPLATES = ("{c}", "a {c}", "a photo of a {c}", "a picture of a {c}", "an image of a {c}")


@dataclass(frozen=True)
class Thing:
    """One thing in a scene. `size` is "small" or "large", `box` is (left, top, right, bottom) in px."""

    name: str
    size: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a scene shows, things from left to right and from top to bottom."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Background:
    """One colour, and the words that say where the things are."""

    colour: tuple[int, int, int]
    where: str


BACKGROUNDS = {
    "white": Background((250, 250, 250), "on a white background"),
    "grey": Background((150, 150, 150), "on a grey background"),
    "pink": Background((250, 190, 210), "on a pink background"),
    "grass": Background((110, 180, 80), "on grass"),
    "sand": Background((230, 205, 140), "on a beach"),
    "sea": Background((70, 140, 200), "in the water"),
    "night": Background((20, 20, 55), "at night"),
    "wood": Background((165, 115, 70), "on a table"),
}


# --- scenes -----------------------------------------------------------------------------------------------------


@cache
def _glyph(name: str) -> Image.Image:
    """Return the image of `name`, RGBA."""
    with Image.open(IMAGES / f"{name}.png") as image:
        return image.convert("RGBA")


def _put(name: str, size: str, column: int, row: int) -> Thing:
    """Return the thing, centred in the square of cells whose left top cell is given."""
    side = CELLS[size] * CELL
    width, height = _glyph(name).size
    scale = side / max(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = column * CELL + (side - width) // 2, row * CELL + (side - height) // 2
    return Thing(name, size, (left, top, left + width, top + height))


def _apart(cells: list[tuple[int, int, int]]) -> bool:
    """Return whether squares (column, row, side) do not overlap."""
    return not any(_overlap(one, other) for one, other in combinations(cells, 2))


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Return whether two squares (column, row, side) overlap, along both axes."""
    return all(one[axis] < other[axis] + other[2] and other[axis] < one[axis] + one[2] for axis in (0, 1))


def make_scene(rng: Random, names: list[str] | None = None) -> Scene:
    """Return a scene of the things `names`, or of one to three drawn at random."""
    if names is None:
        names = rng.sample(THINGS, rng.choices((1, 2, 3), (45, 45, 10))[0])
    background = rng.choice(tuple(BACKGROUNDS))
    while True:
        sizes = ["small" if len(names) == 3 else rng.choice(tuple(CELLS)) for _ in names]
        corners = [(rng.randint(0, GRID - CELLS[s]), rng.randint(0, GRID - CELLS[s]), CELLS[s]) for s in sizes]
        if _apart(corners):
            placed = sorted(zip(corners, names, sizes, strict=True))
            return Scene(background, tuple(_put(name, size, c, r) for (c, r, _), name, size in placed))


def draw_scene(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image of SIDE x SIDE px."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background].colour)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        glyph = _glyph(thing.name).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        image.paste(glyph, (left, top), glyph)
    return image


def to_jpeg(image: Image.Image) -> bytes:
    """Return the image as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


# --- captions ---------------------------------------------------------------------------------------------------


def _subject(scene: Scene, rng: Random) -> str:
    """Return words for all things of the scene from left to right, with or without their size."""
    phrases = [f"{thing.size} {thing.name}" if rng.random() < 0.3 else thing.name for thing in scene.things]
    phrases = [("an " if phrase[0] in "aeiou" else "a ") + phrase for phrase in phrases]
    if len(phrases) == 3:
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return rng.choice((" and ", " next to ")).join(phrases)


def short_caption(scene: Scene, rng: Random) -> str:
    """Return a true caption that names every thing of the scene, but not its background."""
    return rng.choice(STYLES).format(_subject(scene, rng))


def full_caption(scene: Scene, rng: Random) -> str:
    """Return a true caption that names every thing of the scene and its background."""
    return f"{short_caption(scene, rng)} {BACKGROUNDS[scene.background].where}"


def web_caption(scene: Scene, rng: Random) -> tuple[str, str]:
    """Return a caption as the web has them, and its kind: "full", "short" or "junk"."""
    kind = rng.random()
    if kind < JUNK_SHARE:
        return rng.choice(JUNK).format(n=rng.randrange(10000)), "junk"
    if kind < JUNK_SHARE + SHORT_SHARE:
        return short_caption(scene, rng), "short"
    return full_caption(scene, rng), "full"


# --- the list ---------------------------------------------------------------------------------------------------


def _bad_files(images: Path, count: int, seed: int) -> dict[int, list[tuple[str, str]]]:
    """Write the files that no reader can use; return (caption, file name) of their rows by the scene they follow."""
    rng = Random(f"{seed}/bad files")
    page = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body><p>Not found.</p></body></html>\n"
    contents = {f"page-{i}.jpg": page for i in range(HTML_FILES)}
    for i in range(TRUNCATED_FILES):
        jpeg = to_jpeg(draw_scene(make_scene(rng)))
        contents[f"truncated-{i}.jpg"] = jpeg[: len(jpeg) // 2]
    contents |= {f"empty-{i}.jpg": b"" for i in range(EMPTY_FILES)}
    rows: dict[int, list[tuple[str, str]]] = {}
    for name, data in contents.items():
        (images / name).write_bytes(data)
        rows.setdefault(rng.randrange(max(1, count)), []).append((full_caption(make_scene(rng), rng), name))
    return rows


def write_list(out: Path, count: int, seed: int, base_url: str) -> dict[str, int]:
    """Write images, list.tsv and truth.jsonl of `count` scenes; return how many rows of each kind there are."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    bad_rows = _bad_files(images, count, seed)
    totals = {"scenes": count, "full": 0, "short": 0, "junk": 0, "missing": 0}
    totals |= {"html": HTML_FILES, "truncated": TRUNCATED_FILES, "empty": EMPTY_FILES}
    with open(out / "list.tsv", "w", encoding="utf-8") as table, open(out / "truth.jsonl", "w") as truth:
        for i in range(count):
            rng = Random(f"{seed}/{i}")
            scene, name = make_scene(rng), f"{i:06d}.jpg"
            (images / name).write_bytes(to_jpeg(draw_scene(scene)))
            caption, kind = web_caption(scene, rng)
            totals[kind] += 1
            record = {"file": name, "caption": caption, "caption_kind": kind, "background": scene.background}
            truth.write(json.dumps(record | {"things": [asdict(thing) for thing in scene.things]}) + "\n")
            rows = [(caption, name), *bad_rows.get(i, [])]
            if rng.random() < MISSING_SHARE:
                totals["missing"] += 1
                rows.append((full_caption(make_scene(rng), rng), f"missing-{i:06d}.jpg"))
            table.writelines(f"{text}\t{base_url}/images/{file}\n" for text, file in rows)
    totals["rows"] = count + totals["missing"] + HTML_FILES + TRUNCATED_FILES + EMPTY_FILES
    return totals


# --- held-out evaluation ----------------------------------------------------------------------------------------


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file whose bytes depend on the members only."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _write_split(root: Path, split: str, members: Iterable[tuple[str, bytes]]) -> None:
    """Write the one shard of a split under `root`."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / split / "nshards.txt").write_text("1")
    _write_tar(root / split / "0.tar", members)


def _one_thing_scenes(count: int, name: str) -> list[tuple[str, bytes]]:
    """Return the members of scenes of one thing, every class `count` // classes times (at least once)."""
    members = []
    for i in range(max(1, count // len(THINGS)) * len(THINGS)):
        label = i % len(THINGS)
        scene = make_scene(Random(f"{name}/{i}"), [THINGS[label]])
        members.append((f"s{i:07d}.jpg", to_jpeg(draw_scene(scene))))
        members.append((f"s{i:07d}.cls", str(label).encode()))
    return members


def write_zeroshot(root: Path, count: int, train_count: int, seed: int) -> int:
    """Write the split `test` of `count` scenes, and `train` if asked for; return how many are in `test`."""
    members = _one_thing_scenes(count, f"{seed}/zeroshot")
    _write_split(root, "test", members)
    if train_count:
        _write_split(root, "train", _one_thing_scenes(train_count, f"{seed}/labelled"))
    (root / "classnames.txt").write_text("\n".join(THINGS))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return len(members) // 2


def _distinct_scenes(count: int, seed: int) -> Iterable[tuple[Scene, Random]]:
    """Yield `count` scenes of two or three things; none shows all the things of another on the same background."""
    seen: dict[str, list[set[str]]] = {key: [] for key in BACKGROUNDS}
    found = tried = 0
    while found < count:
        rng = Random(f"{seed}/retrieval/{tried}")
        tried += 1
        scene = make_scene(rng, rng.sample(THINGS, rng.choices((2, 3), (70, 30))[0]))
        names = {thing.name for thing in scene.things}
        others = seen[scene.background]
        if not any(names <= other or other <= names for other in others):
            others.append(names)
            found += 1
            yield scene, rng


def write_retrieval(root: Path, count: int, seed: int) -> int:
    """Write `count` scenes with two different full captions each, one a line; return how many."""
    members = []
    for i, (scene, rng) in enumerate(_distinct_scenes(count, seed)):
        first = second = full_caption(scene, rng)
        while second == first:
            second = full_caption(scene, rng)
        members.append((f"s{i:07d}.jpg", to_jpeg(draw_scene(scene))))
        members.append((f"s{i:07d}.txt", f"{first}\n{second}".encode()))
    _write_split(root, "test", members)
    (root / "dataset_type.txt").write_text("retrieval")
    return count


def main() -> None:
    """Write everything and print the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=3000, help="scenes in the list (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="where OUT will be served")
    parser.add_argument("--eval-count", type=int, default=400, help="scenes in each held-out set, 0 for none")
    parser.add_argument("--train-count", type=int, default=0, help="labelled scenes in eval/zeroshot/train")
    args = parser.parse_args()
    summary = write_list(args.out, args.count, args.seed, args.base_url.rstrip("/"))
    if args.eval_count > 0:
        summary["zeroshot"] = write_zeroshot(
            args.out / "eval" / "zeroshot", args.eval_count, args.train_count, args.seed
        )
        summary["retrieval"] = write_retrieval(args.out / "eval" / "retrieval", args.eval_count, args.seed)
    text = json.dumps(summary, indent=2)
    (args.out / "summary.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
