"""CatLIP's vision transformers and the classifier around them."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_catlip import TINY
from torch import nn

from shards_spec.files import UserError
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.export import ExportConfig, to_timm
from training.models.catlip import resize_positions
from training.models.classifier import (
    Classifier,
    describe_classifier,
    is_classifier,
    load_classifier,
    new_classifier,
)

COUNTS = {  # backbone, with K = 24,320, with K = 1000
    "base": (85_955_328, 104_657_408, 86_724_328),
    "large": (303_838_208, 328_766_208, 304_863_208),
    "huge": (631_998_720, 663_152_640, 633_279_720),
}
HEADS = {"base": 12, "large": 16, "huge": 20}


def tiny(**options):
    torch.manual_seed(0)
    small = {"embed_dim": 64, "num_heads": 2, "img_size": 32}
    return timm.create_model("catlip_vit_tiny", num_classes=5, **{**small, **options})


def words(*wnids):
    return Vocabulary(tuple((wnid, f"lemma{wnid}", 9 - rank, 1) for rank, wnid in enumerate(wnids)), {"rule": "r"})


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_to_the_unit(size):  # fact 13
    found = []
    with torch.device("meta"):
        for classes in (0, 24_320, 1000):
            model = timm.create_model(f"catlip_vit_{size}_patch16_224", num_classes=classes)
            found.append(sum(parameter.numel() for parameter in model.parameters()))
    assert tuple(found) == COUNTS[size]
    assert {block.attn.num_heads for block in model.blocks} == {HEADS[size]}
    assert {block.attn.head_dim for block in model.blocks} == {64}


@pytest.mark.parametrize(("side", "tokens"), [(128, 64), (144, 81), (160, 100), (224, 196), (320, 400)])
def test_tokens_of_a_side(side, tokens):  # fact 13
    model = tiny(img_size=224, depth=1).eval()
    with torch.no_grad():
        assert model.forward_features(torch.rand(1, 3, side, side)).shape == (1, tokens + 1, 64)
        assert model(torch.rand(1, 3, side, side)).shape == (1, 5)


def test_stem_by_hand():
    model = timm.create_model("catlip_vit_tiny", num_classes=5, embed_dim=256, num_heads=4).eval()
    stem = model.patch_embed
    kinds = [type(layer).__name__ for layer in stem.layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "GELU", "Conv2d", "BatchNorm2d", "GELU", "Conv2d"]
    first, second, third = (layer for layer in stem.layers if isinstance(layer, nn.Conv2d))
    assert (first.out_channels, second.out_channels, third.out_channels) == (64, 64, 256)
    assert (first.bias is None, second.bias is None, third.bias is None) == (True, True, False)
    image = torch.rand(1, 3, 32, 32)
    padded = np.pad(image[0].double().numpy(), ((0, 0), (1, 1), (1, 1)))
    with torch.no_grad():
        got = first(image)[0]
    assert got.shape == (64, 8, 8)
    for row, column in ((0, 0), (3, 5), (7, 7)):  # the window of output (r, c) begins at pixel 4r - 1
        window = padded[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        expected = (first.weight.detach().double().numpy() * window).sum(axis=(1, 2, 3))
        assert np.allclose(got[:, row, column], expected, atol=1e-5)


def test_positions_are_on_patches_and_not_on_cls():
    model = tiny().eval()
    assert model.pos_embed.shape == (1, 4, 64)
    with torch.no_grad():
        tokens = model._pos_embed(torch.zeros(2, 2, 2, 64))
    assert torch.equal(tokens[:, :1], model.cls_token.expand(2, 1, 64))
    assert torch.equal(tokens[0, 1:], model.pos_embed[0])


def test_pooling_is_the_normalised_cls_token():
    model, images = tiny().eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(images))
        cls = model.blocks(tokens)[:, 0].double().numpy()
        normed = (cls - cls.mean(1, keepdims=True)) / np.sqrt(cls.var(1, keepdims=True) + 1e-6)
        assert np.allclose(model(images), normed @ model.head.weight.T.double().numpy(), atol=1e-5)


def test_positions_along_the_raster_are_one_dimensional():
    source = torch.randn(1, 16, 3)
    got = resize_positions(source, (4, 4), (6, 6), "raster")[0].numpy()
    places = (np.arange(36) + 0.5) * 16 / 36 - 0.5
    expected = np.stack([np.interp(places, np.arange(16), source[0, :, c].double().numpy()) for c in range(3)], 1)
    assert np.allclose(got, expected, atol=1e-5)  # it computes in float32: some roundings of places and values, 6e-8


def test_positions_over_the_grid_are_separable():
    source = torch.randn(1, 12, 2)
    got = resize_positions(source, (3, 4), (5, 8), "grid")[0].numpy().reshape(5, 8, 2)

    def matrix(old, new):
        places = (np.arange(new) + 0.5) * old / new - 0.5
        return np.stack([np.interp(places, np.arange(old), row) for row in np.eye(old)], 1)

    plane = source[0].double().numpy().reshape(3, 4, 2)
    expected = np.einsum("ih,hwc,jw->ijc", matrix(3, 5), plane, matrix(4, 8))
    assert np.allclose(got, expected, atol=1e-5)
    assert resize_positions(source, (3, 4), (3, 4), "raster") is source


def test_first_weights():
    model = timm.create_model("catlip_vit_tiny", num_classes=400, embed_dim=256, num_heads=4, img_size=224)
    conv = model.patch_embed.layers[3]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 4)) ** 0.5, rel=0.05)  # Kaiming, fan-out
    for weight, std in ((model.head.weight, 0.02), (model.cls_token, 0.02), (model.pos_embed, 256**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    assert not model.head.bias.any()
    assert not model.blocks[0].mlp.fc1.bias.any()


def test_a_side_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny()(torch.rand(1, 3, 40, 40))


def test_any_timm_vit_can_be_the_backbone():
    loaded = new_classifier("timm:vit_tiny_patch16_224", 7)
    assert loaded.model(torch.rand(1, 3, 224, 224)).shape == (1, 7)
    assert loaded.model(torch.rand(1, 3, 128, 128)).shape == (1, 7)
    assert loaded.model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not loaded.model.head.bias.any()
    with pytest.raises(UserError, match="no model 'timm:vit_tinny_patch16_224' in timm: did you mean vit_tiny_patch16"):
        new_classifier("timm:vit_tinny_patch16_224", 7)
    with pytest.raises(UserError, match="--model 'ViT-B-32': a classifier is named timm:NAME"):
        new_classifier("ViT-B-32", 7)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "fastvit_mci0", "mobilenetv3_small_050"])
def test_any_convolutional_network_of_timm_can_be_the_backbone(name):
    loaded = new_classifier(f"timm:{name}", 7)
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(loaded.model.head(loaded.model.encode_image(images)), loaded.model(images))
    assert loaded.model(images).shape == (2, 7)


def test_a_network_for_one_side_is_refused_by_name():
    with pytest.raises(UserError, match=r"timm:cait_xxs24_224.*does not serve as a classifier"):
        new_classifier("timm:cait_xxs24_224", 7)


def test_weights_depend_on_the_seed_alone():
    def weights(seed):
        return new_classifier(TINY, 5, seed=seed).model.state_dict()

    one = weights(1)
    same = weights(1)
    other = weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["trunk.head.weight"], other["trunk.head.weight"])


def test_images_are_not_normalised():
    loaded = new_classifier(TINY, 5)
    assert (loaded.mean, loaded.std, loaded.image_size, loaded.tokenizer) == ((0, 0, 0), (1, 1, 1), 48, None)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(loaded.normalise(pixels).flatten(), torch.tensor([0.0, 0.2, 1.0]))


def test_features_are_what_the_head_sees():
    model, images = new_classifier(TINY, 5).model, torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(images), model.head(model.encode_image(images)), atol=1e-6)
        assert torch.allclose(model.encode_image(images, normalize=True).norm(dim=1), torch.ones(2))


def test_another_vocabulary_is_refused_by_name():
    ours, other = words("n1", "n2"), words("n1", "n3")
    trained = new_classifier(TINY, 2, vocabulary=ours).model
    stored = {f"student.{name}": value for name, value in trained.state_dict().items()}
    assert bytes(stored["student.vocabulary_sha256"].tolist()).hex() == ours.sha256
    holder = nn.ModuleDict({"student": new_classifier(TINY, 2, vocabulary=ours, seed=1).model})
    holder.load_state_dict(stored)
    holder = nn.ModuleDict({"student": new_classifier(TINY, 2, vocabulary=other).model})
    with pytest.raises(UserError) as error:
        holder.load_state_dict(stored)
    for part in (ours.sha256[:12], other.sha256[:12], "lemman1, lemman3"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no vocabulary"):
        new_classifier(TINY, 2).model.load_state_dict(trained.state_dict())


def test_description_and_back(tmp_path):
    vocabulary = words("n1", "n2", "n3")
    student = new_classifier(TINY, 3, vocabulary=vocabulary)
    assert not is_classifier(str(tmp_path))
    with pytest.raises(UserError, match=r"classifier\.json is not there"):
        load_classifier(str(tmp_path))
    describe_classifier(str(tmp_path), student)
    again = load_classifier(str(tmp_path))
    assert is_classifier(str(tmp_path))
    again.model.load_state_dict(student.model.state_dict())
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(images), student.model(images))
    assert again.model.vocabulary.sha256 == vocabulary.sha256
    assert (again.mean, again.std, again.image_size) == (student.mean, student.std, student.image_size)


def test_names_of_classes_are_kept(tmp_path):
    loaded = new_classifier(TINY, 2)
    named = Classifier(TINY, loaded.model.trunk, None, ["red", "blue"])
    describe_classifier(str(tmp_path), type(loaded)(named, None, {}, 32, loaded.mean, loaded.std))
    assert load_classifier(str(tmp_path)).model.names == ["red", "blue"]


def test_export_for_timm(tmp_path):
    vocabulary = words("n1", "n2", "n3")
    student, folder = new_classifier(TINY, 3, vocabulary=vocabulary, seed=4), str(tmp_path / "export")
    to_timm.write(Path(folder), student, ExportConfig("run", folder, format="timm"))
    model, images = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), student.model(images))
    said = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (said["architecture"], said["label_names"]) == ("catlip_vit_tiny", ["n1", "n2", "n3"])
    assert read_vocabulary(f"{folder}/vocabulary.tsv").sha256 == vocabulary.sha256
    again = new_classifier(TINY, 9, pretrained=f"{folder}/model.safetensors")  # with another head
    with torch.no_grad():
        assert torch.equal(again.model.encode_image(images), student.model.encode_image(images))
