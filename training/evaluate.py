"""Zero-shot classification and retrieval over a CLIP_benchmark WebDataset root.

    EVAL/classnames.txt, zeroshot_classification_templates.txt   one per line; a template has {c}
    EVAL/dataset_type.txt                                        "retrieval", or absent for classification
    EVAL/test/nshards.txt, test/0.tar …                          members jpg|png|webp and cls (a number) or txt
                                                                 (captions, one per line)

Metrics are named and defined as CLIP_benchmark has them. Memory: class embeddings, or the features of all pictures
and captions; scores only chunk by chunk.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shards_spec.files import DataError, UserError, exists, join, read_bytes, write_json
from shards_spec.images import decode_rgb
from shards_spec.models import LoadedModel, load_model, pick_device
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from training.classifier import Classifier
from training.config import require
from training.hits import Hits
from training.run_dir import RunDir
from training.student import load_run
from training.transfer import measure_classifier

log = logging.getLogger(__name__)
RECALL_AT = (1, 5, 10)
CHUNK = 1024


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run's student or any open_clip model on a CLIP_benchmark WebDataset."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """RUN folder, folder with an open_clip_config.json, or open_clip name"""
    data: tuple[str, ...]
    """one or more EVAL roots, folders or URLs in CLIP_benchmark's WebDataset layout"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file, when model is a name"""
    task: Literal["auto", "zeroshot", "retrieval"] = "auto"
    """auto: what dataset_type.txt says"""
    raw: bool = False
    """take a run's weights themselves where it kept an average of them"""
    best: bool = False
    """take a run's best checkpoint by its eval_data, not the newest"""
    output: str | None = None
    """folder for the results, DATASET_TASK.json each; by default RUN/eval, and none for a model that is no RUN"""
    batch_size: int = 64
    """pictures or texts per forward pass"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(len(self.data) >= 1, "data", self.data, "one EVAL root or more")


@dataclass
class Encoder:
    """Unit features of pictures and texts; counts the samples that had to be left out."""

    loaded: LoadedModel
    batch_size: int
    device: str
    bf16: bool = False
    skipped: int = field(default=0)

    def images(self, samples: Iterable[Sample], path: str) -> Iterator[tuple[list[Sample], Tensor]]:
        """Batches of samples with (b, D) float32 features on the CPU; pictures that do not decode are left out."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        wanted = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.loaded.model))
        transform = image_transform_v2(wanted, is_train=False)
        good: list[tuple[Sample, Tensor]] = []
        for sample in samples:
            try:
                good.append((sample, transform(decode_rgb(sample.image, as_benchmark=True))))
            except DataError as error:
                self.skipped += 1
                log.warning("%s: key %s: %s; left out", path, sample.key, error)
            if len(good) == self.batch_size:
                yield self._encoded(good)
                good = []
        if good:
            yield self._encoded(good)

    def _encoded(self, good: list[tuple[Sample, Tensor]]) -> tuple[list[Sample], Tensor]:
        pixels = torch.stack([image for _, image in good])
        return [sample for sample, _ in good], self._run(self.loaded.model.encode_image, pixels)

    def texts(self, texts: list[str]) -> Tensor:
        """(n, D) float32 features on the CPU."""
        pieces = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        return torch.cat([self._run(self.loaded.model.encode_text, self.loaded.tokenizer(piece)) for piece in pieces])

    @torch.no_grad()
    def _run(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            features = encode(inputs.to(self.device))
        return F.normalize(features.float(), dim=-1).cpu()


def evaluate(config: EvalConfig) -> list[dict[str, Any]]:
    """Measure on each EVAL root, print a table, write the JSON; return what was written.

    Raises UserError and DataError.
    """
    device = pick_device(config.device)
    loaded, about = _load(config)
    loaded.model.to(device).eval()
    if isinstance(loaded.model, Classifier):
        return [_classify(config, loaded, device, about, root) for root in config.data]
    return [
        _evaluate_one(config, Encoder(loaded, config.batch_size, device, config.precision == "bf16"), about, root)
        for root in config.data
    ]


def _evaluate_one(config: EvalConfig, encoder: Encoder, about: dict[str, Any], root: str) -> dict[str, Any]:
    task, metrics, samples = measure(encoder, root, config.task)
    name = "zeroshot_classification" if task == "zeroshot" else "zeroshot_retrieval"
    return _write(config, about, root, task, name, metrics, samples, encoder.skipped)


def _classify(config: EvalConfig, loaded: LoadedModel, device: str, about: dict[str, Any], root: str) -> dict[str, Any]:
    metrics, samples = measure_classifier(loaded, root, device, config.precision == "bf16")
    return _write(config, about, root, "classification", "classification", metrics, samples, 0)


def _write(
    config: EvalConfig,
    about: dict[str, Any],
    root: str,
    task: str,
    name: str,
    metrics: dict[str, float],
    samples: int,
    skipped: int,
) -> dict[str, Any]:
    dataset = root.rstrip("/").rsplit("/", 1)[-1]
    result = {
        "dataset": dataset,
        "model": about["model"],
        "pretrained": about["pretrained"],
        "task": name,
        "metrics": metrics,
        "language": "en",
        "samples": samples,
        "skipped": skipped,
        **{name: value for name, value in about.items() if name in ("recipe", "step")},
    }
    folder = config.output or (join(config.model, "eval") if "step" in about else None)
    output = join(folder, f"{dataset}_{task}.json") if folder else None
    if output:
        write_json(output, result)
    _print(result, output)
    return result


def measure(
    encoder: Encoder, root: str, task: Literal["auto", "zeroshot", "retrieval"] = "auto"
) -> tuple[Literal["zeroshot", "retrieval"], dict[str, float], int]:
    """What was measured, its metrics, and the number of pictures. Raises UserError and DataError."""
    found = _task(root) if task == "auto" else task
    return found, *(zeroshot if found == "zeroshot" else retrieval)(encoder, root)


def check_root(root: str) -> None:
    """Raise now what `measure` would raise for a root that is none, or lacks a file."""
    _shards(root)
    if _task(root) == "zeroshot":
        _classes(root)


def score(metrics: dict[str, float]) -> float:
    """The one number a checkpoint is chosen by: acc1, or the mean of both recalls at 1."""
    return metrics.get("acc1", sum(metrics.get(f"{way}_retrieval_recall@1", 0.0) for way in ("image", "text")) / 2)


def _load(config: EvalConfig) -> tuple[LoadedModel, dict[str, Any]]:
    """The model and how to name it; a RUN also has ``recipe`` and ``step``."""
    folder = Path(config.model)
    if (folder / "checkpoints").is_dir() and (folder / "config.json").exists():
        loaded, step = load_run(config.model, config.raw, config.best)
        run = RunDir(config.model).config()
        return loaded, {"model": run["model"], "pretrained": config.model, "recipe": run["recipe"], "step": step}
    if folder.is_dir() and (folder / "open_clip_config.json").exists():
        return load_model(f"local-dir:{config.model}"), {"model": f"local-dir:{config.model}", "pretrained": None}
    if folder.is_dir():
        raise UserError(f"{config.model} is neither a RUN folder (checkpoints/) nor a model (open_clip_config.json)")
    return load_model(config.model, config.pretrained), {"model": config.model, "pretrained": config.pretrained}


def _task(root: str) -> Literal["zeroshot", "retrieval"]:
    path = join(root, "dataset_type.txt")
    kind = read_bytes(path).decode().strip() if exists(path) else "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{path} says {kind!r}: classification and retrieval can be measured")
    return "retrieval" if kind == "retrieval" else "zeroshot"


def _lines(root: str, name: str, what: str) -> list[str]:
    path = join(root, name)
    if not exists(path):
        raise UserError(f"{path} is not there: it holds {what}; is {root} a CLIP_benchmark WebDataset root?")
    lines = [line.strip() for line in read_bytes(path).decode().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: it holds {what}")
    return lines


def _shards(root: str) -> list[str]:
    """Paths of the test shards. Raises UserError when nshards.txt does not tell them."""
    count = _lines(root, "test/nshards.txt", "the number of shards in test/")[0]
    if not count.isdigit():
        raise UserError(f"{join(root, 'test/nshards.txt')} says {count!r}: it must be a number")
    paths = [join(root, "test", f"{shard}.tar") for shard in range(int(count))]
    if missing := [path for path in paths if not exists(path)]:
        raise UserError(f"{missing[0]} is not there, though nshards.txt says {count}; copy the missing shards")
    return paths


def _classes(root: str) -> tuple[list[str], list[str]]:
    names = _lines(root, "classnames.txt", "one class name per line")
    templates = _lines(root, "zeroshot_classification_templates.txt", "one prompt per line with {c} for the class")
    if bad := [template for template in templates if "{c}" not in template]:
        raise UserError(f"{join(root, 'zeroshot_classification_templates.txt')}: {bad[0]!r} has no {{c}} for the class")
    return names, templates


def zeroshot(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """acc1, acc5, mean_per_class_recall, and the number of pictures.

    A class is the renormalised mean of its prompts' unit features (CLIP, section 3.1.4). With fewer than five
    classes acc5 counts among those there are. Recall is averaged over the classes that occur.
    """
    names, templates = _classes(root)
    prompts = (encoder.texts([template.replace("{c}", name) for template in templates]) for name in names)
    classes = torch.stack([F.normalize(features.mean(dim=0), dim=-1) for features in prompts])
    hits = Hits(len(names))
    for path in _shards(root):
        for samples, features in encoder.images(read_shard(path), path):
            labels = torch.tensor([_label(sample, len(names), path) for sample in samples])
            hits.add(features @ classes.T, labels)
    if not hits.total:
        raise DataError(f"{join(root, 'test')}: no picture that decodes; download it again")
    return hits.metrics(), hits.total


def _label(sample: Sample, classes: int, path: str) -> int:
    text = sample.members.get("cls", b"").decode("utf-8", "replace").strip()
    if not text.isdigit() or int(text) >= classes:
        raise DataError(
            f"{path}: key {sample.key} has class {text!r}, not a number below {classes} (the lines of classnames.txt); "
            "for pictures with captions use --task retrieval"
        )
    return int(text)


def retrieval(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """Recall at 1, 5, 10 both ways over all captions, and the number of pictures.

    ``image_retrieval_recall@k``: share of captions whose picture is among the k best pictures.
    ``text_retrieval_recall@k``: share of pictures with any of their captions among the k best captions.
    """
    pieces, captions, owners = list[Tensor](), list[str](), list[int]()
    pictures = 0
    for path in _shards(root):
        for samples, features in encoder.images(read_shard(path), path):
            pieces.append(features)
            for sample in samples:
                own = [line for line in sample.caption.splitlines() if line.strip()]
                if not own:
                    raise DataError(
                        f"{path}: key {sample.key} has no caption (member txt); for classes use --task zeroshot"
                    )
                captions += own
                owners += [pictures] * len(own)
                pictures += 1
    if not pictures:
        raise DataError(f"{join(root, 'test')}: no picture that decodes; download it again")
    images, texts, owner = torch.cat(pieces), encoder.texts(captions), torch.tensor(owners)
    return recalls(images, texts, owner), pictures


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """(n, D) unit features of pictures, (m, D) of captions, (m,) which picture a caption belongs to."""
    found = {f"{way}_retrieval_recall@{k}": 0 for way in ("image", "text") for k in RECALL_AT}
    ways = (("image", texts, images, owner), ("text", images, texts, torch.arange(len(images))))
    for way, queries, candidates, own in ways:
        identity = torch.arange(len(images)) if way == "image" else owner
        for start in range(0, len(queries), CHUNK):
            scores = queries[start : start + CHUNK] @ candidates.T
            best = identity[scores.topk(min(max(RECALL_AT), len(candidates)), dim=1).indices]
            right = best == own[start : start + CHUNK, None]
            for k in RECALL_AT:
                found[f"{way}_retrieval_recall@{k}"] += int(right[:, :k].any(dim=1).sum())
    return {name: count / len(texts if name.startswith("image") else images) for name, count in found.items()}


def _print(result: dict[str, Any], output: str | None) -> None:
    title = f"{result['dataset']} · {result['task']} · {result['samples']} pictures"
    table = Table("metric", "value", title=title, caption=output)
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if result["skipped"]:
        table.add_row("pictures left out", str(result["skipped"]))
    Console().print(table)
