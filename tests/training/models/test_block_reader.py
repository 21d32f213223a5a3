"""Reading blocks of ViTs and Swins, tied or not; fact 13 of the MiniViT sheet."""

from functools import partial

import pytest
import timm
import torch

import training.models.minivit  # noqa: F401  registers the names
from training.models.block_reader import BlockReader, stage_pairs
from training.models.taps import run_with_taps
from training.models.weight_tying import tied_blocks, untie

pytestmark = pytest.mark.usefixtures("one_thread")


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name).eval()


def read(model, blocks, images):
    with torch.no_grad():
        return BlockReader(model).read(partial(run_with_taps, model), images, blocks)


# fact 13
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mini_swin_tiny_patch4_window7_224", [1, 3, 5, 7, 9, 11]), ("mini_swin_small_patch4_window7_224", None)],
)
def test_the_released_pairs_have_the_same_windows_and_tokens(name, blocks):
    teacher = on_meta("swin_base_patch4_window7_224")
    student = on_meta(name)
    theirs = [1, 3, 9, 15, 21, 23]
    pairs = stage_pairs(BlockReader(student).depths, BlockReader(teacher).depths)
    assert pairs == list(zip(blocks or theirs, theirs, strict=True))
    images = torch.empty(1, 3, 224, 224, device="meta")
    for model, numbers in ((student, blocks or theirs), (teacher, theirs)):
        found = read(model, numbers, images)
        windows = [tuple(each.shape[:2]) for each in found.projections]
        assert windows == [(64, 49), (16, 49), (4, 49), (4, 49), (4, 49), (1, 49)]
        assert [each.shape[1] for each in found.hidden] == [3136, 784, 196, 196, 196, 49]
        assert found.logits.shape == (1, 1000)


def test_pairs_of_other_depths():
    assert stage_pairs((4,), (8,), (4,)) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert stage_pairs((12,), (12,)) == [(3, 3), (7, 7), (11, 11)]
    with pytest.raises(ValueError, match="1 stages cannot follow a teacher of 2"):
        stage_pairs((4,), (4, 4))
    with pytest.raises(ValueError, match="5 pairs in stages of 4 and 8 blocks"):
        stage_pairs((4,), (8,), (5,))


@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_a_tied_models_readings_are_those_of_its_blocks(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 32, 32)
    blocks = range(len(BlockReader(model).names))
    tied = read(model, blocks, images)
    for each in tied_blocks(model).values():
        untie(each)
    apart = read(model, blocks, images)
    assert all(torch.equal(one, other) for one, other in zip(tied.projections, apart.projections, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(tied.hidden, apart.hidden, strict=True))
    assert torch.equal(tied.logits, apart.logits)
    assert not torch.equal(tied.projections[0], tied.projections[1])


def test_prefix_tokens_are_left_out():
    model = timm.create_model("test_vit", img_size=32).eval()
    found = read(model, [1], torch.randn(2, 3, 32, 32))
    assert model.num_prefix_tokens == 1
    assert found.projections[0].shape[:2] == found.hidden[0].shape[:2] == (2, 4)


def test_other_models_have_no_blocks():
    with pytest.raises(ValueError, match="ResNet has no blocks to read"):
        BlockReader(timm.create_model("test_resnet"))
