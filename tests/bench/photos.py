"""Images that cost what photographs cost: 1/f spectra, coloured regions with edges, JPEG quality 80 to 92.

Natural images have amplitude spectra near 1/f (Field 1987), which is what a JPEG decoder's time and file sizes depend
on; the mean here is about 1.5 bits per pixel. The same seed gives the same bytes.
"""

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TILE = 2048


@lru_cache(maxsize=1)
def _tile() -> Image.Image:
    """Colour noise with a 1/f amplitude spectrum, a little correlated between channels."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None])
    frequency[0, 0] = 1
    grey, *colours = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) / frequency**1.3) for _ in range(4))
    planes = [grey / grey.std() + 0.35 * colour / colour.std() for colour in colours]
    return Image.fromarray(np.stack([np.clip(plane * 42 + 120, 0, 255) for plane in planes], -1).astype(np.uint8))


def photo(seed: int, shortest: int = 300, longest: int = 1300) -> bytes:
    """A JPEG whose two sides lie between ``shortest`` and ``longest`` pixels."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(shortest, longest + 1, 2))
    left, top = (int(rng.integers(0, TILE - side)) for side in (width, height))
    image = _tile().crop((left, top, left + width, top + height))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):  # things with edges; the noise shows through half of them
        x, y, w, h = (int(value) for value in rng.integers(0, (width, height, width // 2, height // 2)))
        pen.ellipse((x, y, x + w, y + h), tuple(int(value) for value in rng.integers(0, 256, 3)))
    texture = _tile().crop((top, left, top + width, left + height))
    image = Image.blend(image, texture, 0.3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(80, 93)))
    return file.getvalue()


def small_photo(seed: int) -> bytes:
    """A photo as `ingest` leaves it: shorter side 256."""
    image = Image.open(io.BytesIO(photo(seed)))
    scale = 256 / min(image.size)
    file = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return file.getvalue()


def small_photos(number: int) -> list[bytes]:
    """`small_photo` of the first seeds, by all cores."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(small_photo, range(number), chunksize=max(1, number // 64)))


def _write(seed: int, folder: Path) -> int:
    data = photo(seed)
    return (folder / f"{seed:05d}.jpg").write_bytes(data)


def write_photos(folder: Path, number: int) -> int:
    """``number`` photos as ``00000.jpg`` …, kept from an earlier call; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in range(number) if not (folder / f"{seed:05d}.jpg").exists()]
    if missing:
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(_write, folder=folder), missing, chunksize=50))
    return sum((folder / f"{seed:05d}.jpg").stat().st_size for seed in range(number))
