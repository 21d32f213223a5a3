#!/usr/bin/env python3
"""`select --against`: planted copies found, unrelated images dropped, milliseconds a sample against decoding alone.

    python tests/bench/against.py [--demo 1000] [--photos 300] [--unrelated 5000] [--large 100000] [--pairs]

Copies: cropped by up to 10 % of each side, scaled by 0.5 to 2, half of them mirrored, JPEG quality 40 to 95, all at
once; of the demo's scenes (96 pixels), of made photographs, and of the icons of Debian's theme Adwaita (48 and 96
pixels), where they are installed. Unrelated: the demo's scenes, and for every evaluated scene five that differ from it
in one thing; a scene that shows what an evaluated one or its mirror image shows is left out, as glyphs are nearly
symmetric. Icons against icons, those in colours of 48 pixels: pairs of two faces, and pairs whose drawings
differ, laid over each other at 64 pixels, by more than `DIFFERENT` levels in a block of 8.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from bench.photos import photo  # noqa: E402
from small_copies import alike, copied, drawn, jpeg, mirrored, scene, shown  # noqa: E402

from pipeline.core.cropped_copies import COPY_SIDE, NEAR_BITS, crop_hashes, is_copy, small_copy  # noqa: E402
from pipeline.core.hash_index import HashIndex  # noqa: E402
from pipeline.core.image_match import fingerprint  # noqa: E402
from pipeline.core.near_duplicates import parse_hashes  # noqa: E402
from pipeline.core.perceptual_hash import perceptual_hash  # noqa: E402
from pipeline.select.against import MOST_COMPARED, EvaluationIndex, index_of  # noqa: E402
from pipeline.select.against_cosine import near_images  # noqa: E402
from pipeline.select.cells import Embeddings  # noqa: E402
from shards_spec.images import decode_rgb  # noqa: E402

ICONS = Path("/usr/share/icons/Adwaita")
DIFFERENT = 48
WIDTH = 512  # of embeddings


def shown_images(evaluated: list[bytes], samples: Iterable[bytes]) -> list[str | None]:
    """Of each sample the evaluated image that it shows, by its number, as `select --against` finds it."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "eval")
        folder.mkdir()
        for number, data in enumerate(evaluated):
            (folder / f"{number:06d}.jpg").write_bytes(data)
        with index_of((str(folder),), base, threads=1) as against:
            index = EvaluationIndex(against.folder)
            images = list(map(decode_rgb, samples))
            candidates = index.candidates(parse_hashes(list(map(perceptual_hash, images))))
            found = {row: index.confirm(near, fingerprint(images[row])) for row, near in candidates.items()}
    return [found[row].pair.rpartition("/")[2][:6] if found.get(row) else None for row in range(len(images))]


def share_found(evaluated: list[bytes], seed: str = "copies") -> float:
    """Of one copy of each image: the share that is found and paired with its image or one that looks the same."""
    rng = random.Random(seed)
    found = shown_images(evaluated, [copied(data, rng) for data in evaluated])
    return sum(pair is not None for pair in found) / len(found)


def share_confirmed(evaluated: list[bytes], seed: str = "copies") -> float:
    """Of the same copies: the share whose pixels are taken for their image's, so that a cosine can find them."""
    rng = random.Random(seed)
    confirmed = [
        is_copy(small_copy(decode_rgb(data)), fingerprint(decode_rgb(copied(data, rng)))) for data in evaluated
    ]
    return sum(confirmed) / len(confirmed)


def demo_scenes(number: int) -> list:
    """Evaluated scenes, no two of which show the same."""
    scenes = {shown(one): one for one in (scene(f"evaluated {i}") for i in range(number))}
    return list(scenes.values())


def false_drops(number: int, unrelated: int) -> tuple[int, int]:
    """Unrelated scenes that are dropped, and how many there were."""
    evaluated = demo_scenes(number)
    others = other_scenes(evaluated, unrelated)
    found = shown_images(list(map(drawn, evaluated)), others)
    return sum(pair is not None for pair in found), len(others)


def other_scenes(evaluated: list, unrelated: int) -> list[bytes]:
    """Unrelated scenes, and those that differ from an evaluated one in one thing."""
    rng = random.Random("alike")
    seen = {shown(one) for one in evaluated} | {mirrored(one) for one in evaluated}
    others = [scene(f"unrelated {i}") for i in range(unrelated)]
    for one in evaluated:
        others += alike(one, rng)
    return [drawn(one) for one in others if shown(one) not in seen]


def confirmed_pairs(evaluated: list[bytes], samples: list[bytes]) -> list[tuple[int, int]]:
    """Pairs of an evaluated image and a sample that their pixels take for a copy, of all that there are."""
    copies = [small_copy(decode_rgb(data)) for data in evaluated]
    prints = [fingerprint(decode_rgb(data)) for data in samples]
    places = itertools.product(range(len(copies)), range(len(prints)))
    return [(one, other) for one, other in places if is_copy(copies[one], prints[other])]


def wrong_scene_pairs(number: int, unrelated: int) -> tuple[int, int]:
    """Pairs of other scenes that their pixels take for one, and how many pairs there are."""
    evaluated = demo_scenes(number)
    others = other_scenes(evaluated, unrelated)
    return len(confirmed_pairs(list(map(drawn, evaluated)), others)), len(evaluated) * len(others)


def every_wrong_icon_pair() -> tuple[int, int]:
    """As `wrong_icon_pairs`, of all pairs of two icons, and how many pairs there are."""
    images = icons("48x48", coloured=True)
    names = list(images)
    encoded = list(images.values())
    pairs = [(names[one], names[other]) for one, other in confirmed_pairs(encoded, encoded) if one != other]
    return sum(_is_wrong(images, *pair) for pair in pairs), len(names) * (len(names) - 1)


def icons(sizes: str = "48x48 96x96", coloured: bool = False) -> dict[str, bytes]:
    """Icons on white by their names; ``coloured``: without those of one colour."""
    paths = {path.resolve() for path in ICONS.rglob("*.png") if path.relative_to(ICONS).parts[0] in sizes.split()}
    images = {}
    for path in sorted(paths):
        if not (coloured and "symbolic" in path.name):
            icon = Image.open(path).convert("RGBA")
            ground = Image.new("RGBA", icon.size, "white")
            ground.alpha_composite(icon)
            images["/".join(path.parts[-3:])] = jpeg(ground.convert("RGB"))
    return images


def wrong_icon_pairs() -> tuple[list[tuple[str, str]], int]:
    """Coloured icons that are dropped for one with another drawing, half of all against the others and back.

    The faces differ in the mouth alone, so a pair of them is always wrong.
    """
    images = icons("48x48", coloured=True)
    halves = [list(images)[0::2], list(images)[1::2]]
    wrong = []
    for names, others in (halves, halves[::-1]):
        pairs = shown_images([images[name] for name in names], [images[name] for name in others])
        for other, pair in zip(others, pairs, strict=True):
            if pair is not None:
                name = names[int(pair)]
                if _is_wrong(images, name, other):
                    wrong.append((name, other))
    return wrong, len(images)


def _is_wrong(images: dict[str, bytes], name: str, other: str) -> bool:
    return ("/face-" in name and "/face-" in other) or _differ(images[name], images[other])


def _differ(one: bytes, other: bytes) -> bool:
    """Whether two drawings differ, without the white around them, as they are and mirrored."""
    first, second = (_drawing(decode_rgb(data)) for data in (one, other))
    apart = [
        np.abs(first - turned).reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4)).max() for turned in (second, second[:, ::-1])
    ]
    return min(apart) > DIFFERENT


def _drawing(image: Image.Image) -> np.ndarray:
    inked = ImageChops.difference(image, Image.new("RGB", image.size, "white")).point(lambda level: 255 * (level > 40))
    return np.asarray(image.crop(inked.getbbox()).resize((64, 64)), np.float32)


def milliseconds(work: Callable[[bytes], object], images: list[bytes]) -> float:
    """CPU time of a call, the least of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for data in images:
            work(data)
        rounds.append((time.process_time() - start) / len(images) * 1e3)
    return min(rounds)


def _hash_and_print(data: bytes) -> None:
    image = decode_rgb(data)
    perceptual_hash(image)
    fingerprint(image)


def speed(large: int, samples: int = 200) -> None:
    """Prints what a sample costs beside its decoding, with an index of so many evaluation images."""
    images = [photo(seed, 256, 400) for seed in range(samples)]
    decoding = milliseconds(decode_rgb, images)
    hashing = milliseconds(_hash_and_print, images) - decoding
    indexing = milliseconds(lambda data: crop_hashes(small_copy(decode_rgb(data))), images)
    each = len(crop_hashes(small_copy(decode_rgb(images[0]))))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        HashIndex.build(Path(folder), rng.integers(1, 1 << 63, each * large, np.uint64))
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) + large * (COPY_SIDE**2 * 3 + 4 * each)
        index = HashIndex(Path(folder))
        queries = rng.integers(1, 1 << 63, 2000, np.uint64)
        start = time.process_time()
        index.near(queries, NEAR_BITS)
        looking = (time.process_time() - start) / len(queries) * 1e3
    by_cosine = cosine_milliseconds(large)
    print(f"decoding a sample           {decoding:8.2f} ms")
    print(
        f"hash and fingerprint        {hashing:8.2f} ms: {hashing / decoding:.2f} times decoding, where raw/ has none"
    )
    print(f"looking one up in {large:7,}   {looking:8.2f} ms: {looking / decoding:.2f} times decoding")
    print(f"the same by a cosine        {by_cosine:8.2f} ms, of {WIDTH} numbers")
    print(f"an evaluation image         {indexing:8.2f} ms; {large:,} take {size / 1e9:.2f} GB of files")


def cosine_milliseconds(large: int, samples: int = 4096) -> float:
    """CPU time of looking a sample up by its embedding among so many evaluation images."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Embeddings(str(Path(folder, "embeddings")))
        for start in range(0, 2 * large, 10_000):
            embeddings.append(_unit(rng, min(10_000, 2 * large - start)))
        queries = _unit(rng, samples)
        start = time.process_time()
        near_images(embeddings, queries, 0.8, MOST_COMPARED)
        return (time.process_time() - start) / samples * 1e3


def _unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=int, default=1000)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--unrelated", type=int, default=5000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument(
        "--pairs", action="store_true", help="compare every pair, as a low --against-cosine does: 2 min"
    )
    args = parser.parse_args()
    print(f"copies found, scenes        {100 * share_found(list(map(drawn, demo_scenes(args.demo)))):8.1f} %")
    photos = [photo(seed, 256, 500) for seed in range(args.photos)]
    print(f"copies found, photographs   {100 * share_found(photos):8.1f} %")
    wrong, number = false_drops(args.demo, args.unrelated)
    print(f"unrelated scenes dropped    {wrong:8} of {number:,}")
    if args.pairs:
        print("wrong of all pairs, scenes  {:8} of {:,}".format(*wrong_scene_pairs(100, 500)))
        if ICONS.is_dir():
            print("wrong of all pairs, icons   {:8} of {:,}".format(*every_wrong_icon_pair()))
    if ICONS.is_dir():
        some = random.Random(0).sample(list(icons().values()), 500)
        print(f"copies found, icons         {100 * share_found(some):8.1f} %")
        print(f"confirmed by their pixels   {100 * share_confirmed(some):8.1f} %: what a cosine can find")
        pairs, number = wrong_icon_pairs()
        print(f"icons dropped for another   {len(pairs):8} of {number:,} {pairs or ''}")
    speed(args.large)


if __name__ == "__main__":
    main()
