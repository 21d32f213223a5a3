"""CatLIP's recipes through the trainer: pre-training, resume, several sizes, probe and fine-tuning."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_catlip import TINY, write_folders
from small_dist import fork
from small_training import read_metrics, tiny_clip, write_packed

from pipeline.labels.classes_stage import ClassesConfig, classes
from pipeline.labels.vocab_stage import VocabConfig, vocab
from shards_spec.files import UserError
from shards_spec.vocab import read_vocabulary
from training.config import ModelConfig, OptimConfig, smoke
from training.configs import default_config
from training.engine.optim import learning_rate
from training.evaluation.classification import measure_classifier
from training.export import ExportConfig, export
from training.losses.multilabel import PAD
from training.models.classifier import Classifier
from training.recipes import catlip
from training.recipes.transfer import load_classifier_base
from training.runs.student import load_run
from training.trainer import train

pytestmark = pytest.mark.integration

SMALL = {"model": TINY, "precision": "fp32", "workers": 0, "steps": 4, "log_every": 1, "warmup": 1, "lr": 1e-3}


def small(recipe, **fields):
    """A recipe's config on tiny data; ``fields`` go to whichever part has them."""
    config, wanted = (
        default_config(recipe),
        {**SMALL, "final_lr": 0.0, **fields},
    )
    for part in dataclasses.fields(config):
        piece = getattr(config, part.name)
        if dataclasses.is_dataclass(piece):
            own = {name: wanted.pop(name) for name in {field.name for field in dataclasses.fields(piece)} & set(wanted)}
            config = dataclasses.replace(config, **{part.name: dataclasses.replace(piece, **own)})
    return dataclasses.replace(config, **wanted)


@pytest.fixture(scope="module")
def root(labelled_root):
    return labelled_root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A finished run of four steps of three sizes."""
    out = str(tmp_path_factory.mktemp("run") / "catlip")
    return train("catlip", small("catlip", data=root, out=out, batch_size=8, **SIDES))


SIDES = {"sides": (16, 32, 48), "base_side": 32, "batch_parts": 2}


def newest(run):
    return torch.load(sorted(Path(run, "checkpoints").glob("step_*.pt"))[-1], weights_only=True)


def test_numbers_of_the_paper():  # section 5
    config = default_config("catlip")
    optim = config.optim
    assert (optim.lr, optim.final_lr, optim.weight_decay, optim.beta1, optim.beta2) == (2e-3, 2e-5, 0.2, 0.9, 0.999)
    assert (optim.eps, optim.warmup, optim.clip_norm, optim.ema_decay) == (1e-8, 10_000, 1.0, 1 - 5e-4)
    assert (config.data.batch_size, config.sides.batch_parts) == (2048, 4)
    assert config.sides.sides == tuple(range(128, 321, 16))
    assert (config.views.scale, config.views.flip, config.views.ratio) == ((0.08, 1.0), 0.5, (3 / 4, 4 / 3))
    probe, fine = (default_config(name) for name in ("probe", "finetune"))
    assert (probe.run.epochs, probe.optim.lr, probe.optim.final_lr, probe.data.batch_size) == (30, 3e-5, 1e-6, 256)
    assert (fine.run.epochs, fine.optim.lr, fine.optim.final_lr, fine.data.batch_size) == (10, 3e-5, 3e-6, 512)
    assert (probe.optim.weight_decay, fine.optim.weight_decay, fine.optim.warmup) == (0.0, 0.05, 500)
    assert (probe.freeze, fine.freeze, fine.optim.ema_decay) == (True, False, 1 - 5e-4)


def test_learning_rate_of_b16():  # fact 12
    optim = OptimConfig(lr=1e-3, final_lr=1e-5, warmup=10_000, warmup_lr=1e-6)
    expected = {0: 1e-6, 5000: 5.005e-4, 9999: 9.999e-4, 10_000: 1e-3, 105_000: 5.05e-4, 200_000: 1e-5}
    for step, lr in expected.items():
        assert learning_rate(step, optim, 200_000) == pytest.approx(lr, abs=5.1e-9 if step != 9999 else 1e-7)


def test_a_run(run, root):
    lines, state = read_metrics(run), newest(run)
    plan = catlip.prepare(small("catlip", data=root, batch_size=8, **SIDES))[1].plan
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["samples_seen"] for line in lines] == np.cumsum([plan.size(step) for step in range(4)]).tolist()
    assert all({"labels", "augment"} == set(line["losses"]) for line in lines)
    vocabulary = read_vocabulary(f"{root}/vocab/all.tsv")
    assert bytes(state["task"]["student.vocabulary_sha256"].tolist()).hex() == vocabulary.sha256
    loaded, step = load_run(run)
    assert (step, loaded.model.vocabulary.sha256) == (4, vocabulary.sha256)
    raw, _ = load_run(run, raw=True)
    for name, value in loaded.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, state["ema"][name]), "the average is the result"
    assert not torch.equal(raw.model.head.weight, loaded.model.head.weight)


def test_a_killed_run_goes_on(run, root, tmp_path):
    config = small("catlip", data=root, batch_size=8, **SIDES, out=str(tmp_path / "b"), checkpoint_steps=2)
    train("catlip", config)
    checkpoints = tmp_path / "b" / "checkpoints"
    (checkpoints / "step_000004.pt").unlink()
    train("catlip", config)
    one, two = newest(run)["task"], newest(str(tmp_path / "b"))["task"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def _train(rank, config):
    return train("catlip", config)


def test_two_processes_give_the_run_of_one(root, tmp_path):
    fields = {"batch_size": 8, "range_augment": False, "sync_bn": True, "lr": 1e-4, **SIDES}
    one = small("catlip", data=root, out=str(tmp_path / "one"), **fields)
    train("catlip", one)
    fork(2, _train, dataclasses.replace(one, run=dataclasses.replace(one.run, out=str(tmp_path / "two"))))
    ours, theirs = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["samples_seen"] for line in ours] == [line["samples_seen"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_low_precision(precision, root, tmp_path):
    fields = {"precision": precision, "batch_size": 8, "steps": 12, "checkpoint_activations": True, **SIDES}
    lines = read_metrics(train("catlip", small("catlip", data=root, out=str(tmp_path / "run"), **fields)))
    labels = [line["losses"]["labels"] for line in lines]
    assert sum(labels[-3:]) < sum(labels[:3])
    assert all(line["nonfinite"] == 0 for line in lines)


def test_another_vocabulary_is_refused_when_going_on(run, root, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    other = tmp_path / "root"
    shutil.copytree(root, other)
    vocabulary = read_vocabulary(f"{root}/vocab/all.tsv")
    dataclasses.replace(vocabulary, rows=vocabulary.rows[::-1]).write(str(other / "vocab" / "all.tsv"))
    config = small("catlip", data=str(other), out=str(tmp_path / "run"), batch_size=8, **{**SIDES, "steps": 4})
    text = (tmp_path / "run" / "config.json").read_text().replace(root, str(other))
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"vocabulary {vocabulary.sha256[:12]}"):
        train("catlip", config)
    assert read_vocabulary(str(tmp_path / "run" / "vocabulary.tsv")).sha256 == vocabulary.sha256
    (tmp_path / "run" / "vocabulary.tsv").unlink()
    with pytest.raises(UserError, match=f"these weights' classes are of vocabulary {vocabulary.sha256[:12]}"):
        train("catlip", config)


def test_the_loss_is_that_of_the_definition(root):
    _, samples, task = catlip.prepare(small("catlip", data=root, batch_size=6, range_augment=False, sides=()))
    from training.data.batches import load_batches

    batch = next(load_batches(samples, [range(6)]))
    with torch.no_grad():
        z = task.student(batch["images"]).double().numpy()
    t = np.zeros_like(z)
    for row, own in zip(t, batch["labels"].tolist(), strict=True):
        row[[label for label in own if label != PAD]] = 1
    expected = (t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)).sum() / len(z)
    assert task.eval().losses(task(batch), 0)["labels"].item() == pytest.approx(expected, rel=1e-5)


def test_options(root):
    options = {"frequency_bias": True, "loss": "softmax", "drop_empty": True, "label_captions": "all"}
    with pytest.raises(UserError, match="counted on original captions, but labels are those of --label-captions all"):
        catlip.prepare(small("catlip", data=root, sides=(), **options))
    vocab(VocabConfig(root, min_count=0, source="all", name="every"))
    options["vocabulary"] = "every"
    student, samples, _ = catlip.prepare(small("catlip", data=root, sides=(), **options))
    vocabulary = samples.labels.vocabulary
    share = np.array([row[3] for row in vocabulary.rows]) / vocabulary.header["captions"]
    share = share.clip(0.5 / vocabulary.header["captions"], 1 - 0.5 / vocabulary.header["captions"])
    assert np.allclose(torch.sigmoid(student.model.head.bias.detach()), share, atol=1e-5)
    assert not samples.labels.original_only
    with pytest.raises(UserError, match="--sides 40: must be a multiple of the model's patches of 16"):
        catlip.prepare(small("catlip", data=root, sides=(40,)))
    with pytest.raises(UserError, match="has a distillation head, which CatLIP does not train"):
        catlip.prepare(small("catlip", data=root, model="timm:deit_tiny_distilled_patch16_224", sides=()))
    with pytest.raises(UserError, match="--eval-data: CatLIP has no text tower"):
        catlip.prepare(small("catlip", data=root, eval_data="x"))


@pytest.mark.parametrize(("recipe", "fields"), [("probe", {}), ("probe", {"augment": False}), ("finetune", {})])
def test_transfer_learns_colours(recipe, fields, run, tmp_path):
    images = write_folders(tmp_path / "images", train=24, test=12)
    fields = {"batch_size": 16, "sides": (), "ema_decay": None, "steps": None, **fields}
    fields |= {"lr": 1e-3, "epochs": 30} if recipe == "finetune" else {"lr": 2e-2, "epochs": 40}
    fields |= {"scale": (0.7, 1.0)} if fields.get("augment", True) else {}
    out = train(recipe, small(recipe, data=images, model=run, out=str(tmp_path / recipe), **fields))
    assert read_metrics(out)[-1]["eval"]["acc1"] >= 0.8
    assert measure_classifier(load_run(out)[0], images, "cpu", False) == (read_metrics(out)[-1]["eval"], 24, 0)
    with pytest.raises(UserError, match="has other classes than the model"):
        measure_classifier(load_run(run)[0], images, "cpu", False)
    before, after = load_run(run)[0].model.state_dict(), load_run(out, raw=True)[0].model
    assert isinstance(after, Classifier)
    assert after.names == ["blue", "red"]
    for name in ("trunk.blocks.0.attn.qkv.weight", "trunk.patch_embed.layers.1.running_mean"):
        assert torch.equal(before[name], after.state_dict()[name]) == (recipe == "probe")


def test_transfer_init_starts_ahead(run, root, tmp_path):
    from training.recipes import probe

    images = write_folders(tmp_path / "images", classes=("red", "blue", "yellow"))
    out = str(tmp_path / "classes.tsv")
    found = classes(ClassesConfig(f"{images}/train", f"{run}/vocabulary.tsv", out))
    config = small("probe", data=images, model=run, class_map=out)
    student, _, _ = probe.prepare(config)
    base = load_run(run)[0].model
    for place, row in enumerate(found.rows):
        if row.case == "exact":
            expected = base.head.weight[base.vocabulary.index[row.wnids[0]]]
            assert torch.equal(student.model.head.weight[place], expected)
    assert sum(row.case == "exact" for row in found.rows) >= 1
    assert not student.model.head.bias.any()
    with pytest.raises(UserError, match="has no vocabulary"):
        probe.prepare(dataclasses.replace(config, student=dataclasses.replace(config.student, model=TINY)))


def clip_run(tmp_path, vision):
    """A RUN of one step whose image tower is timm's."""
    import json

    folder = Path(tiny_clip(tmp_path / "models" / "clip").removeprefix("local-dir:"))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] = vision
    path.write_text(json.dumps(config))
    write_packed(str(tmp_path / "root"), [6, 6])
    clip = smoke(default_config("clip"))
    clip = dataclasses.replace(
        clip,
        student=dataclasses.replace(clip.student, model=f"local-dir:{folder}"),
        data=dataclasses.replace(clip.data, data=str(tmp_path / "root"), batch_size=4),
        run=dataclasses.replace(clip.run, out=str(tmp_path / "clip"), steps=1),
    )
    return train("clip", clip)


def test_a_clip_tower_can_be_probed(tmp_path):
    from training.recipes import probe

    vision = {"timm_model_name": "catlip_vit_tiny", "image_size": 32, "timm_pool": "token", "timm_proj": "linear"}
    out = clip_run(tmp_path, vision)
    folders = write_folders(tmp_path / "images")
    student, _, _ = probe.prepare(small("probe", data=folders, model=out))
    trunk = load_run(out)[0].model.visual.trunk
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student.model.encode_image(images), trunk.eval()(images))
    assert (student.mean, student.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["linear", None], ids=["behind the tower", "in the tower's head"])
def test_a_convolutional_tower_can_be_tuned_measured_and_exported(projection, tmp_path):
    """The projection to the embedding, which some towers have as their own head, does not come along."""
    vision = {"timm_model_name": "resnet18", "image_size": 32, "timm_pool": "avg", "timm_proj": projection}
    out = clip_run(tmp_path, vision)
    images = write_folders(tmp_path / "images")
    fields = {"data": images, "model": out, "out": str(tmp_path / "fine"), "batch_size": 8, "steps": 2, "sides": ()}
    fine = train("finetune", small("finetune", **fields, ema_decay=None))
    loaded = load_run(fine)[0]
    assert loaded.model.name == "timm:resnet18"
    assert measure_classifier(loaded, images, "cpu", False)[1] == 12
    assert timm_alone(fine, tmp_path, loaded)


def test_a_plain_classifier_loads_in_timm_alone(tmp_path):
    """Wherever the folder is, with other sides than its own, and without this package."""
    images = write_folders(tmp_path / "images")
    fields = {"data": images, "model": "timm:test_vit", "out": str(tmp_path / "fine"), "batch_size": 8, "steps": 1}
    fine = train("finetune", small("finetune", **fields, sides=(), ema_decay=None))
    assert timm_alone(fine, tmp_path, load_run(fine)[0])


def timm_alone(run, tmp_path, loaded):
    """Whether an export of a run, moved, computes the same in a process that has timm and none of our packages."""
    export(ExportConfig(run, str(tmp_path / "to")))
    moved = shutil.move(tmp_path / "to", tmp_path / "moved")
    assert not any(str(tmp_path) in path.read_text() for path in moved.glob("*.json"))
    images = torch.rand(2, 3, loaded.image_size + 32, loaded.image_size + 32)
    with torch.no_grad():
        torch.save([images, loaded.model(images)], tmp_path / "wanted.pt")
    code = f"""
import sys, timm, torch
model = timm.create_model("local-dir:{moved}", pretrained=True).eval()
images, wanted = torch.load("{tmp_path}/wanted.pt")
assert not {{"training", "shards_spec"}} & set(sys.modules)
assert torch.allclose(model(images), wanted, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return True


def test_weights_beside_a_run_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--pretrained 'x' would not be used: RUN .* brings its own weights"):
        load_classifier_base(ModelConfig(run, "x"), 0)
