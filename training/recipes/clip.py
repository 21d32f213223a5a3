"""Plain CLIP (Radford et al., arXiv 2103.00020): the baseline that every student is measured against.

Learning rate 1e-3 and weight decay 0.1 are those of open_clip's README example on CC3M; 32 epochs, betas and eps of
CLIP's table 19 (ViT); random crops of (0.9, 1.0) and a learned logit scale clamped to 100 as in open_clip. Batch 1024
and warm-up 2000 are ours, for sets of CC12M's size. Cost: 32 epochs of 10 million pairs are 320 million samples seen.

    clipmill train clip --data ROOT --out RUN
"""

from training.configs.clip import ClipConfig
from training.losses.contrastive import clip_loss
from training.recipes.pairs import clamp_logit_scale, open_pairs
from training.task import Batch, Features, Losses, Prepared, Task


class ClipTask(Task):
    """A student and its learned logit scale."""

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
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    return Prepared(student, samples, ClipTask(student.model))
