"""Small packed datasets with a planted teacher, and tiny students, for the tests of training/."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_data import BPE, draw, tiny_coca, write_raw

from shards_spec.embeddings import write_embeddings
from shards_spec.files import join, json_bytes, sha256_file, write_json
from shards_spec.layout import shard_name, vocabulary_tsv
from shards_spec.manifest import Done
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from shards_spec.views import ViewSpec
from shards_spec.vocab import Vocabulary
from training.config import smoke
from training.configs import default_config
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder

DIM = 16
SIZES = (9, 8, 6)  # of the shards of the small roots
SPEC = ViewSpec(seed=3, scale=(0.5, 1.0))


def write_packed(
    root: str, sizes: Sequence[int], synthetic: int = 2, broken: tuple[str, ...] = (), classes: int = 0
) -> list[list[str]]:
    """ROOT/shards as `pack` leaves it; returns the keys per shard. Images of ``broken`` keys do not decode.

    With ``classes`` there is ROOT/vocab/all.tsv of that many made-up synsets, and an original caption has two of them.
    """
    if classes:
        rows = tuple((wnid(number), f"thing_{number}", 1, 1) for number in range(classes))
        Vocabulary(rows, {"source": "original"}).write(vocabulary_tsv(root, "all"))
    keys = shard_keys(sizes)
    for shard, size in enumerate(sizes):
        samples = []
        for index, key in enumerate(keys[shard]):
            image, caption = draw(key)
            meta = {"key": key, "caption": caption, **{f"syn_{i}": f"{caption} {i}" for i in range(synthetic)}}
            if classes:
                meta["synsets"] = [[wnid((index + shard) % classes), wnid(3 * index % classes)]]
            image = image[:200] if key in broken else image
            samples.append(Sample(key, {"jpg": image, "txt": caption.encode(), "json": json_bytes(meta)}))
        path = f"shards/{shard_name(shard)}.tar"
        _, digest = write_shard(join(root, path), samples)
        Done("pack", shard, {}, {"success": size}, {}, {path: digest}).write(join(root, "shards"))
    write_json(join(root, "shards", "sizes.json"), {f"{shard_name(s)}.tar": n for s, n in enumerate(sizes)})
    return keys


def shard_keys(sizes: Sequence[int] = SIZES) -> list[list[str]]:
    """The keys of each shard of `write_packed`."""
    return [[f"{shard:05d}{index:04d}" for index in range(size)] for shard, size in enumerate(sizes)]


def wnid(number: int) -> str:
    """The id of a made-up synset."""
    return f"n{number:08d}"


def teacher_rows(keys: list[str], name: str, dim: int = DIM) -> np.ndarray:
    """(n, dim) unit features that depend on key and column alone."""
    seeds = [[ord(letter) for letter in f"{key}/{name}"] for key in keys]
    rows = np.stack([np.random.default_rng(seed).normal(size=dim) for seed in seeds])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def teacher_meta(root: str, shard: int, views: int, captions: int) -> dict[str, Any]:
    return {
        "model": "planted",
        "pretrained": None,
        "weights_sha256": "0",
        "logit_scale": 20.0,
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "views": SPEC.as_json(),
        "views_sha256": SPEC.sha256,
        "num_views": views,
        "num_captions": captions,
        "shard_sha256": sha256_file(join(root, "shards", f"{shard_name(shard)}.tar")),
        "captions_sha256": "0",
    }


def write_teacher(
    root: str,
    keys: list[list[str]],
    name: str = "planted",
    *,
    views: int = 2,
    captions: int = 3,
    salt: str = "",
    dim: int = DIM,
    meta_fields: dict[str, Any] | None = None,
) -> None:
    """ROOT/teacher/NAME as `cache` leaves it; ``salt`` makes it another teacher's, ``meta_fields`` replace metadata."""
    columns = [*(f"image_{i}" for i in range(views)), *(f"text_{i}" for i in range(captions))]
    for shard, own in enumerate(keys):
        path = join(root, "teacher", name, f"{shard_name(shard)}.parquet")
        rows, meta = (
            {column: teacher_rows(own, f"{salt}{column}", dim) for column in columns},
            teacher_meta(root, shard, views, captions) | (meta_fields or {}),
        )
        write_embeddings(path, own, rows, meta)
        inputs = {f"shards/{shard_name(shard)}.tar": meta["shard_sha256"]}
        outputs = {path.removeprefix(f"{root}/"): sha256_file(path)}
        Done(f"cache/{name}", shard, meta, {"success": len(own)}, inputs, outputs).write(join(root, "teacher", name))


def write_retrieval(folder: Path, count: int = 8) -> str:
    """An EVAL root for retrieval: the first images of `write_packed`, one caption each."""
    samples = []
    for index in range(count):
        image, caption = draw(f"{0:05d}{index:04d}")
        samples.append(Sample(f"s{index:04d}", {"jpg": image, "txt": f"{caption} {index}".encode()}))
    write_shard(str(folder / "test" / "0.tar"), samples)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return str(folder)


TINY_VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TINY_RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


def tiny_clip(folder: Path, dim: int = DIM, vision: dict[str, Any] = TINY_VIT) -> str:
    """A CLIP of 1 + 1 layers (or with another image tower), 32 pixels, without weights; returns its model name."""
    import open_clip

    vocabulary = open_clip.tokenizer.SimpleTokenizer(bpe_path=str(BPE)).vocab_size
    config = {
        "embed_dim": dim,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": 16,
            "vocab_size": vocabulary,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
        },
    }
    folder.mkdir(parents=True)
    shutil.copy(BPE, folder / "bpe.txt.gz")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"


def bare_coca(folder: Path) -> str:
    """`tiny_coca` without its weights."""
    name = tiny_coca(folder)
    (folder / "open_clip_model.safetensors").unlink()
    return name


def tiny_siclip(folder: Path, name: str = "SiCLIP-tiny") -> str:
    """SiCLIP-tiny or MobileCLIP-tiny with a small vocabulary of its own, without weights; returns its model name."""
    import open_clip

    import training.models.mobileclip  # noqa: F401  # makes the name known

    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {
        "vocab_size": open_clip.tokenizer.SimpleTokenizer(bpe_path=str(BPE)).vocab_size,
        "context_length": 16,
        "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
    }
    folder.mkdir(parents=True)
    shutil.copy(BPE, folder / "bpe.txt.gz")
    preprocess = {"mean": [0.0] * 3, "std": [1.0] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"


def write_clip_root(root: Path) -> str:
    """A packed dataset of 3 shards with a student models/clip."""
    write_packed(str(root), SIZES)
    tiny_clip(root / "models" / "clip")
    return str(root)


def write_every_root(root: Path, broken: tuple[str, ...] = ()) -> str:
    """A dataset for every recipe of pairs: 3 packed shards, a teacher, students clip, coca and siclip with its base."""
    write_teacher(str(root), write_packed(str(root), SIZES, broken=broken, classes=7))
    tiny_clip(root / "models" / "clip")
    bare_coca(root / "models" / "coca")
    tiny_siclip(root / "models" / "siclip")
    tiny_siclip(root / "models" / "base", "MobileCLIP-tiny")
    write_raw(str(root), shards=2, per_shard=6)
    return str(root)


def tiny_config(recipe, root, out, **fields):
    """A recipe's smoke config on the tiny data; ``fields`` go to whichever part has them."""
    model = f"local-dir:{root}/models/{recipe if recipe in ('coca', 'siclip') else 'clip'}"
    if recipe == "siclip":
        fields = {"base": f"local-dir:{root}/models/base", "base_weights": "random", **fields}
    wanted = {"data": root, "out": out, "model": model, "batch_size": 4, "steps": 12, "lr": 1e-3, **fields}
    config = smoke(default_config(recipe))
    for part in dataclasses.fields(config):
        piece = getattr(config, part.name)
        if dataclasses.is_dataclass(piece):
            names = {field.name for field in dataclasses.fields(piece)} & set(wanted)
            config = dataclasses.replace(
                config, **{part.name: dataclasses.replace(piece, **{name: wanted.pop(name) for name in names})}
            )
    return dataclasses.replace(config, **wanted)


def train_short(root: Path) -> str:
    """The folder of a clip run of two steps over eight pairs, all below ``root``."""
    from training.trainer import train

    write_packed(str(root), [8])
    tiny_clip(root / "models" / "clip")
    return train("clip", tiny_config("clip", str(root), str(root / "out"), steps=2))


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def steady_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The same without what depends on the clock."""
    clock = ("samples_per_s", "seconds")
    return [{name: value for name, value in line.items() if name not in clock} for line in read_metrics(out)]


def final_weights(out: str | Path) -> dict[str, torch.Tensor]:
    """The task's state in a run's newest checkpoint."""
    return load_checkpoint(RunFolder(str(out)).newest())["task"]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Equal metrics at every step and equal weights at the end, to the bit."""
    assert steady_metrics(one) == steady_metrics(other)
    weights, others = final_weights(one), final_weights(other)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
