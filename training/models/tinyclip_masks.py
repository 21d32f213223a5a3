"""Masks that are learned: which dimensions, heads and neurons of a transformer are worth keeping.

TinyCLIP (Wu et al., arXiv 2309.12314, section 3.2; released code) relaxes binary masks to hard concrete ones (Louizos
et al., arXiv 1712.01312): each unit has a parameter log-alpha, a mask is sampled at each forward pass in training, and
in evaluation the expected number of units has a value, the others 0.

Dimensions are those of the residual stream, and one mask of them holds for all layers of a tower; heads and neurons
have masks of their own in each layer.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses.sparsity import TowerSize, expected_size

TEMPERATURE = 2 / 3
LOW = -0.1  # gamma: samples are stretched from (0, 1) to (LOW, HIGH) and clipped
HIGH = 1.1  # zeta
EPS = 1e-6
INITIAL = 10.0  # log-alpha of a unit that is kept
MIN_LOG_ALPHA = math.log(0.01)
MAX_LOG_ALPHA = math.log(100)
EVAL_SLOPE = 0.8 / TEMPERATURE  # of the value in evaluation, sigmoid(1.2 log-alpha)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """Return the probability that a unit's sampled mask is not 0, of the shape of ``log_alpha``."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).clamp(EPS, 1 - EPS)


def sample_mask(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return masks in [0, 1], many of them exactly 0 or 1.

    Args:
        log_alpha: Any shape.
        uniform: Random numbers in (0, 1) of that shape.
    """
    concrete = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def deterministic_mask(log_alpha: Tensor) -> Tensor:
    """Return the mask of evaluation of one group of units, (n,).

    As many units are kept as are expected to be, those of the largest log-alphas, of equal ones the later; they have
    sigmoid(1.2 log-alpha), the others 0. Also a group that is fully kept loses some, as its probabilities are below 1.
    """
    zeros = torch.round(len(log_alpha) - keep_probability(log_alpha).double().sum())
    rank = log_alpha.argsort(stable=True).argsort()
    return torch.where(rank < zeros, 0.0, torch.sigmoid(EVAL_SLOPE * log_alpha))


class MaskValues(NamedTuple):
    """The masks of a tower's forward pass."""

    dims: Tensor
    """(D,)"""
    heads: tuple[Tensor, ...]
    """(H,) of each layer"""
    neurons: tuple[Tensor, ...]
    """(F,) of each layer"""


class TowerMasks(nn.Module):
    """The log-alphas of a tower.

    Calling it gives `MaskValues`: sampled in training mode, deterministic in evaluation. Samples are a process's own
    and belong to one forward pass. Its parameters are trained in a group of their own: the constant rate 0.02, no
    weight decay, AdamW's default betas; `clamp` follows each step.

    Args:
        width: D.
        heads: H of each layer.
        neurons: F of each layer.
        original: The tower before any pruning, by which the sparsity is counted.
    """

    def __init__(self, width: int, heads: Sequence[int], neurons: Sequence[int], original: TowerSize) -> None:
        super().__init__()
        self.dims = nn.Parameter(torch.full((width,), INITIAL))
        self.heads = nn.Parameter(torch.full((sum(heads),), INITIAL))
        self.neurons = nn.Parameter(torch.full((sum(neurons),), INITIAL))
        self.head_counts = list(heads)
        self.neuron_counts = list(neurons)
        self.original = original

    @property
    def units(self) -> int:
        """How many there are: D + sum of H + sum of F."""
        return len(self.dims) + len(self.heads) + len(self.neurons)

    def draw(self) -> Tensor:
        """Return random numbers for a sample, (units,), from the stream of the device."""
        return torch.rand(self.units, device=self.dims.device).mul_(1 - 2 * EPS).add_(EPS)

    def forward(self, uniform: Tensor | None = None) -> MaskValues:
        """Return the masks.

        Args:
            uniform: Take these numbers (units,) in (0, 1) for the sample; None draws them.
        """
        if not self.training:
            return self.deterministic()
        return self.sample(self.draw() if uniform is None else uniform)

    def sample(self, uniform: Tensor) -> MaskValues:
        """Return sampled masks for numbers (units,) in (0, 1)."""
        values = sample_mask(torch.cat((self.dims, self.heads, self.neurons)), uniform)
        dims, heads, neurons = torch.split(values, [len(self.dims), len(self.heads), len(self.neurons)])
        return MaskValues(dims, torch.split(heads, self.head_counts), torch.split(neurons, self.neuron_counts))

    def deterministic(self) -> MaskValues:
        """Return the masks of evaluation, which those of materialisation are, too."""
        heads = [deterministic_mask(layer) for layer in torch.split(self.heads, self.head_counts)]
        neurons = [deterministic_mask(layer) for layer in torch.split(self.neurons, self.neuron_counts)]
        return MaskValues(deterministic_mask(self.dims), tuple(heads), tuple(neurons))

    def expected_size(self) -> Tensor:
        """Return R, the expected number of weights in the tower's blocks, a scalar."""
        sums = [keep_probability(units).sum() for units in (self.dims, self.heads, self.neurons)]
        return expected_size(self.original, *sums)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the log-alphas in [ln 0.01, ln 100]: from further out 0.02 a step would not bring them back in time."""
        for units in (self.dims, self.heads, self.neurons):
            units.clamp_(MIN_LOG_ALPHA, MAX_LOG_ALPHA)


class KeptDims(NamedTuple):
    """Which dimensions a LayerNorm runs over; made once per forward pass from the mask of dimensions."""

    indicator: Tensor
    """(D,) 1 where the mask is not 0, else 0"""
    number: Tensor
    """n, how many are kept, a scalar"""
    stretch: Tensor
    """sqrt(D / n), a scalar"""


def kept_dims(mask: Tensor) -> KeptDims:
    """Return what `masked_layer_norm` needs of a mask (D,)."""
    indicator = (mask.detach() != 0).to(mask.dtype)
    number = indicator.sum().clamp(min=1)
    return KeptDims(indicator, number, (len(mask) / number).sqrt())


class _StandIn(torch.autograd.Function):
    """x (..., D), which is 0 where a dimension is dropped -> the row's mean there, and kept ones further from it.

    The mean is that of the kept dimensions. With distances times sqrt(D / n) the variance over all D is that of the n
    kept dimensions, so that a LayerNorm over all of them has their statistics, in one kernel of constant shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(weight, number)
        return torch.lerp(x.sum(-1, keepdim=True) / number, x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, number = ctx.saved_tensors
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            at_mean = (gradient @ (1 - weight) / number).unsqueeze(-1)
        # at dropped dimensions this is no derivative, but masks that are clipped to 0 pass no gradient on
        return torch.addcmul(at_mean, gradient, weight), None, None


def masked_layer_norm(x: Tensor, norm: nn.LayerNorm, kept: KeptDims) -> Tensor:
    """Return LayerNorm over the kept dimensions only, (..., D) -> (..., D) with 0 in the others.

    Args:
        x: The input, 0 in the dimensions that are not kept.
        norm: The LayerNorm over all D.
        kept: The dimensions.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    stand_in = _StandIn.apply(wide, kept.indicator * kept.stretch, kept.number)
    weight = norm.weight * (kept.indicator / kept.stretch)
    normed = F.layer_norm(stand_in, norm.normalized_shape, weight, norm.bias * kept.indicator, norm.eps)
    return normed.to(x.dtype)


def masked_weight(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a matrix (M, N) whose rows and columns are multiplied by masks (M,) and (N,).

    Masking a product's weights in place of its output is the same and costs less wherever there are more tokens than
    rows.
    """
    return weight * torch.outer(rows, columns)
