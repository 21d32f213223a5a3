"""An exponential moving average of the student's weights (Polyak averaging)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

NONE_FIXED: Mapping[str, Tensor] = {}


class ModelEma:
    """``average = decay * average + (1 - decay) * weights`` after each step, running statistics of norms included.

    It starts as a copy of the first weights. Tied weights come under each of their names.

    Args:
        student: The student.
        decay: Share of the former average.
        fixed: Weights that do not move, and are their own average, by the names of the student's state dict.

    Attributes:
        weights: The averages by these names.
    """

    def __init__(self, student: nn.Module, decay: float, fixed: Mapping[str, Tensor] = NONE_FIXED) -> None:
        self._update_all = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._fixed = fixed
        self._live = self._moving(student)
        self.weights = {name: value.clone() for name, value in self._live.items()} | dict(fixed)

    def _moving(self, student: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in floating_state(student).items() if name not in self._fixed}

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the weights after a step."""
        live = self._moving(student)
        self._update_all([self.weights[name] for name in live], list(live.values()), 0)

    def keep_from(self, before: "ModelEma") -> None:
        """Take the averages of a former student's tensors, where the new student has the same ones.

        The same tensor is one in the same storage of the same shape, whatever its name is now: a student that lost a
        layer counts the ones behind it differently.
        """
        averages = {_identity(value): before.weights[name] for name, value in before._live.items()}
        for name, value in self._live.items():
            average = averages.get(_identity(value))
            if average is not None:
                self.weights[name] = average.clone()

    @contextmanager
    def swap_in(self, student: nn.Module) -> Iterator[None]:
        """Within, the student has the averaged weights; fixed ones stay as they are."""
        live = self._moving(student)
        original = {name: value.clone() for name, value in live.items()}
        _copy(self.weights, live)
        try:
            yield
        finally:
            _copy(original, live)


def floating_state(student: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state dict."""
    return {name: value for name, value in student.state_dict().items() if value.is_floating_point()}


def _identity(value: Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
