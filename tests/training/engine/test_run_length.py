"""What a user hears before the first step: batches, datasets and warm-ups that do not fit; runs that are extended."""

import json
import logging
import re
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from small_data import draw
from small_training import tiny_clip, tiny_config, write_packed

from shards_spec.files import UserError, json_bytes
from shards_spec.precision import resolve_precision
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from training.configs import default_config
from training.engine.run_length import warn_of_workers
from training.recipes import RECIPES, siclip
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(clip_root):
    return clip_root


def told(caplog):
    """Warnings of our own."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("training") and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"batch_size": 23, "steps": 3}, None),
        (
            {"batch_size": 24, "steps": 3},
            "--batch-size 24: the dataset has 23 samples, so a batch has some twice, and "
            "a pair that comes twice is its own negative",
        ),
        ({"batch_size": 1, "steps": 3}, "--batch-size 1: a batch of one pair has no negatives"),
        (
            {"warmup": 2000, "steps": 1},
            "--warmup 2000: the run has 1 step, so its learning rate is 5e-07 at the end and never --lr 0.001",
        ),
        ({"warmup": 3, "steps": 3}, None),
        ({"warmup": 4, "steps": 3}, "--warmup 4: the run has 3 steps"),
    ],
    ids=str,
)
def test_one_warning_each(root, tmp_path, caplog, fields, warning):
    train("clip", tiny_config("clip", root, str(tmp_path / "run"), **fields))
    found = told(caplog)
    assert len(found) == (warning is not None), found
    assert all(text.startswith(warning) for text in found), found


def test_more_workers_than_cores_are_told(caplog):
    warn_of_workers(1)
    assert not told(caplog)
    warn_of_workers(100_000)
    (text,) = told(caplog)
    assert re.fullmatch(r"--workers 100000: more processes than the [0-9]+ cores? that this one may use", text)


def test_training_on_empty_texts_is_told_once(tmp_path, caplog):
    root, samples = tmp_path / "data", list[Sample]()
    write_packed(str(root), [6, 6])
    for key in (f"00000{index:04d}" for index in range(6)):
        meta = {"key": key, "caption": " ", "syn_0": "", "syn_1": None}
        samples.append(Sample(key, {"jpg": draw(key)[0], "txt": b" ", "json": json_bytes(meta)}))
    write_shard(str(root / "shards" / "00000.tar"), samples)
    train("clip", tiny_config("clip", str(root), str(tmp_path / "run"), model=tiny_clip(tmp_path / "clip")))
    [warning] = told(caplog)
    assert warning.startswith("key 00000000")
    assert "has no caption, so its text is empty" in warning


def rates(out):
    return [json.loads(line)["lr"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_longer_run_goes_on_and_says_what_the_learning_rate_does(root, tmp_path, caplog):
    out, fields = str(tmp_path / "run"), {"schedule": "linear", "warmup": 2, "final_lr": 1e-4}
    train("clip", tiny_config("clip", root, out, steps=6, **fields))
    first = rates(out)
    assert told(caplog) == []
    train("clip", tiny_config("clip", root, out, steps=10, **fields))
    [warning] = told(caplog)
    assert warning == (
        "extended from 6 to 10 steps, resuming after step 6: the linear schedule now ends at step 10 with 0.0001, so "
        "the learning rate goes from 0.000325 to 0.00055 at the next step"
    )
    assert rates(out)[:6] == first
    assert rates(out)[5:7] == pytest.approx([0.000325, 0.00055])
    assert json.loads(Path(out, "config.json").read_text())["steps"] == 10
    assert load_checkpoint(RunFolder(out).newest())["progress"]["step"] == 10
    caplog.clear()
    train("clip", tiny_config("clip", root, out, steps=10, **fields))
    assert told(caplog) == [], "it is no longer than before"


def test_a_run_extended_before_its_end_goes_by_the_new_schedule(root, tmp_path, caplog):
    """The same steps as a run that was to be as long from the start, from there on."""
    out, fields = str(tmp_path / "run"), {"schedule": "cosine", "checkpoint_steps": 3, "keep_checkpoints": 9}
    train("clip", tiny_config("clip", root, out, steps=6, **fields))
    Path(out, "checkpoints", "step_000006.pt").unlink()
    train("clip", tiny_config("clip", root, out, steps=12, **fields))
    whole = train("clip", tiny_config("clip", root, str(tmp_path / "whole"), steps=12, **fields))
    assert rates(out)[3:] == rates(whole)[3:]
    assert "extended from 6 to 12 steps, resuming after step 3: the cosine schedule now ends at step 12" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"steps": None, "epochs": 1.0}, {"steps": None, "epochs": 2.0}),
        ({"steps": None, "epochs": 1.0}, {"steps": 11}),
        ({"steps": 5}, {"steps": None, "epochs": 2.0}),
    ],
    ids=str,
)
def test_epochs_and_steps_extend_each_other(root, tmp_path, caplog, before, now):
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", root, out, **before))
    train("clip", tiny_config("clip", root, out, **now))
    assert "extended from 5 to 11 steps, resuming after step 5" in caplog.text


def test_a_constant_rate_stays(root, tmp_path, caplog):
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", root, out, steps=3, schedule="constant"))
    train("clip", tiny_config("clip", root, out, steps=5, schedule="constant"))
    assert "the constant schedule stays, so the learning rate goes from 0.001 to 0.001" in caplog.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 3}, r"--steps: 6 before, 3 now\) \(a run can be extended, not shortened\)"),
        ({"steps": None, "epochs": 0.5}, r"--epochs: .* now; --steps: 6 before, None now\) \(a run can be extended"),
        ({"steps": 9, "lr": 0.5}, r"--lr: 0\.001 before, 0\.5 now; --steps: 6 before, 9 now\): give the same config"),
    ],
    ids=str,
)
def test_what_is_no_extension_is_refused(root, tmp_path, fields, said):
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", root, out, steps=6))
    with pytest.raises(UserError, match=said):
        train("clip", tiny_config("clip", root, out, **fields))
    assert json.loads(Path(out, "config.json").read_text())["steps"] == 6


def test_precision_auto_is_recorded_as_what_it_was(root, tmp_path):
    """fp32 on a CPU; a run that goes on with auto keeps its own, whatever the device."""
    out = str(tmp_path / "run")
    config = tiny_config("clip", root, out, steps=2, device="cpu")
    assert config.run.precision == "auto"
    train("clip", config)
    assert json.loads(Path(out, "config.json").read_text())["precision"] == "fp32"
    other = str(tmp_path / "other")
    train("clip", tiny_config("clip", root, other, steps=2, precision="bf16", device="cpu"))
    train("clip", tiny_config("clip", root, other, steps=3, device="cpu"))
    assert json.loads(Path(other, "config.json").read_text())["precision"] == "bf16"
    with pytest.raises(UserError, match="--precision: 'bf16' before, 'fp32' now"):
        train("clip", tiny_config("clip", root, other, steps=3, precision="fp32", device="cpu"))


def test_auto_is_bf16_where_cuda_has_it(monkeypatch):
    for has, found in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert resolve_precision("auto", "cuda:0", emulated=False) == found
    assert resolve_precision("auto", "cpu", emulated=False) == "fp32"
    assert resolve_precision("auto", "cuda", before="fp16") == "fp16"
    assert resolve_precision("fp16", "cpu", before="bf16") == "fp16"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [],
            "--base-weights is needed: MobileCLIP-S0's weights (Apple's mobileclip_s0.pt, another checkpoint file, or "
            "a RUN folder), or random for a try; open_clip itself has --base MobileCLIP2-S0 --base-weights dfndr2b",
        ),
        (
            ["--base-weights", "mobileclip_s0.pt"],
            "--base-weights 'mobileclip_s0.pt': no such file, RUN folder or tag of MobileCLIP-S0 (tags: none)",
        ),
        (["--base", "MobileCLIP2-S0", "--base-weights", "nope"], "tag of MobileCLIP2-S0 (tags: dfndr2b)"),
    ],
    ids=str,
)
def test_siclip_without_base_weights_is_refused_before_anything_is_built(words, said, tmp_path, monkeypatch, capsys):
    """Nor is a dataset looked for: the message is the first."""
    import clipmill

    monkeypatch.setattr(
        sys, "argv", ["clipmill", "train", "siclip", "--data", "nowhere", "--out", str(tmp_path / "run"), *words]
    )
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model is built"))
    with pytest.raises(SystemExit) as left:
        clipmill.main()
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_what_the_message_names_is_there():
    base, tag, model = siclip.OPEN_CLIPS.split()[1::2]
    assert tag in open_clip.list_pretrained_tags_by_model(base)
    assert {base, model} <= set(open_clip.list_models())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("probe", "finetune")])
def test_every_recipes_default_model_exists(recipe):
    """probe and finetune have none: they start from a RUN."""
    model = default_config(recipe).student.model
    if model.startswith("timm:"):
        assert model.removeprefix("timm:") in timm.list_models()
    else:
        assert model in open_clip.list_models()


def test_training_in_no_dataset_is_refused_before_a_model_is_built(root, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model is built"))
    for data in ("", str(tmp_path)):
        with pytest.raises(UserError, match=r"--data is needed|clipmill pack"):
            train("clip", tiny_config("clip", root, str(tmp_path / "run"), data=data))
