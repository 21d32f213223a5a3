"""How tied layers are trained and what they compute: MiniViT's two figures (arXiv 2204.07154, section 4.4).

The paper's settings are not known and no code was released; the definitions are the usual ones. It says that plain
sharing makes the gradients of layers larger and less steady, and features less like the untied model's in the last
layers, and that weight multiplexing undoes both.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from shards_spec.messages import counted
from training.models.weight_tying import part_of, tied_blocks, untie

LEAST_SAMPLES = 4  # of the unbiased estimate


def use_gradient_norms(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], blocks: Sequence[str], parts: Sequence[str]
) -> list[float]:
    """Return the l2 norm of a loss's gradient at the weights of each block, as that block uses them.

    A tied weight has a gradient per use, whose sum its ``grad`` is. An untied copy of the model has them apart.

    Args:
        model: The model; it stays as it is.
        loss: Called with the copy.
        blocks: Names of the blocks.
        parts: Names of a block's sub-modules or parameters that count, as `tie` takes them.
    """
    apart = deepcopy(model)
    for tied in tied_blocks(apart).values():
        untie(tied)
    apart.zero_grad(set_to_none=True)
    loss(apart).backward()  # type: ignore[no-untyped-call]
    norms = []
    for name in blocks:
        gradients = list[Tensor]()
        for part in (part_of(apart.get_submodule(name), each) for each in parts):
            parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
            gradients += [each.grad.flatten() for each in parameters if each.grad is not None]
        norms.append(torch.cat(gradients).norm().item() if gradients else 0.0)
    return norms


def linear_cka(one: Tensor, other: Tensor) -> Tensor:
    """Return the linear CKA of features of the same samples, ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), columns centred.

    With fewer samples than features it is far above 0 for independent ones; `CkaMeter` is not.

    Args:
        one: (n, p).
        other: (n, q).
    """
    x, y = (features.double() - features.double().mean(0) for features in (one, other))
    grams = [(a @ a.T, b @ b.T) for a, b in ((x, y), (x, x), (y, y))]
    cross, own, theirs = ((a * b).sum() for a, b in grams)
    return cross / (own * theirs).sqrt()


def unbiased_hsic(one: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC of two Gram matrices (n, n) (Song et al. 2012).

    Raises ValueError with fewer than four samples.
    """
    count = len(one)
    if count < LEAST_SAMPLES:
        raise ValueError(f"{count} samples: the unbiased estimate needs {LEAST_SAMPLES} or more")
    hollow = 1 - torch.eye(count, dtype=one.dtype, device=one.device)
    one, other = one * hollow, other * hollow
    total = one.sum() * other.sum() / ((count - 1) * (count - 2))
    shared = 2 / (count - 2) * one.sum(0) @ other.sum(0)
    return ((one * other).sum() + total - shared) / (count * (count - 3))


class CkaMeter:
    """Unbiased linear CKA between the layers of two models, from batches of the same images.

    Estimates of HSIC are averaged over batches before they are divided, so that small batches do not bias it.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Take in a batch's features of each layer, (n, p) and (n, q); samples are the first axis, the rest is flat.

        Raises ValueError when the numbers of layers or samples differ, or with fewer than four samples.
        """
        rows = []
        for x, y in zip(one, other, strict=True):
            if len(x) != len(y):
                raise ValueError(
                    f"features of {len(x)} and of {counted(len(y), 'sample')}: give those of the same images"
                )
            flat = [features.flatten(1).double() for features in (x, y)]
            own, theirs = ((features @ features.T).cpu() for features in flat)
            pairs = ((own, theirs), (own, own), (theirs, theirs))
            rows.append(torch.stack([unbiased_hsic(*pair) for pair in pairs]))
        batch = torch.stack(rows)
        self._sums = batch if self._sums is None else self._sums + batch

    def values(self) -> list[float]:
        """Return the CKA of each pair of layers: about 0 for independent features, 1 for equal ones."""
        if self._sums is None:
            return []
        cross, own, theirs = self._sums.T
        values: list[float] = (cross / (own * theirs).sqrt()).tolist()
        return values
