"""What several runs say of a few images of an evaluation set, side by side: for the page of `clipmill compare`."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards_spec.files import DataError, UserError
from shards_spec.library_errors import short
from shards_spec.models import LoadedModel, pick_device
from shards_spec.predictions import Guess, GuessedImage, Guesses
from shards_spec.sample import Sample
from training.data.batches import load_batches
from training.data.labelled_images import LabelledImages, find_split, open_split
from training.data.labelled_rows import LabelledImageRows
from training.data.order import BatchPlan
from training.evaluation.clip_benchmark import captioned_samples, captions_of, dataset_task, read_classes
from training.evaluation.zero_shot import Encoder
from training.models.classifier import Classifier
from training.runs.student import load_run

BEST = 5  # guesses of an image
POOL = 200  # images at the beginning of a retrieval set whose captions are candidates: a page is no benchmark
BATCH = 64  # texts per forward pass
NO_TEXTS = "a classifier, which has no text tower"


@dataclass(frozen=True)
class _Question:
    """Images, what is true of them, and the texts to choose from: names of classes with a prompt, or captions.

    Attributes:
        samples: The images.
        truth: Per image the indices of the right texts.
        texts: What is shown.
        prompts: What the text tower reads.
        score: What a guess's score is.
        images: The labelled images and the samples' indices in them; None for captions.
    """

    samples: list[Sample]
    truth: list[list[int]]
    texts: list[str]
    prompts: list[str]
    score: str
    images: tuple[LabelledImages, np.ndarray] | None = None


def guess_images(runs: Mapping[str, str], root: str, *, count: int, device: str = "auto") -> Guesses:
    """Return the best classes, or captions, of ``count`` images by each run.

    Classes are asked for with the set's first prompt alone, captions among those of the first `POOL` images. A run that
    has no checkpoint yet, or cannot be asked about this set, is silent.

    Args:
        runs: RUN folders by the names that the answers have.
        root: EVAL root.
        count: Images, evenly over the set.
        device: Where the runs' students compute.

    Raises:
        UserError: There is no such set, or one of its files is missing or wrong.
        DataError: A shard of the set is damaged, or it has no image.
    """
    place = pick_device(device)
    is_zeroshot = dataset_task(root) == "zeroshot"
    question = _about_classes(root, count) if is_zeroshot else _about_captions(root, count)
    silent = dict[str, str]()
    guesses: list[dict[str, tuple[Guess, ...]]] = [{} for _ in question.samples]
    for name, folder in runs.items():
        try:
            scores = _scores(load_run(folder)[0], question, place)
        except (UserError, DataError) as error:
            silent[name] = short(error)
            continue
        for own, row, right in zip(guesses, scores, question.truth, strict=True):
            if row.isfinite().all():
                own[name] = _best(row, question.texts, right)
    images = []
    for sample, right, own in zip(question.samples, question.truth, guesses, strict=True):
        truth = tuple(question.texts[index] for index in right)
        images.append(GuessedImage(sample.key, sample.image, truth, own))
    return Guesses(root.rstrip("/").rsplit("/", 1)[-1], question.score, images, silent)


def _evenly(total: int, count: int) -> np.ndarray:
    """(n,) ``count`` indices below ``total``, or all of them, evenly spaced."""
    count = min(count, total)
    return (2 * np.arange(count) + 1) * total // max(1, 2 * count)


def _about_classes(root: str, count: int) -> _Question:
    images = open_split(root, find_split(root))
    names, templates = read_classes(root, images)
    chosen = _evenly(len(images.labels), count)
    if not len(chosen):
        raise DataError(f"{root} has no image; make or download it again")
    stored = [images.image(int(index)) for index in chosen]
    return _Question(
        samples=[Sample(key, {"jpg": data}) for key, data in stored],
        truth=[[int(label)] for label in images.labels[chosen]],
        texts=names,
        prompts=[templates[0].replace("{c}", name) for name in names],
        score=f"its probability, for the prompt “{templates[0]}”",
        images=(images, chosen),
    )


def _about_captions(root: str, count: int) -> _Question:
    pool = list(islice(captioned_samples(root), POOL))
    if not pool:
        raise DataError(f"{root} has no image; make or download it again")
    captions, owned = list[str](), list[list[int]]()
    for path, sample in pool:
        own = captions_of(path, sample)
        owned.append(list(range(len(captions), len(captions) + len(own))))
        captions += own
    chosen = _evenly(len(pool), count)
    return _Question(
        samples=[pool[index][1] for index in chosen],
        truth=[owned[index] for index in chosen],
        texts=captions,
        prompts=captions,
        score=f"its cosine, among the {len(captions):,} captions of {len(pool):,} images",
    )


def _scores(loaded: LoadedModel, question: _Question, device: str) -> Tensor:
    """(images, texts) probabilities of classes, or cosines of captions; NaN for an image that does not decode.

    Raises UserError when the model cannot be asked.
    """
    loaded.model.to(device).eval()
    if isinstance(loaded.model, Classifier):
        return _class_probabilities(loaded, loaded.model, question, device)
    encoder = Encoder(loaded, BATCH, device)
    texts = F.normalize(encoder.texts(question.prompts), dim=-1)
    places = {id(sample): place for place, sample in enumerate(question.samples)}
    scores = torch.full((len(places), len(texts)), torch.nan)
    for batch, features in encoder.images(("", sample) for sample in question.samples):
        rows = [places[id(sample)] for _, sample in batch]
        scores[rows] = F.normalize(features, dim=-1) @ texts.T
    if question.images is None:
        return scores
    scale: Tensor = loaded.model.logit_scale.detach().exp().cpu()
    return (scale * scores).softmax(dim=-1)


@torch.no_grad()
def _class_probabilities(loaded: LoadedModel, model: Classifier, question: _Question, device: str) -> Tensor:
    if question.images is None:
        raise UserError(NO_TEXTS)
    images, chosen = question.images
    if images.classes != model.names:
        raise UserError("a classifier of other classes")
    rows = LabelledImageRows(images, loaded, BatchPlan(BATCH), None, chosen)
    scores = torch.full((len(chosen), len(question.texts)), torch.nan)
    for batch in load_batches(rows, [range(len(chosen))], workers=0, device=device):
        scores[batch["positions"].cpu()] = model(batch["images"]).float().softmax(dim=-1).cpu()
    return scores


def _best(scores: Tensor, texts: list[str], right: list[int]) -> tuple[Guess, ...]:
    """The best texts, each once: sets have captions that several images share."""
    best = dict[str, Guess]()
    truth = {texts[index] for index in right}
    for index in scores.argsort(descending=True).tolist():
        best.setdefault(texts[index], Guess(texts[index], float(scores[index]), texts[index] in truth))
        if len(best) == BEST:
            break
    return tuple(best.values())
