"""Plain CLIP (Radford et al., arXiv 2103.00020): the baseline that every student is measured against.

Learning rate 1e-3 and weight decay 0.1 are those of open_clip's README example on CC3M; 32 epochs, betas and eps of
CLIP's table 19 (ViT); random crops of (0.9, 1.0) and a learned logit scale clamped to 100 as in open_clip. Batch 1024
and warm-up 2000 are ours, for sets of CC12M's size. Cost: 32 epochs of 10 million pairs are 320 million samples seen.

    clipmill train clip --data ROOT --out RUN

With --lock a tower stays as it is, which is LiT (Zhai et al., arXiv 2111.07991): an image tower trained on labels is
locked, and a text tower learns to match it; or the other way round. The locked tower is in eval mode, so its BatchNorms
keep their statistics and nothing is dropped.
"""

from typing import Any, Literal, Self

from shards_spec.files import UserError
from shards_spec.models import HUB, names_weights
from training.config import is_run
from training.configs.clip import ClipConfig, random_tower_advice
from training.losses.contrastive import clip_loss
from training.recipes.pairs import clamp_logit_scale, open_pairs
from training.task import Batch, Features, Losses, Prepared, Task


def tower_of(name: str) -> Literal["image", "text"] | None:
    """Return the tower of a part or parameter of an open_clip model; None for scale and bias of the logits.

    A text tower is one part, ``text``, or stands as several parts in the model itself.
    """
    part = name.partition(".")[0]
    if part in ("logit_scale", "logit_bias"):
        return None
    return "image" if part == "visual" else "text"


class ClipTask(Task):
    """A student and its learned logit scale.

    Args:
        student: The student.
        lock: The tower that is not trained.
    """

    def __init__(self, student: Any, lock: Literal["none", "image", "text"] = "none") -> None:
        super().__init__(student)
        self.lock = lock
        for name, parameter in student.named_parameters():
            if tower_of(name) == lock:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Put the student into training mode, but for the locked tower."""
        super().train(mode)
        for name, module in self.student.named_children():
            if tower_of(name) == self.lock:
                module.eval()
        return self

    def forward(self, batch: Batch) -> Features:
        """Return ``image`` and ``text`` features (n, D), normalised."""
        return {
            "image": self.student.encode_image(batch["images"], normalize=True),
            "text": self.student.encode_text(batch["tokens"], normalize=True),
        }

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``contrastive``."""
        scale = self.student.logit_scale.exp()
        return {"contrastive": clip_loss(features["image"], features["text"], scale, share=self.row_share)}

    def after_step(self, step: int) -> None:
        """Keep the logit scale at 100 at most."""
        clamp_logit_scale(self.student)


def prepare(config: ClipConfig) -> Prepared:
    """Return student, samples and task. Raises UserError and DataError."""
    is_locked, named = config.lock != "none", config.student
    # a model of the Hub may have none, which loading it alone finds
    random_weights = not (is_locked and named.model.startswith(HUB))
    seed = config.run.seed
    student, samples = open_pairs(config.data, config.views, named, seed, random_weights=random_weights)
    has_weights = is_run(named.model) or names_weights(named.model, named.pretrained)
    if config.lock == "text":  # transformers' text towers take the weights of their own name
        has_weights = has_weights or bool(student.config["text_cfg"].get("hf_model_name"))
    if is_locked and not has_weights:
        raise UserError(random_tower_advice(config.lock, named.model))
    return Prepared(student, samples, ClipTask(student.model, config.lock))
