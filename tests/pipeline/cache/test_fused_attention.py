"""Attention by torch's fused kernel: the features of open_clip's own, and other blocks are left alone."""

import pytest
import torch
from small_data import tiny_coca
from small_training import tiny_clip

from pipeline.cache.fused_attention import fuse_attention
from shards_spec.models import load_model


@pytest.mark.parametrize("make", [tiny_clip, tiny_coca])
def test_features_are_those_of_the_installed_open_clip(make, tmp_path, monkeypatch):
    model = load_model(make(tmp_path / "model"), random_weights=True).model
    pixels = torch.randn(3, 3, *[model.visual.image_size[0]] * 2)
    length = model.context_length if make is tiny_clip else model.text.context_length
    tokens = torch.randint(5, 500, (2, length))
    called = []
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        expected = model.encode_image(pixels), model.encode_text(tokens)
        assert fuse_attention(model) >= 2
        assert fuse_attention(model) == 0, "they are changed"
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **options: called.append(options) or attend(*args, **options),
        )
        found = model.encode_image(pixels), model.encode_text(tokens)
    assert {"is_causal": False} in called, "images"
    assert ({"is_causal": True} in called) == (make is tiny_clip), "CoCa's text tower has masks of its own"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_timm_model_is_left_alone():
    import timm

    assert fuse_attention(timm.create_model("test_vit", num_classes=0)) == 0
