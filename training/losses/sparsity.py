"""The sparsity that TinyCLIP's masks are trained towards (Wu et al., arXiv 2309.12314, section 3.2; released code).

A tower's size R is the expected number of weights in its blocks: of a pair of units that are kept independently, the
product of both probabilities. The sparsity of several towers together is p = 1 - sum(R) / sum(A), where A counts the
blocks of the whole model; embeddings, norms and projections count nowhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

RAMP = 1000  # steps from the first target to the last
MULTIPLIER = 10.0  # of the one-sided form, at the start


class TowerSize(NamedTuple):
    """A transformer before it is pruned; all of its layers are alike."""

    width: int
    """D, of the residual stream"""
    heads: int
    """H, of a layer"""
    neurons: int
    """F, of a layer's MLP"""
    layers: int
    """L"""

    @property
    def prunable(self) -> int:
        """A, the weights and biases of attention and MLP."""
        attention = 4 * self.width**2 + 4 * self.width
        mlp = 2 * self.width * self.neurons + self.width + self.neurons
        return self.layers * (attention + mlp)

    @property
    def head_weights(self) -> float:
        """P_head / D: the weights of a head per dimension of the residual stream."""
        return 4 * (self.width + 1) / self.heads


def expected_size(size: TowerSize, dims: Tensor, heads: Tensor, neurons: Tensor) -> Tensor:
    """Return R, a scalar: how many weights a tower is expected to keep.

    The MLP's biases are not counted, so it is a little below A even when all is kept.

    Args:
        size: The tower before pruning.
        dims: The expected number of kept dimensions, a scalar: the sum of their probabilities.
        heads: Likewise of kept heads, summed over layers.
        neurons: Likewise of kept neurons.
    """
    return dims * (heads * size.head_weights + 2 * neurons)


def expected_sparsity(sizes: Sequence[Tensor], towers: Sequence[TowerSize]) -> Tensor:
    """Return p of one or several towers together, a scalar: the share of their weights that is expected to go.

    Args:
        sizes: R of each tower.
        towers: The towers before pruning, in the same order.
    """
    return 1 - torch.stack(list(sizes)).sum() / sum(tower.prunable for tower in towers)


def target_sparsity(step: int, start: float, end: float, ramp: int = RAMP) -> float:
    """Return q, which goes linearly from ``start`` at step 0 to ``end`` at step ``ramp`` and stays there."""
    return start + (end - start) * min(1.0, step / ramp) if ramp else end


def sparsity_loss(
    sparsity: Tensor, target: float, linear: Tensor | float, quadratic: Tensor | float, *, two_sided: bool = False
) -> Tensor:
    """Return the penalty for a sparsity p that misses its target q, a scalar.

    The released code's form is one-sided: linear v + quadratic v^2 with v = max(q - p, 0); being sparser than asked
    costs nothing. The paper's is linear (p - q) + quadratic (p - q)^2.

    Args:
        sparsity: p, a scalar.
        target: q.
        linear: The multiplier lambda.
        quadratic: The multiplier beta.
        two_sided: Take the paper's form.
    """
    violation = sparsity - target if two_sided else (target - sparsity).clamp(min=0)
    return linear * violation + quadratic * violation.square()


class SparsityConstraint(nn.Module):
    """`sparsity_loss` with its two multipliers as parameters, which are trained by gradient ascent.

    The optimizer gives them a group of their own: ``maximize``, the constant rate 0.02, no weight decay, AdamW's
    default betas. They get a gradient at every step, though it may be zero. In the one-sided form both start at 10 and
    can only grow. In the paper's form lambda starts at 0 and takes either sign: it is negative while p is below q.

    The released code has a pair per tower and takes means; as AdamW's steps do not depend on a gradient's size, one
    pair moves alike.

    Args:
        two_sided: Take the paper's form.
    """

    def __init__(self, two_sided: bool = False) -> None:
        super().__init__()
        self.two_sided = two_sided
        self.linear = nn.Parameter(torch.tensor(0.0 if two_sided else MULTIPLIER))
        self.quadratic = nn.Parameter(torch.tensor(MULTIPLIER))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """Return the penalty of sparsity p, a scalar, for target q."""
        return sparsity_loss(sparsity, target, self.linear, self.quadratic, two_sided=self.two_sided)
