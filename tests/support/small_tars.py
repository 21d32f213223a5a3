"""Small tars as others make them, and the rows that `ingest` makes of them."""

import io
import tarfile

import numpy as np
from PIL import Image
from small_data import tar_bytes

from pipeline.ingest.detect import detect
from pipeline.ingest.rows import Row
from pipeline.ingest.url_lists import list_rows


def image(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(file, form)
    return file.getvalue()


def tar_of(*members: tuple[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> bytes:
    return tar_bytes(list(members), form)


def rows_of(path: object, **options) -> list[Row]:
    return list(list_rows(str(path), detect(str(path)), **options))


def told(path: object, **options) -> list[tuple[str, str | None, str | None]]:
    """(name of the sample, caption, problem) of each row."""
    return [(row.url.rpartition("/")[2], row.caption, row.problem) for row in rows_of(path, **options)]


def pair(number: int) -> list[tuple[str, bytes | str]]:
    return [(f"{number}.jpg", image(number)), (f"{number}.txt", f"c{number}")]
