"""Several teachers of one student: their caches side by side, live beside each other, and what does not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_dist import fork
from small_tinyclip import config_of, edit_text, plain_config, write_tinyclip_root, write_weights
from small_training import (
    TINY_VIT,
    read_metrics,
    shard_keys,
    steady_metrics,
    teacher_rows,
    tiny_clip,
    tiny_config,
    write_every_root,
    write_teacher,
)

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from shards_spec.files import DataError, UserError
from shards_spec.views import ViewSpec
from training.config import DataConfig, ModelConfig, TeacherCacheConfig
from training.data.batches import first_batch, load_batches
from training.data.samples import Samples, open_samples
from training.engine.memory_estimate import predict_memory
from training.export.card import _teacher_lines
from training.losses.distillation import affinity_loss
from training.recipes import siclip, tinyclip
from training.runs.student import new_student
from training.runs.uses import uses_of
from training.trainer import predict, stages_of, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
BOTH = ("planted", "wide")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Caches planted (2 views, scale 20, 16 dimensions), wide (3 views, scale 30, 24 dimensions) and flipped."""
    root = write_tinyclip_root(tmp_path_factory.mktemp("data"))
    keys = shard_keys()
    write_teacher(root, keys, "wide", views=3, salt="wide/", dim=24, meta_fields={"logit_scale": 30.0})
    flipped = ViewSpec(seed=3, scale=(0.5, 1.0), flip=0.25)
    of_views = {"views": flipped.as_json(), "views_sha256": flipped.sha256}
    write_teacher(root, keys, "flipped", salt="flipped/", meta_fields=of_views)
    return root


def opened(root, *names) -> Samples:
    student = new_student(plain_config(root).student, 0)
    return open_samples(DataConfig(root), TeacherCacheConfig(names), student, seed=0)


def losses_of(config):
    """Losses of the first eight pairs, gradients of the student, and the features."""
    _, samples, task = tinyclip.prepare(config)
    features = task.train()(next(load_batches(samples, [range(8)])))
    losses = task.losses(features, 0)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: value.grad for name, value in task.named_parameters() if value.grad is not None}
    return {name: value.item() for name, value in losses.items()}, gradients, features


def test_a_sample_has_every_teachers_features_of_its_view_and_caption(root):
    both, one = opened(root, *BOTH), opened(root, "planted")
    assert both.cache.num_views == 2  # the smaller number
    for position in (0, 7, 40):
        item, alone = both[position], one[position]
        assert all(torch.equal(item[name], alone[name]) for name in ("teacher_image", "teacher_text", "images"))
        view = item["epoch"] % 2
        expected = teacher_rows([item["key"]], f"wide/image_{view}", 24)[0]
        assert torch.allclose(item["teacher_image_2"], torch.from_numpy(expected), atol=1e-3)
        texts = torch.from_numpy(teacher_rows([item["key"]] * 3, "x", 24))
        for caption in range(3):
            texts[caption] = torch.from_numpy(teacher_rows([item["key"]], f"wide/text_{caption}", 24)[0])
        first = [torch.from_numpy(teacher_rows([item["key"]], f"text_{caption}")[0]) for caption in range(3)]
        shown = [torch.allclose(item["teacher_text"], row, atol=1e-3) for row in first]
        assert [torch.allclose(item["teacher_text_2"], row, atol=1e-3) for row in texts] == shown
        assert sum(shown) == 1


def test_the_command_for_a_missing_shard_names_its_cache_of_several(root):
    path = Path(root) / "teacher" / "wide" / "00001.parquet"
    record = path.with_name("00001_stats.json")
    away = [(file, file.with_name(f"away-{file.name}")) for file in (path, record)]
    for file, other in away:
        file.rename(other)
    try:
        with pytest.raises(UserError) as error:
            opened(root, *BOTH)
    finally:
        for file, other in away:
            other.rename(file)
    again = f"{path} is not there (1 of 3 shards missing): run `clipmill cache {root} --name wide` again"
    assert f"{again} with the options it had, or `clipmill check {root} --repair`" in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("planted", "flipped"), "--teacher 'planted' and 'flipped' are of other views (--flip 0.5 and 0.25)"),
        (("planted", "planted"), "--teacher 'planted' is named twice"),
        (("planted", "nothing"), "--teacher 'nothing' is not there: teacher caches in"),
        ((), "--teacher is needed: teacher caches in"),
    ],
)
def test_caches_that_do_not_go_together_are_refused(root, names, message):
    with pytest.raises(UserError) as error:
        opened(root, *names)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_scale": (70.0,)}, "--teacher-scale 70: 1 number for 2 teachers (planted, wide); give one for each"),
        ({"teacher_scale": (70.0, 0.0)}, "--teacher-scale 70.0 0.0: must be above 0 each"),
        (
            {"teacher_from": "live", "teacher_weights": "x"},
            "--teacher planted wide would not be used with --teacher-from live: say",
        ),
        (
            {"teacher": ("wide",), "teacher_from": "live", "teacher_weights": "x"},
            "--teacher wide would not be used with --teacher-from live",
        ),
        ({"teacher": (), "teacher_from": "live"}, "--teacher-from live needs --teacher-weights"),
        ({"mask_ratio": 0.5}, "--mask-ratio 0.5 would not be used with --mfd-weight 0"),
        ({"gd_inverse_scale": True}, "--gd-inverse-scale would not be used with --gd-weight 0"),
        ({"teacher": ("wide",), "ensemble": "sum"}, "--ensemble sum would not be used with one teacher"),
        (
            {"teacher_scale": (70.0, 60.0), "affinity_weight": 0.0, "feature_weight": 1.0},
            "--teacher-scale 70.0 60.0 would not be used with --affinity-weight 0 and --gd-weight 0: no other loss",
        ),
        ({"more_teachers": ("x",)}, "--more-teachers x would not be used with --teacher-from cache"),
        (
            {"teacher": (), "teacher_from": "live", "teacher_weights": "x", "more_teachers": ("x",)},
            "--more-teachers x: name each teacher once",
        ),
    ],
)
def test_mistakes(root, fields, message):
    with pytest.raises(UserError) as error:
        predict("tinyclip", plain_config(root, **{"teacher": BOTH, **fields}))
    assert message in str(error.value)


def test_each_teacher_has_its_own_scale_unless_it_is_given(root):
    def scales(**fields):
        return tinyclip.prepare(plain_config(root, teacher=BOTH, **fields)).task.teacher.scales

    assert scales() == (50.0, 50.0)
    assert scales(fixed_logit_scale=None) == pytest.approx((20.0, 30.0))
    assert scales(teacher_scale=(70.0, 60.0)) == scales(fixed_logit_scale=None, teacher_scale=(70.0, 60.0))
    assert scales(teacher_scale=(70.0, 60.0)) == (70.0, 60.0)


def test_mean_and_sum_are_those_of_the_teachers_alone(root):
    scales = (70.0, 60.0)
    alone = [
        losses_of(plain_config(root, teacher=(name,), teacher_scale=(scale,)))
        for name, scale in zip(BOTH, scales, strict=True)
    ]
    for ensemble, share in (("mean", 0.5), ("sum", 1.0)):
        losses, gradients, features = losses_of(
            plain_config(root, teacher=BOTH, teacher_scale=scales, ensemble=ensemble, contrastive_weight=0.0)
        )
        assert losses["affinity"] == pytest.approx(share * sum(loss["affinity"] for loss, *_ in alone), rel=1e-5)
        for name, gradient in gradients.items():
            expected = share * (alone[0][1][name] + alone[1][1][name])
            assert torch.allclose(gradient, expected, atol=1e-5, rtol=1e-4)
    written_out = sum(
        affinity_loss(
            features["image"],
            features["text"],
            features[f"teacher_image{ending}"],
            features[f"teacher_text{ending}"],
            teacher_scale=scale,
        )
        for ending, scale in zip(("", "_2"), scales, strict=True)
    )
    assert losses["affinity"] == pytest.approx(written_out.item(), rel=1e-6)


def test_a_damaged_file_is_named_with_its_cache(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "ds")
    path = copy / "teacher" / "wide" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"teacher/wide/00000\.parquet"):
        opened(str(copy), *BOTH)
    opened(str(copy), "planted")


def test_live_teachers_beside_each_other_teach_as_their_caches(root, tmp_path, caplog):
    tiny_clip(tmp_path / "second", vision={**TINY_VIT, "width": 48})
    edit_text(tmp_path / "second", width=48, heads=3)
    models = [f"local-dir:{root}/models/teacher", write_weights(tmp_path / "second", seed=4)]
    scales = {"fixed_logit_scale": None, "teacher_scale": (70.0, 60.0)}
    weights = {"teacher_weights": models[0], "more_teachers": (models[1],)}
    live = plain_config(root, teacher=(), teacher_from="live", **weights, **scales)
    for number, model in enumerate(models):
        spec = live.drawn_views.spec(live.run.seed)
        cache(CacheConfig(root=root, model=model, name=f"of-{number}", views=1, device="cpu", spec=spec))
    cached = plain_config(root, teacher=("of-0", "of-1"), **scales)
    (one, _, features), (other, _, stored) = losses_of(live), losses_of(cached)
    assert one["affinity"] == pytest.approx(other["affinity"], rel=1e-3)  # the caches are float16
    assert list(features) == list(stored)
    alone = losses_of(plain_config(root, teacher=("of-0",), fixed_logit_scale=None, teacher_scale=(70.0,)))[0]
    assert abs(one["affinity"] - alone["affinity"]) > 1e-2
    tinyclip.prepare(plain_config(root, teacher=("of-1", "of-0"), inherit="manual", teacher_weights=models[0]))
    assert "which has other weights" not in caplog.text
    tinyclip.prepare(plain_config(root, teacher=("of-1",), inherit="manual", teacher_weights=models[0]))
    assert "the teacher cache of-1 is of " in caplog.text
    task = tinyclip.prepare(live).task
    assert [len(teacher.tensors()) > 0 for teacher in task.teachers] == [True, True]
    assert not any(name.startswith("teacher") for name in task.state_dict())


def test_siclip_learns_from_several_caches(tmp_path):
    write_every_root(tmp_path)
    root = str(tmp_path)
    keys = shard_keys()
    for name in ("one", "two"):
        write_teacher(root, keys, name, salt=name, dim=64)

    def losses(*names, **fields):
        fields = {"teacher": names, "teacher_from": "cache", "inherit": False, "pm_weight": 0.0, **fields}
        _, samples, task = siclip.prepare(tiny_config("siclip", root, "unused", **fields))
        features = task.train()(task.draw(next(load_batches(samples, [range(4)]))))
        return {name: value.item() for name, value in task.losses(features, 0).items()}

    one, two, both = losses("one"), losses("two"), losses("one", "two")
    summed = losses("one", "two", ensemble="sum", pm_weight=0.1, pm_similarity="teacher")
    for term in ("feature", "interactive"):
        assert both[term] == pytest.approx((one[term] + two[term]) / 2, rel=1e-4)
    assert both["relation"] < (one["relation"] + two["relation"]) / 2
    assert summed["relation"] == pytest.approx(one["relation"] + two["relation"], rel=1e-4)
    assert summed["pairs"] > 0


def run_of_ranks(rank, root, out, fields):
    train("tinyclip", plain_config(root, out, **fields))


def test_masks_two_teachers_and_two_processes(root, tmp_path):
    teacher = f"local-dir:{root}/models/teacher"
    fields = {"teacher": BOTH, "inherit": "auto", "teacher_weights": teacher, "model": "ViT-M-32", "batch_size": 8}
    fields |= {"steps": 3, "prune_step": 2, "teacher_scale": (7.0, 6.0)}
    chain = stages_of("tinyclip", config_of(root, "unused", **fields, stages="1,0.5,0.25", stage_prune_steps="2,2"))
    assert [stage.cached_views.names for stage in chain] == [BOTH] * 2
    masked = train("tinyclip", config_of(root, tmp_path / "masked", **fields))
    assert [line["losses"]["affinity"] > 0 for line in read_metrics(masked)] == [True] * 3
    plain = {"teacher": BOTH, "steps": 2, "batch_size": 8, "chunk_size": 2}
    one = train("tinyclip", plain_config(root, tmp_path / "one", **plain))
    fork(2, run_of_ranks, root, str(tmp_path / "two"), plain)
    for mine, theirs in zip(steady_metrics(one), steady_metrics(tmp_path / "two"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_predicted_memory_counts_every_teacher(root, tmp_path):
    def memory(**fields):
        _, samples, task = tinyclip.prepare(plain_config(root, **fields))
        return predict_memory(task.train(), first_batch(samples, 8), batch_size=64)

    one, two = memory(teacher=("planted",)), memory(teacher=BOTH)
    assert two.batch - one.batch == 64 * 2 * 24 * 4  # image and text, 24 numbers of float32
    assert two.losses == one.losses  # the mean of the distributions is one target
    summed = memory(teacher=BOTH, ensemble="sum")
    assert summed.losses == pytest.approx(2 * one.losses, rel=0.1)
    tiny_clip(tmp_path / "second")
    models = [f"local-dir:{root}/models/teacher", write_weights(tmp_path / "second")]
    live = memory(teacher_from="live", teacher_weights=models[0], more_teachers=(models[1],))
    alone = memory(teacher_from="live", teacher_weights=models[0])
    second = new_student(ModelConfig(models[1]), 0).model
    assert live.weights - alone.weights == sum(tensor.nbytes for tensor in [*second.parameters(), *second.buffers()])


def test_a_run_of_one_teacher_as_older_versions_wrote_it_is_resumed(root, tmp_path):
    config = plain_config(root, tmp_path / "run", steps=2, teacher=("planted",))
    out = train("tinyclip", config)
    path = Path(out, "config.json")
    recorded = json.loads(path.read_text())
    assert recorded["teacher"] == ["planted"]
    for name in ("ensemble", "teacher_scale", "more_teachers"):
        del recorded[name]
    path.write_text(json.dumps(recorded | {"teacher": "planted"}))
    assert "view" in uses_of(out, root, {"raw": None, "shards": (0, 0)})[1]
    assert _teacher_lines(recorded) == ["- teacher: planted"] == _teacher_lines(recorded | {"teacher": "planted"})
    assert _teacher_lines(recorded | {"teacher": list(BOTH)}) == ["- teachers: planted, wide"]
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=3))
    train("tinyclip", longer)
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3]
    others = dataclasses.replace(longer, cached_views=TeacherCacheConfig(BOTH))
    with pytest.raises(UserError, match=r"--teacher: \['planted'\] before, \['planted', 'wide'\] now"):
        train("tinyclip", others)
