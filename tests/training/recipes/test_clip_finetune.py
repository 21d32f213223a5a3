"""finetune and probe of CLIPs whose image tower is open_clip's own: from a folder, a run, a cut student, a ResNet."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from small_catlip import write_folders
from small_tinyclip import config_of, write_tinyclip_root
from small_training import assert_same_run, final_weights, read_metrics, tiny_clip, tiny_config

from shards_spec.files import UserError
from training.evaluation.classification import measure_classifier
from training.export import ExportConfig, export
from training.models.clip_image_tower import ClipImageTower
from training.recipes import finetune, probe
from training.runs.student import load_run
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
TUNED = {"plain": "vit_base_patch16_clip_224", "resnet": "clip_image_tower", "cut": "clip_image_tower"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), train=8, test=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What --model takes: folders of a ViT and a ResNet with weights, and the last stage of a run with masks."""
    folder = tmp_path_factory.mktemp("models")
    root = write_tinyclip_root(folder / "data")
    stages = {"stages": "1,0.7,0.5", "steps": 3, "prune_step": 2}
    cut = train("tinyclip", config_of(root, folder / "masked", "auto", **stages))
    return {"plain": f"local-dir:{root}/models/teacher", "resnet": f"local-dir:{root}/models/resnet", "cut": cut}


def small(recipe, images, out="unused", **fields):
    plain = {"sides": (32, 64), "base_side": 32, "precision": "fp32", "range_augment": False, "ema_decay": None}
    return tiny_config(recipe, images, str(out), **{**plain, "steps": 4, "batch_size": 4, **fields})


@pytest.mark.parametrize("name", TUNED)
def test_it_is_tuned_resumed_measured_and_exported(name, images, models, tmp_path):
    fields = {"model": models[name], "checkpoint_steps": 1, "keep_checkpoints": 9, "checkpoint_activations": True}
    out = train("finetune", small("finetune", images, tmp_path / "run", **fields))
    start = finetune.prepare(small("finetune", images, model=models[name])).task.student.state_dict()
    ended = final_weights(out)
    assert not [key for key, value in start.items() if value.ndim > 1 and torch.equal(value, ended[f"student.{key}"])]
    shutil.copytree(out, tmp_path / "again")
    for step in (3, 4):
        (tmp_path / "again" / "checkpoints" / f"step_{step:06d}.pt").unlink()
    again = train("finetune", small("finetune", images, tmp_path / "again", **fields))
    assert_same_run(out, again)
    loaded, _ = load_run(out)
    assert loaded.model.name == f"timm:{TUNED[name]}"
    assert measure_classifier(loaded, images, "cpu", False) == (read_metrics(out)[-1]["eval"], 8, 0)
    export(ExportConfig(out, str(tmp_path / "to")))
    exported = timm.create_model(f"local-dir:{tmp_path}/to", pretrained=True).eval()
    for side in (32, 64):
        shown = torch.randn(2, 3, side, side)
        torch.testing.assert_close(exported(shown), loaded.model(shown))
    card = Path(tmp_path, "to", "README.md").read_text()
    assert ("import training.models.clip_image_tower" in card) == (name != "plain")


def test_a_cut_students_probe_learns_the_head_alone(images, models, tmp_path):
    plain = {"augment": False, "sides": (), "base_side": 224}
    out = train("probe", small("probe", images, tmp_path / "run", model=models["cut"], **plain))
    start = probe.prepare(small("probe", images, model=models["cut"], sides=())).task.student
    assert isinstance(start.trunk, ClipImageTower)
    heads = [block.attn.num_heads for block in start.trunk.tower.transformer.resblocks]
    assert heads == load_run(models["cut"])[0].config["vision_cfg"]["heads"]
    after = load_run(out)[0].model.state_dict()
    changed = {key for key, value in start.state_dict().items() if not torch.equal(value, after[key])}
    assert changed == {"trunk.head.weight", "trunk.head.bias"}


def test_options_of_a_plain_tower(images, models):
    """It is timm's ViT, which --layer-decay, --drop-path, --pooling and --image-size are for."""
    fields = {"layer_decay": 0.5, "drop_path": 0.2, "pooling": "mean", "image_size": 64, "sides": (64,)}
    task = finetune.prepare(small("finetune", images, model=models["plain"], **fields)).task
    assert {group.lr_factor for group in task.param_groups(0.1)} == {1.0, 0.5, 0.25, 0.125, 0.0625}
    assert task.student.trunk.pos_embed.shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("plain", {"sides": (40,)}, "--sides 40: must be a multiple of the model's patches of 16 pixels"),
        ("resnet", {"sides": (48,)}, "--sides 48: must be a multiple of the model's patches of 32 pixels"),
        ("cut", {"layer_decay": 0.5}, "--layer-decay is for vision transformers and Swins of timm's"),
        ("cut", {"drop_path": 0.5}, "--drop-path is for vision transformers and Swins of timm's"),
        ("cut", {"pooling": "mean"}, "--pooling mean: 'timm:clip_image_tower' is no vision transformer of timm's"),
        ("cut", {"image_size": 64, "sides": (64,)}, "--image-size 64: .* a CLIP's tower takes any --sides"),
        ("cut", {"class_map": "x"}, "--class-map x: --model '.*' has no vocabulary"),
        ("cut", {"keep_head": True}, "--keep-head: --model '.*' has no head of named classes"),
        ("plain", {"pretrained": "x"}, "--pretrained"),
    ],
)
def test_what_does_not_serve_is_named(name, fields, said, images, models):
    with pytest.raises(UserError, match=said):
        finetune.prepare(small("finetune", images, **{"model": models[name], **fields})).task.param_groups(0.1)


def test_names_of_nothing(images, models, tmp_path):
    parent = str(Path(models["cut"]).parent)
    bare = tiny_clip(tmp_path / "bare")
    for model, said in {
        "": "--model: name what to start from",
        parent: r"is no RUN; its stages are RUN folders of their own, the last one is .*stage-2",
        bare: "has no weights",
        "ViT-B-32": "--pretrained",
        "nowhere": "no model 'nowhere'",
        "timm:clip_image_tower": "name the CLIP's RUN or local-dir:PATH",
    }.items():
        with pytest.raises(UserError, match=said):
            finetune.prepare(small("finetune", images, model=model))
