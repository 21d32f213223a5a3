"""RangeAugment (Mehta et al., arXiv 2212.10553): augmentation of learned ranges, as in CatLIP's released code."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOT_CHOSEN = -1.0
EASY_DECIBEL = 40  # target PSNR at the first step
HARD_DECIBEL = 20  # target PSNR at the last step


class Bound(NamedTuple):
    """One learned end of a range of magnitudes: ``low + (high - low) * sigmoid(parameter)``."""

    start: float  # the parameter's initial value
    low: float
    high: float


class RangeAugment(nn.Module):
    """Brightness, contrast and noise on the device, with magnitudes drawn from learned ranges.

    Each operation changes a fresh random half of the batch (``max(1, B // 2)`` images, as in the released code) with a
    magnitude per image; the order of the operations is drawn per batch. The ranges' six scalars are subject to weight
    decay (`training.engine.optim.decays`), and `curriculum_loss` moves them to a distortion that grows in training.

    Args:
        mean: Mean per channel by which the images were normalised.
        std: Standard deviation per channel by which the images were normalised.
    """

    BOUNDS = {  # operation: lower and upper end of its magnitude
        "brightness": (Bound(0.5, 0.1, 0.9), Bound(1.5, 1.1, 10.0)),
        "contrast": (Bound(0.5, 0.1, 0.9), Bound(1.5, 1.1, 10.0)),
        "noise": (Bound(0.0, 0.0, 5e-5), Bound(0.1, 1e-4, 1.0)),
    }

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.ranges = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor([bound.start for bound in ends])) for name, ends in self.BOUNDS.items()}
        )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def magnitude_range(self, name: str) -> Tensor:
        """Return the lower and the upper end of an operation's magnitude, (2,)."""
        parameter = self.ranges[name]
        low = _on_device_of(parameter, [bound.low for bound in self.BOUNDS[name]])
        high = _on_device_of(parameter, [bound.high for bound in self.BOUNDS[name]])
        ends: Tensor = low + (high - low) * torch.sigmoid(parameter)
        return ends

    def draw(self, count: int) -> Tensor:
        """Draw the operations of a batch of ``count`` images.

        Drawn for the whole batch: where it is processed in chunks, the forward pass of a chunk gets its rows.

        Returns:
            (count, operations, 2) on the CPU, in the order of application. The first number is the operation's index,
            the same in all rows; the second is an image's place in the operation's range, from 0 to 1, or -1 where the
            operation leaves the image as it is.
        """
        drawn = torch.full((count, len(self.BOUNDS), 2), NOT_CHOSEN)
        for turn, operation in enumerate(torch.randperm(len(self.BOUNDS)).tolist()):
            chosen = torch.randperm(count)[: max(1, count // 2)]
            drawn[:, turn, 0] = operation
            drawn[chosen, turn, 1] = torch.rand(len(chosen))
        return drawn

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its operations change places, each order a new graph
    def forward(self, images: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Augment normalised images.

        Args:
            images: (B, 3, S, S), normalised.
            drawn: (B, operations, 2), what `draw` returned, or rows of it; None draws for these images.

        Returns:
            The augmented images, normalised, (B, 3, S, S) float32, and their mean squared error, (B,), on the scale of
            0 to 255.
        """
        drawn = self.draw(len(images)) if drawn is None else drawn
        operations = list(self.BOUNDS)
        with torch.autocast(images.device.type, enabled=False):
            clean = images.float() * self.std + self.mean
            pixels = clean
            for turn in range(len(operations)):
                operation = operations[int(drawn[0, turn, 0])]
                fractions = drawn[:, turn, 1]
                is_chosen = fractions >= 0
                chosen = is_chosen.nonzero().flatten().to(clean.device, non_blocking=True)
                chosen_fractions = fractions[is_chosen].view(-1, 1, 1, 1).to(clean.device, non_blocking=True)
                changed = self._apply_operation(operation, pixels[chosen], chosen_fractions)
                pixels = pixels.index_copy(0, chosen, changed)
            pixels = pixels.clamp(0, 1)
            error = (255 * (pixels - clean)).square().mean(dim=(1, 2, 3))
            return (pixels - self.mean) / self.std, error

    def _apply_operation(self, name: str, pixels: Tensor, fractions: Tensor) -> Tensor:
        """Apply one operation to (n, 3, S, S) pixels in [0, 1], at (n, 1, 1, 1) fractions of its range."""
        low, high = self.magnitude_range(name)
        magnitude = low + (high - low) * fractions
        changed: Tensor
        if name == "brightness":
            changed = pixels * magnitude
        elif name == "contrast":
            changed = torch.lerp(pixels.mean(dim=(2, 3), keepdim=True), pixels, magnitude)
        else:
            changed = pixels + magnitude * torch.randn_like(pixels)
        return changed


def _on_device_of(parameter: Tensor, values: list[float]) -> Tensor:
    """Return numbers as the parameter's type, without waiting for its device as ``new_tensor`` would."""
    return torch.tensor(values, dtype=parameter.dtype).to(parameter.device, non_blocking=True)


def curriculum_loss(errors: Tensor, step: int, total: int) -> Tensor:
    """Return RangeAugment's loss: smooth L1 between the images' errors and a target that grows over the training.

    The target falls from 40 dB to 20 dB (PSNR) by half a cosine in terms of the error.

    Args:
        errors: (B,) mean squared errors on the scale of 0 to 255.
        step: The step, from 0.
        total: Steps of the training.
    """
    easy = 255**2 / 10 ** (EASY_DECIBEL / 10)
    hard = 255**2 / 10 ** (HARD_DECIBEL / 10)
    progress = min(1.0, step / max(1, total))
    target = hard + (easy - hard) * 0.5 * (1 + math.cos(math.pi * progress))
    return (100 / 255**2) * F.smooth_l1_loss(errors.float(), torch.full_like(errors, target, dtype=torch.float32))
