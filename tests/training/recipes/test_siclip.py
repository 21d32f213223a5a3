"""The siclip recipe on tiny towers: what is inherited, taught, frozen, weighted, and what it refuses."""

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_training import teacher_rows, tiny_siclip, write_packed, write_teacher

from shards_spec.files import UserError
from training.config import DataConfig, EnsembleConfig, ModelConfig, TeacherCacheConfig, ViewConfig
from training.configs import default_config
from training.configs.teaching import ClipKdConfig
from training.data.batches import load_batches
from training.data.samples import draw_caption, open_samples
from training.engine.optim import build_optimizer, param_groups
from training.losses import contrastive, distillation
from training.losses.pair_matching import pair_loss, sample_negatives
from training.recipes import siclip
from training.runs.student import new_student
from training.trainer import stages_of

UNTAUGHT = {"fd_weight": 0.0, "crd_weight": 0.0, "icl_weight": 0.0}
WEIGHTS = {"contrastive": 1.0, "feature": 4000.0, "relation": 1.0, "interactive": 1.0, "pairs": 0.1}


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """A tiny base model's weights; its norms have seen images and texts."""
    path = tmp_path_factory.mktemp("base") / "tiny.pt"
    base = new_student(ModelConfig("MobileCLIP-tiny"), seed=5).model.train()
    with torch.no_grad():
        base.logit_scale.fill_(math.log(40))
        for seed in range(3):
            base(*(batch_of(8, seed)[name] for name in ("images", "tokens")))
    torch.save(base.state_dict(), path)
    return str(path)


def batch_of(count=6, seed=0):
    """Images of noise, texts of their own."""
    tokens = open_clip.get_tokenizer("ViT-B-32")([f"a photo of {seed} {number}" for number in range(count)])
    images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return {"images": images, "tokens": tokens, "keys": [f"{seed}/{n}" for n in range(count)], "epochs": [0] * count}


def config_of(base_file, model="SiCLIP-tiny", **fields):
    wanted = {"student": ModelConfig(model), "base": "MobileCLIP-tiny", "base_weights": base_file, **fields}
    return dataclasses.replace(default_config("siclip"), **wanted)


def task_of(base_file, **fields):
    config = config_of(base_file, **fields)
    return siclip.build_task(config, new_student(config.student, seed=0), None).train()


def train(task, steps=3, lr=1e-3):
    """A few steps as the trainer makes them; the sum of the losses of each."""
    optimizer = build_optimizer(task, dataclasses.replace(task.config.optim, lr=lr))
    sums = []
    for step in range(steps):
        loss = torch.stack(list(task.losses(task(task.draw(batch_of(6, step % 2))), step).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(step)
        sums.append(loss.item())
    return sums


def test_frozen_tensors_stay_and_trained_ones_move(base_file):  # fact 6
    task = task_of(base_file)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train(task)
    after, base = task.state_dict(), torch.load(base_file)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    blocks = ("student.visual.trunk.stages.3.blocks.", "student.text.layers.")
    assert trained >= {"student.logit_scale", "icl_logit_scale", "head.linear.weight", "head.linear.bias"}
    for name in trained:
        assert name.startswith(blocks) or "student" not in name or name == "student.logit_scale"
        assert not torch.equal(before[name], after[name]), name
    frozen = [name for name in after if not name.startswith(blocks) and name not in trained]
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
        assert torch.equal(after[name], base[name.removeprefix("student.")]), name
    assert sum("running_mean" in name for name in frozen) > 20


def test_the_teacher_from_the_shared_prefix_is_the_whole_teacher(base_file):  # fact 7
    task, batch = task_of(base_file), batch_of()
    features, teacher = task(task.draw(batch)), siclip.load_base("MobileCLIP-tiny", base_file, 0).model
    base = task.base.model
    with torch.no_grad():
        assert torch.equal(features["teacher_image"], base.encode_image(batch["images"]))
        assert torch.equal(features["teacher_text"], base.encode_text(batch["tokens"]))
        whole, texts = teacher.encode_image(batch["images"]), teacher.encode_text(batch["tokens"])
        mine, words = task.eval().student.encode_image(batch["images"]), task.student.encode_text(batch["tokens"])
        again = task(task.draw(batch))
    assert torch.allclose(features["teacher_image"], whole, atol=1e-5)
    assert torch.allclose(features["teacher_text"], texts, atol=1e-5)
    assert torch.allclose(again["image"], mine, atol=1e-4)  # as it is evaluated, without the fused prefix
    assert torch.allclose(again["text"], words, atol=1e-4)
    assert task.teacher.scales == pytest.approx((40,))


def test_losses_are_the_weighted_terms(base_file):  # fact 14
    task = task_of(base_file)
    features = task(task.draw(batch_of()))
    image, text, teacher_image, teacher_text = four = [
        F.normalize(features[name], dim=-1) for name in ("image", "text", "teacher_image", "teacher_text")
    ]
    scale = task.student.logit_scale.exp()
    ids = features["text_ids"], features["key_ids"]
    logits = scale * image @ text.T
    negatives = sample_negatives(logits, logits.T, ids, seed=0, step=4)
    terms = {
        "contrastive": contrastive.clip_loss(image, text, scale),
        "feature": ((image - teacher_image) ** 2).mean() + ((text - teacher_text) ** 2).mean(),
        "relation": distillation.relation_loss(*four, student_scale=scale, teacher_scale=40.0),
        "interactive": distillation.interactive_loss(*four, 1 / 0.07),
        "pairs": pair_loss(task.head, features["image"], features["text"], negatives),
    }
    losses = task.losses(features, step=4)
    assert list(losses) == list(terms)
    for name, term in terms.items():
        assert losses[name].item() == pytest.approx(WEIGHTS[name] * term.item(), rel=1e-4), name


def forbidden(*_, **__):
    raise AssertionError("computed though its weight is 0")


@pytest.mark.parametrize(
    ("weight", "function", "name"),
    [
        ("clip_weight", "clip_loss", "contrastive"),
        ("fd_weight", "element_feature_loss", "feature"),
        ("crd_weight", "ensemble_relation_loss", "relation"),
        ("icl_weight", "interactive_loss", "interactive"),
        ("pm_weight", "sample_negatives", "pairs"),
    ],
)
def test_a_weight_of_zero_takes_the_terms_work_away(weight, function, name, base_file, monkeypatch):  # fact 14
    task = task_of(base_file, **{weight: 0.0})
    monkeypatch.setattr(siclip, function, forbidden)
    assert set(task.losses(task(task.draw(batch_of())), 0)) == set(WEIGHTS) - {name}
    assert hasattr(task, "head") == (name != "pairs")
    assert hasattr(task, "icl_logit_scale") == (name != "interactive")


@pytest.mark.parametrize(
    ("fields", "terms", "trains_stem"),
    [
        ({**UNTAUGHT, "pm_weight": 0.0, "inherit": False, "base_weights": ""}, {"contrastive"}, True),
        ({**UNTAUGHT, "pm_weight": 0.0}, {"contrastive"}, False),
        ({"pm_weight": 0.0}, set(WEIGHTS) - {"pairs"}, False),
        ({}, set(WEIGHTS), False),
        ({"inherit": False}, set(WEIGHTS), True),
    ],
    ids=["plain", "WI", "WIKD", "WIKD+PM", "KD+PM"],
)
def test_rows_of_table_5(fields, terms, trains_stem, base_file, monkeypatch):
    task = task_of(base_file, **fields)
    if "feature" not in terms:
        monkeypatch.setattr(siclip, "forward_tail", count := Counting(siclip.forward_tail))
    features = task(task.draw(batch_of()))
    assert set(task.losses(features, 0)) == terms
    assert ("teacher_image" in features) == ("feature" in terms)
    if "feature" not in terms:
        assert count.models == ([] if trains_stem else [task.student])
    stem = next(task.student.visual.trunk.stem.parameters())
    assert stem.requires_grad == trains_stem
    assert (task.base is None) == (trains_stem and terms == {"contrastive"})


class Counting:
    """A function that remembers its first arguments."""

    def __init__(self, function):
        self.function, self.models = function, []

    def __call__(self, model, *rest, **options):
        self.models.append(model)
        return self.function(model, *rest, **options)


def test_options_of_inheritance(base_file):
    base = torch.load(base_file)
    tail = task_of(base_file, train_tail=True)
    assert {n for n, p in tail.student.named_parameters() if p.requires_grad and n.startswith(siclip.TAIL)} == {
        name for name, _ in tail.student.named_parameters() if name.startswith(siclip.TAIL)
    }
    assert not next(tail.student.visual.trunk.stem.parameters()).requires_grad
    assert tail.student.visual.trunk.final_conv.training
    plain, random_ffn = task_of(base_file).student, task_of(base_file, inherit_ffn=False).student
    of_base = base["text.layers.0.ffn.fc1.weight"]
    found = [student.text.layers[0].blocks[0].ffn.fc1.weight for student in (plain, random_ffn)]
    assert [torch.equal(weight, of_base) for weight in found] == [True, False]
    keys = task_of(base_file, inherit_keys=True).student.text.layers[0].qk[0].weight.chunk(2)[1]
    assert torch.equal(keys, base["text.layers.0.qkv.weight"].chunk(3)[1])
    norm = task_of(base_file, exact_norm=True).student.eval().visual.trunk.stages[3].blocks[0].blocks[0].norm
    x = torch.randn(2, len(norm.weight), 2, 2)
    assert torch.allclose(norm(x), x, atol=1e-5)


def cache_of(dim):
    """What a task asks of caches: here, of one."""
    return SimpleNamespace(members=[SimpleNamespace(logit_scale=40.0, dim=dim, name="made here")])


def test_the_base_is_not_saved_and_comes_along(base_file):
    task = task_of(base_file)
    assert all(name.startswith(("student.", "head.", "icl_logit_scale")) for name in task.state_dict())
    assert set(task.parameters()).isdisjoint(task.base.model.parameters())
    task.double()
    assert next(task.base.model.parameters()).dtype == torch.float64
    batch = batch_of() | {"images": batch_of()["images"].double()}
    assert task(task.draw(batch))["teacher_image"].dtype == torch.float64


def test_cached_and_live_teacher_give_the_same_losses(base_file, tmp_path):
    task = task_of(base_file)
    batch = task.draw(batch_of())
    live = task.losses(task(batch), 1)
    config = config_of(base_file, teacher_from="cache")
    cache = cache_of(64)
    cached = siclip.build_task(config, new_student(config.student, seed=0), cache).train()
    cached.head.load_state_dict(task.head.state_dict())
    with torch.no_grad():
        features = {"teacher_image": task(batch)["teacher_image"], "teacher_text": task(batch)["teacher_text"]}
    found = cached.losses(cached(batch | features), 1)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(
        {name: loss.item() for name, loss in live.items()}, rel=1e-5
    )


def test_scales_stay_in_range_and_raw_ones_as_they_are(base_file):
    task, raw = task_of(base_file), task_of(base_file, icl_raw_scale=True)
    for one in (task, raw):
        with torch.no_grad():
            one.student.logit_scale.fill_(9.0)
            one.icl_logit_scale.fill_(9.0)
        one.after_step(0)
        assert one.student.logit_scale.item() == pytest.approx(math.log(100))
    assert [one.icl_logit_scale.item() for one in (task, raw)] == [pytest.approx(math.log(100)), 9.0]
    assert raw._icl_scale().item() == 9.0
    assert task._icl_scale().item() == pytest.approx(100)


def test_decay_is_for_the_matrices(base_file):
    task = task_of(base_file)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group.params} for group in param_groups(task, 0.1))
    assert "head.linear.weight" in decayed
    assert any(".qk." in name for name in decayed)
    assert plain >= {"head.linear.bias", "icl_logit_scale", "student.logit_scale"}
    assert not [name for name in decayed if name.split(".")[-1] in ("alpha", "beta", "gamma", "beta_sa", "beta_ff")]
    assert not [name for name in decayed if ".norm." in name]


@pytest.mark.parametrize("similarity", ["student", "teacher"])
def test_whose_similarity_draws_the_negatives(similarity, base_file, monkeypatch):
    task = task_of(base_file, pm_similarity=similarity, pm_logits=1, pm_raw=True)
    features = task(task.draw(batch_of()))
    seen = Counting(sample_negatives)
    monkeypatch.setattr(siclip, "sample_negatives", seen)
    task.losses(features, 0)
    prefix = "" if similarity == "student" else "teacher_"
    image, text = (F.normalize(features[prefix + name], dim=-1) for name in ("image", "text"))
    assert torch.allclose(seen.models[0], 40 * image @ text.T, atol=1e-4)
    assert not seen.models[0].requires_grad
    assert task.head.linear.out_features == 1
    assert task.head.raw


def test_it_learns(base_file):
    sums = train(task_of(base_file), steps=30, lr=2e-3)
    assert sum(sums[-4:]) < 0.8 * sum(sums[:4])


def test_forward_in_bf16(base_file):
    task = task_of(base_file)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = task(task.draw(batch_of()))
        losses = task.losses(features, 0)
    assert all(value.dtype in (torch.float32, torch.int64) for value in features.values())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("data"))
    write_teacher(root, write_packed(root, [9, 8]))
    return root


def test_captions_are_drawn_evenly_and_again():  # fact 15
    keys, counts = [f"{number:09d}" for number in range(2500)], Counter()
    drawn = {(key, epoch): draw_caption(7, key, epoch, 6) for key in keys for epoch in range(40)}
    counts = Counter(drawn.values())
    assert len(drawn) == 100_000
    chi_squared = sum((counts[i] - 1e5 / 6) ** 2 / (1e5 / 6) for i in range(6))
    assert chi_squared < 5 + 4 * math.sqrt(10)
    assert drawn == {place: draw_caption(7, *place, 6) for place in drawn}


def test_teacher_and_student_see_one_text(root):  # fact 15
    """The planted teacher's features say which caption they are of; the tokens, which one the student reads."""
    config = config_of("random", teacher_from="cache", data=DataConfig(data=root))
    assert config.views == TeacherCacheConfig()
    student = new_student(config.student, 0)
    samples = open_samples(config.data, config.views, student, seed=0)
    shown = set()
    for position in range(3 * 17):
        item = samples[position]
        place = samples.order.locate(position)
        captions = samples.reader.sample(place.shard, place.index).captions
        texts = [teacher_rows([item["key"]], f"text_{number}")[0] for number in range(3)]
        taught = int(np.argmax([row @ item["teacher_text"].numpy() for row in texts]))
        assert torch.equal(item["tokens"], student.tokenizer([captions[taught]])[0])
        shown.add(taught)
    assert shown == {0, 1, 2}


@pytest.mark.parametrize("captions", ["all", "original"])  # table 4
def test_a_live_teacher_has_views_drawn_now(captions, root):
    config = config_of("random", data=DataConfig(data=root, captions=captions))
    assert isinstance(config.views, ViewConfig)
    student = new_student(config.student, 0)
    samples = open_samples(config.data, config.views, student, seed=0)
    assert (samples.views.scale, samples.views.ops, samples.views.magnitude) == ((0.08, 1.0), 2, 9)
    assert (samples.views.op_set, samples.views.flip, samples.cache) == ("torchvision", 0.0, None)
    task = siclip.build_task(config, student, samples.cache).train()
    (batch,) = load_batches(samples, [range(8)])
    losses = task.losses(task(task.draw(batch)), 0)
    assert set(losses) == set(WEIGHTS)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_weights": ""}, "--base-weights is needed: MobileCLIP-tiny's weights"),
        ({"base_weights": "/no/such.pt"}, "--pretrained '/no/such.pt' is no tag of MobileCLIP-tiny and no file"),
        ({"base": "MobileCLIP-S0", "base_weights": "random"}, "takes images of image_size 256, the student of 64"),
        ({"model": "MobileCLIP-tiny"}, "--model 'MobileCLIP-tiny' has no SAS-P blocks"),
        (
            {"model": "SiCLIP-tiny", "base": "SiCLIP-tiny", "base_weights": "random"},
            "cannot inherit from --base 'SiCLIP-",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message, base_file):
    with pytest.raises(UserError) as error:
        task_of(**{"base_file": base_file, **fields})
    assert message in str(error.value)


def test_a_base_with_other_tokens_is_refused(tmp_path):
    base = tiny_siclip(tmp_path / "base", "MobileCLIP-tiny")
    with pytest.raises(
        UserError, match=r"has \[16, \d+\] for context_length and vocab_size, the student \[77, 49408\]"
    ):
        task_of("random", base=base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crd_weight": -1.0}, "--crd-weight -1.0: must be 0 or more"),
        (
            {**UNTAUGHT, "clip_weight": 0.0, "pm_weight": 0.0},
            "--clip-weight 0.0: must be above 0 when the others are 0",
        ),
        ({"inherit": False, "train_tail": True}, "--train-tail means nothing with --no-inherit"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(default_config("siclip"), **fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ensemble": EnsembleConfig("sum")}, "--ensemble sum would not be used with one teacher"),
        (
            {"ensemble": EnsembleConfig(teacher_scale=(70.0,)), "crd_weight": 0.0},
            "--teacher-scale 70.0 would not be used with --crd-weight 0 and --gd-weight 0",
        ),
        (
            {
                **UNTAUGHT,
                "ensemble": EnsembleConfig("sum"),
                "teacher_from": "cache",
                "cached_views": TeacherCacheConfig(("a", "b")),
            },
            "--ensemble sum would not be used without a loss of a teacher",
        ),
        ({"cached_views": TeacherCacheConfig(("a",))}, "--teacher a would not be used with --teacher-from live"),
        ({"clip_kd": ClipKdConfig(mask_ratio=0.5)}, "--mask-ratio 0.5 would not be used with --mfd-weight 0"),
        ({"clip_kd": ClipKdConfig(gd_inverse_scale=True)}, "--gd-inverse-scale would not be used with --gd-weight 0"),
        ({"icl_weight": 0.0, "icl_raw_scale": True}, "--icl-raw-scale would not be used with --icl-weight 0"),
        ({"pm_weight": 0.0, "pm_logits": 1}, "--pm-logits 1 would not be used with --pm-weight 0"),
        ({"inherit": False, "inherit_ffn": False}, "--no-inherit-ffn would not be used with --no-inherit"),
        (
            {"teacher_from": "cache", "drawn_views": ViewConfig(scale=(0.08, 1.0), flip=0.5)},
            "--flip 0.5 would not be used with --teacher-from cache",
        ),
    ],
)
def test_options_that_would_not_be_used_are_refused(fields, message):
    with pytest.raises(UserError) as error:
        stages_of("siclip", dataclasses.replace(default_config("siclip"), **fields))
    assert message in str(error.value)


def test_a_teacher_of_another_width_gets_linear_maps_where_features_are_compared(base_file):
    config, cache = config_of(base_file, teacher_from="cache"), cache_of(16)
    task = siclip.build_task(config, new_student(config.student, 0), cache)
    assert task.clip_kd.projections["0"].image.weight.shape == (16, 64)
    plain = dataclasses.replace(config, fd_weight=0.0, icl_weight=0.0)
    task = siclip.build_task(plain, new_student(config.student, 0), cache)
    assert (task.teacher.scales, task.clip_kd.projects) == ((40.0,), False)
