"""Targets that are trees of files: a data set, shards of img2dataset, a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.target import Input, Target, parquet_of, placed, samples, tar_of
from small_data import draw, write_raw


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


class Labelled(Tree):
    """ROOT of labelled images, and the same as CLIP_benchmark's shards: ``check``, training's reader, ``ingest``."""

    def build(self, valid: Path) -> None:
        from pipeline.ingest.config import IngestConfig
        from pipeline.ingest.stage import ingest
        from pipeline.pack.config import PackConfig
        from pipeline.pack.stage import pack

        source = valid.with_name("class-folders")
        for number in range(8):
            placed(source, f"{'ab'[number % 2]}/{number}.jpg", draw(str(number))[0])
        root = str(valid / "root")
        ingest(IngestConfig(root, (str(source),), format="classes", shard_size=4, workers=1))
        pack(PackConfig(root, workers=1))
        tar = (valid / "root/raw/00000.tar").read_bytes()
        for name, data in (("0.tar", tar), ("nshards.txt", b"1\n"), ("classnames.txt", b"a\nb\n")):
            placed(valid / "bench", name, data)

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.check.config import CheckConfig
        from pipeline.check.stage import check
        from pipeline.ingest.url_lists import list_rows
        from training.data.labelled_images import open_images

        place = self.with_change(folder, path, data)
        if path.startswith("bench/"):
            list(list_rows(f"{place}/bench", "classes"))
            return
        root = f"{place}/root"
        check(CheckConfig(root))
        images = open_images(root, True)
        for index in range(len(images.labels)):
            images.image(index)


def write_captions(root: str) -> None:
    """ROOT/captions/cap as ``caption --similarity`` leaves it, without a model."""
    from pipeline.caption.shard_captions import FIELDS, SIMILARITY_FIELDS
    from shards_spec.files import join, sha256_file
    from shards_spec.layout import shard_name
    from shards_spec.manifest import Done, write_stage
    from shards_spec.tar import read_shard

    for shard in range(2):
        keys = [sample.key for sample in read_shard(join(root, f"raw/{shard_name(shard)}.tar"))]
        rows = [
            {
                "key": key,
                "captions": [f"a ball {n}"],
                "logprobs": [-3.0],
                "num_tokens": [3],
                "similarities": [0.2],
                "original_similarity": 0.3,
            }
            for n, key in enumerate(keys)
        ]
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


class Img2datasetFolder(Tree):
    """A folder of img2dataset's shards as a source."""

    def build(self, valid: Path) -> None:
        for shard in range(2):
            members = samples(3, str(shard))
            members = [(f"{shard:05d}{name[5:]}", data) for name, data in members]
            placed(valid, f"{shard:05d}.tar", tar_of(members))
            rows = [
                {
                    "url": f"http://h/{n}",
                    "caption": "a cat",
                    "key": f"{shard:05d}{n:04d}",
                    "status": "success",
                    "error_message": None,
                    "width": 48,
                    "height": 48,
                    "sha256": "0" * 64,
                }
                for n in range(3)
            ]
            placed(valid, f"{shard:05d}.parquet", parquet_of(pa.Table.from_pylist(rows)))
            stats = {
                "count": 3,
                "successes": 3,
                "failed_to_download": 0,
                "failed_to_resize": 0,
                "duration": 1.0,
                "status_dict": {"success": 3},
            }
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
        from training.runs.checkpoint_files import load_checkpoint

        run = self.with_change(folder, path, data)
        if path.endswith(".pt"):
            load_checkpoint(Path(run, path))
        report(ReportConfig(run))
