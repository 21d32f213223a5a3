"""TinyMIM (Ren et al., arXiv 2301.01296): a small ViT that learns the token relations of a large one that MAE trained.

It takes the place of masked pre-training: unlabelled images, no text, no projector, no decoder. In one block of the
teacher, and in the student's last block with as many heads, the relations of queries with keys and of values with
values are softmaxes over tokens; the student's follow the teacher's.

    L = KL(R_QK^t || R_QK^s) + KL(R_VV^t || R_VV^s), means over samples, heads and rows

Target (tables of the paper, ImageNet-1k after fine-tuning): ViT-B from MAE's ViT-L 85.0 (MAE itself 83.6), ViT-S from
that ViT-B 83.0, ViT-T from that ViT-S 75.8. Cost: 300 epochs, forward passes of 17 blocks of the teacher and of 11 of
the student, each with the projections of one more, and the student's backward pass.

    clipmill train tinymim --data ROOT --out runs/b                                                   ViT-B from MAE-L
      --model timm:vit_small_patch16_224 --teacher runs/b --out runs/s                                ViT-S from that
      --chain timm:vit_base_patch16_224,timm:vit_small_patch16_224,timm:vit_tiny_patch16_224          all three
      --teacher timm:vit_large_patch16_224 --teacher-weights mae_pretrain_vit_large.pth               MAE's own file
      --teacher ViT-B-16 --teacher-weights openai                                                     CLIP's image tower
      --target ffn-before | attention-before | qkv | class-token | output                             other targets
      --relations qq kk vv | --no-softmax | --mask-ratio 0.75                                         other ablations

From paper and code: batch 4096, AdamW (0.9, 0.95), lr 1.5e-4 * batch / 256 = 2.4e-3, 15 epochs of warm-up (4691 steps
of ImageNet-1k), cosine to 0, weight decay 0.05 of all but vectors, crops of (0.2, 1), flips, colour jitter of the
student's copy alone, drop path 0.1 of the student's blocks but the last, the 18th of 24 teacher blocks. The paper calls
the 18th best; its table has the 21st above it in classification (84.8 to 84.6). Readings, each with its other one as an
option or noted:
- The default teacher block is at 3/4 of the depth, and of a tinymim run the block that it trained, with the heads that
  it trained it with: a checkpoint keeps both. The released code rebuilds that block with the model's own heads.
- The student's images have the teacher's mean and std.
- Class token: softmaxes over channels behind the final norms, a linear map on the student where widths differ.
- Relations without softmax are compared by smooth L1 (beta 2) of the scaled products.
- The blocks of "output" and "class-token" are the last ones unless said otherwise.
- Masking keeps the same patches in both, drawn by (seed, key, epoch); so is what drop paths drop, on any process.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import TIMM, LoadedModel
from training.config import ModelConfig
from training.configs.tinymim import TinymimConfig
from training.data.labelled_images import has_labelled_images, open_images
from training.data.labelled_rows import LabelledImageRows
from training.data.order import BatchPlan
from training.data.paired_views import CLEAN, DROPS, KEEP, PairedViews
from training.data.samples import Samples, open_samples
from training.losses.relations import Pair, soft_kl, token_relation_loss, whitened_feature_loss
from training.models.tinymim import (
    DrawnDropPath,
    NoTower,
    Reading,
    TimmTower,
    fix_positions,
    freeze_unread,
    initialise,
    read,
    set_drop_path,
    set_heads,
    tower_of,
)
from training.models.vit_teacher import TARGET_BLOCK, VitTeacher, load_encoder, load_vit_teacher
from training.runs.student import load_student
from training.task import Batch, Features, Losses, Prepared, Task

LAST_BLOCK = ("class-token", "output")  # targets whose block is the last one


class TinymimTask(Task):
    """The student, and the linear maps that features of another width need; both are dropped by an export.

    Args:
        config: The recipe's config.
        student: A classifier whose trunk is a timm ViT.
        tower: Its tower, with the teacher's heads where relations are compared.
        teacher: The teacher.
        blocks: Numbers of the student's and of the teacher's block.
        fields: Of an item.
        drops: The student's drop paths, in the order of an item's draws.
    """

    def __init__(
        self,
        config: TinymimConfig,
        student: nn.Module,
        tower: TimmTower,
        teacher: VitTeacher,
        *,
        blocks: tuple[int, int],
        fields: tuple[str, ...],
        drops: Sequence[DrawnDropPath] = (),
    ) -> None:
        super().__init__(student, fields)
        self.drops = tuple(drops)
        self.config = config
        self.tower = tower
        self.frozen = teacher.frozen
        self.teacher_tower = teacher.tower
        self.block, self.teacher_block = blocks
        self.heads = tower.heads(self.block)
        if config.target == "relations":
            self.register_buffer(TARGET_BLOCK, torch.tensor([self.block, self.heads]))
        self.maps = nn.ModuleDict(
            {name: nn.Linear(tower.width, teacher.tower.width) for name in _mapped(config, tower, teacher)}
        )

    def forward(self, batch: Batch) -> Features:
        """Return the losses (n,) of each sample, by name."""
        keep = batch.get(KEEP)
        target = self.config.target
        images: Tensor = batch["images"]
        clean: Tensor = batch.get(CLEAN, images)
        theirs = self.frozen.intermediate(
            lambda _: read(self.teacher_tower, clean, target, self.teacher_block, keep), taps=()
        ).output
        draws = batch.get(DROPS)
        for number, drop in enumerate(self.drops):
            drop.draws = None if draws is None else draws[:, number]
        mine = read(self.tower, images, target, self.block, keep)
        if target == "relations":
            return {name: self._relation_loss(mine, theirs, name) for name in self.config.relations}
        mine = {name: self.maps[name](value) if name in self.maps else value for name, value in mine.items()}
        if target == "class-token":
            return {"class_token": soft_kl(mine["feature"], theirs["feature"])}
        losses = [whitened_feature_loss(mine[name], theirs[name]) for name in mine]
        return {"feature": torch.stack(losses).mean(dim=0)}

    def _relation_loss(self, mine: Reading, theirs: Reading, name: str) -> Tensor:
        """(n,) of the relation that two letters name."""
        student = Pair(mine[name[0]], mine[name[1]])
        teacher = Pair(theirs[name[0]], theirs[name[1]])
        return token_relation_loss(student, teacher, self.heads, "kl" if self.config.softmax else "smooth_l1")

    def losses(self, features: Features, step: int) -> Losses:
        """Return the means over samples: of each relation, ``feature`` or ``class_token``."""
        return {name: values.mean() for name, values in features.items()}


def _mapped(config: TinymimConfig, tower: TimmTower, teacher: VitTeacher) -> tuple[str, ...]:
    """What is mapped to the teacher's width by a linear layer."""
    if config.target == "relations":
        return ()
    if config.target == "qkv":
        return ("q", "k", "v")
    is_same = config.target == "class-token" and tower.width == teacher.tower.width
    return () if is_same else ("feature",)


def prepare(config: TinymimConfig) -> Prepared:
    """Return student, rows and task.

    Raises UserError and DataError, among others where student and teacher do not fit together.
    """
    if config.run.eval_data:
        raise UserError("--eval-data: it has no text tower; `clipmill train finetune` measures what it learned")
    if not config.data.data:
        raise UserError("--data is needed: the ROOT of a dataset, or of labelled images with train/")
    teacher = load_vit_teacher(config.teacher, config.teacher_weights, config.run.seed, config.student.trust)
    student, tower = load_tinymim_student(config.student, config.run.seed)
    student = replace(student, mean=teacher.mean, std=teacher.std)
    check_tokens(config, student, tower, teacher)
    blocks = find_blocks(config, tower, teacher)
    adapt_student(config, student, tower, teacher, blocks)
    drops = set_drop_path(tower, config.drop_path, blocks[0])
    paired = PairedViews(
        teacher.image_size,
        patches=tower.patches,
        mask_ratio=config.mask_ratio,
        drops=len(drops),
        seed=config.run.seed,
    )
    rows = open_rows(config, student)
    rows.paired = paired
    fields = paired.fields(config.views.jitter, student.image_size)
    torch.manual_seed(config.run.seed)
    task = TinymimTask(config, student.model, tower, teacher, blocks=blocks, fields=fields, drops=drops)
    return Prepared(student, rows, task)


def load_tinymim_student(config: ModelConfig, seed: int) -> tuple[LoadedModel, TimmTower]:
    """Return the student and its tower; without weights of its own it begins as MAE's encoders do.

    Raises UserError for models that are no ViT of timm's.
    """
    of_file = config.pretrained is not None and config.pretrained != "timm" and config.model.startswith(TIMM)
    student = load_student(replace(config, pretrained=None) if of_file else config, seed)
    try:
        tower = tower_of(student.model)
    except NoTower as error:
        raise UserError(f"--model {config.model!r} cannot learn tokens: {error}; take a ViT of timm's") from error
    if not isinstance(tower, TimmTower) or getattr(student.model, "trunk", None) is not tower.model:
        raise UserError(f"--model {config.model!r}: the student is a ViT of timm's, say {TIMM}vit_tiny_patch16_224")
    if of_file:
        assert config.pretrained is not None
        load_encoder(tower.model, config.pretrained, config.trust.trust_checkpoint)
    elif config.pretrained is None and config.model.startswith(TIMM):
        torch.manual_seed(seed)
        initialise(tower)
        fix_positions(tower)
    return student, tower


def check_tokens(config: TinymimConfig, student: LoadedModel, tower: TimmTower, teacher: VitTeacher) -> None:
    """Raise UserError where student and teacher do not have the same tokens, or masking leaves none."""
    theirs = teacher.tower
    if tower.grid != theirs.grid:
        ours = f"{tower.grid[0]} x {tower.grid[1]} patches of {student.image_size} pixels a side"
        raise UserError(
            f"--model {config.student.model!r} has {ours}, --teacher {config.teacher!r} {theirs.grid[0]} x "
            f"{theirs.grid[1]} of {teacher.image_size}: take models with the same grid of patches"
        )
    if tower.prefix != theirs.prefix:
        raise UserError(
            f"--model {config.student.model!r} has {tower.prefix} tokens before the patches, --teacher "
            f"{config.teacher!r} {theirs.prefix}: take models with the same tokens"
        )
    if int(tower.patches * (1 - config.mask_ratio)) < 1:
        raise UserError(f"--mask-ratio {config.mask_ratio}: it leaves none of {tower.patches} patches")


def find_blocks(config: TinymimConfig, tower: TimmTower, teacher: VitTeacher) -> tuple[int, int]:
    """Return the numbers of the student's and of the teacher's block, from 1. Raises UserError where there is none."""
    depth = len(tower.blocks)
    teacher_depth = len(teacher.tower.blocks)
    default = teacher_depth if config.target in LAST_BLOCK else teacher.trained_block or round(0.75 * teacher_depth)
    block = config.student_block or depth
    teacher_block = config.teacher_block or max(1, default)
    if block > depth:
        raise UserError(f"--student-block {block}: --model {config.student.model!r} has {depth} blocks")
    if teacher_block > teacher_depth:
        raise UserError(f"--teacher-block {teacher_block}: --teacher {config.teacher!r} has {teacher_depth} blocks")
    if config.target == "class-token" and (block, teacher_block) != (depth, teacher_depth):
        raise UserError("--target class-token is read behind the last block: leave the numbers of blocks out")
    return block, teacher_block


def adapt_student(
    config: TinymimConfig, student: LoadedModel, tower: TimmTower, teacher: VitTeacher, blocks: tuple[int, int]
) -> None:
    """Give the student's block the teacher's heads, and freeze what nothing is read of.

    Raises UserError where the teacher's heads do not divide a width, or a class token is asked for that is not there.
    """
    block, teacher_block = blocks
    if config.target == "relations":
        heads = teacher.tower.heads(teacher_block)
        try:
            set_heads(tower, block, heads)
        except ValueError as error:
            raise UserError(
                f"--model {config.student.model!r} cannot follow block {teacher_block} of --teacher "
                f"{config.teacher!r}: {error}; take a student of another width, or another teacher"
            ) from error
    try:
        freeze_unread(tower, config.target, block, student.image_size)
        if config.target == "class-token":
            side = teacher.image_size
            teacher.frozen.intermediate(
                lambda _: read(teacher.tower, torch.zeros(1, 3, side, side), config.target, teacher_block), taps=()
            )
    except NoTower as error:
        raise UserError(f"--target {config.target}: {error} (of --model or --teacher)") from error


def open_rows(config: TinymimConfig, student: LoadedModel) -> Samples | LabelledImageRows:
    """Return the images of a dataset's shards, or of the training split of labelled images. Raises UserError."""
    root, seed = config.data.data, config.run.seed
    if not has_labelled_images(root, "train"):
        return open_samples(config.data, config.views, student, seed)
    images = open_images(root, True)
    plan = BatchPlan(config.data.batch_size, seed=seed)
    return LabelledImageRows(images, student, plan, config.views.spec(seed), np.arange(len(images.labels)))
