"""What a target of the fuzzer is: valid inputs of a kind, made wrong or made up, and the readers that take them.

A target makes an input, (path, bytes), from a random generator, and runs what a user's command would run over it. Only
UserError and DataError may come of it.
"""

import csv
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.mutate import mutated
from small_data import draw

Input = tuple[str, bytes]
MAX_BYTES = 1 << 24


class Target:
    """Valid files of a kind, below ``valid``; ``run`` takes a changed one in an empty folder."""

    def __init__(self, valid: Path) -> None:
        self.files = [(path, data) for path, data in self.make(valid) if data]

    def make(self, valid: Path) -> list[Input]:
        raise NotImplementedError

    def made_up(self, rng: random.Random) -> Input | None:
        """An input from nothing, where there is a way to make one."""

    def input(self, rng: random.Random) -> Input:
        if rng.random() < 0.4 and (made := self.made_up(rng)):
            return made if rng.random() < 0.7 else (made[0], mutated(rng, made[1], made[1]))
        path, data = rng.choice(self.files)
        alike = [other for name, other in self.files if Path(name).suffix == Path(path).suffix]
        return path, mutated(rng, data, rng.choice(alike))

    def run(self, folder: Path, path: str, data: bytes) -> None:
        raise NotImplementedError


def placed(folder: Path, path: str, data: bytes) -> str:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return str(target)


def read_source(source: str) -> None:
    """All rows of a list, a tar or a folder and the bytes of the images that it brings: what ``ingest`` does first."""
    from pipeline.ingest.detect import detect
    from pipeline.ingest.estimate import estimate_rows
    from pipeline.ingest.image_bytes import ImageReadError, clear_read_cache, read_image_bytes
    from pipeline.ingest.url_lists import list_rows

    form = detect(source)
    estimate_rows(source, form)
    try:
        for row in list_rows(source, form):
            if row.image_ref is not None:
                try:
                    read_image_bytes(row.image_ref, MAX_BYTES)
                except ImageReadError:
                    continue
    finally:
        clear_read_cache()


def read_captions(path: str) -> None:
    """All captions of a list, cleaned: what ``caption --from`` does with a file that is none of ours."""
    from pipeline.caption.caption_lists import cleaned, list_files, listed_rows, pick_columns
    from pipeline.caption.config import ListOptions

    files = list_files((path,))
    columns = pick_columns(files, ListOptions((path,)), ["key", "url", "uid"])
    for row in listed_rows(path, columns):
        for text in row.captions()[0]:
            cleaned(text).encode()


def read_takedown_list(path: str) -> None:
    """What ``takedown --list`` reads."""
    from pipeline.takedown.request import read_request

    read_request(path, "auto")


def tar_of(
    members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, pax: dict[str, str] | None = None
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers=pax) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(number: int, seed: str = "") -> list[tuple[str, bytes]]:
    members = []
    for index in range(number):
        image, caption = draw(f"{seed}{index}")
        meta = {"key": f"{index:09d}", "caption": caption, "url": f"http://h/{index}", "width": 48, "similarity": 0.3}
        members += [
            (f"{index:09d}.jpg", image),
            (f"{index:09d}.txt", caption.encode()),
            (f"{index:09d}.json", json.dumps(meta).encode()),
        ]
    return members


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def quoted(rows: list[list[Any]], delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file.getvalue()
