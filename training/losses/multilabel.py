"""Classification with several labels per image: losses on index lists, and CatLIP's RangeAugment.

Labels are (B, L) int64 class indices, each at most once per row, filled up with `PAD`. The 0/1 target (B, K) is never
made: its product with the logits is a gather, whose gradient is scattered.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = -1


def sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy summed over classes (CatLIP, arXiv 2404.15653; its code's "batch_mean" before the mean).

    (B, K), (B, L) -> (B,) float32. sum_k BCE(z_k, t_k) = sum_k log(1 + e^z_k) - sum over the labels of z_k.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        return F.softplus(logits, threshold=80.0).sum(dim=1) - _of_labels(logits, labels).sum(dim=1)


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels' uniform distribution (SuperClass, arXiv 2411.03313); 0 without labels.

    (B, K), (B, L) -> (B,) float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        count = (labels != PAD).sum(dim=1)
        own = _of_labels(logits, labels).sum(dim=1) / count.clamp(min=1)
        return torch.where(count > 0, torch.logsumexp(logits, dim=1) - own, 0.0)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, L) logits of the labels, 0 at the padding."""
    return logits.gather(1, labels.clamp(min=0)) * (labels != PAD)


def mean_loss(losses: Tensor, counts: Tensor, drop_empty: bool) -> Tensor:
    """Mean of (B,) losses over all rows, or over those whose (B,) number of labels is not 0."""
    if not drop_empty:
        return losses.mean()
    return losses[counts > 0].sum() / (counts > 0).sum().clamp(min=1)


def pad_labels(rows: list[list[int]]) -> Tensor:
    """Lists of indices -> (B, L) int64, L the longest of them."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64).reshape(
        len(rows), longest
    )


def frequency_bias(documents: list[int], captions: int) -> Tensor:
    """(K,) log-odds of a class in a caption, from in how many of ``captions`` it occurs: SigLIP's idea, not CatLIP's.

    With it sigmoid and softmax start from the classes' frequencies rather than from one half each.
    """
    share = torch.tensor(documents, dtype=torch.float64) / captions
    return torch.logit(share, eps=0.5 / captions).float()


class RangeAugment(nn.Module):
    """Brightness, contrast and noise of learned ranges (Mehta et al., arXiv 2212.10553), as CatLIP's code applies them.

    Each operation hits a fresh random half of the batch (``max(1, B // 2)`` images), in an order drawn per batch, with
    a magnitude per image. The ranges' six scalars are squashed, decay as matrices do
    (`training.engine.optim.decays`), and are pulled by `curriculum_loss` to a distortion that grows in training.
    """

    SPANS = {  # operation: raw start and allowed range of its low end, then of its high end
        "brightness": ((0.5, 0.1, 0.9), (1.5, 1.1, 10.0)),
        "contrast": ((0.5, 0.1, 0.9), (1.5, 1.1, 10.0)),
        "noise": ((0.0, 0.0, 5e-5), (0.1, 1e-4, 1.0)),
    }

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.ranges = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor([start for start, _, _ in ends])) for name, ends in self.SPANS.items()}
        )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def span(self, name: str) -> Tensor:
        """(2,) low and high end of an operation's magnitude."""
        lows, highs = zip(*((low, high) for _, low, high in self.SPANS[name]), strict=True)
        low, high = self.ranges[name].new_tensor(lows), self.ranges[name].new_tensor(highs)
        return low + (high - low) * torch.sigmoid(self.ranges[name])

    def draw(self, count: int) -> Tensor:
        """(B, operations, 2) on the CPU, in the order of application: the operation's number, the same in all rows,
        and where in its range an image's magnitude is, 0 to 1, or -1 for an image that it does not hit.

        Of a batch that is taken in chunks, each chunk's forward pass gets its rows.
        """
        drawn = torch.full((count, len(self.SPANS), 2), -1.0)
        for turn, index in enumerate(torch.randperm(len(self.SPANS)).tolist()):
            chosen = torch.randperm(count)[: max(1, count // 2)]
            drawn[:, turn, 0] = index
            drawn[chosen, turn, 1] = torch.rand(len(chosen))
        return drawn

    def forward(self, images: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalised -> the same augmented, and (B,) mean squared error on the scale of 0 to 255.

        ``drawn`` is `draw`'s, or rows of it; None draws for these images.
        """
        drawn = self.draw(len(images)) if drawn is None else drawn
        with torch.autocast(images.device.type, enabled=False):
            clean = images.float() * self.std + self.mean
            pixels = clean
            names = list(self.SPANS)
            for turn in range(len(names)):
                places = drawn[:, turn, 1]
                chosen, shares = (places >= 0).nonzero().flatten(), places[places >= 0].view(-1, 1, 1, 1)
                chosen, shares = chosen.to(clean.device), shares.to(clean.device)
                changed = self._apply_one(names[int(drawn[0, turn, 0])], pixels[chosen], shares)
                pixels = pixels.index_copy(0, chosen, changed)
            pixels = pixels.clamp(0, 1)
            error = (255 * (pixels - clean)).square().mean(dim=(1, 2, 3))
            return (pixels - self.mean) / self.std, error

    def _apply_one(self, name: str, pixels: Tensor, shares: Tensor) -> Tensor:
        low, high = self.span(name)
        magnitude = low + (high - low) * shares
        if name == "brightness":
            return pixels * magnitude
        if name == "contrast":
            return torch.lerp(pixels.mean(dim=(2, 3), keepdim=True), pixels, magnitude)
        return pixels + magnitude * torch.randn_like(pixels)


def curriculum_loss(errors: Tensor, step: int, total: int) -> Tensor:
    """RangeAugment's loss of (B,) errors: smooth L1 to a target of 40 dB that falls to 20 dB, in error, by a cosine."""
    easy, hard = (255**2 / 10 ** (decibel / 10) for decibel in (40, 20))
    target = hard + (easy - hard) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
    return (100 / 255**2) * F.smooth_l1_loss(errors.float(), torch.full_like(errors, target, dtype=torch.float32))
