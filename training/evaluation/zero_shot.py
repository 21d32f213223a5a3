"""Zero-shot classification and retrieval; metrics are named and defined as CLIP_benchmark has them.

Kept in memory are the class embeddings, or the features of all images and captions; similarities only chunk by chunk.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shards_spec.class_names import label_of
from shards_spec.files import DataError, join
from shards_spec.images import crop_extreme_aspect, decode_rgb
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from training.data.labelled_images import find_split, open_split
from training.evaluation.accuracy import AccuracyMeter
from training.evaluation.clip_benchmark import captioned_samples, captions_of, dataset_task, read_classes

log = logging.getLogger(__name__)
RECALL_AT = (1, 5, 10)
CHUNK = 1024  # queries whose similarities to all candidates are computed at a time


@dataclass
class Encoder:
    """Computes unit features of images and texts, and counts the images that had to be left out in ``skipped``."""

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
            The samples of a batch as they came, and their (b, D) float32 features on the CPU.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.loaded.model))
        transform = image_transform_v2(preprocess, is_train=False)
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
        """Return the (n, D) float32 features of texts, on the CPU."""
        features = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.loaded.tokenizer(texts[start : start + self.batch_size])
            features.append(self._encode(self.loaded.model.encode_text, tokens))
        return torch.cat(features)

    @torch.no_grad()
    def _encode(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            features = encode(inputs.to(self.device))
        return F.normalize(features.float(), dim=-1).cpu()


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
    images = open_split(root, find_split(root))
    names, templates = read_classes(root, images)
    embeddings = []
    for name in names:
        prompts = encoder.texts([template.replace("{c}", name) for template in templates])
        embeddings.append(F.normalize(prompts.mean(dim=0), dim=-1))
    classes = torch.stack(embeddings)
    meter = AccuracyMeter(len(names))
    for samples, features in encoder.images(images.samples()):
        labels = torch.tensor([label_of(path, sample, len(names)) for path, sample in samples])
        meter.add(features @ classes.T, labels)
    if not meter.total:
        raise _no_images(root)
    return meter.metrics(), meter.total


def retrieval(encoder: Encoder, root: str) -> tuple[dict[str, float], int]:
    """Measure retrieval: recall at 1, 5 and 10 both ways over all captions, and the number of images.

    ``image_retrieval_recall@k``: share of captions whose image is among the k best images.
    ``text_retrieval_recall@k``: share of images with any of their captions among the k best captions.
    """
    image_features: list[Tensor] = []
    captions: list[str] = []
    owners: list[int] = []  # per caption the index of its image
    image_count = 0
    for samples, features in encoder.images(captioned_samples(root)):
        image_features.append(features)
        for path, sample in samples:
            of_image = captions_of(path, sample)
            captions += of_image
            owners += [image_count] * len(of_image)
            image_count += 1
    if not image_count:
        raise _no_images(root)
    return recalls(torch.cat(image_features), encoder.texts(captions), torch.tensor(owners)), image_count


def _no_images(root: str) -> DataError:
    return DataError(f"{join(root, 'test')}: no image that decodes; download it again")


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 of image and of text retrieval.

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
