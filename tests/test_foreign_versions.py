"""What we count on in versions of others. The floors were tried too: torch 2.6.0, open_clip 3.1.0, timm 1.0.26."""

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from small_data import tiny_coca

from shards_spec.models import load_model
from training.recipes.coca import CocaTask

ROOT = Path(__file__).parents[1]


def release(name):
    return tuple(int(part) for part in version(name).split("+")[0].split(".")[:3])


def test_versions_are_within_what_was_tried():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {"torch>=2.6", "open_clip_torch>=3.1,<4", "timm>=1.0.26"} <= set(wanted)
    assert release("torch") >= (2, 6, 0)
    assert (3, 1, 0) <= release("open_clip_torch") < (4, 0, 0)
    assert release("timm") >= (1, 0, 26)


@pytest.mark.parametrize(
    "function",
    [
        timm.models.load_state_dict,
        timm.models.load_checkpoint,
        timm.models.load_state_dict_from_hf,
        timm.models._hub.load_state_dict_from_path,
    ],
    ids=lambda function: function.__name__,
)
def test_timm_unpickles_nothing_but_weights_by_itself(function):
    assert inspect.signature(function).parameters["weights_only"].default is True


class WithoutLabels(torch.nn.Module):
    """CoCa as open_clip 4 has it: no labels in what forward gives, and logits of every token."""

    def __init__(self, model):
        super().__init__()
        self.model, self.pad_id, self.logit_scale = model, model.pad_id, model.logit_scale

    def forward(self, image, text):
        return self.model(image, text, output_labels=False)


def test_the_coca_recipe_does_not_need_open_clip_3s_labels(tmp_path):
    loaded = load_model(tiny_coca(tmp_path / "coca"))
    tokens = loaded.tokenizer(["a red ball", "two green boxes on a wall"])
    batch = {"images": torch.rand(2, 3, loaded.image_size, loaded.image_size), "tokens": tokens}
    with torch.no_grad():
        output = loaded.model(batch["images"], tokens)
        found, other = (CocaTask(model, 1.0, 2.0)(batch) for model in (loaded.model, WithoutLabels(loaded.model)))
    assert torch.equal(output["labels"], tokens[:, 1:])
    for name in ("image", "text", "caption", "words"):
        torch.testing.assert_close(found[name], other[name])
    expected = torch.nn.functional.cross_entropy(
        output["logits"].mT, output["labels"], ignore_index=loaded.model.pad_id, reduction="none"
    )
    torch.testing.assert_close(found["caption"], expected.sum(dim=1))
