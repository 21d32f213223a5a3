"""Zero-shot classification and retrieval over a CLIP_benchmark WebDataset root, or over class folders.

    EVAL/classnames.txt, zeroshot_classification_templates.txt   one per line; a template has {c}
    EVAL/dataset_type.txt                                        "retrieval", or absent for classification
    EVAL/test/nshards.txt, test/0.tar …                          members jpg|png|webp and cls (a number) or txt
                                                                 (captions, one per line)
    EVAL/test/CLASS/*.jpg (or val/)                              instead of shards; both text files may be left out then

Metrics are named and defined as CLIP_benchmark has them. Memory: class embeddings, or the features of all images
and captions; scores only chunk by chunk.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from shards_spec.class_names import parse_label, read_class_names, read_lines
from shards_spec.display import shown
from shards_spec.files import DataError, UserError, exists, is_url, join, write_json
from shards_spec.images import decode_rgb, without_ends
from shards_spec.models import DESCRIPTION, FOLDER, LoadedModel, Trust, load_model, pick_device
from shards_spec.names import IMAGE_EXTENSIONS
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from training.config import require
from training.data.labelled_images import FolderImages, find_split, is_folders, numbered_shards
from training.evaluation.accuracy import AccuracyMeter
from training.evaluation.classification import measure_classifier
from training.models.classifier import Classifier
from training.runs.run_folder import RunDir
from training.runs.student import load_run

log = logging.getLogger(__name__)
RECALL_AT = (1, 5, 10)
CHUNK = 1024
PROMPT = "a photo of a {c}."  # of class folders that bring no prompts; the one of CLIP's paper


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run's student or any open_clip model on a CLIP_benchmark WebDataset."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """RUN folder, folder with an open_clip_config.json, or open_clip name"""
    data: tuple[str, ...]
    """one or more EVAL roots: folders or URLs in CLIP_benchmark's WebDataset layout, or with test/CLASS/*.jpg"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file, when model is a name"""
    task: Literal["auto", "zeroshot", "retrieval"] = "auto"
    """auto: what dataset_type.txt says"""
    raw: bool = False
    """take a run's weights themselves where it kept an average of them"""
    best: bool = False
    """take a run's best checkpoint by its eval_data, not the newest"""
    output: str | None = None
    """folder for the results, DATASET_TASK.json each (DATASET: the EVAL root's name, with its parents' where several
    have that); by default RUN/eval, and none for a model that is no RUN"""
    batch_size: int = 64
    """images or texts per forward pass"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(len(self.data) >= 1, "data", self.data, "one EVAL root or more")


@dataclass
class Encoder:
    """Unit features of images and texts; counts the samples that had to be left out."""

    loaded: LoadedModel
    batch_size: int
    device: str
    bf16: bool = False
    skipped: int = field(default=0)

    def images(self, samples: Iterable[Sample], path: str) -> Iterator[tuple[list[Sample], Tensor]]:
        """Batches of samples with (b, D) float32 features on the CPU; images that do not decode are left out."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        wanted = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.loaded.model))
        transform = image_transform_v2(wanted, is_train=False)
        good: list[tuple[Sample, Tensor]] = []
        for sample in samples:
            try:
                good.append((sample, transform(without_ends(decode_rgb(sample.image, as_benchmark=True)))))
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
    bf16, results = config.precision == "bf16", list[dict[str, Any]]()
    for root, dataset in zip(config.data, dataset_names(config.data), strict=True):
        if isinstance(loaded.model, Classifier):
            metrics, samples = measure_classifier(loaded, root, device, bf16)
            results.append(_write(config, about, dataset, "classification", "classification", metrics, samples, 0))
            continue
        encoder = Encoder(loaded, config.batch_size, device, bf16)
        task, metrics, samples = measure(encoder, root, config.task)
        name = "zeroshot_classification" if task == "zeroshot" else "zeroshot_retrieval"
        results.append(_write(config, about, dataset, task, name, metrics, samples, encoder.skipped))
    return results


def dataset_names(roots: Sequence[str]) -> list[str]:
    """A name per EVAL root: its last part, and as many of its parents before it as tell different roots apart."""
    whole = [root.rstrip("/") if is_url(root) else os.path.abspath(root) for root in roots]
    parts = [[part.rstrip(":") for part in path.split("/") if part] for path in whole]
    depths = [1] * len(roots)
    while True:
        names = ["-".join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
        alike = [
            any(whole[n] != whole[m] and names[n] == names[m] for m in range(len(roots))) for n in range(len(roots))
        ]
        if not any(alike):
            return names
        deeper = [min(depth + same, len(own)) for depth, same, own in zip(depths, alike, parts, strict=True)]
        if deeper == depths:
            raise UserError(
                f"--data {' '.join(roots)}: results of different roots would have one name; measure one by one"
            )
        depths = deeper


def _write(
    config: EvalConfig,
    about: dict[str, Any],
    dataset: str,
    task: str,
    name: str,
    metrics: dict[str, float],
    samples: int,
    skipped: int,
) -> dict[str, Any]:
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
    """What was measured, its metrics, and the number of images. Raises UserError and DataError."""
    found = _task(root) if task == "auto" else task
    return found, *(zeroshot if found == "zeroshot" else retrieval)(encoder, root)


def check_root(root: str) -> None:
    """Raise now what `measure` would raise for a root that is none, or lacks a file."""
    split = find_split(root)
    if not is_folders(root, split):
        numbered_shards(root, split)
    if _task(root) == "zeroshot":
        _classes(root, split)


def score(metrics: dict[str, float]) -> float:
    """The one number a checkpoint is chosen by: acc1, or the mean of both recalls at 1."""
    return metrics.get("acc1", sum(metrics.get(f"{way}_retrieval_recall@1", 0.0) for way in ("image", "text")) / 2)


def _load(config: EvalConfig) -> tuple[LoadedModel, dict[str, Any]]:
    """The model and how to name it; a RUN also has ``recipe`` and ``step``."""
    folder = Path(config.model)
    is_run = (folder / "checkpoints").is_dir() and (folder / "config.json").exists()
    if config.pretrained is not None and folder.is_dir():
        raise UserError(f"--pretrained {config.pretrained!r} would not be used: {config.model} brings its own weights")
    if is_run:
        loaded, step = load_run(config.model, config.raw, config.best, config.trust)
        run = RunDir(config.model).config()
        return loaded, {"model": run["model"], "pretrained": config.model, "recipe": run["recipe"], "step": step}
    if config.raw or config.best:
        raise UserError(f"--{'raw' if config.raw else 'best'} would not be used: {config.model} is no RUN folder")
    if folder.is_dir() and not (folder / DESCRIPTION).exists():
        raise UserError(f"{config.model} is neither a RUN folder (checkpoints/) nor a model ({DESCRIPTION})")
    name = f"{FOLDER}{config.model}" if folder.is_dir() else config.model
    return load_model(name, config.pretrained, trust=config.trust), {"model": name, "pretrained": config.pretrained}


def _task(root: str) -> Literal["zeroshot", "retrieval"]:
    path = join(root, "dataset_type.txt")
    kind = next(filter(None, read_lines(path, "the kind of data"))).lower() if exists(path) else "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{path} says {kind!r}: classification and retrieval can be measured")
    return "retrieval" if kind == "retrieval" else "zeroshot"


def _classes(root: str, split: str) -> tuple[list[str], list[str]]:
    """Names of the classes and prompts; class folders may do without files of either."""
    names_file, prompts_file = join(root, "classnames.txt"), join(root, "zeroshot_classification_templates.txt")
    folders = FolderImages(Path(root, split)).classes if is_folders(root, split) else None
    if folders is None or exists(names_file):
        names = read_class_names(names_file)
    else:
        names = [name.replace("_", " ") for name in folders]
        log.info(
            "%s: classes are named as their folders; classnames.txt, a line per folder, names them otherwise", root
        )
    if folders is not None and len(names) != len(folders):
        raise UserError(f"{names_file} has {len(names)} lines, {join(root, split)} {len(folders)} class folders; "
                        "give a line per folder, in their alphabetical order")  # fmt: skip
    if folders is not None and not exists(prompts_file):
        return names, [PROMPT]
    prompts = [line for line in read_lines(prompts_file, "one prompt per line with {c} for the class") if line]
    if bad := [prompt for prompt in prompts if "{c}" not in prompt]:
        raise UserError(f"{prompts_file}: {bad[0]!r} has no {{c}} for the class")
    return names, prompts


def _test_samples(root: str, split: str) -> Iterator[tuple[str, Iterable[Sample]]]:
    """Where samples lie, and they; those of class folders have the member ``cls`` that shards have."""
    if not is_folders(root, split):
        yield from ((path, read_shard(path)) for path in numbered_shards(root, split))
        return
    found = FolderImages(Path(root, split))
    samples = (
        Sample(name, {IMAGE_EXTENSIONS[0]: data, "cls": str(label).encode()})  # the ending does not say how to decode
        for label, (name, data) in zip(found.labels, map(found.image, range(len(found.labels))), strict=True)
    )
    yield join(root, split), samples


def zeroshot(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """acc1, acc5, mean_per_class_recall, and the number of images.

    A class is the renormalised mean of its prompts' unit features (CLIP, section 3.1.4). With fewer than five
    classes acc5 counts among those there are. Recall is averaged over the classes that occur.
    """
    split = find_split(root)
    names, templates = _classes(root, split)
    prompts = (encoder.texts([template.replace("{c}", name) for template in templates]) for name in names)
    classes = torch.stack([F.normalize(features.mean(dim=0), dim=-1) for features in prompts])
    hits = AccuracyMeter(len(names))
    for path, found in _test_samples(root, split):
        for samples, features in encoder.images(found, path):
            labels = torch.tensor([_label(sample, len(names), path) for sample in samples])
            hits.add(features @ classes.T, labels)
    if not hits.total:
        raise DataError(f"{join(root, 'test')}: no image that decodes; download it again")
    return hits.metrics(), hits.total


def _label(sample: Sample, classes: int, path: str) -> int:
    return parse_label(sample.members.get("cls", b""), classes, f"{path}: key {sample.key}")


def retrieval(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """Recall at 1, 5, 10 both ways over all captions, and the number of images.

    ``image_retrieval_recall@k``: share of captions whose image is among the k best images.
    ``text_retrieval_recall@k``: share of images with any of their captions among the k best captions.
    """
    pieces, captions, owners = list[Tensor](), list[str](), list[int]()
    image_count = 0
    for path in numbered_shards(root, find_split(root)):
        for samples, features in encoder.images(read_shard(path), path):
            pieces.append(features)
            for sample in samples:
                own = sample.caption.splitlines()  # CLIP_benchmark's rule: a blank line is a caption, the empty one
                if not own:
                    raise DataError(
                        f"{path}: key {sample.key} has no caption (member txt); for classes use --task zeroshot"
                    )
                captions += own
                owners += [image_count] * len(own)
                image_count += 1
    if not image_count:
        raise DataError(f"{join(root, 'test')}: no image that decodes; download it again")
    images, texts, owner = torch.cat(pieces), encoder.texts(captions), torch.tensor(owners)
    return recalls(images, texts, owner), image_count


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """(n, D) unit features of images, (m, D) of captions, (m,) which image a caption belongs to."""
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
    title = shown(f"{result['dataset']} · {result['task']} · {result['samples']} images")
    table = Table("metric", "value", title=Text(title))  # a name with brackets is no markup
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if result["skipped"]:
        table.add_row("images left out", str(result["skipped"]))
    Console().print(table)
    if output:
        print(shown(output))  # whole, however narrow the terminal
