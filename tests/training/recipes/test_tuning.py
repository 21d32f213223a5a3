"""Fine-tuning after masked pre-training: rates by layer, drop path, pooling of patches, mixed images."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from small_catlip import TINY, write_folders
from small_training import final_weights, read_metrics, tiny_config
from timm.layers import DropPath
from torch import nn

from pipeline.core.command_line import parse_several
from shards_spec.files import UserError
from training.config import MixConfig
from training.configs import default_config
from training.export import ExportConfig, export
from training.models.classifier import new_classifier
from training.models.mixing import draw_mix, mixed_targets
from training.models.weight_tying import check_tied
from training.recipes import finetune
from training.recipes.transfer import TransferTask
from training.recipes.tuning import layer_groups, layer_of, pool_patches, resize_input, set_linear_drop_path
from training.runs.student import load_run
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
DOCS = Path(__file__).resolve().parents[3] / "docs"
ALL = {"pooling": "mean", "layer_decay": 0.65, "drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), train=8, test=4)


def small(images, out, **fields):
    plain = {"model": "timm:test_vit", "sides": (), "precision": "fp32", "range_augment": False, "ema_decay": None}
    return tiny_config("finetune", images, str(out), **{**plain, "steps": 3, "batch_size": 4, **fields})


def documented(page):
    """The configs of the page's `clipmill train finetune` commands: every flag is one of the recipe's."""
    commands = re.findall(r"clipmill train finetune (.*?[^\\])\n", (DOCS / page).read_text(), re.DOTALL)
    default = default_config("finetune")
    return [
        parse_several("train finetune", {"finetune": (type(default), default)}, command.replace("\\\n", " ").split())[0]
        for command in commands
    ]


def test_mini_vits_columns_for_384_pixels():
    """docs/minivit.md names the numbers of the sheet's section 8, with the rates that its batches make of them."""
    deit, swin = documented("minivit.md")
    for config in (deit, swin):
        assert (config.run.epochs, config.tuning.image_size, config.sides.sides) == (30, 384, (384,))
        assert (config.tuning.keep_head, config.optim.weight_decay, config.smoothing) == (True, 1e-8, 0.1)
        assert config.mix == MixConfig(0.8, 1.0, 0.25)
        views = config.views
        assert (views.scale, views.flip, views.ops, views.magnitude, views.magnitude_std) == ((0.08, 1), 0.5, 2, 9, 0.5)
        assert not config.range_augment
        share = config.data.batch_size / 512
        assert config.optim.lr == {id(deit): 5e-6, id(swin): 2e-5}[id(config)] * share
    assert (deit.tuning.drop_path, deit.optim.schedule, deit.optim.clip_norm, deit.repeats) == (0, "constant", None, 3)
    optim = swin.optim
    assert (swin.tuning.drop_path, optim.clip_norm, optim.warmup) == (None, 5.0, 5 * (1_281_167 // 256))
    assert (optim.final_lr, optim.warmup_lr) == (1e-5 * 256 / 1024, 1e-6 * 256 / 1024)


def test_the_pages_flags_are_the_papers():
    """docs/tinymim.md names the numbers of the sheet's section 6."""
    config, star = documented("tinymim.md")
    optim, tuning, views = config.optim, config.tuning, config.views
    assert optim.lr == pytest.approx(5e-4 * config.data.batch_size / 256)
    assert (config.run.epochs, optim.warmup, optim.final_lr) == (100, 5 * 1_281_167 // 1024, 1e-6)
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.999, 0.05)
    assert (tuning.layer_decay, tuning.drop_path, tuning.pooling, tuning.head_std) == (0.65, 0.2, "mean", 2e-5)
    assert config.mix == MixConfig(0.8, 1.0, 0.25)
    assert (views.ops, views.op_set, views.magnitude, views.magnitude_std) == (2, "timm-inc", 9, 0.5)
    assert (config.smoothing, config.freeze, optim.clip_norm, optim.ema_decay) == (0.1, False, None, None)
    assert (star.distillation.teacher, star.run.epochs, star.mix) == ("timm:regnety_160.deit_in1k", 1000, config.mix)
    assert star.optim.lr == pytest.approx(5e-4 * star.data.batch_size / 512)


def test_rates_by_layer():
    """Embeddings are layer 0, block i is i, the rest 13; a rate is 0.65^(13 - layer) of the whole."""
    names = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.bias": 0, "blocks.0.norm1.weight": 1}
    names |= {"blocks.11.mlp.fc2.weight": 12, "fc_norm.weight": 13, "head.weight": 13}
    assert {name: layer_of(name, [12]) for name in names} == names
    with torch.device("meta"):
        trunk = new_classifier("timm:vit_tiny_patch16_224", 7).model.trunk
    task = nn.Module()
    task.trunk, task.other = trunk, nn.Linear(2, 2)
    groups = layer_groups(task, trunk, 0.65, 0.05)
    assert sum(len(group.params) for group in groups) == len(list(task.parameters()))
    factors = {id(value): group for group in groups for value in group.params}

    def of(value):
        group = factors[id(value)]
        return group.lr_factor, group.weight_decay

    assert of(trunk.pos_embed) == of(trunk.cls_token) == (0.65**13, 0.0)
    assert of(trunk.patch_embed.proj.weight) == (0.65**13, 0.05)
    assert of(trunk.blocks[0].attn.qkv.weight) == (0.65**12, 0.05)
    assert of(trunk.blocks[11].attn.qkv.bias) == (0.65, 0.0)
    assert of(trunk.head.weight) == of(task.other.weight) == (1.0, 0.05)


def test_layers_of_a_swin():
    """As for ordinary Swins: blocks are numbered over the stages, merging belongs to the block before it."""
    names = {"patch_embed.norm.weight": 0, "layers.0.blocks.1.norm1.weight": 2, "layers.1.downsample.norm.weight": 2}
    names |= {"layers.1.blocks.0.attn.qkv.weight": 3, "layers.1.blocks.3.mlp.fc1.bias": 6, "norm.weight": 7}
    names |= {"head.fc.weight": 7}
    assert {name: layer_of(name, [2, 4]) for name in names} == names


@pytest.mark.parametrize("model", ["timm:mini_swin_test", "timm:mini_deit_test"])
def test_rates_of_shared_weights_are_the_first_blocks(model):
    trunk = new_classifier(model, 2).model.trunk
    task = nn.Module()
    task.trunk = trunk
    groups = layer_groups(task, trunk, 0.5, 0.05)
    assert sum(len(group.params) for group in groups) == len(list(task.parameters()))
    group_of = {id(value): group for group in groups for value in group.params}
    blocks = trunk.blocks if "deit" in model else trunk.layers[1].blocks
    last = 5 if "deit" in model else 7
    first = 3  # the third block overall, of a Swin the first of its second stage
    owner, follower = (blocks[2], blocks[3]) if "deit" in model else (blocks[0], blocks[1])
    assert owner.mlp is follower.mlp
    assert group_of[id(follower.mlp.fc1.weight)].lr_factor == 0.5 ** (last - first)
    assert group_of[id(follower.norm1.weight)].lr_factor == 0.5 ** (last - first - 1)
    assert group_of[id(follower.attn.after.weight)].weight_decay == 0, "maps across heads do not decay"
    if "swin" in model:
        assert group_of[id(owner.attn.relative_position_bias_table)].weight_decay == 0


def test_drop_path_grows_with_the_depth():
    trunk = new_classifier("timm:test_vit", 2).model.trunk
    set_linear_drop_path(trunk, 0.2)
    assert isinstance(trunk.blocks[0].drop_path1, nn.Identity)
    rates = [block.drop_path2.drop_prob for block in trunk.blocks[1:]]
    assert rates == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert all(isinstance(block.drop_path1, DropPath) for block in trunk.blocks[1:])
    swin = new_classifier("timm:mini_swin_test", 2).model.trunk
    set_linear_drop_path(swin, 0.5)
    rates = [block.drop_path1.drop_prob for block in [*swin.layers[0].blocks, *swin.layers[1].blocks][1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    set_linear_drop_path(swin, 0.0)
    assert isinstance(swin.layers[1].blocks[3].drop_path2, nn.Identity)
    with pytest.raises(UserError, match="--drop-path is for vision transformers"):
        set_linear_drop_path(new_classifier("timm:test_resnet", 2).model.trunk, 0.2)


def test_the_mean_of_the_patches():
    base = new_classifier("timm:test_vit", 2)
    pooled = pool_patches(base)
    trunk = pooled.model.trunk
    shown = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens = base.model.trunk.blocks(
            base.model.trunk._pos_embed(base.model.trunk.patch_embed(shown)),
        )
        expected = F.layer_norm(tokens[:, 1:].mean(dim=1), (64,), eps=1e-6)
        torch.testing.assert_close(pooled.model.encode_image(shown), expected)
    assert (trunk.fc_norm.weight == 1).all()
    assert pool_patches(pooled) is pooled
    assert pool_patches(new_classifier(TINY, 2)).model.options == {"global_pool": "avg"}
    with pytest.raises(UserError, match="--pooling mean: 'timm:test_resnet' is no vision transformer"):
        pool_patches(new_classifier("timm:test_resnet", 2))


def test_a_tinymim_run_is_fine_tuned(clip_root, images, tmp_path):
    """All of it at once; the run rebuilds, and an export of it loads by timm alone."""
    fields = {"model": "timm:test_vit3", "teacher": "timm:test_vit2", "teacher_weights": "random", "steps": 1}
    encoder = train(
        "tinymim", tiny_config("tinymim", clip_root, str(tmp_path / "run"), **{**fields, "precision": "fp32"})
    )
    out = train("finetune", small(images, tmp_path / "tuned", model=encoder, head_std=2e-5, **ALL))
    assert all(line["nonfinite"] == 0 for line in read_metrics(out))
    assert {"acc1", "acc5"} <= set(read_metrics(out)[-1]["eval"])
    student, _ = load_run(out)
    assert student.model.options == {"global_pool": "avg"}
    assert student.model.trunk.blocks[8].attn.num_heads == 3, "trained with the teacher's two"
    before, after = final_weights(encoder), final_weights(out)
    assert "student.trunk.norm.weight" not in after
    assert "student.trunk.fc_norm.weight" in after
    for part in ("blocks.8.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "pos_embed"):
        assert not torch.equal(before[f"student.trunk.{part}"], after[f"student.trunk.{part}"]), "all is trained"
    export(ExportConfig(out, str(tmp_path / "exported")))


def test_the_head_starts_near_zero(images):
    config = small(images, "unused", pooling="mean", head_std=2e-5)
    head = finetune.prepare(config).student.model.head
    assert 0 < head.weight.abs().max() < 1e-4
    assert (head.bias == 0).all()


def test_mixed_images_have_mixed_labels(images, monkeypatch):
    """The loss of a mixed batch is the cross-entropy with the mixed labels of the mixed images."""
    task: TransferTask = finetune.prepare(small(images, "unused", mixup=1.0)).task
    generator = torch.Generator().manual_seed(0)
    batch = {"images": torch.randn(4, 3, 160, 160, generator=generator), "targets": torch.tensor([0, 0, 1, 0])}
    torch.manual_seed(0)
    mixed = draw_mix(MixConfig(mixup=1.0), batch)
    share = mixed["share"][0]
    torch.manual_seed(0)
    drawn = task.draw({**batch, "keys": list("abcd")})
    assert torch.equal(drawn["share"], mixed["share"])
    logits = task.student(share * batch["images"] + (1 - share) * batch["images"].flip(0))
    targets = mixed_targets(mixed, 2, 0.1)
    expected = -(targets * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(task(drawn)["loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_decay": 0.0}, "--layer-decay"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"head_std": 0.0}, "--head-std"),
        ({"mixup": 0.5, "augment": False, "freeze": True}, "--mixup, --cutmix and --erasing change images"),
    ],
)
def test_what_is_refused(fields, said, images):
    with pytest.raises(UserError, match=said):
        small(images, "unused", **fields)


def test_a_network_without_blocks_has_no_layer_decay(images, tmp_path):
    with pytest.raises(UserError, match="--layer-decay is for vision transformers"):
        train("finetune", small(images, tmp_path / "run", model="timm:test_resnet", layer_decay=0.7))


def test_by_default_nothing_changes(images):
    task = finetune.prepare(small(images, "unused")).task
    batch = {"images": torch.zeros(2, 3, 160, 160), "keys": ["a", "b"]}
    assert task.draw(batch) is batch
    assert len(task.param_groups(0.05)) == 2
    assert dataclasses.asdict(default_config("finetune").tuning)["pooling"] == "own"


def test_a_folder_of_timms_keeps_its_options_in_a_run(images, tmp_path):
    """What config.json says of the architecture goes with the run, which is rebuilt without that folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    described = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 48, "embed_dim": 36, "depth": 2}}
    (folder / "config.json").write_text(json.dumps({**described, "pretrained_cfg": {"input_size": [3, 48, 48]}}))
    run = train("finetune", small(images, tmp_path / "run", model=f"timm:local-dir:{folder}", steps=1))
    (folder / "config.json").unlink()
    loaded, _ = load_run(run)
    assert (loaded.model.trunk.embed_dim, len(loaded.model.trunk.blocks), loaded.image_size) == (36, 2, 48)
    export(ExportConfig(run, str(tmp_path / "exported")))
    again = train("finetune", small(images, tmp_path / "again", model=f"timm:local-dir:{tmp_path}/exported", steps=1))
    assert load_run(again)[0].model.trunk.patch_embed.grid_size == (3, 3)


@pytest.mark.parametrize("model", ["timm:mini_deit_test", "timm:mini_swin_test"])
def test_a_run_of_another_image_size(images, tmp_path, model):
    """All of it at 64 pixels; the run rebuilds at that size, and so does its export."""
    fields = {"image_size": 64, "sides": (64,), "base_side": 64, "layer_decay": 0.75, "drop_path": 0.2, "repeats": 2}
    out = train("finetune", small(images, tmp_path / "run", model=model, **fields))
    student, _ = load_run(out)
    assert student.image_size == 64
    trunk = student.model.trunk
    check_tied(trunk)
    assert trunk.patch_embed.img_size == (64, 64)
    if "swin" in model:
        assert [stage.blocks[0].window_size for stage in trunk.layers] == [(8, 8), (8, 8)]
        assert trunk.layers[1].blocks[3].attn.relative_position_bias_table.shape == (225, 4)
    else:
        assert trunk.pos_embed.shape == (1, 64, 32)
    export(ExportConfig(out, str(tmp_path / "exported")))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    shown = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(shown), student.model(shown))
    kept = finetune.prepare(small(images, tmp_path / "unused", model=out, keep_head=True)).task.student
    torch.testing.assert_close(kept.eval()(shown), student.model(shown))
    other = write_folders(tmp_path / "other", classes=("red", "yellow"))
    with pytest.raises(UserError, match=r"--keep-head: --model .* has other classes than --data \(blue, yellow\)"):
        finetune.prepare(small(other, tmp_path / "unused", model=out, keep_head=True))
    again = prepared_trunk(images, tmp_path, model=out)
    torch.testing.assert_close(again.forward_features(shown), trunk.forward_features(shown))


def prepared_trunk(images, tmp_path, **fields):
    return finetune.prepare(small(images, tmp_path / "unused", **fields)).task.student.eval().trunk


def test_from_224_to_384_pixels():
    swin = new_classifier("timm:mini_swin_tiny_patch4_window7_224", 1000)
    table = swin.model.trunk.layers[2].blocks[5].attn.relative_position_bias_table.detach().clone()
    positions = new_classifier("timm:mini_deit_tiny_patch16_224", 1000)
    before = positions.model.trunk.pos_embed.detach().clone()
    relative = positions.model.trunk.blocks[3].attn.positions.table
    resized = resize_input(swin, 384)
    trunk = resized.model.trunk
    check_tied(trunk)
    windows = [stage.blocks[0].window_size for stage in trunk.layers]
    assert (resized.image_size, windows) == (384, [(12, 12)] * 4)
    expected = F.interpolate(table.T.reshape(1, 12, 13, 13), (23, 23), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(trunk.layers[2].blocks[5].attn.relative_position_bias_table.data, expected)
    assert sum(value.numel() for value in trunk.parameters()) == 12_001_765 + (23**2 - 13**2) * (3 + 6 + 12 + 24)
    deit = resize_input(positions, 384).model.trunk
    expected = F.interpolate(before.mT.reshape(1, 192, 14, 14), (24, 24), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(deit.pos_embed.data, expected)
    assert deit.blocks[3].attn.positions.table is relative
    assert sum(value.numel() for value in deit.parameters()) == 3_090_304 + (24**2 - 14**2) * 192


def test_the_class_tokens_position_stays():
    base = new_classifier("timm:test_vit", 2)
    before = base.model.trunk.pos_embed.detach().clone()
    after = resize_input(base, 192).model.trunk.pos_embed
    assert torch.equal(after[:, 0], before[:, 0])
    expected = F.interpolate(before[:, 1:].mT.reshape(1, 64, 10, 10), (12, 12), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(after[:, 1:].data, expected)


def test_an_ordinary_swins_tables_are_resized_as_the_mini_swins():
    options = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    base = new_classifier("timm:swin_tiny_patch4_window7_224", 3, options=options)
    table = base.model.trunk.layers[0].blocks[1].attn.relative_position_bias_table.detach()
    expected = F.interpolate(table.T.reshape(1, 2, 7, 7), (11, 11), mode="bicubic").flatten(2)[0].T
    base = replace(base, image_size=32)
    trunk = resize_input(base, 48).model.trunk
    torch.testing.assert_close(trunk.layers[0].blocks[1].attn.relative_position_bias_table.data, expected)
    rebuilt = new_classifier(base.model.name, 3, options=base.model.options).model.trunk
    rebuilt.load_state_dict(trunk.state_dict())
    shown = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(rebuilt.eval()(shown), trunk.eval()(shown))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": "timm:test_resnet", "image_size": 64},
            "--image-size 64: .* is none of timm's plain ViTs and Swins.* takes any --sides",
        ),
        ({"model": "timm:mini_deit_test", "image_size": 60}, "its patches are of 8 pixels"),
        ({"image_size": 64, "sides": (32, 48)}, "--sides 32 48 never show that size; give --sides 64 --base-side 64"),
        ({"model": "timm:test_resnet", "layer_decay": 0.5}, "--layer-decay is for vision transformers and Swins"),
        ({"repeats": 0}, "--repeats 0: must be 1 or more"),
        ({"keep_head": True}, "--keep-head: --model 'timm:test_vit' has no head of named classes"),
        ({"keep_head": True, "class_map": "classes.tsv"}, "--class-map classes.tsv and --keep-head: both say"),
    ],
)
def test_sizes_and_heads_that_do_not_serve(images, tmp_path, fields, message):
    def groups():
        return finetune.prepare(small(images, tmp_path, **fields)).task.param_groups(0.05)

    with pytest.raises(UserError, match=message):
        groups()
