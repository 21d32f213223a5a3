"""What a classifier said of the views in a batch, as targets: the fields that a cache of soft labels adds to items."""

from typing import Any

from torch import Tensor

from training.data.soft_label_cache import SOFT_FIELDS
from training.losses.soft_labels import spread_rest
from training.models.mixing import PARTNERS


def soft_targets(batch: dict[str, Any], classes: int, temperature: float = 1.0, prefix: str = "") -> Tensor:
    """Return the stored distributions (n, K) of a batch, float32.

    Args:
        batch: With ``soft_logits``, or with the other three of `SOFT_FIELDS`.
        classes: K.
        temperature: Divides the logits; only 1 where there are none.
        prefix: Before the names of fields.
    """
    logits = batch.get(f"{prefix}soft_logits")
    if logits is not None:
        targets: Tensor = (logits.float() / temperature).softmax(dim=1)
        return targets
    kept, probabilities, rest = (batch[f"{prefix}{name}"] for name in SOFT_FIELDS[1:])
    return spread_rest(kept, probabilities, rest, classes)


def mixed_soft_targets(batch: dict[str, Any], classes: int, temperature: float = 1.0) -> Tensor:
    """Return the distributions (n, K) of mixed images: those of both images by their shares.

    TinyViT's teacher sees the mixed image, so that its mixing must be stored; here both images have their own labels,
    mixing is drawn anew in every step, and mixup of labels is what mixup (arXiv 1710.09412) means.
    """
    targets = soft_targets(batch, classes, temperature)
    if "share" not in batch:
        return targets
    share = batch["share"].unsqueeze(1)
    mixed: Tensor = share * targets + (1 - share) * soft_targets(batch, classes, temperature, PARTNERS)
    return mixed


def hard_targets(batch: dict[str, Any], prefix: str = "") -> Tensor:
    """Return the teacher's most probable classes (n,) int64, as hard distillation (DeiT) takes them.

    Args:
        batch: As for `soft_targets`.
        prefix: Before the names of fields.
    """
    logits = batch.get(f"{prefix}soft_logits")
    most_probable: Tensor = batch[f"{prefix}soft_classes"][:, 0] if logits is None else logits.argmax(dim=1)
    return most_probable
