"""The clip recipe's own option: a tower that is locked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small_data import write_roberta
from small_training import TINY_RESNET, final_weights, tiny_clip, tiny_config, write_packed

from shards_spec.files import UserError
from training.config import ModelConfig
from training.recipes.clip import ClipTask, prepare, tower_of
from training.runs.student import load_run, new_student
from training.trainer import train

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A packed dataset; a CLIP with BatchNorms in its image tower and one with dropout in its text tower beside it."""
    root = tmp_path_factory.mktemp("data")
    write_packed(str(root), [8])
    tiny_clip(root / "models/resnet", vision=TINY_RESNET)
    tiny_clip(root / "models/roberta")
    text = write_roberta(root / "models/roberta", width=32, layers=1, heads=2, wide=64)
    description = root / "models/roberta/open_clip_config.json"
    said = json.loads(description.read_text())
    said["model_cfg"]["text_cfg"] = {**text, "context_length": 16}
    description.write_text(json.dumps(said))
    shutil.copytree(root / "models/roberta", root / "models/roberta-weights")
    shutil.copytree(root / "models/resnet", root / "models/bare")
    for model in ("resnet", "roberta-weights"):
        folder = root / "models" / model
        weights = new_student(ModelConfig(f"local-dir:{folder}"), 0).model.state_dict()
        save_file(weights, folder / "open_clip_model.safetensors")
    return root


@pytest.mark.parametrize(("lock", "trained"), [("image", "text"), ("text", "image")])
@pytest.mark.parametrize("model", ["resnet", "roberta-weights"])
def test_a_locked_tower_keeps_weights_and_statistics(model, lock, trained, root, tmp_path):
    name = f"local-dir:{root}/models/{model}"
    before = new_student(ModelConfig(name), 0).model.state_dict()
    out = train("clip", tiny_config("clip", str(root), str(tmp_path / "run"), model=name, steps=2, lock=lock))
    after = final_weights(out)
    changed = {tower_of(key) for key, value in before.items() if not torch.equal(value, after[f"student.{key}"])}
    assert changed == {trained, None}


@pytest.mark.parametrize(("model", "lock"), [("bare", "image"), ("bare", "text"), ("roberta", "image")])
def test_a_tower_of_random_weights_is_not_locked(model, lock, root):
    name = f"local-dir:{root}/models/{model}"
    with pytest.raises(UserError, match=rf"--lock {lock}: '{name}' has no weights for its {lock} tower.*--pretrained"):
        prepare(tiny_config("clip", str(root), "unused", model=name, lock=lock))


def test_a_text_tower_with_weights_of_its_own_name_is_locked_beside_a_random_image_tower(root):
    name = f"local-dir:{root}/models/roberta"
    task = prepare(tiny_config("clip", str(root), "unused", model=name, lock="text")).task
    assert {tower_of(key) for key, value in task.student.named_parameters() if not value.requires_grad} == {"text"}


def test_a_locked_tower_stays_in_eval_mode(root):
    student = new_student(ModelConfig(f"local-dir:{root}/models/roberta"), 0)
    task = ClipTask(student.model, "text").train()
    assert task.student.visual.training
    assert not any(module.training for module in task.student.text.modules())


def test_a_run_needs_no_weights_of_its_text_towers_name(root, tmp_path):
    name = f"local-dir:{root}/models/roberta"
    out = train("clip", tiny_config("clip", str(root), str(tmp_path / "run"), model=name, steps=1))
    weights = root / "models/roberta/roberta/model.safetensors"
    hidden = weights.rename(tmp_path / "hidden")
    try:
        student, _ = load_run(out)
    finally:
        hidden.rename(weights)
    wanted = final_weights(out)
    assert all(torch.equal(value, wanted[f"student.{key}"]) for key, value in student.model.state_dict().items())
