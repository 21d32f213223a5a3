"""RangeAugment: its ranges, what it does to a batch, its curriculum, and its place in the optimizer."""

import numpy as np
import pytest
import torch
from torch import nn

from training.config import OptimConfig
from training.engine.optim import build_optimizer
from training.models.range_augment import RangeAugment, curriculum_loss


def test_ranges_at_the_start():
    augment = RangeAugment((0, 0, 0), (1, 1, 1))
    assert sum(parameter.numel() for parameter in augment.parameters()) == 6
    assert augment.magnitude_range("brightness").tolist() == pytest.approx([0.598, 8.376], abs=5e-4)
    assert augment.magnitude_range("contrast").tolist() == augment.magnitude_range("brightness").tolist()
    assert augment.magnitude_range("noise").tolist() == pytest.approx([2.5e-5, 0.525], rel=1e-3)
    for name, (low, high) in {"brightness": ((0.1, 0.9), (1.1, 10)), "noise": ((0, 5e-5), (1e-4, 1))}.items():
        for raw, place in ((-50.0, 0), (50.0, 1)):
            augment.ranges[name].data.fill_(raw)
            assert augment.magnitude_range(name).tolist() == pytest.approx([low[place], high[place]], abs=1e-6)


def test_augmented_images_and_their_error():
    torch.manual_seed(0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    augment, clean = RangeAugment(mean, std), torch.rand(8, 3, 16, 16)
    mean_, std_ = (torch.tensor(own).view(3, 1, 1) for own in (mean, std))
    shown, error = augment((clean - mean_) / std_)
    pixels = (shown * std_ + mean_).detach()
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    expected = ((255 * (pixels - clean).double().numpy()) ** 2).mean(axis=(1, 2, 3))
    assert np.allclose(error.detach(), expected, rtol=1e-4)
    curriculum_loss(error, 0, 10).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in augment.parameters())


def test_each_operation_hits_half_of_the_batch():
    augment, flat = RangeAugment((0, 0, 0), (1, 1, 1)), torch.full((10, 3, 8, 8), 0.05)
    ramp = torch.linspace(0.02, 0.08, 8).expand(10, 3, 8, 8)

    def changed(pixels, keep):
        augment.BOUNDS = {keep: RangeAugment.BOUNDS[keep]}
        return augment(pixels)[1] > 1e-6

    for keep, pixels in (("brightness", flat), ("noise", flat), ("contrast", ramp)):
        torch.manual_seed(1)
        first, second = changed(pixels, keep), changed(pixels, keep)
        assert (int(first.sum()), int(second.sum())) == (5, 5)
        assert not torch.equal(first, second)
    assert not changed(flat, "contrast").any(), "contrast keeps a flat image"


@pytest.mark.parametrize(("batch", "chosen"), [(1, 1), (2, 1), (3, 1), (5, 2), (10, 5), (11, 5)])
def test_a_half_is_corenets(batch, chosen):
    """max(1, B // 2), not rounded up."""
    augment, flat = RangeAugment((0, 0, 0), (1, 1, 1)), torch.full((batch, 3, 8, 8), 0.05)
    augment.BOUNDS = {"brightness": RangeAugment.BOUNDS["brightness"]}
    assert int((augment(flat)[1] > 1e-6).sum()) == chosen


def test_the_ranges_six_scalars_decay():
    """Corenet exempts tensors of one dimension; these are 0-dimensional there."""
    augment = RangeAugment((0, 0, 0), (1, 1, 1))
    task = nn.ModuleDict({"augment": augment, "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(task, OptimConfig(lr=0.1, weight_decay=0.2))
    before = {name: value.detach().clone() for name, value in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, value in task.named_parameters() if not torch.equal(value, before[name])}
    assert decayed == {"head.weight", *(f"augment.ranges.{name}" for name in RangeAugment.BOUNDS)}
    for name in RangeAugment.BOUNDS:
        torch.testing.assert_close(augment.ranges[name].detach(), before[f"augment.ranges.{name}"] * (1 - 0.1 * 0.2))


def test_curriculum_goes_from_40_to_20_decibel():
    def loss(error, step):
        return curriculum_loss(torch.tensor([error]), step, 100).item()

    for step, target in ((0, 6.5025), (50, (6.5025 + 650.25) / 2), (100, 650.25)):
        assert loss(target, step) == pytest.approx(0, abs=1e-6)
        assert loss(target + 3, step) == pytest.approx(100 / 65025 * 2.5, rel=1e-4)  # smooth L1: |3| - 1/2
        assert loss(target + 0.5, step) == pytest.approx(100 / 65025 * 0.125, rel=1e-2)


def test_contrast_is_about_each_channels_mean():
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 6, 6) * torch.tensor([0.2, 0.5, 1.0]).view(3, 1, 1)
    shown = (
        RangeAugment((0, 0, 0), (1, 1, 1))
        ._apply_operation("contrast", pixels, torch.rand(4, 1, 1, 1))
        .detach()
        .double()
        .numpy()
    )
    before = pixels.double().numpy()
    mean = before.mean(axis=(2, 3), keepdims=True)
    assert np.allclose(shown.mean(axis=(2, 3), keepdims=True), mean, atol=1e-6)
    magnitudes = (shown - mean) / (before - mean)
    assert np.allclose(magnitudes, magnitudes[:, :1, :1, :1], rtol=1e-2)
    assert len({round(value, 3) for value in magnitudes[:, 0, 0, 0].tolist()}) == 4
