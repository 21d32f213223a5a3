"""Vision transformers as teachers of tokens: timm's, MAE's encoder files, CLIP's image towers, and students of runs."""

from dataclasses import dataclass
from typing import Any

import torch

from shards_spec.checkpoints import describe_mismatch, load_checkpoint
from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import MAE_DECODER, NO_TRUST, TIMM, LoadedModel, Trust, load_model, load_teacher
from training.config import is_run
from training.models.classifier import new_classifier
from training.models.teacher import FrozenTeacher
from training.models.tinymim import NoTower, VisionTower, set_heads, tower_of
from training.models.tinymim_star import AUTHORS_NECK, DISTILLATION_TOKEN, HEADS
from training.runs.run_folder import RunFolder
from training.runs.student import load_run

RANDOM = "random"
NECKS = ("neck.", AUTHORS_NECK)  # of TinyMIM*-T
TARGET_BLOCK = "target_block"  # of a run's task: number and heads of the block whose relations were trained


@dataclass(frozen=True)
class VitTeacher:
    """A frozen vision transformer."""

    frozen: FrozenTeacher
    tower: VisionTower
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trained_block: int | None = None
    """of a tinymim run's student: the block whose relations it learned"""


def load_vit_teacher(name: str, weights: str | None, seed: int, trust: Trust = NO_TRUST) -> VitTeacher:
    """Load a teacher by whatever names it.

    Args:
        name: ``timm:NAME``, open_clip's name, ``local-dir:PATH`` or ``hf-hub:ORG/NAME``, or a RUN folder.
        weights: A checkpoint file (of MAE or TinyMIM for timm's models) or open_clip's tag; "random" is untrained; None
            takes timm's own, or those of the folder.
        seed: Of random weights.
        trust: What model and file may do.

    Raises:
        UserError: There is no such model, its weights do not fit, or it has no blocks to read.
        DataError: A run's checkpoints are damaged.
    """
    loaded, trained = _load(name, weights, seed, trust)
    try:
        tower = tower_of(loaded.model)
        if trained is not None:
            set_heads(tower, *trained)
    except NoTower as error:
        raise UserError(
            f"--teacher {name!r} cannot teach tokens: {error}; take a vision transformer of timm's or open_clip's"
        ) from error
    frozen = FrozenTeacher(name, width=tower.width, model=tower.model)
    block = trained[0] if trained is not None else None
    return VitTeacher(frozen, tower, loaded.image_size, tuple(loaded.mean), tuple(loaded.std), block)


def _load(name: str, weights: str | None, seed: int, trust: Trust) -> tuple[LoadedModel, tuple[int, int] | None]:
    """Return the model, and block and heads that were trained where it is a run's."""
    torch.manual_seed(seed)
    if is_run(name):
        if weights is not None:
            raise UserError(f"--teacher-weights {weights!r} would not be used: RUN {name} brings its own weights")
        return load_run(name, trust=trust)[0], trained_block(name)
    if not name.startswith(TIMM):
        is_random = weights == RANDOM
        named = None if is_random else weights
        return load_model(name, named, random_weights=is_random, trust=trust), None
    if weights is None:
        return load_teacher(name, trust=trust), None
    loaded = new_classifier(name, 1, seed=seed)
    loaded.model.trunk.reset_classifier(0)
    if weights != RANDOM:
        load_encoder(loaded.model.trunk, weights, trust.trust_checkpoint)
    return loaded, None


def trained_block(run: str) -> tuple[int, int] | None:
    """Return number and heads of the block that a tinymim run trained the relations of; None for other runs.

    Raises DataError when no checkpoint is intact.
    """
    state = RunFolder(run).load_newest() or {"task": {}}
    stored = state["task"].get(TARGET_BLOCK)
    if stored is None:
        return None
    block, heads = stored.tolist()
    return block, heads


def load_encoder(model: Any, file: str, trusted: bool = False) -> None:
    """Load a checkpoint of MAE or TinyMIM into a timm ViT, where the names are the same.

    Decoder and mask token are left out, and so are a neck and a head of other classes. A distillation token, which
    stands second among 198 positions, goes with its position where the model has none. A fine-tuned one has no norm
    behind its blocks, others have no head and no norm behind a pooling: the model keeps its own.

    Raises:
        UserError: The file cannot be read, or other weights are missing or left over.
    """
    own = model.state_dict()
    weights = load_checkpoint(file, trusted, own.keys())
    if DISTILLATION_TOKEN in weights and DISTILLATION_TOKEN not in own:
        del weights[DISTILLATION_TOKEN]
        positions = weights.get("pos_embed")
        if positions is not None and "pos_embed" in own and positions.shape[1] == own["pos_embed"].shape[1] + 1:
            weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    is_fine_tuned = any(key.startswith("fc_norm.") for key in weights)
    for key in [key for key in weights if key.startswith((*MAE_DECODER, *HEADS, *NECKS))]:
        if key not in own or weights[key].shape != own[key].shape:
            del weights[key]
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit: {describe_mismatch(error)}") from error
    kept = (*HEADS, "norm.") if is_fine_tuned else HEADS
    missing = [key for key in result.missing_keys if not key.startswith(kept)]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{file} does not fit: {counted(len(missing), 'weight')} missing {missing[:3]}, "
            f"{len(result.unexpected_keys)} left over {result.unexpected_keys[:3]}"
        )
