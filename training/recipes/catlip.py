"""CatLIP (Mehta et al., arXiv 2404.15653): a vision transformer that names the synsets of its image's caption.

No text tower and no pairs: a caption becomes WordNet synsets (`clipmill pack`, `clipmill vocab`), the model says for
each class of the vocabulary whether it is among them.

    L = 1/B sum_b sum_k BCE(z_bk, t_bk) + L_RangeAugment

Target: the linear probe on ImageNet-1k of a ViT-B/16 (table of section 5): 58.0 from CC3M, 80.1 from DataComp-1.3B,
where CLIP's fine-tuned 84.4 is CatLIP's 84.3. Cost: 2.7 times fewer GPU hours than CLIP for an epoch of DataComp.
The default numbers are the paper's CC3M column, ViT-B/16 on 4 GPUs; its DataComp columns, of 200,000 steps, are

    clipmill train catlip --data ROOT --epochs 25                                                        CC3M, to 100
      --steps 200000 --batch-size 65536 --batch-parts 64 --lr 1e-3 --final-lr 1e-5                       B/16
      ... --model timm:catlip_vit_large_patch16_224 --batch-parts 128 --lr 6e-4 --final-lr 6e-6          L/16
      ... --model timm:catlip_vit_huge_patch16_224 --batch-parts 256 --lr 4e-4 --final-lr 4e-6           H/16

The paper and its configs give: batches, peak and final learning rates, AdamW (0.9, 0.999), eps 1e-8, weight decay 0.2,
10,000 steps of warm-up from 1e-6 (stated for DataComp alone), cosine, clipping at 1, bf16, crops of (0.08, 1), flips,
RangeAugment from 40 to 20 dB, sides of 128 to 320 by 16 with equal pixels per batch, and the average of the weights
(decay 0.9995) as the result. An image's labels are its original caption's; images without any are kept.
Readings, each with its other one as an option or noted:
- Crops are rendered bicubic and antialiased, as all our views are; theirs are bilinear.
- Positions are resized over the grid; the code's way, along the raster order, is `CatlipViT(positions="raster")`.
- A loss is the mean over the global batch. Theirs is the mean over GPUs of means over equal parts, the same number.
- An epoch is the dataset once. Their steps have 1.27 times the nominal batch on average, so do ours.
- Biases from the vocabulary's frequencies (--frequency-bias) and softmax (--loss softmax; SuperClass, arXiv 2411.03313)
  are not CatLIP's. Runs of some hundred steps gain much by the first (docs/catlip.md).
Any ViT of timm's can be the backbone: --model timm:vit_base_patch16_224.
"""

import torch
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from shards_spec.vocab import Vocabulary
from training.config import total_steps
from training.configs.catlip import CatlipConfig
from training.data.samples import SampleLabels, find_vocabulary, open_samples
from training.losses.multilabel import PAD, frequency_bias, mean_loss, sigmoid_loss, softmax_loss
from training.models.classifier import new_classifier
from training.models.range_augment import RangeAugment, curriculum_loss
from training.recipes.tuning import check_sides
from training.task import Batch, Features, Losses, Prepared, Task

LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}


class CatlipTask(Task):
    """The classifier and RangeAugment's six scalars, over ``total`` steps."""

    def __init__(self, config: CatlipConfig, student: LoadedModel, total: int) -> None:
        super().__init__(student.model, ("images", "labels"))
        self.config, self.total = config, total
        self.augment = RangeAugment(student.mean, student.std) if config.range_augment else None

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with RangeAugment's draws."""
        return batch if self.augment is None else {**batch, "drawn": self.augment.draw(len(batch["keys"]))}

    def forward(self, batch: Batch) -> Features:
        """Return (n,) ``loss``, number of ``labels`` and, with RangeAugment, ``error`` of its images."""
        images = batch["images"]
        features: Features = {}
        if self.augment is not None and self.training:
            images, features["error"] = self.augment(images, batch.get("drawn"))
        logits = self.student(images)
        features["loss"] = LOSSES[self.config.loss](logits, batch["labels"])
        features["labels"] = (batch["labels"] != PAD).sum(dim=1)
        return features

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``labels``, and ``augment`` when there is RangeAugment."""
        losses = {"labels": mean_loss(features["loss"], features["labels"], self.config.labels.drop_empty)}
        if "error" in features:
            losses["augment"] = curriculum_loss(features["error"], step, self.total)
        return losses


def prepare(config: CatlipConfig) -> Prepared:
    """Return student, samples and task. Raises UserError and DataError when data, vocabulary or model do not serve."""
    if config.run.eval_data:
        raise UserError("--eval-data: CatLIP has no text tower to measure by; `clipmill train probe` measures its run")
    vocabulary, seed = find_vocabulary(config.data, config.labels), config.run.seed
    model = config.student
    student = new_classifier(
        model.model,
        len(vocabulary),
        vocabulary=vocabulary,
        pretrained=model.pretrained,
        seed=seed,
        trust=model.trust,
    )
    if len(student.model.heads) > 1:
        raise UserError(f"--model {model.model!r} has a distillation head, which CatLIP does not train; take another")
    check_sides(student.model, config.sides.sides)
    if config.frequency_bias:
        with torch.no_grad():
            student.model.head.bias.copy_(start_bias(vocabulary))
    labels = SampleLabels(vocabulary, config.labels.label_captions == "original")
    samples = open_samples(config.data, config.views, student, seed, labels=labels, sides=config.sides)
    total = total_steps(config.run, samples.plan.mean, samples.order.total)
    return Prepared(student, samples, CatlipTask(config, student, total))


def start_bias(vocabulary: Vocabulary) -> Tensor:
    """Return log-odds (K,) of the classes.

    Raises UserError for a vocabulary that does not know in how many captions a synset occurs.
    """
    captions = vocabulary.header.get("captions")
    if not captions or not all(documents for *_, documents in vocabulary.rows):
        raise UserError("--frequency-bias: this vocabulary was imported and has no counts of captions")
    return frequency_bias([documents for *_, documents in vocabulary.rows], captions)
