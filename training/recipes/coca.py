"""CoCa (Yu et al., arXiv 2205.01917): contrastive and captioning loss; makes the captioner of `clipmill caption`.

Weights of the two losses, 1 and 2, are the paper's and open_clip's; the rest is the clip recipe's. Reads the raw
shards: no synthetic captions exist yet. Cost: above the clip recipe per step: a decoder as deep as the
text tower comes on top, over the same tokens.

    clipmill train coca --data ROOT --out RUN
"""

from typing import Any

import torch
import torch.nn.functional as F

from shards_spec.files import UserError
from training.configs.coca import CocaConfig
from training.losses.contrastive import clip_loss
from training.recipes.pairs import clamp_logit_scale, open_pairs
from training.task import Batch, Features, Losses, Prepared, Task


class CocaTask(Task):
    """An open_clip CoCa model and the weights of its two losses."""

    def __init__(self, student: Any, clip_weight: float, caption_weight: float) -> None:
        super().__init__(student)
        self.clip_weight, self.caption_weight = clip_weight, caption_weight

    def forward(self, batch: Batch) -> Features:
        """Return normalised features and each caption's cross-entropy.

        ``image`` and ``text`` are (n, D); ``caption`` (n,) is summed over a caption's tokens without the padding, and
        ``words`` (n,) says how many they are.
        """
        output, labels = self.student(batch["images"], batch["tokens"]), batch["tokens"][:, 1:]
        with torch.autocast(labels.device.type, enabled=False):
            # open_clip 3 gives no logits for the last token, which nothing follows; other versions may
            logits = output["logits"][:, : labels.shape[1]].float().transpose(1, 2)
            words = F.cross_entropy(logits, labels, ignore_index=self.student.pad_id, reduction="none")
        return {
            "image": output["image_features"],
            "text": output["text_features"],
            "caption": words.sum(dim=1),
            "words": (labels != self.student.pad_id).sum(dim=1),
        }

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``contrastive`` and ``caption``, a mean over the tokens of all captions, if their weight is not 0."""
        losses = {}
        if self.clip_weight:
            scale = self.student.logit_scale.exp()
            pairs = features["image"], features["text"]
            losses["contrastive"] = self.clip_weight * clip_loss(*pairs, scale, share=self.row_share)
        if self.caption_weight:
            losses["caption"] = self.caption_weight * features["caption"].sum() / features["words"].sum()
        return losses

    def after_step(self, step: int) -> None:
        """Keep the logit scale at 100 at most."""
        clamp_logit_scale(self.student)


def prepare(config: CocaConfig) -> Prepared:
    """Return student, samples and task. Raises UserError, among others when the model is no CoCa, and DataError."""
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    if "multimodal_cfg" not in student.config:
        raise UserError(f"--model {config.student.model!r} has no text decoder: the coca recipe needs a CoCa model")
    return Prepared(student, samples, CocaTask(student.model, config.clip_weight, config.caption_weight))
