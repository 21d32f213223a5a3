"""Hard distillation in fine-tuning: DeiT's rule, what the teacher sees, starts, resume, processes, what is refused."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from small_catlip import write_folders
from small_dist import fork
from small_training import assert_same_run, final_weights, read_metrics, steady_metrics, tiny_config

from shards_spec.files import UserError
from training.data.batches import first_batch
from training.evaluation.classification import classification_metrics
from training.export.config import ExportConfig
from training.export.stage import export
from training.models.classifier import new_classifier
from training.models.mixing import mixed_images, mixed_targets
from training.recipes import finetune, probe
from training.runs.student import load_run
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
SIDE = 48
STAR = "tinymim_star_tiny_patch16_224"
MIXED = {"mixup": 0.8, "cutmix": 0.0}


def timm_folder(folder, architecture, **options):
    """A folder that timm reads as ``local-dir:``, with a small model for 48 pixels."""
    folder.mkdir(exist_ok=True)
    small = {"img_size": SIDE, "embed_dim": 32, "depth": 2, "num_heads": 4, **options}
    config = {"architecture": architecture, "num_classes": 3, "model_args": small}
    pixels = {"input_size": [3, SIDE, SIDE], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    pixels["classifier"] = ["head", "head_dist"]
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pixels}))
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Names of a student with a neck, one of timm's without, and one without a distillation token."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "star": timm_folder(folder / "star", STAR, neck=40),
        "deit": timm_folder(folder / "deit", "deit_tiny_distilled_patch16_224"),
        "vit": timm_folder(folder / "vit", "vit_tiny_patch16_224"),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), train=8, test=4)


def small(images, models, out="unused", recipe="finetune", **fields):
    wanted = {
        "model": models["star"],
        "teacher": models["vit"],
        "teacher_weights": "random",
        "precision": "fp32",
        "batch_size": 6,
        "steps": 4,
        "seed": 3,
        **fields,
    }
    if recipe == "finetune":
        wanted = {"sides": (), "range_augment": False, "ema_decay": None, **wanted}
    return tiny_config(recipe, images, str(out), **wanted)


@pytest.mark.parametrize(("kind", "mix"), [("star", MIXED), ("deit", {})])
def test_the_rule(kind, mix, images, models):
    """Half the class head's loss with the true labels, half the other's with the teacher's argmax, of mixed images."""
    task, rows = (finetune.prepare(small(images, models, model=models[kind], **mix))[part] for part in (2, 1))
    task.train()
    batch = task.draw(first_batch(rows, 6))
    losses = task.losses(task(batch), 0)
    shown = mixed_images(batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (rows.student.mean, rows.student.std))
    pixels = shown * std + mean
    teacher = task.frozen.model
    cfg = teacher.pretrained_cfg
    seen = (pixels - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    taught = teacher(seen).argmax(dim=1)
    trunk = task.student.trunk
    trunk.set_distilled_training(True)
    logits, distilled = trunk(shown)
    trunk.set_distilled_training(False)
    labels = F.cross_entropy(logits, mixed_targets(batch, logits.shape[-1], 0.1))
    torch.testing.assert_close(losses["classes"], labels / 2)
    torch.testing.assert_close(losses["distillation"], F.cross_entropy(distilled, taught) / 2)
    assert set(losses) == {"classes", "distillation"}
    assert not any(value.requires_grad for value in teacher.parameters())
    with torch.no_grad():
        torch.testing.assert_close(task.eval().student(shown), (logits + distilled) / 2)


def test_a_teacher_of_other_pixels_sees_its_own_normalisation(images, models, tmp_path):
    folder = tmp_path / "grey"
    name = timm_folder(folder, "vit_tiny_patch16_224")
    described = json.loads((folder / "config.json").read_text())
    described["pretrained_cfg"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    (folder / "config.json").write_text(json.dumps(described))
    task = finetune.prepare(small(images, models, teacher=name)).task
    student = new_classifier(models["star"], 3)
    pixels = torch.rand(4, 3, SIDE, SIDE)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std))
    expected = task.frozen.model(pixels).argmax(dim=1)
    assert torch.equal(task.hard_teacher.classes((pixels - mean) / std), expected)


def test_it_learns_resumes_and_is_measured_by_both_heads(images, models, tmp_path):
    fields = {"steps": 6, "checkpoint_steps": 3, "eval_every_steps": 3, **MIXED}
    whole = train("finetune", small(images, models, tmp_path / "whole", **fields))
    lines = read_metrics(whole)
    assert all(set(line["losses"]) == {"classes", "distillation"} for line in lines)
    config = small(images, models, tmp_path / "parts", **fields)
    train("finetune", config)
    (tmp_path / "parts" / "checkpoints" / "step_000006.pt").unlink()
    train("finetune", config)
    assert_same_run(whole, tmp_path / "parts")
    assert not any("frozen" in name or "hard_teacher" in name for name in final_weights(whole))
    loaded, _ = load_run(whole)
    rows = finetune.prepare(config).task.test
    assert classification_metrics(loaded.model, rows, device="cpu", workers=0, bf16=False) == lines[-1]["eval"]
    export(ExportConfig(whole, str(tmp_path / "exported")))
    again = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True).eval()
    shown = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(again(shown), loaded.model(shown))


def test_two_processes_and_chunks_give_the_run_of_one(images, models, tmp_path):
    one = train("finetune", small(images, models, tmp_path / "one", steps=3))
    train("finetune", small(images, models, tmp_path / "chunks", steps=3, chunk_size=2))
    fork(2, _train, small(images, models, tmp_path / "two", steps=3))
    for other in ("chunks", "two"):
        for line, expected in zip(steady_metrics(tmp_path / other), steady_metrics(one), strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def _train(rank, config):
    return train("finetune", config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_in_low_precision(dtype, images, models):
    task, rows = (finetune.prepare(small(images, models, **MIXED))[part] for part in (2, 1))
    task.train()
    with torch.no_grad():
        for head in task.student.heads:
            head.weight.mul_(2e4 / head.weight.abs().max())
    batch = task.draw(first_batch(rows, 6))
    with torch.autocast("cpu", dtype):
        features = task(batch)
    losses = task.losses(features, 0)
    total = sum(losses.values())
    assert 1e3 < total.item() < float("inf")
    total.backward()
    assert all(torch.isfinite(value.grad).all() for value in task.parameters() if value.grad is not None)


def test_it_starts_from_an_encoder(images, models, tmp_path):
    """A file of pre-training's: the token, its position, the neck and the heads are new."""
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, embed_dim=32, depth=2, num_heads=4)
    file = str(tmp_path / "encoder.pth")
    torch.save({"model": {**encoder.state_dict(), "mask_token": torch.zeros(1)}}, file)
    trunk = finetune.prepare(small(images, models, pretrained=file)).student.model.trunk
    for name, value in encoder.state_dict().items():
        if name.startswith(("blocks.", "patch_embed.", "norm.", "cls_token")):
            assert torch.equal(trunk.state_dict()[name], value), name
    assert torch.equal(trunk.pos_embed[:, 2:], encoder.pos_embed[:, 1:])
    assert torch.equal(trunk.pos_embed[:, 1], trunk.pos_embed[:, 0])
    own = str(tmp_path / "own.pth")
    with torch.no_grad():
        trunk.dist_token.fill_(3)
    torch.save({name.replace("neck.", "conv1x1."): value for name, value in trunk.state_dict().items()}, own)
    again = finetune.prepare(small(images, models, pretrained=own)).student.model.trunk
    for name, value in trunk.state_dict().items():
        assert name.startswith("head") or torch.equal(again.state_dict()[name], value), name
    broken = {name: value for name, value in encoder.state_dict().items() if name != "norm.weight"}
    torch.save(broken, file)
    with pytest.raises(UserError, match="1 weight missing"):
        finetune.prepare(small(images, models, pretrained=file))


def test_layers_of_a_student_with_a_neck(images, models):
    task = finetune.prepare(small(images, models, layer_decay=0.5, drop_path=0.1)).task
    factors = {id(value): group.lr_factor for group in task.param_groups(0.05) for value in group.params}
    trunk = task.student.trunk
    assert factors[id(trunk.dist_token)] == factors[id(trunk.pos_embed)] == 0.5**3
    assert factors[id(trunk.neck[1].weight)] == factors[id(trunk.head_dist.weight)] == 1
    plain = finetune.prepare(small(images, models)).task
    decays = {id(value): group.weight_decay for group in plain.param_groups(0.05) for value in group.params}
    trunk = plain.student.trunk
    assert decays[id(trunk.dist_token)] == decays[id(trunk.pos_embed)] == decays[id(trunk.cls_token)] == 0
    assert decays[id(trunk.neck[1].weight)] == decays[id(trunk.patch_embed.proj.weight)] == 0.05


REFUSED = [
    ({"teacher": None, "teacher_weights": None}, "has a distillation token: give its --teacher, or --soft-labels"),
    ({"teacher": None}, "--teacher-weights 'random' is of no teacher: give --teacher, too"),
    (
        {"model": "vit"},
        "the student has no distillation token to teach; take one of timm:tinymim_star_tiny_patch16_224",
    ),
    ({"pooling": "mean"}, "--pooling mean: 'timm:tinymim_star_tiny_patch16_224' has heads on its class and distillati"),
    ({"soft_labels": "cache"}, "and --soft-labels 'cache': one of them is the teacher"),
    ({"sides": (SIDE, 64)}, "does not take images of 64 pixels"),
    ({"teacher": "timm:nope"}, "no model 'timm:nope' in timm"),
    ({"teacher": "nowhere"}, "--teacher 'nowhere': give a RUN folder of a classifier, or timm:NAME"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_does_not_fit_is_named(fields, said, images, models):
    fields = {**fields, "model": models[fields.get("model", "star")]}
    with pytest.raises(UserError) as refused:
        finetune.prepare(small(images, models, **fields))
    assert said in str(refused.value)


def test_a_probe_trains_one_head(images, models):
    with pytest.raises(UserError, match="two heads, which a probe does not train"):
        probe.prepare(small(images, models, recipe="probe", sides=()))
