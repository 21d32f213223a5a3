"""Recipes on cached soft labels: the live teacher's loss, views in turn, mixing, resume, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_catlip import write_folders
from small_training import final_weights, read_metrics, tiny_config

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.timm_classifiers import load_timm_classifier
from shards_spec.views import ViewSpec, apply_view, draw_view
from training.configs import default_config
from training.data.batches import first_batch
from training.export import to_timm
from training.export.config import ExportConfig
from training.losses.relations import soft_ce, soft_kl
from training.models.classifier import new_classifier
from training.models.mixing import mixed_images, mixed_targets
from training.models.soft_targets import hard_targets, soft_targets
from training.recipes import finetune, minivit
from training.recipes.hard_distillation import logits_of_both
from training.trainer import predict, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
CLASSES = ["blue", "green", "red"]
MODEL = "timm:mini_deit_test"
VIEWS = ViewSpec(ops=2, op_set="timm-inc", op_prob=0.5, magnitude_std=0.5)  # minivit's
ALONE = {"attention_weight": 0.0, "hidden_weight": 0.0}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """An exported classifier whose logits differ much."""
    student = new_classifier(MODEL, len(CLASSES), seed=5)
    student.model.names = CLASSES
    with torch.no_grad():
        student.model.head.weight.mul_(40)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    to_timm.write(folder, student, ExportConfig("run", str(folder)))
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory, teacher) -> str:
    """ROOTs of labelled images; caches `all`, `two` (probabilities), `plain` (finetune's views), `vectors`."""
    data = tmp_path_factory.mktemp("data")
    folders = write_folders(data / "folders", train=5, test=3, classes=tuple(CLASSES))
    for split in ("train", "test"):
        root = str(data / split)
        ingest(IngestConfig(root, (f"{folders}/{split}",), format="classes", shard_size=6, image_size=48, workers=1))
    root = str(data / "train")
    pack(PackConfig(root, captioner=("none",), workers=1))
    caches = {
        "all": {"soft_labels": "all"},
        "two": {"soft_labels": 2},
        "plain": {"soft_labels": "all", "spec": ViewSpec()},
        "vectors": {},
    }
    for name, changes in caches.items():
        cache(CacheConfig(root, teacher, **{"name": name, "views": 2, "spec": VIEWS, "device": "cpu", **changes}))
    return str(data)


def small(data, out="", recipe="minivit", **fields):
    wanted = {"workers": 0, "warmup": 0, "warmup_lr": None, **fields}
    if recipe == "minivit":
        wanted = {**ALONE, **wanted}
    elif recipe == "finetune":
        wanted = {"sides": (), "range_augment": False, **wanted}
    return tiny_config(recipe, data, out, **{"model": MODEL, "device": "cpu", **wanted})


def prepared(data, recipe=minivit, **fields):
    return recipe.prepare(small(data, recipe=recipe.__name__.rpartition(".")[2], **fields))


@pytest.mark.parametrize("prediction", ["cross-entropy", "deit"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_labels_give_the_live_teachers_loss(data, teacher, prediction, temperature):
    rows, task = prepared(
        data, soft_labels="all", prediction=prediction, temperature=temperature, batch_size=15, **UNMIXED
    )[1:]
    assert task.item_fields == ("images", "targets", "soft_logits")
    batch = first_batch(rows, 15)
    live = load_timm_classifier(teacher)
    assert (rows.student.mean, rows.student.std) == (live.mean, live.std)
    with torch.no_grad():
        theirs, own = live.model(batch["images"]), task.student.eval()(batch["images"])
        loss = task(batch)["prediction"]
    expected = soft_ce(own, theirs, temperature)
    if prediction == "deit":
        expected = soft_kl(own, theirs, temperature) * temperature**2 / 3
    assert torch.allclose(loss, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(hard_targets(batch), theirs.argmax(1))


def test_few_labels_and_their_rest(data, teacher):
    rows = prepared(data, soft_labels="two", **UNMIXED).rows
    batch = first_batch(rows, 15)
    with torch.no_grad():
        theirs = load_timm_classifier(teacher).model(batch["images"]).softmax(1)
    assert batch["soft_classes"].shape == (15, 2)
    assert torch.allclose(soft_targets(batch, 3), theirs, atol=1e-3)  # the rest is one class
    assert torch.equal(hard_targets(batch), theirs.argmax(1))


def test_views_come_in_turn(data):
    """With repeats the next views; what is shown is the cache's view of the key, whatever the run's seed."""
    for repeats in (1, 3):
        rows = prepared(data, soft_labels="all", repeats=repeats, seed=7, **UNMIXED).rows
        for position in (0, 4, 15 * 3 + 1, 15 * 6 + 5):
            item, location = rows[position], rows.order.locate(position // repeats)
            view = (location.epoch * repeats + position % repeats) % 2
            number = [rows.images.image(index)[0] for index in range(15)].index(item["key"])
            image = decode_rgb(rows.images.image(number)[1])
            shown = np.array(apply_view(image, VIEWS, draw_view(VIEWS, item["key"], view), 32))
            assert np.array_equal(item["images"].permute(1, 2, 0).numpy(), shown)
            assert torch.equal(item["soft_logits"], rows.soft.item(number, view)["soft_logits"])


def test_labels_of_mixed_images_are_mixed(data):
    task, rows = (prepared(data, soft_labels="two", **{**UNMIXED, "mixup": 0.8})[i] for i in (2, 1))
    torch.manual_seed(1)
    batch = task.draw(first_batch(rows, 6))
    own = soft_targets(batch, 3)
    share = batch["share"][0]
    assert 0 < share < 1
    targets = share * own + (1 - share) * own.flip(0)
    with torch.no_grad():
        expected = -(targets * task.student.eval()(mixed_images(batch)).log_softmax(1)).sum(1)
        assert torch.allclose(task(batch)["prediction"], expected, atol=1e-5)


@pytest.mark.parametrize(("recipe", "name"), [("finetune", "plain"), ("minivit", "two")])
def test_runs_resume_and_are_cut_into_chunks(data, tmp_path, recipe, name):
    fields = {"soft_labels": name, "schedule": "constant", "batch_size": 6, "log_every": 1}
    for out, steps, changes in (("whole", (3,), {}), ("part", (2, 3), {}), ("chunks", (3,), {"chunk_size": 2})):
        for count in steps:
            given = small(data, str(tmp_path / out), recipe, steps=count, **fields, **changes, erasing=0.0, mixup=0.8)
            train(recipe, given)
    whole, part, chunks = (final_weights(str(tmp_path / out)) for out in ("whole", "part", "chunks"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert all(torch.allclose(whole[key].float(), chunks[key].float(), atol=2e-4) for key in whole)
    losses = {"finetune": {"classes"}, "minivit": {"prediction"}}[recipe]
    assert set(read_metrics(str(tmp_path / "whole"))[0]["losses"]) == losses


def test_finetune_learns_the_stored_labels(data):
    rows, task = prepared(data, finetune, soft_labels="plain", smoothing=0.1)[1:]
    batch = first_batch(rows, 5)
    with torch.no_grad():
        logits = task.student.eval()(batch["images"])
        expected = -(soft_targets(batch, 3) * logits.log_softmax(1)).sum(1)
        assert torch.allclose(task(batch)["loss"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "two"])
def test_a_distillation_head_learns_the_most_probable_classes(data, teacher, tmp_path, name):
    """DeiT's hard distillation from a cache: the live teacher's classes; of mixed images both, by their shares."""
    small_star = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "neck": 40}
    described = {"architecture": "tinymim_star_tiny_patch16_224", "num_classes": 3, "model_args": small_star}
    (tmp_path / "config.json").write_text(json.dumps({**described, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    fields = {"model": f"timm:local-dir:{tmp_path}", "mixup": 0.8}
    task, rows = (prepared(data, finetune, soft_labels=name, **fields)[part] for part in (2, 1))
    plain = first_batch(rows, 15)
    live = load_timm_classifier(teacher)
    pixels = plain["images"] * torch.tensor(rows.student.std).view(3, 1, 1)
    pixels = pixels + torch.tensor(rows.student.mean).view(3, 1, 1)
    seen = (pixels - torch.tensor(live.mean).view(3, 1, 1)) / torch.tensor(live.std).view(3, 1, 1)
    torch.manual_seed(1)
    batch = task.draw(plain)
    share = batch["share"][0]
    with torch.no_grad():
        taught = live.model(seen).argmax(1)
        logits, distilled = logits_of_both(task.student.trunk.eval(), mixed_images(batch))
        losses = task.losses(task(batch), 0)
    own, partner = (F.cross_entropy(distilled, classes) for classes in (taught, taught.flip(0)))
    assert torch.allclose(losses["distillation"], (share * own + (1 - share) * partner) / 2, atol=1e-5)
    labels = F.cross_entropy(logits, mixed_targets(batch, 3, 0.1))
    assert torch.allclose(losses["classes"], labels / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soft_labels": "no"}, r"--soft-labels 'no' is not there: teacher caches in .* are: all, plain, two, vectors"),
        ({"soft_labels": "vectors"}, r"--soft-labels 'vectors' is a cache of embeddings; .*--soft-labels 100"),
        ({"soft_labels": "two", "temperature": 2.0}, r"--temperature 2\.0: --soft-labels 'two' keeps 2 probabilities"),
        (
            {"soft_labels": "all", "magnitude": 7},
            r"--magnitude 7: the views are those of --soft-labels 'all', which has 9",
        ),
        ({"soft_labels": "all", "attention_weight": 1.0}, r"'all': attention and hidden states need a live teacher"),
        ({"soft_labels": "all", "inherit": "mean"}, r"--inherit mean: --soft-labels 'all' has no weights"),
        ({"soft_labels": "all", "teacher": "timm:test_vit"}, r"--teacher timm:test_vit would not be used beside"),
    ],
)
def test_what_is_refused(data, fields, message):
    with pytest.raises(UserError, match=message):
        predict("minivit", small(data, **fields))


def test_the_caches_views_take_the_place_of_the_recipes_own(data):
    assert prepared(data, soft_labels="plain").rows.views.ops == 0
    assert prepared(data, soft_labels="plain", ops=0).rows.views.ops == 0


def test_images_without_a_cache_are_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"the training images are no packed ROOT.*clipmill ingest DATA/train"):
        prepared(f"{data}/folders", soft_labels="all")
    with pytest.raises(UserError, match="--soft-labels are those of views, which --no-augment does not draw"):
        small(data, recipe="probe", soft_labels="all", augment=False)


def test_labels_of_other_classes_are_refused(data, teacher, tmp_path, caplog):
    """By their names where the teacher says them, else by their number; `cache` warns of the former."""
    copy = shutil.copytree(data, tmp_path / "copy")
    root = str(copy / "train")
    for name, classes in (("names", ["cyan", "green", "red"]), ("four", [])):
        student = new_classifier(MODEL, len(classes) or 4)
        student.model.names = classes
        to_timm.write(tmp_path / name, student, ExportConfig("run", str(tmp_path / name)))
        soft = CacheConfig(root, f"timm:local-dir:{tmp_path / name}", name=name, views=1, soft_labels=1, device="cpu")
        cache(soft)
    warning = "the teacher's classes are not those of"
    assert [record.getMessage().count(warning) for record in caplog.records if "cache:" in record.msg].count(1) == 1
    with pytest.raises(UserError, match=r"make one with `clipmill cache .* --model timm:NAME --soft-labels K`"):
        prepared(str(copy), soft_labels="none-such")
    with pytest.raises(UserError, match=r"'names': its teacher knows other classes than --data \(blue, cyan\)"):
        prepared(str(copy), soft_labels="names")
    with pytest.raises(UserError, match=r"'four' is of 4 classes, --data has 3: its labels are of another list"):
        prepared(str(copy), soft_labels="four")


def test_another_size_is_said(data, caplog):
    with caplog.at_level(logging.WARNING):
        prepared(data, model="timm:test_vit", soft_labels="all")
    assert "the teacher saw its views at 32 pixels, the student sees the same views at 160" in caplog.text


def test_damage_is_named(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    path = Path(copy, "train/teacher/two/00001.parquet")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"two/00001\.parquet"):
        first_batch(prepared(str(copy), soft_labels="two", **UNMIXED).rows, 15)
    shutil.copy(copy / "train/teacher/two/00000.parquet", path)
    with pytest.raises(DataError, match=r"two/00001\.parquet: row 0 is key .*, the shard has"):
        first_batch(prepared(str(copy), soft_labels="two", **UNMIXED).rows, 15)


def test_a_frozen_tower_learns_them_too(data, tmp_path):
    fields = {"soft_labels": "plain", "sides": (), "steps": 2, "batch_size": 6}
    run = train("probe", small(data, str(tmp_path), "probe", **fields))
    assert np.isfinite(read_metrics(run)[-1]["losses"]["classes"])
    assert default_config("probe").soft.soft_labels is None
