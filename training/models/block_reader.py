"""Projections and outputs of chosen blocks of timm's ViTs and Swins, tied or not, and which blocks go together.

Blocks are numbered from 0 over the whole model. A block that shares its projection with others has one of the outputs
of the shared module: those come in the order of the calls, which is the order of the blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from training.models.taps import Tapped

Run = Callable[[Callable[[Any], Any], Sequence[str]], Tapped]
MIDDLE_TAPS = 3  # of the longest stage of the released Mini-Swins


class BlockReadings(NamedTuple):
    """What a forward pass gave."""

    logits: Tensor
    """(B, K)"""
    projections: list[Tensor]
    """of each block queries, keys and values side by side, (B W, N, 3 C): N tokens in each of W windows, image by
    image; a ViT has one window"""
    hidden: list[Tensor]
    """of each block its output, (B, T, C) of all T tokens of the map"""


class BlockReader:
    """Reads the blocks of a timm model.

    Prefix tokens (CLS, registers) are left out: other models have none.

    Args:
        model: A ViT or a Swin of timm's, or of `training.models.minivit`.

    Attributes:
        depths: Number of blocks of each stage; a ViT is one stage.

    Raises:
        ValueError: The model is neither.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, SwinTransformer):
            self.depths = tuple(len(stage.blocks) for stage in model.layers)  # type: ignore[arg-type]
            self.names = list[str]()
            for stage, depth in enumerate(self.depths):
                self.names += [f"layers.{stage}.blocks.{block}" for block in range(depth)]
            self.prefix = 0
        elif isinstance(model, VisionTransformer):
            self.depths = (len(model.blocks),)
            self.names = [f"blocks.{block}" for block in range(self.depths[0])]
            self.prefix = model.num_prefix_tokens
        else:
            raise ValueError(f"{type(model).__name__} has no blocks to read: take a ViT or a Swin of timm's")
        modules = [model.get_submodule(f"{name}.attn.qkv") for name in self.names]
        earlier = enumerate(modules)
        self._call = [sum(other is module for other in modules[:block]) for block, module in earlier]

    def read(self, run: Run, images: Tensor, blocks: Sequence[int]) -> BlockReadings:
        """Run the model once.

        Args:
            run: `run_with_taps` with the model, or `FrozenTeacher.intermediate`.
            images: (B, 3, S, S), normalised.
            blocks: The blocks that are read.
        """
        names = [self.names[block] for block in blocks]
        taps = [*names, *(f"{name}.attn.qkv" for name in names)]
        output, kept = run(lambda model: model(images), taps)
        projections = [kept[f"{self.names[block]}.attn.qkv"][self._call[block]] for block in blocks]
        hidden = [kept[name][0] for name in names]
        return BlockReadings(
            output,
            [each[:, self.prefix :] for each in projections],
            [each.flatten(1, -2)[:, self.prefix :] for each in hidden],
        )


def stage_pairs(
    student: Sequence[int], teacher: Sequence[int], taps: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Return pairs of a student's and a teacher's blocks, evenly spaced in each stage up to its last block.

    Args:
        student: Blocks of each stage.
        teacher: Blocks of each stage.
        taps: Pairs in each stage; None is `MIDDLE_TAPS` in stages of at least twice as many blocks (of six and more),
            and one in shorter ones, as the released Mini-Swins have it.

    Raises:
        ValueError: The models have other numbers of stages, or a stage has fewer blocks than pairs.
    """
    if len(student) != len(teacher):
        raise ValueError(f"a student of {len(student)} stages cannot follow a teacher of {len(teacher)}")
    if taps is None:
        shortest = [min(depths) for depths in zip(student, teacher, strict=True)]
        taps = [MIDDLE_TAPS if depth >= 2 * MIDDLE_TAPS else 1 for depth in shortest]
    pairs = []
    student_start = teacher_start = 0
    for depth, teacher_depth, count in zip(student, teacher, taps, strict=True):
        if not 1 <= count <= min(depth, teacher_depth):
            raise ValueError(f"{count} pairs in stages of {depth} and {teacher_depth} blocks")
        for number in range(1, count + 1):
            own = student_start + number * depth // count - 1
            theirs = teacher_start + number * teacher_depth // count - 1
            pairs.append((own, theirs))
        student_start += depth
        teacher_start += teacher_depth
    return pairs
