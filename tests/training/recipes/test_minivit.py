"""The recipe of MiniViT: losses by their formulas, pairs, classes, resume, chunks, options, and what it refuses."""

from collections import Counter
from functools import partial
from itertools import chain

import pytest
import timm
import torch
from small_catlip import write_folders
from small_dist import fork
from small_training import final_weights, read_metrics, steady_metrics, tiny_config

from shards_spec.files import UserError
from training.configs import default_config
from training.data.batches import first_batch
from training.evaluation.classification import measure_classifier
from training.export import ExportConfig, export
from training.losses.hidden_relations import attention_relation_loss, hidden_relation_loss
from training.losses.relations import soft_ce, soft_kl
from training.models.mixing import mixed_images
from training.models.taps import run_with_taps
from training.models.weight_tying import check_tied, tied_blocks
from training.recipes import minivit
from training.runs.student import load_run
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
SWIN = "timm:mini_swin_test"
DEIT = "timm:mini_deit_test"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), train=12, test=6)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run of one step with groups of its own."""
    return train("minivit", small(images, str(tmp_path_factory.mktemp("run")), steps=1, groups=(1, 4)))


def small(images, out="", model=SWIN, **fields):
    fields = {"teacher": model, "teacher_weights": "random", "warmup": 0, "warmup_lr": None, "workers": 0, **fields}
    return tiny_config("minivit", images, out, model=model, device="cpu", **fields)


def prepared(images, **fields):
    return minivit.prepare(small(images, **fields))


def test_the_papers_numbers():
    config = default_config("minivit")
    assert (config.optim.lr, config.optim.final_lr, config.optim.clip_norm) == (1e-3, 1e-5, 5.0)
    assert (config.mix.mixup, config.mix.cutmix, config.mix.erasing) == (0.8, 1.0, 0.25)
    assert (config.distillation.attention_weight, config.distillation.hidden_weight) == (1.0, 0.1)
    assert config.distillation.label_weight == 0


# fact 14
@pytest.mark.parametrize("model", [SWIN, DEIT])
def test_losses_are_their_formulas(images, model):
    task = prepared(images, model=model, seed=3, erasing=0.0, label_weight=0.5, smoothing=0.1).task.eval()
    batch = task.draw(first_batch(prepared(images, model=model).rows, 4))
    features = task(batch)
    assert {name: tuple(value.shape) for name, value in features.items()} == dict.fromkeys(
        ("attention", "hidden", "prediction", "labels"), (4,)
    )
    losses = task.losses(features, 0)
    assert losses["hidden"].item() == pytest.approx(0.1 * features["hidden"].mean().item())
    assert losses["labels"].item() == pytest.approx(0.5 * features["labels"].mean().item())
    assert losses["attention"].item() == pytest.approx(features["attention"].mean().item())
    # one image at a time: then all windows are its own
    mixed = mixed_images(batch)
    teacher = task.frozen.model
    for number in range(4):
        image = mixed[number : number + 1]
        attention, hidden = [], []
        for own, theirs in task.pairs:
            readings = [
                reader.read(partial(run_with_taps, module), image, [block])
                for reader, module, block in zip(
                    task.readers, (task.student.trunk, teacher), (own, theirs), strict=True
                )
            ]
            attention.append(attention_relation_loss(readings[0].projections[0], readings[1].projections[0]).mean())
            hidden.append(hidden_relation_loss(readings[0].hidden[0], readings[1].hidden[0]).mean())
        assert features["attention"][number].item() == pytest.approx(torch.stack(attention).mean().item(), rel=1e-4)
        assert features["hidden"][number].item() == pytest.approx(torch.stack(hidden).mean().item(), rel=1e-3, abs=1e-5)
        expected = soft_ce(task.student(image), teacher(image))
        assert features["prediction"][number].item() == pytest.approx(expected.item(), rel=1e-4)


def test_deits_prediction(images):
    fields = {
        "model": DEIT,
        "attention_weight": 0.0,
        "hidden_weight": 0.0,
        "teacher": "timm:test_resnet",
        "erasing": 0.0,
    }
    task = prepared(images, **fields, prediction="deit").task.eval()
    assert task.readers is None
    batch = task.draw(first_batch(prepared(images, model=DEIT).rows, 4))
    features = task(batch)
    assert list(features) == ["prediction"]
    mixed = mixed_images(batch)
    expected = soft_kl(task.student(mixed), task.frozen.model(mixed)) / 2
    assert torch.allclose(features["prediction"], expected, atol=1e-6)


def test_a_run_learns_resumes_and_loads(images, tmp_path):
    fields = {"groups": (2, 1), "schedule": "constant", "lr": 3e-3, "ema_decay": 0.9, "log_every": 1}
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    train("minivit", small(images, whole, steps=6, **fields))
    for steps in (3, 6):
        train("minivit", small(images, part, steps=steps, **fields))
    assert_same_weights(whole, part)
    student, step = load_run(whole)
    assert step == 6
    check_tied(student.model)
    groups = [blocks.tying.groups for blocks in tied_blocks(student.model).values()]
    assert groups == [(0, 1), (0, 0, 0, 0)]  # options are part of the run
    assert {"acc1", "acc5"} <= set(read_metrics(whole)[-1]["eval"])
    assert "student.trunk.layers.1.blocks.1.mlp.fc1.weight" not in final_weights(whole)


def assert_same_weights(one, other):
    weights, others = final_weights(one), final_weights(other)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_losses_fall(images, tmp_path):
    fields = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "scale": None, "ops": 0, "batch_size": 12, "log_every": 1}
    run = train("minivit", small(images, str(tmp_path), steps=20, inherit="mean", lr=3e-3, **fields, local="residual"))
    losses = [line["losses"] for line in read_metrics(run)]
    assert losses[-1]["hidden"] < 0.7 * losses[0]["hidden"]
    assert losses[-1]["attention"] < losses[0]["attention"]


def test_chunks_and_repeats(images, tmp_path):
    runs = []
    for name, chunk in (("whole", None), ("chunks", 2)):
        fields = {"steps": 3, "chunk_size": chunk, "repeats": 3, "erasing": 0.0, "batch_size": 6}
        runs.append(train("minivit", small(images, str(tmp_path / name), **fields)))
    one, other = (final_weights(run) for run in runs)
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=2e-4) for name in one)
    rows = prepared(images, repeats=3).rows
    keys = [rows[position]["key"] for position in range(6)]
    assert keys == [keys[0]] * 3 + [keys[3]] * 3
    assert keys[0] != keys[3]
    views = [rows[position]["images"] for position in range(3)]
    assert not torch.equal(views[0], views[1])
    once = Counter(rows[position]["key"] for position in range(3 * 24))
    assert set(once.values()) == {3}  # in three epochs of 24 views each of the 24 images has had three
    assert len(once) == 24
    later = [position for position in range(3 * 24, 6 * 24) if rows[position]["key"] == keys[0]]
    assert not any(torch.equal(rows[position]["images"], view) for position in later for view in views)


def test_a_run_is_fine_tuned_and_probed(images, run, tmp_path):
    for recipe in ("finetune", "probe"):
        fields = {"model": run, "sides": (), "steps": 2, "batch_size": 4, "device": "cpu", "workers": 0}
        out = train(recipe, tiny_config(recipe, images, str(tmp_path / recipe), **fields))
        student, _ = load_run(out)
        check_tied(student.model)
        assert [blocks.tying.groups for blocks in tied_blocks(student.model).values()] == [(0, 0), (0, 1, 2, 3)]
        assert measure_classifier(student, images, "cpu", False)[1] == 12


def test_two_processes_give_the_run_of_one(images, tmp_path):
    fields = {"steps": 3, "batch_size": 6, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "log_every": 1}
    one = train("minivit", small(images, str(tmp_path / "one"), **fields))
    fork(2, _train, small(images, str(tmp_path / "two"), **fields))
    for line, expected in zip(steady_metrics(tmp_path / "two"), steady_metrics(one), strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def _train(rank, config):
    return train("minivit", config)


@pytest.mark.parametrize("model", [SWIN, DEIT])
def test_low_precision_and_an_export(images, tmp_path, model):
    fields = {"precision": "bf16", "checkpoint_activations": True, "drop_path": 0.1, "head_maps": "identity"}
    run = train("minivit", small(images, str(tmp_path / "run"), model=model, steps=3, log_every=1, **fields))
    assert all(line["nonfinite"] == 0 for line in read_metrics(run))
    export(ExportConfig(run, str(tmp_path / "exported")))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    check_tied(loaded)
    pixels = torch.randn(2, 3, 32, 32)
    assert (loaded(pixels) - load_run(run)[0].model(pixels)).abs().max() < 1e-5


def test_what_decays(images):
    task = prepared(images).task
    decayed, exempt = task.param_groups(0.05)
    assert (decayed.weight_decay, exempt.weight_decay) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed.params + exempt.params} == set(names.values())
    of_exempt = {names[id(parameter)] for parameter in exempt.params}
    assert "student.trunk.layers.0.blocks.1.attn.after.weight" in of_exempt
    assert "student.trunk.layers.0.blocks.0.attn.relative_position_bias_table" in of_exempt
    assert "student.trunk.layers.0.blocks.0.local.conv.weight" not in of_exempt
    assert all(parameter.ndim > 1 for parameter in decayed.params)


def test_inheritance_from_the_teacher(images):
    fields = {"teacher": "timm:vit_tiny_patch16_224", "inherit": "mean"}
    with pytest.raises(UserError, match=r"--inherit mean: the student cannot start .*a teacher of 12 blocks"):
        prepared(images, model=DEIT, **fields)
    with pytest.raises(UserError, match="has no head_maps: take one of timm:mini_deit"):
        prepared(images, model="timm:test_vit", teacher="timm:test_vit", inherit="first")
    task = prepared(images, model=DEIT, teacher=DEIT, inherit="last").task
    assert torch.equal(task.student.trunk.blocks[0].attn.before.weight, torch.eye(2))
    taught = task.frozen.model.state_dict()["blocks.2.mlp.fc1.weight"]
    assert torch.equal(task.student.trunk.blocks[3].mlp.fc1.weight, taught)


def test_a_run_as_teacher_and_other_classes(images, run, tmp_path):
    task = prepared(images, teacher=run, teacher_weights=None).task
    assert task.frozen.width == 2
    other = write_folders(tmp_path / "other", classes=("red", "yellow"))
    with pytest.raises(UserError, match=r"knows other classes than --data \(blue, yellow\)"):
        prepared(other, teacher=run, teacher_weights=None)
    with pytest.raises(UserError, match="brings its own weights"):
        prepared(images, teacher=run)
    encoder = load_run(run)[0]
    encoder.model.names = []  # as a run of tinymim has none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.models.class_teacher.load_run", lambda *_, **__: (encoder, 1))
        with pytest.raises(UserError, match="it is no classifier"):
            prepared(images, teacher=run, teacher_weights=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (3, 1)}, "2 blocks cannot be divided"),
        ({"relation_heads": 3}, "3 heads do not divide a width of 16"),
        ({"student_blocks": (1,)}, "give as many of both"),
        ({"student_blocks": (1,), "teacher_blocks": (9,)}, "there is no block 9, the last is 5"),
        ({"student_blocks": (1,), "teacher_blocks": (5,)}, "4 windows of 16 tokens and 1 windows of 16 tokens"),
        ({"teacher": "timm:test_resnet"}, "no blocks to read.*--attention-weight 0 --hidden-weight 0"),
        ({"teacher": DEIT}, "2 stages cannot follow a teacher of 1"),
        ({"teacher": "swin"}, "give a RUN folder of a classifier, or timm:NAME"),
        ({"model": "timm:test_vit", "teacher": SWIN, "groups": (2,)}, "has no groups"),
        ({"eval_data": "x"}, "--eval-data"),
        ({"temperature": 0.0}, "--temperature"),
        ({"drop_path": 1.0}, "--drop-path"),
    ],
)
def test_what_it_refuses(images, fields, message):
    with pytest.raises(UserError, match=message):
        prepared(images, **fields)


def test_the_true_labels_alone(images, tmp_path):
    fields = {"teacher": "none", "teacher_weights": None, "label_weight": 1.0, "smoothing": 0.0}
    task = prepared(images, **fields, erasing=0.0, mixup=0.0, cutmix=0.0).task.eval()
    assert task.teachers == []
    batch = task.draw(first_batch(prepared(images, **fields).rows, 4))
    losses = task.losses(task(batch), 0)
    assert list(losses) == ["labels"]
    expected = torch.nn.functional.cross_entropy(task.student(batch["images"]), batch["targets"])
    assert losses["labels"].item() == pytest.approx(expected.item(), rel=1e-5)
    run = train("minivit", small(images, str(tmp_path), steps=1, log_every=1, log_analysis=1, **fields))
    line = read_metrics(run)[-1]
    assert line["use_grad_norm.5"] > 0
    assert not any(name.startswith("cka.") for name in line)


def test_analysis_is_logged_and_changes_nothing(images, tmp_path):
    fields = {"steps": 3, "batch_size": 12, "log_every": 1, "drop_path": 0.2}
    runs = {
        every: train("minivit", small(images, str(tmp_path / str(every)), log_analysis=every, **fields))
        for every in (None, 2)
    }
    lines = read_metrics(runs[2])
    assert [line["losses"] for line in lines] == [line["losses"] for line in read_metrics(runs[None])]
    assert_same_weights(runs[2], runs[None])
    logged = [{name for name in line if name.startswith(("use_grad_norm.", "cka."))} for line in lines]
    blocks = range(6)
    expected = {f"use_grad_norm.{block}" for block in blocks} | {f"cka.{block}-{block}" for block in blocks}
    assert logged == [set(), expected, set()]
    assert all(lines[1][f"use_grad_norm.{block}"] > 0 for block in blocks)
    assert all(lines[1][f"cka.{block}-{block}"] < 1.01 for block in blocks)
    assert not any(name.startswith("use_grad_norm") for name in read_metrics(runs[None])[1])


def test_what_analysis_measures(images):
    fields = {"log_analysis": 1, "log_every": 1, "erasing": 0.0}
    task = prepared(images, groups=(2, 4), **fields).task
    batch = task.draw(first_batch(prepared(images).rows, 4))
    features = task(batch)
    measured = task.metrics(0)
    torch.stack([*task.losses(features, 0).values()]).sum().backward()
    block = task.student.trunk.layers[0].blocks[1]
    shared = (block.attn.qkv, block.attn.proj, block.mlp)
    weights = [*chain.from_iterable(part.parameters() for part in shared), block.attn.relative_position_bias_table]
    norm = torch.cat([weight.grad.flatten() for weight in weights]).norm().item()
    assert measured["use_grad_norm.1"] == pytest.approx(norm, rel=1e-4)
    twin = prepared(images, **fields).task
    twin.frozen.model.load_state_dict(twin.student.trunk.state_dict())
    twin(twin.draw(batch))
    assert [value for name, value in twin.metrics(0).items() if name.startswith("cka.")] == pytest.approx([1] * 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "none"}, "--teacher none: without a teacher there are the true labels: --label-weight 1"),
        ({"teacher": "none", "label_weight": 1.0, "inherit": "mean"}, "there is no teacher to inherit from"),
        ({"log_analysis": 15, "log_every": 10}, "--log-analysis 15: must be a multiple of --log-every 10"),
        (
            {"model": "timm:test_resnet", "teacher": "none", "label_weight": 1.0, "log_analysis": 10},
            "--log-analysis: ResNet has no blocks to read.*; leave it out",
        ),
    ],
)
def test_what_it_refuses_of_teachers_and_analysis(images, fields, message):
    with pytest.raises(UserError, match=message):
        prepared(images, **{"log_every": 10, **fields})
