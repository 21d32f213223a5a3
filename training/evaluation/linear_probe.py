"""Linear probe as CLIP does it (arXiv 2103.00020, appendix A.3): logistic regression, C swept on held-out images.

The paper uses scikit-learn's LogisticRegression with at most 1,000 iterations. Here it is torch's L-BFGS on the same
objective, ``|W|^2 / 2 + C * (sum of cross-entropies)``, bias not penalised, softmax also for two classes. C is found by
the paper's parametric binary search: 1e-6, 1e-4, ..., 1e6 first, then ever smaller steps around the best, down to eight
a decade. A fifth of each class's training images is held out for that; the final fit is on all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.labelled_rows import subset
from training.evaluation.accuracy import AccuracyMeter

MAX_ITERATIONS = 1000
TOLERANCE = 1e-5  # largest derivative of the mean loss at the end
HELD_OUT = 0.2
DECADES = 6  # C from 10^-6 to 10^6
PER_DECADE = 8
FIRST_STEP = 2 * PER_DECADE
CHUNK = 8192  # images whose logits are computed at a time
SEED = 0  # of the images that are held out


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier: ``weight`` (K, D), ``bias`` (K,), and the C it was fit with."""

    weight: Tensor
    bias: Tensor
    c: float

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits (N, K) of features (N, D)."""
        return F.linear(features, self.weight, self.bias)


def fit(features: Tensor, labels: Tensor, classes: int, c: float, start: LinearProbe | None = None) -> LinearProbe:
    """Fit a logistic regression.

    Args:
        features: (N, D), float32 or float64, on any device.
        labels: (N,) int64, on the same device.
        classes: Their number K.
        c: Inverse strength of the penalty.
        start: Where to begin; the result is the same to the tolerance, since the objective is convex.
    """
    weight = features.new_zeros(classes, features.shape[1]) if start is None else start.weight.clone()
    bias = features.new_zeros(classes) if start is None else start.bias.clone()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    penalty = 1 / (c * len(labels))  # of the mean loss

    def closure() -> Tensor:
        weight.grad = penalty * weight
        bias.grad = torch.zeros_like(bias)
        loss = penalty / 2 * weight.square().sum()
        for some, answers in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
            log_shares = F.linear(some, weight, bias).log_softmax(dim=1)
            loss = loss - log_shares.gather(1, answers[:, None]).sum() / len(labels)
            error = log_shares.exp()
            error[torch.arange(len(answers), device=error.device), answers] -= 1
            weight.grad += error.T @ some / len(labels)
            bias.grad += error.sum(dim=0) / len(labels)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearProbe(weight, bias, c)


def sweep(accuracy: Callable[[float], float]) -> float:
    """Return the C of the best accuracy by the paper's binary search; of equals the one nearest to 1."""
    found = dict[int, float]()

    def try_at(positions: range | list[int]) -> int:
        for position in positions:
            if position not in found and 0 <= position <= 2 * DECADES * PER_DECADE:
                found[position] = accuracy(_value_of_c(position))
        return min(found, key=lambda position: (-found[position], abs(position - DECADES * PER_DECADE), position))

    best = try_at(range(0, 2 * DECADES * PER_DECADE + 1, FIRST_STEP))
    step = FIRST_STEP // 2
    while step:
        best = try_at([best - step, best + step])
        step //= 2
    return _value_of_c(best)


def _value_of_c(position: int) -> float:
    return math.pow(10, position / PER_DECADE - DECADES)


def linear_probe(features: Tensor, labels: Tensor, classes: int, device: str) -> LinearProbe:
    """Return the probe of training images: the best C on a held-out part, then a fit on all; on the CPU.

    Args:
        features: (N, D) float32.
        labels: (N,) int64.
        classes: Their number K.
        device: Where it is computed.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.from_numpy(subset(labels.numpy(), HELD_OUT, SEED))] = True
    if held.all():  # one image of each class
        held[:] = False
    features, labels = features.to(device), labels.to(device)
    kept, checked = (~held).to(device), (held if held.any() else ~held).to(device)
    probes: list[LinearProbe] = []

    def accuracy(c: float) -> float:
        probe = fit(features[kept], labels[kept], classes, c, probes[-1] if probes else None)
        probes[:] = [probe]
        meter = AccuracyMeter(classes)
        meter.add(probe.scores(features[checked]), labels[checked].cpu())
        return meter.metrics()["acc1"]

    c = sweep(accuracy)
    probe = fit(features, labels, classes, c, probes[-1])
    return LinearProbe(probe.weight.cpu(), probe.bias.cpu(), c)
