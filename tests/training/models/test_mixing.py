"""Mixup, CutMix and erasing against timm's and by their definitions."""

import numpy as np
import pytest
import timm.data.mixup
import torch

from shards_spec.files import UserError
from training.config import MixConfig
from training.engine.gradients import split
from training.models.mixing import draw_mix, mixed_images, mixed_targets

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(count=6, side=16, seed=0):
    torch.manual_seed(seed)
    images = torch.rand(count, 3, side, side)
    return {"images": images, "targets": torch.arange(count) % 4, "keys": [str(number) for number in range(count)]}


def test_without_options_nothing_is_drawn():
    batch = batch_of()
    state = torch.get_rng_state()
    drawn = draw_mix(MixConfig(), batch)
    assert drawn.keys() == batch.keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mixed_images(drawn), batch["images"])
    assert torch.equal(mixed_targets(drawn, 4, 0.0).argmax(1), batch["targets"])


def test_mixup_is_timms():
    drawn = draw_mix(MixConfig(mixup=0.8), batch_of())
    share = drawn["share"][0].item()
    assert 0 < share < 1
    assert len(drawn["share"].unique()) == 1
    theirs = timm.data.mixup.Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=4)
    theirs._params_per_batch = lambda: (share, False)
    images, targets = theirs(batch_of()["images"].clone(), batch_of()["targets"])
    assert torch.allclose(mixed_images(drawn), images, atol=1e-6)
    assert torch.allclose(mixed_targets(drawn, 4, 0.1), targets, atol=1e-6)


def test_cutmix_is_timms():
    drawn = draw_mix(MixConfig(cutmix=1.0), batch_of(seed=3))
    top, left, bottom, right = drawn["mix_box"][0].tolist()
    assert (bottom - top) * (right - left) > 0
    share = drawn["share"][0].item()
    assert share == pytest.approx(1 - (bottom - top) * (right - left) / 256)
    images = batch_of(seed=3)["images"].clone()
    images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    assert torch.equal(mixed_images(drawn), images)
    expected = timm.data.mixup.mixup_target(batch_of()["targets"], 4, share, 0.1)
    assert torch.allclose(mixed_targets(drawn, 4, 0.1), expected, atol=1e-6)


def test_shares_and_boxes_are_distributed_as_timms():
    torch.manual_seed(0)
    np.random.seed(0)
    theirs = timm.data.mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    ours, expected = [], []
    for _ in range(3000):
        drawn = draw_mix(
            MixConfig(mixup=0.8, cutmix=1.0), {"images": torch.zeros(1, 3, 32, 32), "targets": torch.zeros(1)}
        )
        ours.append((drawn["share"].item(), float(drawn["mix_box"][0, 2] > drawn["mix_box"][0, 0])))
        share, is_cut = theirs._params_per_batch()
        if is_cut:
            _, share = timm.data.mixup.cutmix_bbox_and_lam((1, 3, 32, 32), share)
        expected.append((float(share), float(is_cut and share < 1)))
    ours, expected = np.array(ours), np.array(expected)
    assert np.abs(ours.mean(0) - expected.mean(0)).max() < 0.03
    assert np.abs(np.quantile(ours[:, 0], (0.1, 0.5, 0.9)) - np.quantile(expected[:, 0], (0.1, 0.5, 0.9))).max() < 0.05


def test_erasing():
    torch.manual_seed(0)
    drawn = draw_mix(MixConfig(erasing=0.25), batch_of(400))
    changed = (mixed_images(drawn) != batch_of(400)["images"]).all(1)
    boxes = drawn["erased_boxes"]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert torch.equal(changed.sum((1, 2)), areas)
    assert (areas > 0).float().mean() == pytest.approx(0.25, abs=0.07)
    assert areas[areas > 0].min() >= 0.01 * 256
    assert areas.max() <= 0.37 * 256
    erased = mixed_images(drawn)[areas > 0]
    assert erased.min() < 0  # noise; the images are in [0, 1]


def test_chunks_are_mixed_like_the_whole_batch():
    config = MixConfig(mixup=0.8, cutmix=1.0)
    for seed in range(4):
        drawn = draw_mix(config, batch_of(6, seed=seed))
        parts = [mixed_images(part) for part in split(drawn, 3)]
        assert torch.equal(torch.cat(parts), mixed_images(drawn))
    drawn = draw_mix(MixConfig(mixup=0.8, erasing=1.0), batch_of())
    assert torch.equal(drawn["partner_erased"], drawn["erased_boxes"].flip(0))


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"cutmix": float("inf")}, {"erasing": 1.5}])
def test_options_out_of_range(options):
    with pytest.raises(UserError, match="--" + next(iter(options))):
        MixConfig(**options)
