#!/usr/bin/env python3
"""Make a small web of images that people made: a list of links with captions, and held-out images.

    python demo/real/world.py OUT --base-url http://127.0.0.1:8000 --backgrounds FOLDER FILE

The drawings of `drawings.py` are listed as they are, with the titles, descriptions and keywords that people gave them,
and those with a title of their own are also laid on photographs and textures (JPEGs of 144 x 144 px), alone or in
twos. A tenth of the stamps' captions are in another language. OUT receives:

    images/NAME-0.jpg …           the composed images
    list.parquet                  url, caption and more of each image, as img2dataset reads it, in an order of hashes
    heldout/, heldout.csv         images of held-out drawings, each with its title
    labelled/train/CLASS/…, test  drawings by the kind of thing that their folder names; those in test are held out
    summary.json                  how many there are of each

OUT and the server's folders hold all that the list links to: /images is OUT/images, /openclipart and /stamps are the
packages' folders. An image depends on the drawing's name, so OUT can be made again in parts; every file appears whole.
"""

import argparse
import csv
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from drawings import Drawing, openclipart, stamps
from PIL import Image, ImageChops, ImageStat

SIDE = 144  # px, width and height of a composed image
COMPOSED = 3  # images made of a drawing for the list
COPIES = 2  # images made of a drawing for the labelled set, beside the drawing itself
COLLECTION = 20  # drawings of one title; more of them bear a collection's name, which says nothing of each
MOST_PIXELS = 20_000_000  # of a drawing that is composed
MOST_LABELLED = {"train": 60, "test": 30}  # drawings of a class
PAIRS = 0.3  # share of composed images with a second drawing
SEEN = 40  # grey levels by which a cut-out differs from what it lies on, in the mean
TRIES = 8
FOREIGN = 0.15  # share of the stamps' composed images whose caption is in another language
PACKAGES = {"openclipart": "CC0-1.0", "stamps": "GPL-2.0-or-later"}


# --- images -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _background(path: Path) -> Image.Image:
    """Return a background, its longer side 1024 px at most."""
    with Image.open(path) as image:
        image.draft("RGB", (1024, 1024))
        rgb = image.convert("RGB")
    rgb.thumbnail((1024, 1024))
    return rgb


def cut_out(drawing: Drawing) -> Image.Image | None:
    """Return the drawing as RGBA, cropped to what is not transparent; None where it is too large, empty or broken."""
    try:
        with Image.open(drawing.file) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            image.thumbnail((4 * SIDE, 4 * SIDE))
            rgba = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    box = rgba.getchannel("A").getbbox()
    return rgba.crop(box) if box else None


def _paste(scene: Image.Image, cut: Image.Image, side: int, centre: tuple[float, float]) -> bool:
    """Lay a cut-out on the scene, its longer side ``side`` px, around ``centre``; return whether it shows there."""
    scale = side / max(cut.size)
    width, height = (max(1, round(length * scale)) for length in cut.size)
    left = min(max(0, round(centre[0] * SIDE - width / 2)), SIDE - width)
    top = min(max(0, round(centre[1] * SIDE - height / 2)), SIDE - height)
    small = cut.resize((width, height), Image.Resampling.LANCZOS)
    before = scene.crop((left, top, left + width, top + height))
    scene.paste(small, (left, top), small)
    change = ImageChops.difference(before, small.convert("RGB")).convert("L")
    return ImageStat.Stat(change, small.getchannel("A")).mean[0] >= SEEN


def compose(cuts: list[Image.Image], backgrounds: list[Path], rng: Random) -> Image.Image:
    """Return one or two cut-outs, from left to right, on a part of a background: RGB, SIDE x SIDE px.

    Other backgrounds are tried where one hides a cut-out, as a black one does with a black drawing.
    """
    for _ in range(TRIES):
        background = _background(rng.choice(backgrounds))
        side = round(min(background.size) * rng.uniform(0.3, 1))
        left, top = rng.randint(0, background.width - side), rng.randint(0, background.height - side)
        scene = background.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        are_seen = []
        for number, cut in enumerate(cuts, start=1):
            longest = rng.uniform(0.55, 0.95) if len(cuts) == 1 else rng.uniform(0.4, 0.5)
            centre = (number / (len(cuts) + 1) + rng.uniform(-0.06, 0.06), rng.uniform(0.35, 0.65))
            are_seen.append(_paste(scene, cut, round(longest * SIDE), centre))
        if all(are_seen):
            break
    return scene


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file beside ``path``, which takes its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    write(beside)
    beside.rename(path)


def _write_jpeg(path: Path, image: Image.Image) -> None:
    write_whole(path, lambda beside: image.save(beside, "JPEG", quality=90))


def _stem(drawing: Drawing) -> str:
    """Return the name of a drawing's files."""
    return drawing.name.replace("/", "-").removesuffix(".png")


# --- captions ---------------------------------------------------------------------------------------------------


def caption_of(drawing: Drawing, rng: Random) -> str:
    """Return a text about a drawing as its page would have it: the title, the description, or title and keywords."""
    if drawing.description and rng.random() < 0.3:
        return drawing.description
    others = [word for word in drawing.keywords if word.lower() not in drawing.title.lower()]
    if others and rng.random() < 0.6:
        return ", ".join(filter(None, [drawing.title, *others[:5]]))
    return drawing.title


def _joined(first: str, second: str) -> str:
    """Return two captions as one."""
    return f"{first.rstrip('.')} and {second.rstrip('.')}"


def _foreign(drawing: Drawing, rng: Random) -> tuple[str, str]:
    """Return the title in another language, and which."""
    language = rng.choice(sorted(drawing.translations))
    return drawing.translations[language], language


# --- the list ---------------------------------------------------------------------------------------------------


def draw_for_list(item: tuple[Drawing, list[Drawing]], out: Path, backgrounds: list[Path]) -> list[dict[str, str]]:
    """Write the composed images of a drawing; return their rows, without the server's address.

    ``item`` is the drawing, and for each composed image a drawing that may stand beside it.
    """
    drawing, partners = item
    rows = []
    cut: Image.Image | None = None
    for index, partner in enumerate(partners):
        rng = Random(f"{drawing.name}/{index}")
        in_twos, foreign = rng.random() < PAIRS, rng.random() < FOREIGN
        name = f"{_stem(drawing)}-{index}.jpg"
        caption, language = caption_of(drawing, rng), ""
        if in_twos:
            caption = _joined(drawing.title, partner.title)
        elif foreign and drawing.translations:
            caption, language = _foreign(drawing, rng)
        if not (out / "images" / name).exists():
            cut = cut or cut_out(drawing)
            beside = cut_out(partner) if in_twos else None
            if cut is None or (in_twos and beside is None):
                continue
            _write_jpeg(out / "images" / name, compose([cut, beside] if beside else [cut], backgrounds, rng))
        row = _row(drawing, caption) | {"url": f"images/{name}", "translated_to": language}
        rows.append(row | {"second": partner.name if in_twos else ""})
    return rows


def _row(drawing: Drawing, caption: str) -> dict[str, str]:
    """Return the row of a drawing as it is."""
    licence = PACKAGES[drawing.name.partition("/")[0]]
    return {
        "url": drawing.name,
        "caption": caption,
        "folder": drawing.folder,
        "drawing": drawing.name,
        "second": "",
        "translated_to": "",
        "license": licence,
    }


def own_titles(drawings: list[Drawing]) -> set[str]:
    """Return the titles that are not a collection's."""
    count = Counter(drawing.title for drawing in drawings)
    return {title for title, times in count.items() if title and times <= COLLECTION}


def write_list(out: Path, drawings: list[Drawing], titles: set[str], base_url: str, backgrounds: list[Path]) -> int:
    """Write list.parquet, and the composed images of drawings with one of ``titles``; return the number of rows."""
    usable = [drawing for drawing in drawings if drawing.title in titles]
    items = []
    for drawing in usable:
        rng = Random(f"{drawing.name}/partners")
        items.append((drawing, [rng.choice(usable) for _ in range(COMPOSED)]))
    rows = [_row(drawing, caption_of(drawing, Random(drawing.name))) for drawing in drawings]
    for made in _in_parallel(partial(draw_for_list, out=out, backgrounds=backgrounds), items):
        rows += made
    rows = [row | {"url": f"{base_url}/{row['url']}"} for row in rows]
    rows.sort(key=lambda row: sha256(row["drawing"].encode() + row["url"].rpartition("/")[2].encode()).digest())
    write_whole(out / "list.parquet", lambda beside: pq.write_table(pa.Table.from_pylist(rows), beside))
    return len(rows)


def _in_parallel(function: Callable, items: list) -> Iterator:
    with ProcessPoolExecutor() as pool:
        yield from pool.map(function, items, chunksize=16)


# --- what is held out -------------------------------------------------------------------------------------------


def _copy(drawing: Drawing, path: Path) -> None:
    if not path.exists():
        write_whole(path, lambda beside: beside.write_bytes(drawing.file.read_bytes()))


def write_held_out(out: Path, drawings: list[Drawing], titles: set[str]) -> int:
    """Write the held-out drawings with one of ``titles`` that no other of them has; return how many there are."""
    held_out = [drawing for drawing in drawings if drawing.is_held_out and drawing.title in titles]
    count = Counter(drawing.title.lower() for drawing in held_out)
    chosen = [drawing for drawing in held_out if count[drawing.title.lower()] == 1]
    rows = [("image", "caption")]
    for drawing in chosen:
        name = f"{_stem(drawing)}.png"
        _copy(drawing, out / "heldout" / name)
        rows.append((name, drawing.title))

    def write(beside: Path) -> None:
        with open(beside, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    write_whole(out / "heldout.csv", write)
    return len(chosen)


def draw_labelled(item: tuple[Path, Drawing], backgrounds: list[Path]) -> int:
    """Write a drawing and its composed images into the folder of its class; return how many images there are."""
    folder, drawing = item
    stem = _stem(drawing)
    names = [f"{stem}-{index}.jpg" for index in range(COPIES)]
    _copy(drawing, folder / f"{stem}.png")
    if all((folder / name).exists() for name in names):
        return 1 + COPIES
    cut = cut_out(drawing)
    if cut is None:
        return 1
    for index, name in enumerate(names):
        _write_jpeg(folder / name, compose([cut], backgrounds, Random(f"{drawing.name}/labelled/{index}")))
    return 1 + COPIES


def write_labelled(out: Path, drawings: list[Drawing], fewest: int, backgrounds: list[Path]) -> dict[str, int]:
    """Write folders of classes with ``fewest`` held-out drawings; return how many, and the images in each split."""
    by_class: dict[str, dict[str, list[Drawing]]] = {split: defaultdict(list) for split in MOST_LABELLED}
    for drawing in sorted(drawings, key=lambda drawing: sha256(drawing.name.encode()).digest()):
        if drawing.label:
            by_class["test" if drawing.is_held_out else "train"][drawing.label].append(drawing)
    classes = [name for name in by_class["train"] if len(by_class["test"][name]) >= fewest]
    totals = {"classes": len(classes)}
    for split, most in MOST_LABELLED.items():
        items = []
        for name in classes:
            items += [(out / "labelled" / split / name, drawing) for drawing in by_class[split][name][:most]]
        draw = partial(draw_labelled, backgrounds=backgrounds)
        totals[f"labelled_{split}"] = sum(_in_parallel(draw, items))
    return totals


def main() -> None:
    """Write everything and print the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="where the folders will be served")
    parser.add_argument("--backgrounds", type=Path, nargs="+", required=True, help="photographs, or folders of them")
    parser.add_argument("--drawings", type=int, help="only so many, chosen by a hash of their names")
    parser.add_argument("--fewest", type=int, default=5, help="held-out drawings that make a folder a class")
    args = parser.parse_args()
    backgrounds = [path for path in args.backgrounds if path.is_file()]
    for folder in args.backgrounds:
        backgrounds += sorted(path for path in folder.rglob("*") if _is_background(path))
    drawings = openclipart() + stamps()
    titles = own_titles(drawings)
    if args.drawings is not None:
        drawings.sort(key=lambda drawing: sha256(drawing.name.encode()).digest())
        drawings = drawings[: args.drawings]
    if not drawings or not backgrounds:
        parser.error(
            "there are no drawings or no backgrounds: apt-get install openclipart-png openclipart-svg "
            "tuxpaint-stamps-default mate-backgrounds ukui-wallpapers"
        )
    kept = [drawing for drawing in drawings if not drawing.is_held_out]
    summary = {"drawings": len(drawings), "backgrounds": len(backgrounds)}
    summary["rows"] = write_list(args.out, kept, titles, args.base_url.rstrip("/"), backgrounds)
    summary["held_out"] = write_held_out(args.out, drawings, titles)
    summary |= write_labelled(args.out, drawings, args.fewest, backgrounds)
    text = json.dumps(summary, indent=2)
    (args.out / "summary.json").write_text(text + "\n")
    print(text)


def _is_background(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".png") and not path.is_symlink() and path.stat().st_size < 6_000_000


if __name__ == "__main__":
    main()
