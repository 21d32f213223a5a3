"""Zero-shot classification and retrieval; metrics are named and defined as CLIP_benchmark has them.

The features of all images, and of all captions, are in memory; similarities of retrieval only chunk by chunk.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shards_spec.class_names import label_of
from shards_spec.files import DataError, join, sha256_json
from shards_spec.images import crop_extreme_aspect, decode_rgb
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from training.data.eval_crop import eval_pixels
from training.data.labelled_images import LabelledImages, find_split, open_split
from training.evaluation.accuracy import AccuracyMeter
from training.evaluation.clip_benchmark import captioned_samples, captions_of, dataset_task, read_classes
from training.evaluation.feature_cache import NO_CACHE, FeatureCache, data_hash
from training.models.classifier import Classifier

log = logging.getLogger(__name__)
RECALL_AT = (1, 5, 10)
CHUNK = 1024  # queries whose similarities to all candidates are computed at a time


@dataclass
class Encoder:
    """Computes features of images and texts, and counts the images that had to be left out in ``skipped``."""

    loaded: LoadedModel
    batch_size: int
    device: str
    bf16: bool = False
    skipped: int = field(default=0)

    def images(self, samples: Iterable[tuple[str, Sample]]) -> Iterator[tuple[list[tuple[str, Sample]], Tensor]]:
        """Encode images batch by batch; images that do not decode are left out.

        Args:
            samples: Where each sample lies, for messages, and the sample.

        Yields:
            The samples of a batch as they came, and their (b, D) float32 features as the model gives them, on the CPU.
        """
        transform = _transform(self.loaded)
        batch: list[tuple[str, Sample]] = []
        pixels: list[Tensor] = []
        for path, sample in samples:
            try:
                pixels.append(transform(crop_extreme_aspect(decode_rgb(sample.image, as_benchmark=True))))
                batch.append((path, sample))
            except DataError as error:
                self.skipped += 1
                log.warning("%s: key %s: %s; left out", path, sample.key, error)
            if len(batch) == self.batch_size:
                yield batch, self._encode(self.loaded.model.encode_image, torch.stack(pixels))
                batch, pixels = [], []
        if batch:
            yield batch, self._encode(self.loaded.model.encode_image, torch.stack(pixels))

    def texts(self, texts: list[str]) -> Tensor:
        """Return the (n, D) unit features of texts, float32, on the CPU."""
        features = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.loaded.tokenizer(texts[start : start + self.batch_size])
            features.append(self._encode(self.loaded.model.encode_text, tokens))
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def _encode(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            features = encode(inputs.to(self.device))
        return features.float().cpu()


def _transform(loaded: LoadedModel) -> Callable[[Image.Image], Tensor]:
    """From an image to what the image tower takes, (3, S, S): open_clip's for a CLIP, a classifier's own crop."""
    if isinstance(loaded.model, Classifier):
        return lambda image: loaded.normalise(eval_pixels(image, loaded, loaded.image_size))
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Image.Image], Tensor] = image_transform_v2(
        PreprocessCfg(**preprocessing(loaded)), is_train=False
    )
    return transform


def preprocessing(loaded: LoadedModel) -> dict[str, Any]:
    """Return what images become before they are encoded: open_clip's description, a classifier's size and colours."""
    if isinstance(loaded.model, Classifier):
        crop = {} if loaded.crop is None else loaded.crop._asdict()
        return {"size": loaded.image_size, "mean": list(loaded.mean), "std": list(loaded.std), **crop}
    import open_clip

    description: dict[str, Any] = open_clip.get_model_preprocess_cfg(loaded.model)
    return description


@dataclass(frozen=True)
class EvalSet:
    """A set that a model is measured on.

    Attributes:
        root: Where it lies.
        name: What results and kept features are called by.
        cache: Keeps the model's features.
    """

    root: str
    name: str = ""
    cache: FeatureCache = NO_CACHE


def measure(
    encoder: Encoder, root: str, task: Literal["auto", "zeroshot", "retrieval"] = "auto"
) -> tuple[Literal["zeroshot", "retrieval"], dict[str, float], int]:
    """Measure a model on a dataset.

    Returns:
        The task that was measured, its metrics, and the number of images.

    Raises:
        UserError: There is no such dataset, or one of its files is missing or wrong.
        DataError: A shard is damaged, or the dataset does not fit the task.
    """
    if task == "auto":
        task = dataset_task(root)
    if task == "zeroshot":
        return task, *zeroshot(encoder, root)
    return task, *retrieval(encoder, root)


def score(metrics: dict[str, float]) -> float:
    """Return the one number that the best checkpoint is chosen by: acc1, or the mean of both recalls at 1."""
    if "acc1" in metrics:
        return metrics["acc1"]
    return sum(metrics.get(f"{way}_retrieval_recall@1", 0.0) for way in ("image", "text")) / 2


def zeroshot(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """Measure zero-shot classification: acc1, acc5, mean_per_class_recall, and the number of images.

    A class is the renormalised mean of its prompts' unit features (CLIP, section 3.1.4). With fewer than five
    classes acc5 counts among those there are. Recall is averaged over the classes that occur.
    """
    scores, labels = zeroshot_scores(encoder, EvalSet(root))
    return class_metrics(scores, labels), len(labels)


def zeroshot_scores(encoder: Encoder, data: EvalSet) -> tuple[Tensor, Tensor]:
    """Return the cosines of images and classes (N, K), and the labels (N,)."""
    images = open_split(data.root, find_split(data.root))
    classes = class_embeddings(encoder, *read_classes(data.root, images), data.cache)
    features, labels = labelled_features(encoder, data, images, find_split(data.root))
    scores = [some @ classes.T for some in torch.split(F.normalize(features, dim=-1), CHUNK)]
    return torch.cat(scores), labels


def class_embeddings(encoder: Encoder, names: list[str], templates: list[str], cache: FeatureCache) -> Tensor:
    """Return the unit embeddings (K, D) of classes; sets of the same classes and prompts share what is kept."""

    def compute() -> dict[str, Tensor]:
        embeddings = []
        for name in names:
            prompts = encoder.texts([template.replace("{c}", name) for template in templates])
            embeddings.append(F.normalize(prompts.mean(dim=0), dim=-1))
        return {"classes": torch.stack(embeddings)}

    content = sha256_json([names, templates])
    return cache.tensors(f"classes_{content[:16]}", lambda: content, compute)["classes"]


def class_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return acc1, acc5 and mean_per_class_recall of scores (N, K) and labels (N,)."""
    meter = AccuracyMeter(scores.shape[1])
    meter.add(scores, labels)
    return meter.metrics()


def labelled_features(encoder: Encoder, data: EvalSet, images: LabelledImages, split: str) -> tuple[Tensor, Tensor]:
    """Return the features (N, D), as the model gives them, and the labels (N,) of a split's images that decode.

    Raises:
        DataError: A shard is damaged, a label is none, or no image decodes.
    """

    def compute() -> dict[str, Tensor]:
        features: list[Tensor] = []
        labels: list[int] = []
        before = encoder.skipped
        for samples, some in encoder.images(images.samples()):
            features.append(some)
            labels += [label_of(path, sample, len(images.classes)) for path, sample in samples]
        if not labels:
            raise _no_images(data.root, split)
        skipped = encoder.skipped - before
        encoder.skipped = before
        return {"images": torch.cat(features), "labels": torch.tensor(labels), "skipped": torch.tensor(skipped)}

    tensors = data.cache.tensors(f"{data.name}_{split or 'images'}", lambda: data_hash(data.root, split), compute)
    encoder.skipped += int(tensors["skipped"])
    return tensors["images"], tensors["labels"]


def retrieval(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """Measure retrieval over all captions, see `recalls`; return the metrics and the number of images."""
    features = captioned_features(encoder, EvalSet(root))
    return recalls(features.images, features.texts, features.owner), len(features.images)


def first_caption_recalls(features: "CaptionedFeatures") -> dict[str, float]:
    """Return the recalls of each image and its first caption alone.

    So CLIP-KD evaluates (arXiv 2307.12732; its code's ``RetrievalDataset`` takes the first of the captions): there are
    as many texts as images, which is easier for images and harder for texts than all captions.
    """
    images = torch.arange(len(features.images))
    first = torch.searchsorted(features.owner, images)  # owners ascend
    return recalls(features.images, features.texts[first], images)


@dataclass(frozen=True)
class CaptionedFeatures:
    """Unit features of images (N, D) and of all their captions (M, D), and each caption's image (M,), ascending."""

    images: Tensor
    texts: Tensor
    owner: Tensor


def captioned_features(encoder: Encoder, data: EvalSet) -> CaptionedFeatures:
    """Return the features of a retrieval dataset's images that decode and of their captions.

    Raises:
        UserError: There is no such dataset.
        DataError: A shard is damaged, an image has no caption, or no image decodes.
    """
    split = find_split(data.root)

    def compute() -> dict[str, Tensor]:
        image_features: list[Tensor] = []
        captions: list[str] = []
        owners: list[int] = []  # per caption the index of its image
        image_count = 0
        before = encoder.skipped
        for samples, features in encoder.images(captioned_samples(data.root)):
            image_features.append(features)
            for path, sample in samples:
                of_image = captions_of(path, sample)
                captions += of_image
                owners += [image_count] * len(of_image)
                image_count += 1
        if not image_count:
            raise _no_images(data.root, split)
        skipped = encoder.skipped - before
        encoder.skipped = before
        return {
            "images": torch.cat(image_features),
            "texts": encoder.texts(captions),
            "owner": torch.tensor(owners),
            "skipped": torch.tensor(skipped),
        }

    tensors = data.cache.tensors(f"{data.name}_captions", lambda: data_hash(data.root, split), compute)
    encoder.skipped += int(tensors["skipped"])
    return CaptionedFeatures(F.normalize(tensors["images"], dim=-1), tensors["texts"], tensors["owner"])


def _no_images(root: str, split: str) -> DataError:
    return DataError(f"{join(root, split or 'test')}: no image that decodes; download it again")


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 of image and of text retrieval.

    ``image_retrieval_recall@k``: share of captions whose image is among the k best images.
    ``text_retrieval_recall@k``: share of images with any of their captions among the k best captions.

    Args:
        images: (n, D) unit features of images.
        texts: (m, D) unit features of captions.
        owner: (m,) index of the image that a caption belongs to.
    """
    image_index = torch.arange(len(images))
    image_hits = _hits(texts, owner, images, image_index)
    text_hits = _hits(images, image_index, texts, owner)
    metrics = {f"image_retrieval_recall@{k}": image_hits[k] / len(texts) for k in RECALL_AT}
    return metrics | {f"text_retrieval_recall@{k}": text_hits[k] / len(images) for k in RECALL_AT}


def _hits(queries: Tensor, query_image: Tensor, candidates: Tensor, candidate_image: Tensor) -> dict[int, int]:
    """For each k, how many queries have a candidate of their own image among their k best candidates."""
    hits = dict.fromkeys(RECALL_AT, 0)
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ candidates.T
        best = candidate_image[similarity.topk(min(max(RECALL_AT), len(candidates)), dim=1).indices]
        is_own = best == query_image[start : start + CHUNK, None]
        for k in RECALL_AT:
            hits[k] += int(is_own[:, :k].any(dim=1).sum())
    return hits
