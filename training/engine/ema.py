"""An exponential moving average of the student's weights (Polyak averaging)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEma:
    """``average = decay * average + (1 - decay) * weights`` after each step, running statistics of norms included.

    It starts as a copy of the first weights. Tied weights come under each of their names.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.update_all = get_ema_multi_avg_fn(decay)
        self.weights = {name: value.clone() for name, value in _floating(student).items()}

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the weights after a step."""
        self.update_all(list(self.weights.values()), list(_floating(student).values()), 0)

    @contextmanager
    def swap_in(self, student: nn.Module) -> Iterator[None]:
        """The student has the averaged weights."""
        live = _floating(student)
        own = {name: value.clone() for name, value in live.items()}
        _copy(self.weights, live)
        try:
            yield
        finally:
            _copy(own, live)


def _floating(student: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in student.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
