"""The tinyclip recipe: inheritance by hand, a live teacher, and what it refuses."""

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
from small_dist import fork
from small_tinyclip import config_of, edit_text, write_tinyclip_root, write_weights
from small_training import TINY_RESNET, TINY_VIT, read_metrics, steady_metrics, tiny_clip

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from shards_spec.files import UserError
from shards_spec.models import load_model
from training.data.batches import load_batches
from training.evaluation.config import EvalConfig
from training.evaluation.stage import load_measured
from training.recipes import tinyclip
from training.runs.run_folder import RunFolder
from training.runs.student import load_run
from training.trainer import stages_of, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tinyclip_root(tmp_path_factory.mktemp("data"))


def teacher_of(root, name="teacher"):
    return load_model(f"local-dir:{root}/models/{name}")


def prepared(root, **fields):
    return tinyclip.prepare(config_of(root, "unused", **fields))


def batch_of(samples, count=8):
    return next(load_batches(samples, [range(count)]))


def test_manual_inheritance_starts_from_the_teachers_corner(root):
    student, _, task = prepared(root, model=f"local-dir:{root}/models/half")
    teacher = teacher_of(root).model.state_dict()
    own = student.model.state_dict()
    assert torch.equal(own["visual.class_embedding"], teacher["visual.class_embedding"][:48])
    assert torch.equal(
        own["visual.transformer.resblocks.1.ln_1.bias"], teacher["visual.transformer.resblocks.1.ln_1.bias"][:48]
    )
    assert own["logit_scale"].exp().item() == pytest.approx(50)
    assert not task.student.logit_scale.requires_grad


def test_layers_and_rank_are_options(root):
    half = f"local-dir:{root}/models/half"
    spread = prepared(root, model=half, layers="spread")[0].model.state_dict()
    third = "transformer.resblocks.1.ln_1.bias"
    assert torch.equal(spread[third], teacher_of(root).model.state_dict()[third][:48])  # layers 0, 1 of 3: as interval
    kept = [prepared(root, model=half, rank=rank)[0].model.state_dict() for rank in ("leading", "magnitude", "taylor")]
    names = ("visual.class_embedding", "text_projection")
    for name in names:
        whole = teacher_of(root).model.state_dict()[name]
        for one in kept:
            rows = {tuple(row.tolist()) for row in one[name].reshape(48, -1)}
            assert rows <= {tuple(row.tolist()) for row in whole.reshape(64, -1)}
        assert not torch.equal(kept[0][name], kept[1][name])
        assert not torch.equal(kept[0][name], kept[2][name])
    again = prepared(root, model=half, rank="taylor")[0].model.state_dict()
    assert all(torch.equal(again[name], kept[2][name]) for name in again)
    few = prepared(root, model=half, rank="taylor", rank_samples=4)[0].model.state_dict()
    assert not all(torch.equal(few[name], kept[2][name]) for name in few)


@pytest.mark.parametrize("rank", ["leading", "magnitude", "taylor"])
def test_a_resnet_inherits_by_hand(rank, root, tmp_path):
    student = tiny_clip(tmp_path / "narrow", vision={**TINY_RESNET, "width": 4})
    teacher = f"local-dir:{root}/models/resnet"
    config = config_of(root, tmp_path / "run", model=student, teacher_weights=teacher, rank=rank, steps=2)
    own = tinyclip.prepare(config).student.model.state_dict()
    whole = teacher_of(root, "resnet").model.state_dict()
    name = "visual.layer1.0.bn1.running_var"
    assert set(own[name].tolist()) <= set(whole[name].tolist())
    assert torch.equal(own["text_projection"], whole["text_projection"])
    assert len(read_metrics(train("tinyclip", config))) == 2


@pytest.mark.parametrize("rank", ["leading", "taylor"])
def test_towers_of_different_sources(rank, root, tmp_path):
    tiny_clip(tmp_path / "other", vision={**TINY_VIT, "layers": 2})
    edit_text(tmp_path / "other", width=64, heads=4, layers=2)
    other = write_weights(tmp_path / "other", seed=5)
    half = f"local-dir:{root}/models/half"
    own = prepared(root, model=half, teacher_weights_text=other, rank=rank)[0].model.state_dict()
    words = load_model(other).model.state_dict()["token_embedding.weight"]
    image = teacher_of(root).model.state_dict()["visual.class_embedding"]
    assert set(own["token_embedding.weight"][7].tolist()) <= set(words[7].tolist())
    assert set(own["visual.class_embedding"].tolist()) <= set(image.tolist())
    assert torch.equal(own["token_embedding.weight"], words[:, :48]) == (rank == "leading")


def test_an_inherited_student_is_trained_and_resumed_without_the_teachers_weights(root, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(Path(root, "models", "teacher"), teacher)
    config = config_of(
        root, tmp_path / "run", steps=6, checkpoint_steps=3, rank="taylor", teacher_weights=f"local-dir:{teacher}"
    )
    whole = train("tinyclip", config)
    assert [line["logit_scale"] for line in read_metrics(whole)] == [pytest.approx(50)] * 6
    assert "parameters" not in read_metrics(whole)[0]
    (tmp_path / "run" / "checkpoints" / "step_000006.pt").unlink()
    before = steady_metrics(whole)
    shutil.rmtree(teacher)
    train("tinyclip", config)
    assert steady_metrics(whole) == before


# fact 5
def test_a_student_of_the_teachers_sizes_starts_at_the_teachers_entropy(root):
    same = f"local-dir:{root}/models/teacher"
    _, samples, task = prepared(root, model=same, teacher_from="live")
    task.eval()
    with torch.no_grad():
        features = task(batch_of(samples))
        (loss,) = task.losses(features, 0).values()
    assert (features["image"] - features["teacher_image"]).abs().max() < 1e-6
    entropies = []
    for one, other in (("teacher_image", "teacher_text"), ("teacher_text", "teacher_image")):
        target = (50 * features[one] @ features[other].T).softmax(-1)
        entropies.append(-(target * target.clamp(min=1e-30).log()).sum(-1).mean().item())
    assert loss.item() == pytest.approx(sum(entropies) / 2, abs=1e-5)


def test_live_and_cached_teacher_teach_the_same_on_equal_views(root, tmp_path):
    live = config_of(root, "unused", teacher_from="live", model=f"local-dir:{root}/models/clip")
    name = "own"
    cache(
        CacheConfig(
            root=root,
            model=f"local-dir:{root}/models/teacher",
            name=name,
            views=1,
            dtype="float32",
            precision="fp32",
            device="cpu",
            spec=live.drawn_views.spec(live.run.seed),
        )
    )
    cached = dataclasses.replace(
        live, teacher_from="cache", cached_views=dataclasses.replace(live.cached_views, teacher=name)
    )
    losses = []
    for config in (live, cached):
        _, samples, task = tinyclip.prepare(config)
        task.train()
        batch = batch_of(samples)
        losses.append(task.losses(task(batch), 0)["affinity"].item())
        assert ("teacher_image" in batch) == (config is cached)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert not [parameter for parameter in tinyclip.prepare(live).task.teachers[0].tensors() if parameter.requires_grad]


MISTAKES = [
    ({"model": "local-dir:{root}/models/wide"}, "wide is wider than local-dir:{root}/models/teacher, 96 dims and 64"),
    ({"model": "local-dir:{root}/models/deep"}, "has 4 image layers in visual.transformer.resblocks"),
    (
        {"model": "local-dir:{root}/models/patch"},
        "has another patch size than",
    ),
    ({"model": "local-dir:{root}/models/narrow"}, "has another embedding width than"),
    ({"model": "local-dir:{root}/models/resnet"}, "is a CLIP-ResNet, that of local-dir:{root}/models/teacher a ViT"),
    ({"model": "local-dir:{root}/models/side"}, "takes images of image_size 32, the student of 64"),
    ({"teacher_weights": ""}, "--inherit manual needs --teacher-weights: NAME:TAG_OR_FILE"),
    ({"teacher_weights": "ViT-B-32"}, "'ViT-B-32' is no RUN folder and names no weights: say NAME:TAG_OR_FILE"),
    ({"teacher_weights": "ViT-B-32:nothing"}, "'nothing'"),
    ({"teacher_weights": "local-dir:{root}/models/half"}, "half"),
    ({"inherit": "auto", "teacher_weights": "ViT-B-32:openai"}, "'ViT-B-32:openai': these weights were trained with"),
    ({"teacher_weights": "ViT-B-32:openai", "teacher_from": "live"}, "take ViT-B-32-quickgelu with them"),
    (
        {"stage_models": "A,B", "model": "X"},
        "--model X would not be used with --stage-models, which",
    ),
    ({"inherit": "none", "teacher_weights": "", "teacher_from": "live"}, "--teacher-from live needs --teacher-weights"),
    ({"inherit": "none"}, "would not be used with --inherit none"),
    (
        {"inherit": "none", "teacher_weights": "", "from_run": "x"},
        "--from-run x would not be used with --inherit none",
    ),
    ({"pretrained": "x"}, "--pretrained x would not be used with --inherit manual"),
    ({"inherit": "auto", "teacher_weights": ""}, "--inherit auto needs --teacher-weights"),
    ({"inherit": "auto", "model": "ViT-B-16"}, "--model ViT-B-16 would not be used with --inherit auto"),
    (
        {"inherit": "auto", "teacher_weights_text": "x"},
        "--teacher-weights-text x would not be used with --inherit auto",
    ),
    ({"inherit": "auto", "teacher_weights": "local-dir:{root}/models/resnet"}, "masks need a ViT"),
    ({"inherit": "auto", "prune_step": 99}, "--prune-step 99: the run has 12 steps"),
    ({"inherit": "auto", "sparsity": 1.0}, "--sparsity 1.0: must be in (0, 1)"),
    ({"inherit": "auto", "from_run": "{root}/none"}, "none"),
    ({"stages": "1,0.5"}, "--stages '1,0.5' is for --inherit auto, not manual"),
    ({"inherit": "auto", "stages": "0.5,0.75"}, "--stages '0.5,0.75': must be shares of the parameters, each smaller"),
    ({"inherit": "auto", "stages": "half"}, "--stages 'half': must be shares"),
    (
        {"inherit": "auto", "stages": "1,0.5", "stage_prune_steps": "1,2"},
        "--stage-prune-steps '1,2': 2 numbers for 1 stage",
    ),
    ({"inherit": "auto", "stages": "1,0.5", "stage": 2}, "--stage 2: must be from 1 to 1"),
    ({"inherit": "auto", "stages": "1,nan"}, "--stages '1,nan': must be shares"),
    ({"inherit": "auto", "stages": "1,nan,0.5"}, "--stages '1,nan,0.5': must be shares"),
    (
        {"inherit": "auto", "stages": "1,0.7,0.5", "stage_prune_steps": "3,0"},
        "--stage-prune-steps '3,0': must be whole numbers of 1 or more",
    ),
    (
        {"inherit": "auto", "stages": "1,0.7,0.5", "stage_prune_steps": "3,20"},  # known before the first is trained
        "--stage-prune-steps '3,20': a stage has 12 steps, so masks of 20 would never be applied",
    ),
    ({"inherit": "auto", "stages": "1,0.5", "sparsity": 0.3}, "--sparsity 0.3 would not be used with --stages"),
    (
        {"inherit": "auto", "stages": "1,0.5", "stage_prune_steps": "3", "prune_step": 5},
        "--prune-step 5 would not be used with --stage-prune-steps",
    ),
    ({"inherit": "auto", "layers": "first"}, "--layers first would not be used with --inherit auto"),
    (
        {"inherit": "none", "teacher_weights": "", "rank": "taylor"},
        "--rank taylor would not be used with --inherit none",
    ),
    ({"rank_samples": 8}, "--rank-samples 8 would not be used with --rank leading"),
    ({"sparsity": 0.5}, "--sparsity 0.5 would not be used with --inherit manual"),
    ({"prune_step": 5}, "--prune-step 5 would not be used with --inherit manual"),
    ({"flip": 0.5}, "--flip 0.5 would not be used with --teacher-from cache"),
    ({"scale": (0.5, 1.0)}, "--scale 0.5 1.0 would not be used with --teacher-from cache"),
    ({"stage_models": "a,b", "stage_prune_steps": "1"}, "--stage-prune-steps '1' is for --inherit auto, not manual"),
]


@pytest.fixture(scope="module")
def odd_models(root, tmp_path_factory):
    """Students that the teacher has no weights for."""
    for name, fields in {
        "wide": {"width": 96},
        "deep": {"layers": 4},
        "patch": {"patch_size": 8},
        "side": {"image_size": 64},
    }.items():
        tiny_clip(Path(root, "models", name), vision={**TINY_VIT, **fields})
    tiny_clip(Path(root, "models", "narrow"), dim=8)


@pytest.mark.usefixtures("odd_models")
@pytest.mark.parametrize(("fields", "message"), MISTAKES)
def test_mistakes(fields, message, root, tmp_path):
    given = {name: value.format(root=root) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(UserError) as error:
        train("tinyclip", config_of(root, tmp_path / "run", **given))
    assert message.format(root=root) in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cache_of_another_teacher_is_named_with_the_weights(root, caplog):
    with caplog.at_level(logging.WARNING):
        prepared(root, model=f"local-dir:{root}/models/half")
    (message,) = [one.getMessage() for one in caplog.records if "teacher cache" in one.getMessage()]
    assert "the teacher cache planted is of planted, the student inherits from local-dir:" in message
    assert message.endswith("better than a larger one")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_of_the_inherited_teacher_is_not(precision, root, tmp_path, caplog):
    name = f"same-{precision}"
    teacher = f"local-dir:{root}/models/teacher"
    cache(CacheConfig(root=root, model=teacher, name=name, views=1, precision=precision, device="cpu"))
    with caplog.at_level(logging.WARNING):
        prepared(root, model=f"local-dir:{root}/models/half", teacher=name)
        prepared(root, inherit="auto", teacher=name)
    assert not [one for one in caplog.records if "teacher cache" in one.getMessage()]


# fact 17
def test_labels_do_not_matter_to_affinity_mimicking(root):
    """The gradient is that of the teacher's similarities alone; with the hard-label loss it is not."""

    def gradients(contrastive, rolled):
        _, samples, task = prepared(root, model=f"local-dir:{root}/models/clip", contrastive_weight=contrastive)
        batch = batch_of(samples)
        features = task(batch)
        if rolled:  # other pairs stand in the diagonal: texts of both models in another order
            for side in ("text", "teacher_text"):
                features[side] = features[side].roll(1, 0)
        torch.stack(list(task.losses(features, 0).values())).sum().backward()
        return {name: value.grad for name, value in task.named_parameters() if value.grad is not None}

    plain, other = gradients(0.0, False), gradients(0.0, True)
    assert all(torch.allclose(plain[name], other[name], atol=1e-5) for name in plain)
    plain, other = gradients(1.0, False), gradients(1.0, True)
    assert not all(torch.allclose(plain[name], other[name], atol=1e-3) for name in plain)


def run_of_ranks(rank, root, out, fields):
    train("tinyclip", config_of(root, out, **fields))


# fact 4
def test_loss_and_gradient_of_two_processes_are_those_of_one(root, tmp_path):
    fields = {"model": f"local-dir:{root}/models/half", "steps": 3, "batch_size": 8}
    one = train("tinyclip", config_of(root, tmp_path / "one", **fields))
    fork(2, run_of_ranks, root, str(tmp_path / "two"), fields)
    for mine, theirs in zip(steady_metrics(one), steady_metrics(tmp_path / "two"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_stages_by_hand(root, tmp_path):
    half, small = f"local-dir:{root}/models/half", f"local-dir:{root}/models/clip"
    config = config_of(root, tmp_path / "run", stage_models=f"{half},{small}", steps=2)
    out = train("tinyclip", config)
    assert out == str(tmp_path / "run" / "stage-2")
    first, _ = load_run(str(tmp_path / "run" / "stage-1"))
    assert len(first.model.visual.transformer.resblocks) == 2
    (_, second) = stages_of("tinyclip", config)
    assert second.inheritance.from_run == str(tmp_path / "run" / "stage-1")
    new = dataclasses.replace(second, run=dataclasses.replace(second.run, out="unused"))
    start = tinyclip.prepare(new).student.model.state_dict()
    assert torch.equal(start["visual.class_embedding"], first.model.state_dict()["visual.class_embedding"][:32])
    before = steady_metrics(out)
    assert train("tinyclip", config) == out
    assert steady_metrics(out) == before
    alone = dataclasses.replace(config, stages=dataclasses.replace(config.stages, stage=2))
    assert [one.run.out for one in stages_of("tinyclip", alone)] == [out]


def test_the_folder_of_stages_is_no_run_and_the_last_stage_is_named(tmp_path):
    for number in (2, 10):
        (tmp_path / "run" / f"stage-{number}").mkdir(parents=True)
    hint = f"the last one is {tmp_path}/run/stage-10"
    with pytest.raises(UserError, match=f"no RUN folder of .*{hint}$"):
        RunFolder(str(tmp_path / "run")).config()
    with pytest.raises(UserError, match=f"neither a RUN folder .*{hint}$"):
        load_measured(EvalConfig((str(tmp_path / "run"),), data=("unused",)), str(tmp_path / "run"))
