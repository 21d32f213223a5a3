"""Targets for `ingest`: tars, lists, Parquet files, folders of images, images."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from fuzz.mutate import NUMBERS, TEXTS
from fuzz.target import (
    Input,
    Target,
    parquet_of,
    placed,
    quoted,
    read_captions,
    read_source,
    read_takedown_list,
    samples,
    tar_of,
)
from PIL import Image
from small_data import draw

from shards_spec.files import UserError


class Tar(Target):
    """Tars of others as a source, and as shards of ours."""

    def make(self, valid: Path) -> list[Input]:
        plain, long = samples(3), [(f"{'a' * 120}/{name}", data) for name, data in samples(2)]
        return [
            ("x.tar", tar_of(plain)),
            ("x.tar", tar_of(long, tarfile.PAX_FORMAT, {"comment": "ü" * 90})),
            ("x.tar", tar_of(long, tarfile.GNU_FORMAT)),
            ("x.tar", tar_of(plain) + tar_of(samples(2, "b"))),
        ]

    def made_up(self, rng: random.Random) -> Input:
        """Any names, kinds of members and pax records, with sizes that need not be true."""
        blocks = b""
        for _ in range(rng.randrange(1, 8)):
            name = rng.choice(["0", "1", "a/0", "0.b", "._0", "", "../0", "ü", "x" * 99])
            name += rng.choice([".jpg", ".txt", ".json", ".JPG", ".", ".jpg.txt", "", ".cls"])
            body = rng.choice([b"", b"words", b'{"caption": 1}', rng.choice(TEXTS), draw("0")[0]])
            kind = rng.choice(b"00000\x0012345678xgLKSVN")
            if kind in b"xg":
                key = rng.choice(
                    ["path", "size", "linkpath", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset", "mtime"]
                )
                value = rng.choice(["1", "-1", "x", "9" * 30, "0,5,10", "binary", "", "ü"])
                record = f" {key}={value}\n"
                length = rng.choice([len(record) + 2, 0, 1, len(record) + len(str(len(record))), 10**6])
                body = f"{length}{record}".encode() * rng.choice([1, 1, 3])
            info = tarfile.TarInfo(name)
            info.type, info.size = bytes([kind]), rng.choice([len(body)] * 8 + list(NUMBERS[:12]))
            info.linkname = rng.choice(["0.jpg", "", "../../etc/passwd", name])
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            blocks += bytes(header) + body + b"\0" * (-len(body) % 512)
        return "x.tar", blocks + b"\0" * rng.choice([1024, 512, 0, 10240])

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from shards_spec.files import DataError
        from shards_spec.tar import read_shard, shard_keys

        tar = placed(folder, path, data)
        read_source_error: Exception | None = None
        try:
            read_source(tar)
        except Exception as error:  # the same bytes are a shard too
            read_source_error = error
        try:
            shard_keys(tar)
            for sample in read_shard(tar):
                for part in ("image", "caption", "captions", "meta"):
                    try:
                        getattr(sample, part)
                    except DataError:
                        continue
        except DataError:
            pass
        if read_source_error is not None:
            raise read_source_error


class List(Target):
    """Lists as text: CSV, TSV, JSON Lines, addresses alone; packed or not."""

    def make(self, valid: Path) -> list[Input]:
        rows = [[f"http://h/{n}.jpg?a=1&amp;b", f'a "{n}", cat\nand\ta dog; | é', 0.3, "UNLIKELY"] for n in range(12)]
        header, plain = ["url", "caption", "similarity", "NSFW"], [[row[0], f"a cat {n}"] for n, row in enumerate(rows)]
        lines = "".join(json.dumps({"url": row[0], "caption": row[1], "w": 3}) + "\n" for row in rows)
        texts = [
            ("x.csv", quoted([header, *rows], ",")),
            ("x.csv", quoted([header, *rows], ";")),
            ("x.jsonl", lines),
            ("x.tsv", quoted([header, *rows], "\t")),
            ("x.tsv", "".join(f"{c}\t{u}\n" for u, c in plain)),
            ("x.tsv", "".join(f"{u}\t{c}\r\n" for u, c in plain)),
            ("x.txt", "".join(f"{u}\n" for u, _ in plain)),
            ("x.csv", quoted([["filepath", "title"], ["a.jpg", "x"]], "\t")),
        ]
        found = [(name, text.encode()) for name, text in texts]
        import gzip

        packed = [(f"{name}.gz", gzip.compress(data, mtime=0)) for name, data in found]
        return [*found, *packed, ("x.csv", texts[0][1].encode("utf-16")), ("x.tsv", texts[3][1].encode("latin-1"))]

    def made_up(self, rng: random.Random) -> Input:
        """Cells, quotes and line ends in any order, in any encoding."""
        pieces = [
            "url",
            "caption",
            "http://h/1",
            "a cat",
            '"',
            '""',
            ",",
            "\t",
            ";",
            "|",
            "\n",
            "\n",
            "\r",
            "\r\n",
            " ",
            "\\N",
            "NaN",
            "null",
            "{",
            "}",
            '{"url": "http://h/1", "caption": ',
            "[1]",
            "é",
            "\ufeff",
            "\x00",
            "1e5",
            "http://",
            "https://\u00fc.de/%zz",
            "a.jpg",
            "TEXT",
            "\u2028",
            "\x1b[0m",
            "\ud800",
        ]
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 120)))
        if rng.random() < 0.5:
            delimiter = rng.choice(",\t;|")
            text = delimiter.join(["url", "caption"]) + rng.choice(["\n", "\r\n", "\r"]) + text
        encoding = rng.choice(["utf-8"] * 6 + ["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"])
        return f"x{rng.choice(['.csv', '.tsv', '.jsonl', '.txt', '.json'])}", text.encode(
            encoding, "surrogatepass" if "utf" in encoding else "replace"
        )

    def run(self, folder: Path, path: str, data: bytes) -> None:
        _read_as_any_list(placed(folder, path, data))


class Parquet(Target):
    """Lists and images in Parquet."""

    def make(self, valid: Path) -> list[Input]:
        urls, captions = [f"http://h/{n}" for n in range(20)], [f"a cat {n % 3}" for n in range(20)]
        listed = pa.table({"url": urls, "caption": captions, "similarity": np.linspace(0, 1, 20), "uid": captions})
        image = [{"bytes": draw(str(n))[0], "path": f"{n}.jpg"} for n in range(4)]
        images = pa.table({"image": image, "text": captions[:4]})
        several = pa.table({"url": urls, "caption": [[c, c] for c in captions]})
        tables = [listed, images, several]
        codecs = ("snappy", "zstd", "none")
        inputs = []
        for table in tables:
            inputs += [("x.parquet", parquet_of(table, compression=codec, row_group_size=8)) for codec in codecs]
        return inputs

    def made_up(self, rng: random.Random) -> Input | None:
        """Columns of any Arrow type under the names that are looked for."""
        number = rng.randrange(0, 5)
        kinds: list[Callable[[], pa.Array]] = [
            lambda: pa.array([rng.choice([None, "x", "http://h/1", "ü" * 50]) for _ in range(number)], pa.string()),
            lambda: pa.array([rng.choice([None, b"x", b"\xff"]) for _ in range(number)], pa.binary()),
            lambda: pa.array([rng.choice([None, "x"]) for _ in range(number)], pa.large_string()),
            lambda: pa.array([rng.choice([None, ["x", None], []]) for _ in range(number)], pa.list_(pa.string())),
            lambda: pa.array([rng.randrange(9) for _ in range(number)], pa.int64()),
            lambda: pa.array([rng.choice([None, 1.5, float("nan")]) for _ in range(number)], pa.float32()),
            lambda: pa.array([None] * number, pa.null()),
            lambda: pa.array([rng.choice([None, {"a": 1}]) for _ in range(number)], pa.struct([("a", pa.int8())])),
            lambda: pa.array([rng.choice([None, [{"text": "x"}]]) for _ in range(number)]),
            lambda: pa.array([rng.choice([None, "x", "y"]) for _ in range(number)]).dictionary_encode(),
            lambda: pa.array(
                [rng.choice([None, {"bytes": b"x", "path": "p"}]) for _ in range(number)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            lambda: pa.array([rng.choice([None, True]) for _ in range(number)], pa.bool_()),
            lambda: pa.array([rng.choice([None, 0, 10**15]) for _ in range(number)], pa.timestamp("us", "UTC")),
            lambda: pa.array([rng.choice([None, [("k", 1)]]) for _ in range(number)], pa.map_(pa.string(), pa.int8())),
        ]
        named = ["url", "caption", "text", "TEXT", "image", "jpg", "URL", "title", "similarity", "ü", ""]
        chosen = [rng.choice(named) for _ in range(rng.randrange(1, 5))]
        table = pa.Table.from_arrays([rng.choice(kinds)() for _ in chosen], names=chosen)
        try:
            return "x.parquet", parquet_of(table, use_dictionary=rng.random() < 0.5)
        except pa.ArrowException:  # what Arrow itself does not write, nobody reads
            return None

    def run(self, folder: Path, path: str, data: bytes) -> None:
        _read_as_any_list(placed(folder, path, data))


def _read_as_any_list(path: str) -> None:
    """As a source of `ingest`, as captions for `caption --from`, as what `takedown` is to take down."""
    refused: UserError | None = None
    for read in (read_source, read_captions, read_takedown_list):
        try:
            read(path)
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


class Folder(Target):
    """A folder of images with sidecars and metadata."""

    def make(self, valid: Path) -> list[Input]:
        rows = [["file_name", "text", "similarity"], ["0.jpg", "a cat", 0.3], ["1.jpg", "a dog", 0.4]]
        coco = {
            "images": [{"id": 1, "file_name": "0.jpg"}, {"id": 2, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "one cat"}],
        }
        lines = "".join(json.dumps({"file_name": f"{n}.jpg", "text": ["a", "b"]}) + "\n" for n in range(2))
        table = pa.table({"file_name": ["0.jpg", "1.jpg"], "text": ["a cat", "a dog"]})
        return [
            ("metadata.csv", quoted(rows, ",").encode()),
            ("metadata.jsonl", lines.encode()),
            ("metadata.parquet", parquet_of(table)),
            ("captions.txt", b"image,caption\n0.jpg,a cat\n1.jpg,a dog\n"),
            ("captions_val.json", json.dumps(coco).encode()),
            ("0.txt", b"a cat"),
            ("0.caption", b"a cat"),
            ("0.json", json.dumps({"caption": "a cat", "texts": ["a"]}).encode()),
            ("0.jpg", draw("0")[0]),
        ]

    def run(self, folder: Path, path: str, data: bytes) -> None:
        for number in range(2):
            placed(folder, f"{number}.jpg", draw(str(number))[0])
        placed(folder, path, data)
        read_source(str(folder))


class ImageFile(Target):
    """Images of every format that is taken, as ``ingest`` and as all later stages decode them."""

    def make(self, valid: Path) -> list[Input]:
        rng = np.random.default_rng(0)
        found = []
        wide = [
            ("RGB", (40, 24)),
            ("L", (17, 9)),
            ("RGBA", (16, 16)),
            ("P", (16, 16)),
            ("CMYK", (16, 16)),
            ("I;16", (9, 9)),
            ("1", (9, 9)),
        ]
        more_options = {"JPEG": ({"progressive": True},), "TIFF": ({"compression": "tiff_lzw"},)}
        for mode, size in wide:
            array = rng.integers(0, 65535 if mode == "I;16" else 255, (size[1], size[0], 3), dtype="int64")
            image = Image.fromarray(array.astype("uint8")).convert("RGB")
            image = Image.fromarray(array[..., 0].astype("uint16")) if mode == "I;16" else image.convert(mode)
            for form in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO"):
                for options in ({}, *more_options.get(form, ())):
                    file = io.BytesIO()
                    try:
                        image.save(file, form, **options)
                    except (OSError, ValueError, KeyError):
                        continue
                    found.append((f"x.{form.lower()}", file.getvalue()))
        exif = Image.Exif()
        exif[274], exif[305] = 6, "x" * 50
        file = io.BytesIO()
        Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif, icc_profile=b"x" * 200, comment=b"c")
        return [*found, ("x.jpeg", file.getvalue())]

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from jpegs import outcome, outcome_of_pillow

        from pipeline.ingest.images import ImageRules, to_outcome
        from shards_spec.images import decode_rgb

        to_outcome(data, ImageRules(image_size=64))
        assert outcome(data) == outcome_of_pillow(data)
        decode_rgb(data)
