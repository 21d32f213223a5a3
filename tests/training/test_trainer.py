"""Whole runs of tiny students: what a run writes, resuming to the last bit, stopping, errors."""

import json
import math
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import (
    TINY_RESNET,
    assert_same_run,
    final_weights,
    steady_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
    write_packed,
    write_retrieval,
)
from warm_process import WarmProcess

import clipmill
from shards_spec.files import UserError
from training.config import ModelConfig, flat
from training.configs import default_config
from training.evaluation.config import EvalConfig
from training.evaluation.stage import evaluate
from training.recipes import RECIPES
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.runs.student import load_run, load_student, new_student
from training.trainer import Trainer, train

PAIRS = [
    name for name in RECIPES if name not in ("catlip", "probe", "finetune", "tinymim", "minivit")
]  # those: tests/training/recipes
RUN_IT = """
import sys, json, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from small_training import tiny_config
from training.trainer import train
train("tinyclip", tiny_config(*json.loads(sys.argv[1]), **json.loads(sys.argv[2])))
"""


# Tiny tensors on one thread: as fast, and sums are in the same order as in the killed processes.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A packed dataset of 3 shards with a teacher; students clip/, coca/ and siclip/ with its base/ beside them."""
    return write_every_root(tmp_path_factory.mktemp("data"), broken=("000020001",))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_field_is_a_flat_flag_with_help(recipe, capsys):
    import tyro

    default = default_config(recipe)
    config = tyro.cli(type(default), args=["--data", "D", "--batch-size", "3", "--lr", "0.5"], default=default)
    assert (flat(config)["data"], flat(config)["batch_size"], flat(config)["lr"]) == ("D", 3, 0.5)
    with pytest.raises(SystemExit):
        tyro.cli(type(default), args=["--help"], default=default)
    options = re.split(r"\n[│ ]{0,6}--", capsys.readouterr().out)  # its text may name others
    flags = [" ".join(option.replace("│", " ").split()) for option in options]
    for name in flat(config):
        flag = name.replace("_", "-")
        shown = [text for text in flags if text.partition(" ")[0].rstrip(",") == flag]
        assert shown, name
        assert len(shown[-1].split()) > 4, f"{name} has no help"
        assert "(default: " in shown[-1], shown


@pytest.mark.parametrize("recipe", PAIRS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recipe_learns_and_leaves_a_whole_run_folder(recipe, precision, root, tmp_path):
    out = train(recipe, tiny_config(recipe, root, str(tmp_path / "run"), precision=precision, steps=30, batch_size=6))
    run = steady_metrics(out)
    assert [line["step"] for line in run] == list(range(1, 31))
    assert run[-1]["samples_seen"] == 180
    first, last = (sum(line["loss"] for line in part) / 5 for part in (run[:5], run[-5:]))
    assert last < first
    assert run[0]["loss"] == pytest.approx(sum(run[0]["losses"].values()))
    names = set(os.listdir(out))
    model = {"open_clip_config.json", "bpe.txt.gz"}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"} | model
    assert sorted(os.listdir(f"{out}/checkpoints")) == ["step_000030.pt", "step_000030.pt.sha256"]
    config = json.loads(Path(out, "config.json").read_text())
    assert (config["recipe"], config["batch_size"], config["precision"]) == (recipe, 6, precision)
    student, step = load_run(out)
    weights = final_weights(out)
    assert step == 30
    assert all(torch.equal(value, weights[f"student.{name}"]) for name, value in student.model.state_dict().items())


def test_terms_of_the_tinyclip_recipe(root, tmp_path):
    weights = {"affinity_weight": 1.0, "feature_weight": 2.0, "contrastive_weight": 0.5}
    out = train("tinyclip", tiny_config("tinyclip", root, str(tmp_path / "all"), steps=2, **weights))
    assert set(steady_metrics(out)[0]["losses"]) == {"affinity", "feature", "contrastive"}
    assert steady_metrics(out)[-1]["logit_scale"] == pytest.approx(50)
    learned = tiny_config("tinyclip", root, str(tmp_path / "learned"), steps=2, fixed_logit_scale=None)
    scales = [line["logit_scale"] for line in steady_metrics(train("tinyclip", learned))]
    assert scales[0] != scales[1]
    assert scales[0] == pytest.approx(1 / 0.07, rel=0.01)


def test_broken_images_are_counted(root, tmp_path):
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), steps=12, batch_size=4))
    assert steady_metrics(out)[-1]["skipped"] == 2  # 48 positions: two epochs of 23 samples and a bit


def test_workers_and_cadence_change_nothing(root, tmp_path):
    one = train("tinyclip", tiny_config("tinyclip", root, str(tmp_path / "one")))
    two = train("tinyclip", tiny_config("tinyclip", root, str(tmp_path / "two"), workers=2, checkpoint_steps=5))
    assert_same_run(one, two)


def test_going_on_from_any_checkpoint_equals_an_undisturbed_run(root, tmp_path):
    whole = train(
        "tinyclip", tiny_config("tinyclip", root, str(tmp_path / "whole"), checkpoint_steps=1, keep_checkpoints=99)
    )
    kept = RunFolder(whole)
    for step in (1, 5, 11):
        out = tmp_path / f"from_{step}"
        train("tinyclip", tiny_config("tinyclip", root, str(out), checkpoint_steps=1, keep_checkpoints=99))
        for later in range(step + 1, 13):
            (out / "checkpoints" / f"step_{later:06d}.pt").unlink()
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 13, "lo')  # killed while writing
        train("tinyclip", tiny_config("tinyclip", root, str(out), log_every=1))
        assert_same_run(whole, out)
    assert load_checkpoint(kept.newest())["epoch"] == 48 // 23


def test_dropout_goes_on_in_its_random_stream(root, tmp_path):
    """The student's own randomness is part of a checkpoint."""
    source = Path(root, "models", "clip")
    folder = tmp_path / "dropping"
    folder.mkdir()
    for name in ("bpe.txt.gz", "open_clip_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    fields = {"model": f"local-dir:{folder}", "checkpoint_steps": 4, "keep_checkpoints": 9}
    whole = train("clip", tiny_config("clip", root, str(tmp_path / "whole"), **fields))
    again = train("clip", tiny_config("clip", root, str(tmp_path / "again"), **fields))
    (Path(again) / "checkpoints" / "step_000012.pt").unlink()
    train("clip", tiny_config("clip", root, again, **fields))
    assert_same_run(whole, again)


def start(root, out, **fields):
    code = RUN_IT.format(tests=str(Path(__file__).parents[1] / "support"))
    words = [json.dumps(["tinyclip", root, str(out)]), json.dumps(fields)]
    return WarmProcess(code, *words)


def logged(out):
    path = Path(out) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_often(root, tmp_path, kills, steps, longest_s):
    fields = {"steps": steps, "checkpoint_steps": 3, "workers": 1}
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    rng, done = random.Random(0), 0
    for _ in range(kills):
        process, before = start(root, out, **fields), logged(out)
        while process.poll() is None and logged(out) <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * longest_s)
        process.kill()
        done += process.wait() == -signal.SIGKILL
    assert done, "every process had finished before it was killed"
    assert 0 < steady_metrics(out)[-1]["step"] < steps
    train("tinyclip", tiny_config("tinyclip", root, str(out), **fields))
    train("tinyclip", tiny_config("tinyclip", root, str(undisturbed), **fields | {"checkpoint_steps": None}))
    assert_same_run(undisturbed, out)
    assert not [name for name in os.listdir(out / "checkpoints") if name.endswith(".tmp")]


def test_killed_and_run_again_gives_the_same_losses(root, tmp_path):
    kill_often(root, tmp_path, kills=2, steps=40, longest_s=0.1)


@pytest.mark.slow
def test_killed_twenty_times(root, tmp_path):
    kill_often(root, tmp_path, kills=20, steps=1500, longest_s=0.3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopping_signals_leave_a_checkpoint(root, tmp_path, number, monkeypatch, caplog):
    step = Trainer.step

    def interrupted(self, batch):
        if self.progress.step == 4:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:  # Slurm repeats it; a second Ctrl-C is meant
                os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    handler = signal.getsignal(number)
    config = tiny_config("tinyclip", root, str(tmp_path / "run"), checkpoint_minutes=99.0)
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        train("tinyclip", config)
    assert left.value.code == 128 + number, "so that `train && eval` ends here"
    assert RunFolder(out).newest().name == "step_000005.pt"
    assert f"stopped by {number.name} after step 5 of 12" in caplog.text
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    train("tinyclip", config)
    assert_same_run(out, train("tinyclip", tiny_config("tinyclip", root, str(tmp_path / "whole"))))


def test_ctrl_c_reaches_the_workers_too_and_they_stay(root, tmp_path):
    process = start(root, tmp_path / "run", steps=10**6, workers=2)
    while process.poll() is None and not logged(tmp_path / "run"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by SIGINT" in errors
    assert (
        load_checkpoint(RunFolder(str(tmp_path / "run")).newest())["progress"]["step"]
        == steady_metrics(tmp_path / "run")[-1]["step"]
    )


def test_only_the_newest_checkpoints_stay(root, tmp_path):
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), checkpoint_steps=2, keep_checkpoints=3))
    kept = ["step_000008.pt", "step_000010.pt", "step_000012.pt"]
    assert sorted(os.listdir(f"{out}/checkpoints")) == sorted(kept + [f"{name}.sha256" for name in kept])


def test_another_config_is_refused_by_field(root, tmp_path):
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", root, out, steps=2))
    with pytest.raises(UserError) as error:
        train("clip", tiny_config("clip", root, out, steps=3, lr=0.5, workers=1, log_every=2, keep_checkpoints=1))
    assert "--lr: 0.001 before, 0.5 now; --steps: 2 before, 3 now" in str(error.value)
    with pytest.raises(UserError, match="recipe: 'clip' before, 'tinyclip' now"):
        train("tinyclip", tiny_config("tinyclip", root, out, steps=2))
    with pytest.raises(UserError, match=r"has checkpoints \(up to step_000002\.pt\)"):
        train("clip", tiny_config("clip", root, out, steps=2, resume=False))
    assert steady_metrics(train("clip", tiny_config("clip", root, out, steps=2)))[-1]["step"] == 2


def test_another_dataset_is_refused(root, tmp_path):
    data, out = tmp_path / "data", str(tmp_path / "run")
    write_packed(str(data), [5])
    config = tiny_config("clip", root, out, data=str(data), steps=2)
    train("clip", config)
    Path(out, "checkpoints", "step_000002.pt").rename(Path(out, "checkpoints", "step_000001.pt"))
    write_packed(str(data), [4, 4])
    with pytest.raises(UserError, match="or what is selected of them, are others"):
        train("clip", config)


@pytest.mark.parametrize(
    "fields",
    [
        {"chunk_size": 2},
        {"chunk_size": 3},
        {"checkpoint_activations": True},
        {"channels_last": True},
        pytest.param({"compile": "on"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["clip", "coca"])
def test_ways_to_compute_the_same(recipe, fields, root, tmp_path):
    usual = steady_metrics(train(recipe, tiny_config(recipe, root, str(tmp_path / "usual"), steps=6)))
    other = steady_metrics(train(recipe, tiny_config(recipe, root, str(tmp_path / "other"), steps=6, **fields)))
    for line, expected in zip(other, usual, strict=True):
        assert line.pop("losses") == pytest.approx(expected.pop("losses"), abs=1e-4)
        assert line == pytest.approx(expected, rel=1e-3)


def test_how_to_compute_may_change_when_going_on(root, tmp_path):
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", root, out, checkpoint_steps=6, keep_checkpoints=2))
    Path(out, "checkpoints", "step_000012.pt").unlink()
    fields = {"chunk_size": 3, "checkpoint_activations": True, "channels_last": True, "max_nonfinite": 1}
    train("clip", tiny_config("clip", root, out, **fields))
    assert len(steady_metrics(out)) == 12


def test_the_learning_rate_of_a_run_is_the_schedules(root, tmp_path):
    fields = {"schedule": "linear", "final_lr": 2e-4, "warmup": 2}
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), steps=6, **fields))
    expected = [0.5e-3, 1e-3, 1e-3, 0.8e-3, 0.6e-3, 0.4e-3]
    assert [line["lr"] for line in steady_metrics(out)] == pytest.approx(expected)


def test_an_average_of_the_weights(root, tmp_path):
    """It follows its formula, survives a resume, and is what a run's student is."""
    model = tiny_clip(tmp_path / "resnet", vision=TINY_RESNET)
    fields = {"model": model, "steps": 5, "ema_decay": 0.6, "checkpoint_steps": 1, "keep_checkpoints": 9}
    config = tiny_config("clip", root, str(tmp_path / "run"), **fields)
    out = train("clip", config)
    average = new_student(config.student, 0).model.state_dict()
    average = {name: value.double() for name, value in average.items()}
    for step in range(1, 6):
        state = load_checkpoint(Path(out, "checkpoints", f"step_{step:06d}.pt"))
        for name, value in average.items():
            average[name] = 0.6 * value + 0.4 * state["task"][f"student.{name}"].double()
    student, raw = load_run(out)[0].model.state_dict(), load_run(out, raw=True)[0].model.state_dict()
    for name, value in student.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(raw[name], state["task"][f"student.{name}"])
    assert not torch.equal(student["visual.bn1.running_mean"], raw["visual.bn1.running_mean"])
    for step in (4, 5):
        Path(out, "checkpoints", f"step_{step:06d}.pt").unlink()
    again = load_run(train("clip", config))[0].model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in student.items())


@pytest.fixture(scope="module")
def eval_root(tmp_path_factory):
    return write_retrieval(tmp_path_factory.mktemp("eval"))


def test_measuring_while_training_keeps_the_best(root, eval_root, tmp_path):
    fields = {"checkpoint_steps": 1, "keep_checkpoints": 99, "lr": 3e-3, "ema_decay": 0.5}
    usual = train("clip", tiny_config("clip", root, str(tmp_path / "usual"), **fields))
    fields |= {"eval_data": eval_root, "eval_every_steps": 2}
    config = tiny_config("clip", root, str(tmp_path / "run"), **fields)
    out = train("clip", config)
    run = steady_metrics(out)
    found = {line["step"]: line.pop("eval") for line in run if "eval" in line}
    assert list(found) == [2, 4, 6, 8, 10, 12]
    assert run == steady_metrics(usual), "measuring changes nothing"
    scores = [(e["image_retrieval_recall@1"] + e["text_retrieval_recall@1"]) / 2 for e in found.values()]
    best = load_checkpoint(RunFolder(out).best())
    step = best["progress"]["step"]
    assert best["score"] == max(scores) == scores[step // 2 - 1]
    assert scores.index(max(scores)) == step // 2 - 1, "the first of equals"
    assert best["eval"] == found[step]
    (measured,) = evaluate(EvalConfig(out, (eval_root,), best=True))
    assert (measured["metrics"], measured["step"]) == (found[step], step)
    (measured,) = evaluate(EvalConfig(out, (eval_root,)))
    assert (measured["metrics"], measured["step"]) == (found[12], 12)
    assert final_weights(out).keys() == best["task"].keys()
    for later in range(7, 13):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    train("clip", config)
    assert load_checkpoint(RunFolder(out).newest())["progress"]["best"] == max(scores)
    with pytest.raises(UserError, match="has no best checkpoint yet: train with --eval-data EVAL"):
        load_run(usual, best=True)


def test_measuring_once_per_epoch(root, eval_root, tmp_path):
    fields = {"eval_data": eval_root, "steps": 14, "log_every": 100}
    out = train("clip", tiny_config("clip", root, str(tmp_path / "run"), **fields))
    assert [line["step"] for line in steady_metrics(out)] == [6, 12, 14]  # 23 samples in batches of 4


def test_captioning_loss_is_open_clips(root):
    from open_clip.loss import CoCaLoss

    from training.recipes.coca import CocaTask

    student = new_student(ModelConfig(f"local-dir:{root}/models/coca"), 0)
    tokens = student.tokenizer(["a red square", "two green circles and a long blue line", "a dot"])
    images = torch.randn(3, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0))
    task = CocaTask(student.model, 0.7, 1.5)
    ours = task.losses(task({"images": images, "tokens": tokens}), 0)
    out = student.model(images, tokens)
    theirs = CoCaLoss(1.5, 0.7, pad_id=student.model.pad_id)(
        out["image_features"], out["text_features"], out["logits"], out["labels"], out["logit_scale"]
    )
    assert [value.item() for value in ours.values()] == pytest.approx([value.item() for value in theirs], rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ("clip", {"data": ""}, "--data is needed"),
        ("clip", {"model": "no-such"}, "'no-such'"),
        ("clip", {"device": "cuda"}, "no CUDA device"),
        ("tinyclip", {"teacher": "x"}, "--teacher 'x' is not there"),
        ("tinyclip", {"affinity_weight": 0.0}, "--affinity-weight 0.0: must be above 0 when the others are 0"),
        ("coca", {"model": "ViT-S-32"}, "has no text decoder"),
        ("clip", {"batch_size": 0}, "--batch-size 0: must be 1 or more"),
        ("clip", {"lr": math.inf}, "--lr inf: must be above 0"),
        ("clip", {"epochs": math.inf}, "--epochs inf: must be a number"),
        ("clip", {"seed": 1 << 70}, "--seed 1180591620717411303424: must be a whole number of less than 63 bits"),
        ("clip", {"steps": 0}, "--steps 0: must be 1 or more"),
        ("clip", {"scale": (0.9, 0.5)}, "0 < low <= high <= 1"),
        ("clip", {"eval_data": "nowhere"}, "nowhere is not there; check the path"),
        ("clip", {"eval_every_steps": 0}, "--eval-every-steps 0: must be 1 or more"),
        ("clip", {"final_lr": 1.0}, "--final-lr 1.0: must be from 0 to --lr (0.001)"),
        ("clip", {"ema_decay": 1.0}, "--ema-decay 1.0: must be in (0, 1)"),
        ("clip", {"chunk_size": 0}, "--chunk-size 0: must be 1 or more, or None"),
        ("coca", {"clip_weight": 0.0, "caption_weight": 0.0}, "--clip-weight 0.0: must be above 0"),
    ],
)
def test_users_mistakes(recipe, fields, message, root, tmp_path):
    if fields.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError) as error:
        train(recipe, tiny_config(recipe, root, str(tmp_path / "run"), **fields))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_peak_memory_is_printed(root, capsys, monkeypatch):
    model = f"local-dir:{root}/models/clip"
    words = ["train", "clip", "--data", root, "--model", model, "--predict-memory", "--ema-decay", "0.9"]
    monkeypatch.setattr(sys, "argv", ["clipmill", *words])
    with pytest.raises(SystemExit) as done:
        clipmill.main()
    assert not done.value.code
    assert capsys.readouterr().out.startswith("peak memory of a process: about ")


def test_random_weights_depend_on_the_seed_alone(root):
    def weights(seed):
        return new_student(ModelConfig(f"local-dir:{root}/models/coca"), seed).model.state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    projection = "text_decoder.text_projection"
    assert one[projection].std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert not torch.equal(one[projection], other[projection])


def test_a_run_may_start_from_another_runs_student(root, tmp_path):
    """By the one loader, which takes names, folders and runs; the new run can be loaded without the former."""
    first = train("clip", tiny_config("clip", root, str(tmp_path / "first"), steps=2))
    loaded, weights = load_student(ModelConfig(first), 0).model.state_dict(), final_weights(first)
    assert all(torch.equal(value, weights[f"student.{name}"]) for name, value in loaded.items())
    second = train("clip", tiny_config("clip", root, str(tmp_path / "second"), steps=1, warmup=1, lr=1e-9, model=first))
    for name, value in final_weights(second).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    Path(first).rename(tmp_path / "moved")
    assert load_run(second)[1] == 1
    with pytest.raises(UserError, match=r"--pretrained 'x' would not be used: RUN .*moved brings its own weights"):
        load_student(ModelConfig(str(tmp_path / "moved"), "x"), 0)
    with pytest.raises(UserError, match="--model 'timm:test_vit' has no text tower"):
        train("clip", tiny_config("clip", root, str(tmp_path / "run"), model="timm:test_vit"))
