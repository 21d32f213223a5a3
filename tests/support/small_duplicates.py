"""Drawn images, random rows, and the rule for duplicates pair by pair, for tests of what compares images."""

import io
import random

from PIL import Image, ImageDraw

from shards_spec.files import sha256_bytes


def make_image(seed: object, size: tuple[int, int] = (340, 256)) -> Image.Image:
    """A drawn image of several shapes."""
    rng, (width, height) = random.Random(str(seed)), size
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randrange(5, 12)):
        x, y, w, h = (rng.randrange(5, side) for side in (width, height, width // 2, height // 2))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x - w // 2, y - h // 2, x + w // 2 + 9, y + h // 2 + 9), tuple(rng.randrange(256) for _ in range(3)))
    return image


def jpeg(image: Image.Image, quality: int = 90, scale: float = 1) -> bytes:
    file = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def bits(one: str | None, other: str | None) -> int:
    return 64 if one is None or other is None else (int(one, 16) ^ int(other, 16)).bit_count()


def expected_drops(urls, sha256s, hashes, near_bits) -> dict[int, bool]:
    """By the rule itself, pair by pair: row to whether an equal file stands earlier."""
    rows = [i for i in range(len(urls)) if sha256s[i] is not None or hashes[i] is not None]
    first = {}
    for i in rows:
        first.setdefault(urls[i] if urls[i] is not None else i, i)
    canonical = {i: first[urls[i] if urls[i] is not None else i] for i in rows}
    drops = {}
    for i in rows:
        for j in rows:
            if canonical[j] < canonical[i]:
                exact = sha256s[i] is not None and sha256s[i] == sha256s[j]
                near = near_bits is not None and None not in (hashes[i], hashes[j])
                if exact or (near and bits(hashes[i], hashes[j]) <= near_bits):
                    drops[i] = drops.get(i, False) or exact
    return drops


def random_rows(seed: int, count: int) -> tuple[list, list, list]:
    """Rows with repeated URLs, repeated files, clusters of near signatures, failed rows and plain images."""
    rng = random.Random(seed)
    centres = [rng.getrandbits(64) | 1 for _ in range(max(1, count // 4))]
    urls: list = []
    sha256s: list = []
    hashes: list = []
    for _ in range(count):
        urls.append(rng.choice([None, *(f"http://h/{rng.randrange(count)}" for _ in range(9))]))
        centre = rng.choice(centres)
        for _ in range(rng.choice([0, 0, 1, 2, 3, 4, 7, 20])):
            centre ^= 1 << rng.randrange(64)
        failed = rng.random() < 0.1
        sha256s.append(None if failed else sha256_bytes(str(rng.randrange(count)).encode()))
        hashes.append(None if failed or rng.random() < 0.1 else f"{centre:016x}")
    return urls, sha256s, hashes
