"""TinyMIM's recipe through the trainer: targets, teachers, resume, processes, precisions, what is refused."""

import dataclasses

import pytest
import timm
import torch
from small_catlip import class_images, write_folders
from small_data import write_raw
from small_dist import fork
from small_training import assert_same_run, final_weights, read_metrics, steady_metrics, tiny_clip, tiny_config

from shards_spec.files import UserError
from training.configs import default_config
from training.export import ExportConfig, export
from training.models.classifier import new_classifier
from training.models.tinymim import set_heads
from training.models.vit_teacher import load_vit_teacher, trained_block
from training.recipes import tinymim
from training.runs.student import load_run
from training.trainer import stages_of, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

TINY = {
    "model": "timm:test_vit",  # 10 x 10 patches, 6 blocks of width 64 with 2 heads
    "teacher": "timm:test_vit2",  # the same with 8 blocks
    "teacher_weights": "random",
    "precision": "fp32",
    "batch_size": 8,
    "steps": 4,
}
CLIP_VIT = {"image_size": 160, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16}
TARGETS = ("qkv", "class-token", "output", "attention-before", "attention-after", "ffn-before", "ffn-after")


def tiny(root, out, **fields):
    return tiny_config("tinymim", root, str(out), **{**TINY, **fields})


def prepared(root, **fields):
    return tinymim.prepare(tiny(root, "unused", **fields))


def test_numbers_of_the_paper():  # fact 13
    config = default_config("tinymim")
    optim = config.optim
    assert optim.lr == pytest.approx(1.5e-4 * config.data.batch_size / 256) == 2.4e-3
    assert (config.data.batch_size, config.run.epochs) == (4096, 300)
    assert optim.warmup == 15 * 1_281_167 // 4096
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm, optim.ema_decay) == (
        0.9,
        0.95,
        0.05,
        None,
        None,
    )
    assert (config.views.scale, config.views.flip, config.views.ops) == ((0.2, 1.0), 0.5, 0)
    assert config.views.jitter == (0.4, 0.4, 0.4, 0.0)
    assert (config.drop_path, config.relations, config.softmax, config.mask_ratio) == (0.1, ("qk", "vv"), True, 0.0)


def test_a_run_resumes_to_the_bit(clip_root, tmp_path):
    whole = train("tinymim", tiny(clip_root, tmp_path / "whole"))
    lines = read_metrics(whole)
    assert [set(line["losses"]) for line in lines] == [{"qk", "vv"}] * 4
    config = tiny(clip_root, tmp_path / "parts", checkpoint_steps=2)
    train("tinymim", config)
    (tmp_path / "parts" / "checkpoints" / "step_000004.pt").unlink()
    train("tinymim", config)
    assert_same_run(whole, tmp_path / "parts")
    assert steady_metrics(whole)[0]["losses"]["qk"] > 0
    assert trained_block(whole) == (6, 2)
    first = prepared(clip_root).task.state_dict()
    last = final_weights(whole)
    changed = {name for name, value in last.items() if not torch.equal(value, first[name])}
    kept = {"student.trunk.pos_embed", "student.vocabulary_sha256", "target_block"}
    unread = [f"blocks.5.{part}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    for part in (*unread, "norm", "head"):
        kept |= {f"student.trunk.{part}.weight", f"student.trunk.{part}.bias"}
    assert set(last) - changed == kept


@pytest.mark.parametrize(
    "fields", [{}, {"softmax": False, "relations": ("qq", "kk", "vv")}, {"target": "qkv", "mask_ratio": 0.75}]
)
def test_two_processes_and_chunks_give_the_run_of_one(fields, clip_root, tmp_path):
    fields = {"drop_path": 0.4, "batch_size": 6, **fields}
    one = train("tinymim", tiny(clip_root, tmp_path / "one", **fields))
    train("tinymim", tiny(clip_root, tmp_path / "chunks", **fields, chunk_size=2))
    fork(2, _train, tiny(clip_root, tmp_path / "two", **fields))
    for other in ("chunks", "two"):
        for line, expected in zip(steady_metrics(tmp_path / other), steady_metrics(one), strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def _train(rank, config):
    return train("tinymim", config)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_learns_in_low_precision(precision, clip_root, tmp_path):
    fields = {"precision": precision, "steps": 12, "checkpoint_activations": True, "ema_decay": 0.9}
    lines = read_metrics(train("tinymim", tiny(clip_root, tmp_path / "run", **fields)))
    losses = [line["loss"] for line in lines]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(line["nonfinite"] == 0 for line in lines)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_learns(target, clip_root, tmp_path):
    teacher = tiny_clip(tmp_path / "clip", vision={**CLIP_VIT, "width": 96})
    fields = {"target": target, "teacher": teacher, "steps": 8, "jitter": (0.0,) * 4}
    out = train("tinymim", tiny(clip_root, tmp_path / "run", **fields))
    lines = read_metrics(out)
    name = "class_token" if target == "class-token" else "feature"
    assert all(set(line["losses"]) == {name} for line in lines)
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3])
    weights = final_weights(out)
    maps = {key.split(".")[1] for key in weights if key.startswith("maps.")}
    assert maps == ({"q", "k", "v"} if target == "qkv" else {"feature"})
    assert trained_block(out) is None


def test_an_export_is_the_encoder(clip_root, tmp_path):  # fact 12
    out = train("tinymim", tiny(clip_root, tmp_path / "run", target="output", teacher="timm:test_vit3"))
    assert any(name.startswith("maps.") for name in final_weights(out))
    export(ExportConfig(out, str(tmp_path / "exported")))
    model = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True, num_classes=0)
    theirs = timm.create_model("test_vit", num_classes=0).state_dict()
    assert set(model.state_dict()) == set(theirs)
    assert torch.equal(model.blocks[0].attn.qkv.weight, final_weights(out)["student.trunk.blocks.0.attn.qkv.weight"])


def test_the_student_alone_sees_colour_jitter(clip_root):
    rows = prepared(clip_root).rows
    items = [rows[position] for position in range(4)]
    assert all(not torch.equal(item["images"], item["clean_images"]) for item in items)
    plain = prepared(clip_root, jitter=(0.0,) * 4)
    assert plain.task.item_fields == ("images", "drop_draws")
    assert prepared(clip_root, jitter=(0.0,) * 4, drop_path=0.0).task.item_fields == ("images",)
    for position, item in enumerate(items):
        assert torch.equal(item["clean_images"], plain.rows[position]["images"]), "the same crop and flip"
        assert "clean_images" not in plain.rows[position]


def test_the_teacher_sees_the_clean_copy(clip_root, monkeypatch):
    task = prepared(clip_root).task
    images = torch.zeros(1, 3, 160, 160)
    seen = []
    embed = task.teacher_tower.embed
    monkeypatch.setattr(task.teacher_tower, "embed", lambda shown: (seen.append(shown), embed(shown))[1])
    task({"images": images, "clean_images": images + 1})
    assert torch.equal(seen[0], images + 1)


def test_masks_are_drawn_by_key_and_epoch(clip_root):  # fact 10
    task, rows = prepared(clip_root, mask_ratio=0.75)[2], prepared(clip_root, mask_ratio=0.75)[1]
    assert task.item_fields == ("images", "clean_images", "keep", "drop_draws")
    kept = [rows[position]["keep"] for position in range(30)]
    assert all(len(one) == 25 and len(one.unique()) == 25 and one.max() < 100 for one in kept)
    assert torch.equal(kept[3], prepared(clip_root, mask_ratio=0.75).rows[3]["keep"])
    by_key = {}
    for position in range(30):  # 23 samples: some come again in the second epoch
        by_key.setdefault(rows[position]["key"], []).append(kept[position])
    again = [draws for draws in by_key.values() if len(draws) == 2]
    assert again
    assert not any(torch.equal(*draws) for draws in again)


def test_drop_paths_are_drawn_by_key_and_epoch(clip_root):  # fact 11
    task, rows = prepared(clip_root, drop_path=0.5).task.train(), prepared(clip_root, drop_path=0.5).rows
    assert len(task.drops) == 2 * 5, "two of each block but the last of six"
    items = [rows[position] for position in range(4)]
    batch = {name: torch.stack([item[name] for item in items]) for name in task.item_fields}
    batch |= {name: batch[name].float() / 255 for name in ("images", "clean_images")}
    with torch.no_grad():
        one, two = task(batch), task(batch)
        halves = [task({name: value[part] for name, value in batch.items()}) for part in (slice(2), slice(2, 4))]
        other = task({**batch, "drop_draws": 1 - batch["drop_draws"]})
        whole = task.eval()(batch)
    assert torch.equal(one["qk"], two["qk"])
    torch.testing.assert_close(torch.cat([half["qk"] for half in halves]), one["qk"], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(other["qk"], one["qk"])
    assert not torch.allclose(whole["qk"], one["qk"])
    expected = items[0]["drop_draws"][0] >= 0.5
    assert (task.train().drops[0](torch.ones(4, 3, 2))[0] == (2 if expected else 0)).all()


def test_labelled_images_without_their_labels(tmp_path):
    root = write_folders(tmp_path / "images")
    lines = read_metrics(train("tinymim", tiny(root, tmp_path / "run", mask_ratio=0.5)))
    assert [line["samples_seen"] for line in lines] == [8, 16, 24, 32]
    assert prepared(root).rows.order.total == len(class_images(12, "train"))
    assert [prepared(root, seed=seed).rows.order.seed for seed in (0, 1)] == [0, 1]


def test_raw_shards(tmp_path):
    write_raw(str(tmp_path / "ds"), shards=1, per_shard=6)
    assert len(read_metrics(train("tinymim", tiny(str(tmp_path / "ds"), tmp_path / "run", folder="raw", steps=1)))) == 1


def test_a_clip_models_image_tower_teaches(clip_root, tmp_path):
    name = tiny_clip(tmp_path / "clip", vision=CLIP_VIT)
    out = train("tinymim", tiny(clip_root, tmp_path / "run", teacher=name, steps=1))
    assert trained_block(out) == (6, 4), "block 3 of 4 has four heads, and so has the student's last"
    student = prepared(clip_root, teacher=name).student
    assert (student.mean, student.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_chain_keeps_the_heads_that_were_trained(clip_root, tmp_path):
    """A run's student teaches by the block that it was trained in, with the heads that it was trained with."""
    first = train("tinymim", tiny(clip_root, tmp_path / "b", model="timm:test_vit3", teacher="timm:test_vit2", steps=1))
    assert trained_block(first) == (9, 2)
    fields = {"teacher": first, "teacher_weights": None, "steps": 1}
    second = train("tinymim", tiny(clip_root, tmp_path / "s", **fields))
    assert trained_block(second) == (6, 2)
    teacher = load_vit_teacher(first, None, 0)
    assert (teacher.trained_block, teacher.tower.heads(9), teacher.tower.heads(8)) == (9, 2, 3)
    assert load_run(first)[0].model.trunk.blocks[8].attn.num_heads == 3, "fine-tuning has the model's own"
    task = prepared(clip_root, **fields).task
    assert (task.teacher_block, task.heads) == (9, 2)
    assert prepared(clip_root, **fields, teacher_block=7, model="timm:test_vit3").task.heads == 3


def test_a_chain_in_one_command(clip_root, tmp_path):
    chain = "timm:test_vit3,timm:test_vit,timm:test_vit"
    model = default_config("tinymim").student.model  # what the chain takes the place of
    config = tiny(clip_root, tmp_path / "run", model=model, chain=chain, teacher_block=3, steps=2, checkpoint_steps=1)
    assert train("tinymim", config) == str(tmp_path / "run" / "stage-3")
    one, two, three = stages_of("tinymim", config)
    assert [stage.run.out for stage in (one, two, three)] == [f"{tmp_path}/run/stage-{number}" for number in (1, 2, 3)]
    assert (one.teacher, one.teacher_block, one.teacher_weights) == ("timm:test_vit2", 3, "random")
    assert (three.teacher, three.teacher_block, three.teacher_weights) == (two.run.out, None, None)
    assert [trained_block(stage.run.out) for stage in (one, two, three)] == [(9, 2), (6, 2), (6, 2)]
    before = [final_weights(stage.run.out) for stage in (one, two, three)]
    (tmp_path / "run" / "stage-3" / "checkpoints" / "step_000002.pt").unlink()
    train("tinymim", config)  # resumes in the third
    for stage, weights in zip((one, two, three), before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in final_weights(stage.run.out).items())
    alone = dataclasses.replace(config, stage=3)
    assert stages_of("tinymim", alone) == [three]
    with pytest.raises(UserError, match=r"nowhere/stage-2 is no RUN; train --stage 2 first"):
        stages_of("tinymim", dataclasses.replace(alone, run=dataclasses.replace(alone.run, out="nowhere")))
    for stage, said in ((4, "must be from 1 to 3"), (0, "must be from 1 to 3")):
        with pytest.raises(UserError, match=f"--stage {stage}: {said}"):
            dataclasses.replace(config, stage=stage)
    with pytest.raises(UserError, match="--stage 1: there are no stages, give --chain"):
        dataclasses.replace(config, chain="", stage=1)


def test_a_larger_image_for_the_teacher(clip_root, tmp_path):
    """The same grid of patches of another size: the teacher's copy is rendered at its own side."""
    vision = {**CLIP_VIT, "image_size": 80, "patch_size": 8}
    item = prepared(clip_root, teacher=tiny_clip(tmp_path / "clip", vision=vision), jitter=(0.0,) * 4)
    assert item.rows[0]["clean_images"].shape == (3, 80, 80)
    assert item.rows[0]["images"].shape == (3, 160, 160)


def test_files_of_mae_for_teacher_and_student(clip_root, tmp_path):
    """With a decoder: for the teacher, for the student, and for fine-tuning."""
    torch.manual_seed(5)
    encoder = timm.create_model("test_vit", num_classes=0)
    file = str(tmp_path / "mae.pth")
    torch.save(
        {"model": {**encoder.state_dict(), "mask_token": torch.zeros(1), "decoder_pred.bias": torch.ones(3)}}, file
    )
    task = prepared(clip_root, teacher="timm:test_vit", teacher_weights=file, pretrained=file).task
    fine = new_classifier("timm:test_vit", 2, pretrained=file).model.trunk
    for model in (task.teacher_tower.model, task.tower.model, fine):
        for name, value in encoder.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match="does not fit"):
        prepared(clip_root, teacher="timm:test_vit3", teacher_weights=file)
    run = train("tinymim", tiny(clip_root, tmp_path / "run", steps=1))
    with pytest.raises(UserError, match=r"--teacher-weights 'random' would not be used: RUN .*/run brings its own"):
        prepared(clip_root, teacher=run)


def test_blocks():
    student, teacher = (load_vit_teacher(name, "random", 0) for name in ("timm:test_vit", "timm:test_vit2"))

    def blocks(**fields):
        return tinymim.find_blocks(dataclasses.replace(default_config("tinymim"), **fields), student.tower, teacher)

    assert blocks() == (6, 6)
    assert blocks(target="output") == blocks(target="class-token") == (6, 8)
    assert blocks(target="output", teacher_block=3) == (6, 3)
    assert blocks(teacher_block=1, student_block=2) == (2, 1)
    with torch.device("meta"):
        large = timm.create_model("vit_large_patch16_224", num_classes=0)
    teacher.tower.blocks = list(large.blocks)
    assert blocks() == (6, 18), "the 18th of 24"


REFUSED = [
    ({"model": "timm:catlip_vit_tiny"}, "has 3 x 3 patches of 48 pixels a side, --teacher 'timm:test_vit2' 10 x 10"),
    ({"teacher": "timm:test_resnet"}, "--teacher 'timm:test_resnet' cannot teach tokens: it is a ResNet, without"),
    ({"teacher": "timm:test_resnet", "mask_ratio": 0.75}, "without blocks that have queries, keys and values of each"),
    ({"model": "timm:test_resnet"}, "--model 'timm:test_resnet' cannot learn tokens: it is a ResNet"),
    ({"teacher_block": 9}, "--teacher-block 9: --teacher 'timm:test_vit2' has 8 blocks"),
    ({"student_block": 7}, "--student-block 7: --model 'timm:test_vit' has 6 blocks"),
    ({"teacher": "timm:test_vit3"}, "cannot follow block 7 of --teacher 'timm:test_vit3': 3 heads do not divide a wid"),
    ({"target": "class-token", "teacher_block": 3}, "--target class-token is read behind the last block"),
    ({"target": "class-token"}, "--target class-token: it has no class token with a norm"),
    ({"mask_ratio": 0.995}, "--mask-ratio 0.995: it leaves none of 100 patches"),
    ({"data": ""}, "--data is needed"),
    ({"data": "nowhere"}, "nowhere/shards"),
    ({"eval_data": "somewhere"}, "--eval-data: it has no text tower"),
    ({"teacher": "timm:nope"}, "no model 'timm:nope' in timm"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_does_not_fit_is_named(fields, said, clip_root):
    with pytest.raises(UserError) as refused:
        prepared(clip_root, **fields)
    assert said in str(refused.value)


def test_a_clip_of_convolutions_cannot_teach(clip_root, tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    name = tiny_clip(tmp_path / "resnet", vision=vision)
    with pytest.raises(UserError, match="it is a ModifiedResNet, without blocks that have queries, keys and values"):
        prepared(clip_root, teacher=name, mask_ratio=0.75)


@pytest.mark.parametrize(
    ("field", "value"),
    [("relations", ()), ("mask_ratio", 1.0), ("drop_path", -0.1), ("teacher_block", 0), ("student_block", 0)],
)
def test_values_out_of_range(field, value):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')}"):
        dataclasses.replace(default_config("tinymim"), **{field: value})


def test_heads_of_a_tower_are_one_rule():
    tower = load_vit_teacher("timm:test_vit", "random", 0).tower
    set_heads(tower, 6, 16)
    assert (tower.heads(6), tower.heads(5)) == (16, 2)
