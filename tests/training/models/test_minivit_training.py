"""Tied models through training, checkpoints, averages and exports."""

import pytest
import torch
from safetensors import safe_open
from small_training import final_weights, tiny_clip, tiny_config, write_packed, write_teacher

import training.models.minivit  # noqa: F401  registers the names
from shards_spec.files import UserError
from shards_spec.models import load_model
from training.export import ExportConfig, export, to_timm
from training.export.comparison import compare, encoders_of
from training.export.probe import noise
from training.models.classifier import load_classifier, new_classifier
from training.models.weight_tying import check_tied, tied_blocks
from training.runs.student import load_run
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
COPIES = {"mini_deit_test": "blocks.1.attn.qkv.weight", "mini_swin_test": "layers.1.blocks.3.mlp.fc1.weight"}
ORIGINALS = {"mini_deit_test": "blocks.0.attn.qkv.weight", "mini_swin_test": "layers.1.blocks.2.mlp.fc1.weight"}


@pytest.mark.parametrize("name", COPIES)
def test_a_clip_with_a_tied_image_tower_trains_resumes_and_exports(tmp_path, name):
    root, out = str(tmp_path / "data"), str(tmp_path / "run")
    write_packed(root, [9, 8])
    vision = {"image_size": 32, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    tiny_clip(tmp_path / "data" / "models" / "clip", vision=vision)
    for steps in (2, 3):
        config = tiny_config("clip", root, out, steps=steps, ema_decay=0.5, resume=steps > 2)
        train("clip", config)
    weights = final_weights(out)
    prefix = "student.visual.trunk."
    assert prefix + ORIGINALS[name] in weights
    assert prefix + COPIES[name] not in weights
    student, step = load_run(out)
    assert step == 3
    check_tied(student.model)
    assert len(tied_blocks(student.model)) == {"mini_deit_test": 1, "mini_swin_test": 2}[name]
    assert not torch.equal(
        student.model.state_dict()["visual.trunk." + ORIGINALS[name]], weights[prefix + ORIGINALS[name]]
    )
    export(ExportConfig(run=out, to=str(tmp_path / "exported")))
    with safe_open(tmp_path / "exported" / "open_clip_model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "visual.trunk." + ORIGINALS[name] in stored
    assert "visual.trunk." + COPIES[name] not in stored
    again = load_model(f"local-dir:{tmp_path / 'exported'}")
    check_tied(again.model)
    images = torch.rand(2, 3, 32, 32)
    assert (again.model.encode_image(images) - student.model.encode_image(images)).abs().max() < 1e-5


def test_a_tied_image_tower_learns_from_a_teacher_cache(tmp_path):
    root, out = str(tmp_path / "data"), str(tmp_path / "run")
    write_teacher(root, write_packed(root, [9, 8]))
    vision = {"image_size": 32, "timm_model_name": "mini_swin_test", "timm_pool": "avg", "timm_proj": "linear"}
    tiny_clip(tmp_path / "data" / "models" / "clip", vision=vision)
    train("tinyclip", tiny_config("tinyclip", root, out, steps=2))
    weights = final_weights(out)
    assert "student.visual.trunk." + ORIGINALS["mini_swin_test"] in weights
    assert "student.visual.trunk." + COPIES["mini_swin_test"] not in weights
    check_tied(load_run(out)[0].model)


@pytest.mark.parametrize("name", COPIES)
def test_a_tied_image_tower_names_synsets(tmp_path, labelled_root, name):
    fields = {"sides": (32, 64), "base_side": 32, "batch_parts": 1, "model": f"timm:{name}", "final_lr": 0.0}
    out = train(
        "catlip", tiny_config("catlip", labelled_root, str(tmp_path), steps=3, batch_size=8, warmup=1, **fields)
    )
    assert "student.trunk." + COPIES[name] not in final_weights(out)
    check_tied(load_run(out)[0].model)


@pytest.mark.parametrize("name", COPIES)
def test_a_tied_classifier_is_exported_for_timm(tmp_path, name, caplog):
    student = new_classifier(f"timm:{name}", 5, seed=1)
    check_tied(student.model)
    config = ExportConfig("run", str(tmp_path), format="timm")
    to_timm.write(tmp_path, student, config)
    same = compare(encoders_of(student), to_timm.load(tmp_path, student, config), noise(student))
    assert same.difference < 1e-5
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert COPIES[name] not in set(file.keys())
    check_tied(load_classifier(str(tmp_path)).model)
    other = new_classifier(f"timm:{name}", 5, seed=2)
    other.model.load_state_dict(student.model.state_dict())
    check_tied(other.model)


def test_the_export_says_what_loads_it():
    student = new_classifier("timm:mini_deit_test", 5)
    assert to_timm.needed_module(student) == "training.models.minivit"
    assert "import training.models.minivit  # of Clipmill" in to_timm.usage(student)


def test_weights_of_another_grouping_are_named():
    model = new_classifier("timm:mini_deit_test", 5).model
    state = model.state_dict()
    state["trunk.blocks.groups"] = torch.tensor([0, 1, 2, 3])
    with pytest.raises(UserError, match=r"tied in groups \[1, 1, 1, 1\], the model's blocks trunk.blocks are tied"):
        model.load_state_dict(state)
