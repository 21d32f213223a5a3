"""What is fuzzed: valid inputs of each kind, made wrong or made up, and the readers of the product that take them.

A target makes an input, (path, bytes), from a random generator, and runs what a user's command would run over it. Only
UserError and DataError may come of it.
"""

import csv
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.mutate import NUMBERS, TEXTS, mutated
from PIL import Image
from small_data import draw, write_raw

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


# tars


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
            (f"{index:09d}.jpg", image), (f"{index:09d}.txt", caption.encode()),
            (f"{index:09d}.json", json.dumps(meta).encode()),
        ]  # fmt: skip
    return members


class Tar(Target):
    """Tars of others as a source, and as shards of ours."""

    def make(self, valid: Path) -> list[Input]:
        plain, long = samples(3), [(f"{'a' * 120}/{name}", data) for name, data in samples(2)]
        return [
            ("x.tar", tar_of(plain)), ("x.tar", tar_of(long, tarfile.PAX_FORMAT, {"comment": "ü" * 90})),
            ("x.tar", tar_of(long, tarfile.GNU_FORMAT)), ("x.tar", tar_of(plain) + tar_of(samples(2, "b"))),
        ]  # fmt: skip

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


# lists


def quoted(rows: list[list[Any]], delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file.getvalue()


class List(Target):
    """Lists as text: CSV, TSV, JSON Lines, addresses alone; packed or not."""

    def make(self, valid: Path) -> list[Input]:
        rows = [[f"http://h/{n}.jpg?a=1&amp;b", f'a "{n}", cat\nand\ta dog; | é', 0.3, "UNLIKELY"] for n in range(12)]
        header, plain = ["url", "caption", "similarity", "NSFW"], [[row[0], f"a cat {n}"] for n, row in enumerate(rows)]
        lines = "".join(json.dumps({"url": row[0], "caption": row[1], "w": 3}) + "\n" for row in rows)
        texts = [
            ("x.csv", quoted([header, *rows], ",")), ("x.csv", quoted([header, *rows], ";")), ("x.jsonl", lines),
            ("x.tsv", quoted([header, *rows], "\t")), ("x.tsv", "".join(f"{c}\t{u}\n" for u, c in plain)),
            ("x.tsv", "".join(f"{u}\t{c}\r\n" for u, c in plain)), ("x.txt", "".join(f"{u}\n" for u, _ in plain)),
            ("x.csv", quoted([["filepath", "title"], ["a.jpg", "x"]], "\t")),
        ]  # fmt: skip
        found = [(name, text.encode()) for name, text in texts]
        import gzip

        packed = [(f"{name}.gz", gzip.compress(data, mtime=0)) for name, data in found]
        return [*found, *packed, ("x.csv", texts[0][1].encode("utf-16")), ("x.tsv", texts[3][1].encode("latin-1"))]

    def made_up(self, rng: random.Random) -> Input:
        """Cells, quotes and line ends in any order, in any encoding."""
        pieces = [
            "url", "caption", "http://h/1", "a cat", '"', '""', ",", "\t", ";", "|", "\n", "\n", "\r", "\r\n", " ",
            "\\N", "NaN", "null", "{", "}", '{"url": "http://h/1", "caption": ', "[1]", "é", "\ufeff", "\x00", "1e5",
            "http://", "https://\u00fc.de/%zz", "a.jpg", "TEXT", "\u2028", "\x1b[0m", "\ud800",
        ]  # fmt: skip
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 120)))
        if rng.random() < 0.5:
            delimiter = rng.choice(",\t;|")
            text = delimiter.join(["url", "caption"]) + rng.choice(["\n", "\r\n", "\r"]) + text
        encoding = rng.choice(["utf-8"] * 6 + ["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"])
        return f"x{rng.choice(['.csv', '.tsv', '.jsonl', '.txt', '.json'])}", text.encode(
            encoding, "surrogatepass" if "utf" in encoding else "replace"
        )

    def run(self, folder: Path, path: str, data: bytes) -> None:
        read_source(placed(folder, path, data))


# Parquet


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


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
        return [("x.parquet", parquet_of(t, compression=c, row_group_size=8)) for t in tables for c in codecs]

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
            lambda: pa.array([rng.choice([None, {"bytes": b"x", "path": "p"}]) for _ in range(number)],
                             pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            lambda: pa.array([rng.choice([None, True]) for _ in range(number)], pa.bool_()),
            lambda: pa.array([rng.choice([None, 0, 10**15]) for _ in range(number)], pa.timestamp("us", "UTC")),
            lambda: pa.array([rng.choice([None, [("k", 1)]]) for _ in range(number)], pa.map_(pa.string(), pa.int8())),
        ]  # fmt: skip
        named = ["url", "caption", "text", "TEXT", "image", "jpg", "URL", "title", "similarity", "ü", ""]
        chosen = [rng.choice(named) for _ in range(rng.randrange(1, 5))]
        table = pa.Table.from_arrays([rng.choice(kinds)() for _ in chosen], names=chosen)
        try:
            return "x.parquet", parquet_of(table, use_dictionary=rng.random() < 0.5)
        except pa.ArrowException:  # what Arrow itself does not write, nobody reads
            return None

    def run(self, folder: Path, path: str, data: bytes) -> None:
        read_source(placed(folder, path, data))


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
            ("metadata.csv", quoted(rows, ",").encode()), ("metadata.jsonl", lines.encode()),
            ("metadata.parquet", parquet_of(table)), ("captions.txt", b"image,caption\n0.jpg,a cat\n1.jpg,a dog\n"),
            ("captions_val.json", json.dumps(coco).encode()), ("0.txt", b"a cat"), ("0.caption", b"a cat"),
            ("0.json", json.dumps({"caption": "a cat", "texts": ["a"]}).encode()), ("0.jpg", draw("0")[0]),
        ]  # fmt: skip

    def run(self, folder: Path, path: str, data: bytes) -> None:
        for number in range(2):
            placed(folder, f"{number}.jpg", draw(str(number))[0])
        placed(folder, path, data)
        read_source(str(folder))


# images


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
        for mode, size in wide:
            array = rng.integers(0, 65535 if mode == "I;16" else 255, (size[1], size[0], 3), dtype="int64")
            image = Image.fromarray(array.astype("uint8")).convert("RGB")
            image = Image.fromarray(array[..., 0].astype("uint16")) if mode == "I;16" else image.convert(mode)
            for form in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO"):
                for options in (
                    ({}, {"progressive": True})
                    if form == "JPEG"
                    else ({}, {"compression": "tiff_lzw"})
                    if form == "TIFF"
                    else ({},)
                ):
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
        from pipeline.ingest.images import ImageRules, to_outcome
        from shards_spec.images import decode_rgb

        to_outcome(data, ImageRules(image_size=64))
        decode_rgb(data)


# whole datasets


class Tree(Target):
    """A file of a whole folder is changed; the others are links to the valid ones."""

    def make(self, valid: Path) -> list[Input]:
        self.valid = valid
        if not (valid / ".made").exists():
            shutil.rmtree(valid, ignore_errors=True)
            self.build(valid)
            (valid / ".made").touch()
        paths = sorted(path for path in valid.rglob("*") if path.is_file() and path.name != ".made")
        return [(str(path.relative_to(valid)), path.read_bytes()) for path in paths if "logs" not in path.parts]

    def build(self, valid: Path) -> None:
        raise NotImplementedError

    def with_change(self, folder: Path, path: str, data: bytes) -> str:
        for name, valid in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name != path:
                target.write_bytes(valid)
        placed(folder, path, data)
        return str(folder)


class Dataset(Tree):
    """ROOT of a dataset, all stages: ``check``, ``report`` and, of changed raw shards and captions, ``pack``."""

    def build(self, valid: Path) -> None:
        from small_training import write_teacher

        from pipeline.dedup.config import DedupConfig
        from pipeline.dedup.stage import dedup
        from pipeline.labels.vocab_stage import VocabConfig, vocab
        from pipeline.pack.config import PackConfig
        from pipeline.pack.stage import pack

        root = str(valid)
        write_raw(root, 2, 5)
        dedup(DedupConfig(root))
        write_captions(root)
        pack(PackConfig(root, workers=1))
        vocab(VocabConfig(root, min_count=0))
        keys = [[f"{shard:05d}{n:04d}" for n in range(4)] for shard in range(2)]
        write_teacher(root, keys, views=1, captions=2)

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.check.config import CheckConfig
        from pipeline.check.stage import check
        from pipeline.core.runner import ShardsFailed
        from pipeline.pack.config import PackConfig
        from pipeline.pack.stage import pack
        from pipeline.report import ReportConfig, report
        from shards_spec.files import DataError, UserError

        root = self.with_change(folder, path, data)
        check(CheckConfig(root))
        errors = list[Exception]()
        steps: list[Callable[[], object]] = [lambda: report(ReportConfig(root, samples=3))]
        if path.startswith(("raw/", "captions/", "dedup/")):
            steps.append(lambda: pack(PackConfig(root, workers=1, overwrite=True)))
        for step in steps:
            try:
                step()
            except (UserError, DataError, ShardsFailed) as error:
                errors.append(error)
        if errors:
            raise errors[0]


def write_captions(root: str) -> None:
    """ROOT/captions/cap as ``caption --similarity`` leaves it, without a model."""
    from pipeline.caption.stage import FIELDS, SIMILARITY_FIELDS
    from shards_spec.files import join, sha256_file
    from shards_spec.layout import shard_name
    from shards_spec.manifest import Done, write_stage
    from shards_spec.tar import read_shard

    for shard in range(2):
        keys = [sample.key for sample in read_shard(join(root, f"raw/{shard_name(shard)}.tar"))]
        rows = [
            {"key": key, "captions": [f"a ball {n}"], "logprobs": [-3.0], "num_tokens": [3], "similarities": [0.2],
             "original_similarity": 0.3}
            for n, key in enumerate(keys)
        ]  # fmt: skip
        path = f"captions/cap/{shard_name(shard)}.parquet"
        os.makedirs(join(root, "captions/cap"), exist_ok=True)
        config = {"model": "planted", "num_captions": 1, "similarity": True}
        schema = pa.schema([*FIELDS, *SIMILARITY_FIELDS], {"clipmill": json.dumps(config)})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), join(root, path))
        outputs = {path: sha256_file(join(root, path))}
        inputs = {f"raw/{shard_name(shard)}.tar": sha256_file(join(root, f"raw/{shard_name(shard)}.tar"))}
        Done("caption/cap", shard, config, {"success": len(keys)}, inputs, outputs).write(join(root, "captions/cap"))
    block = {"config": config, "shards": 2, "counts": {"success": 8}}
    write_stage(root, "caption/cap", block)


class Adopted(Tree):
    """A folder of img2dataset's shards as a source."""

    def build(self, valid: Path) -> None:
        for shard in range(2):
            members = samples(3, str(shard))
            members = [(f"{shard:05d}{name[5:]}", data) for name, data in members]
            placed(valid, f"{shard:05d}.tar", tar_of(members))
            rows = [
                {"url": f"http://h/{n}", "caption": "a cat", "key": f"{shard:05d}{n:04d}", "status": "success",
                 "error_message": None, "width": 48, "height": 48, "sha256": "0" * 64}
                for n in range(3)
            ]  # fmt: skip
            placed(valid, f"{shard:05d}.parquet", parquet_of(pa.Table.from_pylist(rows)))
            stats = {"count": 3, "successes": 3, "failed_to_download": 0, "failed_to_resize": 0, "duration": 1.0,
                     "status_dict": {"success": 3}}  # fmt: skip
            placed(valid, f"{shard:05d}_stats.json", json.dumps(stats).encode())

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.ingest.config import IngestConfig
        from pipeline.ingest.stage import ingest

        ingest(IngestConfig(str(folder / "root"), self.with_change(folder / "source", path, data), workers=1))


class Run(Tree):
    """The folder of a training run: ``report`` and what reads its checkpoints."""

    def build(self, valid: Path) -> None:
        import torch

        lines = [{"step": n, "loss": 2 / n, "losses": {"a": 1.0}, "lr": 1e-3, "seconds": 0.1} for n in range(1, 30)]
        lines[-1]["eval"] = {"acc1": 0.5, "acc5": 0.9}
        placed(valid, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        placed(valid, "config.json", json.dumps({"recipe": "clip", "config": {"lr": 1e-3, "out": "x"}}).encode())
        placed(valid, "environment.json", json.dumps({"python": "3.11", "versions": {"torch": "2"}}).encode())
        result = {"dataset": "x", "task": "zeroshot_classification", "metrics": {"acc1": 0.5}, "samples": 9}
        placed(valid, "eval/x.json", json.dumps(result).encode())
        (valid / "checkpoints").mkdir()
        state = {
            "step": 20,
            "student": {"w": torch.ones(3, 4)},
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
        }
        torch.save(state, valid / "checkpoints" / "step_000020.pt")

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.report import ReportConfig, report
        from training.runs.run_folder import load_checkpoint

        run = self.with_change(folder, path, data)
        if path.endswith(".pt"):
            load_checkpoint(Path(run, path))
        report(ReportConfig(run))


# checkpoints and small files


class Checkpoint(Target):
    """Weights of others: pickles in every wrapping, safetensors."""

    def make(self, valid: Path) -> list[Input]:
        import argparse

        import torch
        from safetensors.torch import save

        weights = {f"module.layer{n}.weight": torch.arange(12.0).reshape(3, 4) for n in range(3)}
        found = [("x.safetensors", save(weights))]
        states: list[tuple[Any, dict[str, Any]]] = [
            (weights, {}),
            (weights, {"_use_new_zipfile_serialization": False}),
            ({"state_dict": weights, "epoch": np.float64(3)}, {}),
            ({"state_dict": weights, "args": argparse.Namespace(lr=1)}, {}),
        ]
        for state, options in states:
            file = io.BytesIO()
            torch.save(state, file, **options)
            found += [("x.pt", file.getvalue()), ("x.bin", file.getvalue())]
        return found

    def made_up(self, rng: random.Random) -> Input:
        """safetensors whose header may say anything."""
        entry = {
            "dtype": rng.choice(["F32", "BF16", "X", 3]),
            "shape": rng.choice([[3], [0], [-1], [2**62], ["a"], 3, []]),
            "data_offsets": rng.choice([[0, 12], [12, 0], [0, 2**63], [-4, 8], [0], "x"]),
        }
        described = rng.choice([{"w": entry}, {"w": entry, "__metadata__": {"a": 1}}, [], {}, {"w": None}])
        header = json.dumps(described).encode()
        length = rng.choice([len(header)] * 4 + [0, 2**63, 2**40, len(header) + 1])
        return "x.safetensors", struct.pack("<Q", length) + header + b"\0" * rng.choice([0, 12, 100])

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from shards_spec.checkpoints import load_checkpoint

        load_checkpoint(placed(folder, path, data))


class Json(Target):
    """json members and records, vocabularies, class lists, CatLIP's pickle."""

    def make(self, valid: Path) -> list[Input]:
        import pickle

        from shards_spec.vocab import Vocabulary

        meta = {"caption": "a", "syn_0": "b", "syn_1": "c", "synsets": [["n02084071"]], "width": 3}
        stats = {
            "count": 3,
            "successes": 3,
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": 3},
        }
        counts = {"n2084071": 30, "n2121620": 20}
        rule = {"wordnet": "3.0", "rule": "catlip-released", "source": "original", "captions": 9}
        Vocabulary((("n02084071", "dog", 3, 2), ("n02121620", "cat", 2, 2)), rule).write(str(valid.with_suffix(".tsv")))
        described = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"width": 4}, "text_cfg": {"width": 4}}}
        return [
            ("meta.json", json.dumps(meta).encode()), ("raw/00000_stats.json", json.dumps(stats).encode()),
            ("dataset.json", json.dumps({"spec_version": 1, "name": "x", "stages": {"ingest": {}}}).encode()),
            ("vocab.tsv", valid.with_suffix(".tsv").read_bytes()),
            ("catlip.pkl", pickle.dumps(counts)), ("catlip.pkl", pickle.dumps(counts, 0)),
            ("classnames.txt", b"red cat\nblue dog\n\n"), ("open_clip_config.json", json.dumps(described).encode()),
        ]  # fmt: skip

    def made_up(self, rng: random.Random) -> Input:
        """Any JSON value where an object is expected, with keys that are looked for."""

        def value(depth: int) -> Any:
            keys = [
                "caption", "syn_0", "synsets", "clipmill", "stages", "config", "counts", "status_dict", "model_cfg",
                "text_cfg", "spec_version", "outputs", "inputs", "shard", "stage", "successes", "count",
            ]  # fmt: skip
            simple = [None, True, 1, -1, 1.5, float("nan"), 10**30, "", "x", "n02084071", "\ud800", "a" * 300]
            kinds = [lambda: rng.choice(simple), lambda: [value(depth - 1) for _ in range(rng.randrange(3))],
                     lambda: {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(4))}]  # fmt: skip
            return (rng.choice(kinds) if depth else kinds[0])()

        name = rng.choice(["meta.json", "raw/00000_stats.json", "dataset.json", "open_clip_config.json"])
        return name, json.dumps(value(4)).encode("utf-8", "surrogatepass")

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.labels.catlip_pickle import read_catlip
        from pipeline.labels.classes_stage import read_names
        from shards_spec.manifest import read_dataset, read_done
        from shards_spec.models import load_model
        from shards_spec.sample import Sample
        from shards_spec.vocab import read_vocabulary

        place = placed(folder, path, data)
        if path == "meta.json":
            sample = Sample("0", {"jpg": b"x", "txt": data[:40], "json": data})
            assert isinstance(sample.captions, list)
        elif path.endswith("_stats.json"):
            read_done(str(folder / "raw"), 0)
        elif path == "dataset.json":
            read_dataset(str(folder))
        elif path == "vocab.tsv":
            read_vocabulary(place)
        elif path == "catlip.pkl":
            read_catlip(data, place)
        elif path == "classnames.txt":
            read_names(place)
        else:
            load_model(f"local-dir:{folder}")


TARGETS: dict[str, Callable[[Path], Target]] = {
    "tar": Tar, "list": List, "parquet": Parquet, "folder": Folder, "image": ImageFile, "dataset": Dataset, "run": Run,
    "adopted": Adopted, "checkpoint": Checkpoint, "json": Json,
}  # fmt: skip
