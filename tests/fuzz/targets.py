"""All targets of the fuzzer by name, and those for checkpoints and small files."""

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.dataset_targets import Dataset, Img2datasetFolder, Labelled, Run
from fuzz.reinforced_targets import ReinforcedTar
from fuzz.source_targets import Folder, ImageFile, List, Parquet, Tar
from fuzz.target import Input, Target, placed


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
            ("meta.json", json.dumps(meta).encode()),
            ("raw/00000_stats.json", json.dumps(stats).encode()),
            ("dataset.json", json.dumps({"spec_version": 1, "name": "x", "stages": {"ingest": {}}}).encode()),
            ("vocab.tsv", valid.with_suffix(".tsv").read_bytes()),
            ("catlip.pkl", pickle.dumps(counts)),
            ("catlip.pkl", pickle.dumps(counts, 0)),
            ("classnames.txt", b"red cat\nblue dog\n\n"),
            ("open_clip_config.json", json.dumps(described).encode()),
        ]

    def made_up(self, rng: random.Random) -> Input:
        """Any JSON value where an object is expected, with keys that are looked for."""

        def value(depth: int) -> Any:
            keys = [
                "caption",
                "syn_0",
                "synsets",
                "clipmill",
                "stages",
                "config",
                "counts",
                "status_dict",
                "model_cfg",
                "text_cfg",
                "spec_version",
                "outputs",
                "inputs",
                "shard",
                "stage",
                "successes",
                "count",
            ]
            simple = [None, True, 1, -1, 1.5, float("nan"), 10**30, "", "x", "n02084071", "\ud800", "a" * 300]
            kinds = [
                lambda: rng.choice(simple),
                lambda: [value(depth - 1) for _ in range(rng.randrange(3))],
                lambda: {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(4))},
            ]
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
    "tar": Tar,
    "reinforced": ReinforcedTar,
    "list": List,
    "parquet": Parquet,
    "folder": Folder,
    "image": ImageFile,
    "dataset": Dataset,
    "run": Run,
    "img2dataset": Img2datasetFolder,
    "labelled": Labelled,
    "checkpoint": Checkpoint,
    "json": Json,
}
