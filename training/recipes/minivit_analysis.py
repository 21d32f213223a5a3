"""What a MiniViT run logs of its layers: gradients per use of a tied weight, and how like the teacher's they are.

Lines of metrics.jsonl have ``use_grad_norm.BLOCK``, the l2 norm of the loss's gradient at the shared weights as the
block uses them, and ``cka.BLOCK-TEACHERBLOCK``, the unbiased CKA of the outputs of two blocks (arXiv 2204.07154,
section 4.4; `training.evaluation.layer_analysis`). Blocks are numbered from 0 over the whole model.

Both are measured after the step, on the images of its first chunk on the main process, mixed as they were trained on.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from training.evaluation.layer_analysis import LEAST_SAMPLES, CkaMeter, use_gradient_norms
from training.models.block_reader import BlockReader, stage_pairs
from training.models.classifier import Classifier
from training.models.minivit import DEIT_SHARED, SWIN_SHARED
from training.models.mixing import mixed_images
from training.models.taps import run_with_taps
from training.models.teacher import FrozenTeacher

TRUNK = "trunk."  # of a classifier


class LayerAnalysis:
    """Measures a student's blocks now and then.

    Args:
        every: Steps between measurements.
        trunk: The student's ViT or Swin.
        teacher: The model that its blocks are compared with. Without one, or where it has no blocks to read, there is
            no CKA.

    Raises:
        ValueError: The student has no blocks to read, or other stages than the teacher.
    """

    def __init__(self, every: int, trunk: Any, teacher: FrozenTeacher | None) -> None:
        self.every = every
        self.reader = BlockReader(trunk)
        self.parts = SWIN_SHARED if isinstance(trunk, SwinTransformer) else DEIT_SHARED
        self.teacher = teacher
        self.teacher_reader = _reader_of(teacher)
        self.pairs = _pairs(self.reader, self.teacher_reader)
        self._batch: dict[str, Any] | None = None

    def start_step(self) -> None:
        """Forget the last step's images."""
        self._batch = None

    def keep(self, batch: dict[str, Any]) -> None:
        """Keep the first chunk of a step for `measure`."""
        if self._batch is None:
            self._batch = batch

    def measure(
        self, step: int, student: Classifier, loss: Callable[[dict[str, Any], Classifier], Tensor]
    ) -> dict[str, float]:
        """Return the measurements after step number ``step``, by name; none where it is not their turn.

        Random streams stay as they are, so that a run's weights do not depend on what it logs.

        Args:
            step: Number of the step, from 0.
            student: The model as it is after the step.
            loss: Returns the loss of a batch and of a copy of the student.
        """
        batch = self._batch
        if batch is None or (step + 1) % self.every:
            return {}
        device = batch["images"].device
        blocks = [TRUNK + name for name in self.reader.names]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            norms = use_gradient_norms(student, partial(loss, batch), blocks, self.parts)
            alike = self._cka(student, mixed_images(batch))
        values = {f"use_grad_norm.{block}": norm for block, norm in enumerate(norms)} | alike
        return {name: value for name, value in values.items() if math.isfinite(value)}

    @torch.no_grad()
    def _cka(self, student: Classifier, images: Tensor) -> dict[str, float]:
        """CKA of the outputs of blocks, flattened; the student runs in eval mode."""
        if self.teacher is None or self.teacher_reader is None or len(images) < LEAST_SAMPLES:
            return {}
        was_training = student.training
        student.eval()
        own = self.reader.read(partial(run_with_taps, student.trunk), images, [block for block, _ in self.pairs])
        student.train(was_training)
        theirs = self.teacher_reader.read(self.teacher.intermediate, images, [block for _, block in self.pairs])
        meter = CkaMeter()
        meter.add(own.hidden, theirs.hidden)
        return {f"cka.{s}-{t}": value for (s, t), value in zip(self.pairs, meter.values(), strict=True)}


def _reader_of(teacher: FrozenTeacher | None) -> BlockReader | None:
    """A reader of a teacher's blocks, or None for one that has none."""
    if teacher is None:
        return None
    try:
        return BlockReader(teacher.model)
    except ValueError:  # a convolutional network, say
        return None


def _pairs(student: BlockReader, teacher: BlockReader | None) -> list[tuple[int, int]]:
    """Each block with the teacher's of the same number, or of other depths those that distillation compares."""
    if teacher is None:
        return []
    if student.depths == teacher.depths:
        return [(block, block) for block in range(len(student.names))]
    return stage_pairs(student.depths, teacher.depths)
