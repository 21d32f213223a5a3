"""Chunks that fit the memory there is: chosen by prediction, exact, halved when the prediction was wrong."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_catlip import write_folders, write_labelled
from small_training import (
    TINY_RESNET,
    TINY_VIT,
    read_metrics,
    tiny_clip,
    tiny_config,
    write_every_root,
)

from shards_spec.files import UserError
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.configs import default_config
from training.engine import batch_fit as fit
from training.engine.batch_fit import available_bytes, choose, halved, profiles
from training.engine.gradients import Gradients
from training.engine.memory_estimate import Profile
from training.losses import contrastive, distillation, similarity
from training.recipes import RECIPES
from training.trainer import predict, prepare, train

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset for every recipe of pairs, with its tiny models."""
    return write_every_root(tmp_path_factory.mktemp("data"))


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("training") and r.levelno >= logging.WARNING]


def bytes_of(config, recipe, chunk, as_bytes=True):
    """What chunks of a size take, as predicted."""
    _, samples, task = prepare(recipe, config)
    [(profile, size)] = profiles(config, samples, task)
    return profile.at(size, 1, chunk, as_bytes).total


@pytest.mark.parametrize("recipe", ["clip", "tinyclip", "coca"])
def test_chunks_chosen_by_fit_are_the_same_mathematics(recipe, root, tmp_path, caplog):
    """The largest that fits of 16, 8, 4, 2, 1; losses, gradients and learning rate of every step are the whole's."""
    fields = {"batch_size": 16, "steps": 5, "precision": "fp32"}
    whole = tiny_config(recipe, root, str(tmp_path / "whole"), **fields)
    room = bytes_of(whole, recipe, 4) / fit.SHARE / fit.GB
    assert bytes_of(whole, recipe, 8) > bytes_of(whole, recipe, 4)
    caplog.set_level(logging.INFO)
    train(recipe, whole)
    assert "in chunks of" not in caplog.text
    train(recipe, tiny_config(recipe, root, str(tmp_path / "fit"), **fields, fit=room))
    assert "in chunks of 4 samples" in caplog.text
    for line, expected in zip(read_metrics(tmp_path / "fit"), read_metrics(tmp_path / "whole"), strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    config = json.loads(Path(tmp_path, "fit", "config.json").read_text())
    assert (config["chunk_size"], config["fit"]) == (None, room), "what was asked, so that another machine may choose"


@pytest.mark.parametrize("recipe", ["clip", "siclip"])
def test_chunks_of_a_trained_batch_norm_are_told(recipe, root, tmp_path, caplog):
    model = {"model": tiny_clip(tmp_path / "resnet", vision=TINY_RESNET)} if recipe == "clip" else {}
    config = tiny_config(recipe, root, str(tmp_path / "run"), batch_size=16, steps=2, **model)
    room = bytes_of(config, recipe, 4) / fit.SHARE / fit.GB
    train(recipe, dataclasses.replace(config, run=dataclasses.replace(config.run, fit=room)))
    [warning] = told(caplog)
    assert "trained BatchNorms normalise over a chunk of 4 samples and not over the batch" in warning


@pytest.mark.parametrize("range_augment", [False, True])
def test_finetuning_and_catlip_in_chunks_are_the_whole(range_augment, tmp_path):
    """Means over the whole batch, of images of two sizes, with a tower that has no BatchNorm.

    RangeAugment draws for the whole batch; on a CPU the noise of chunks is that of the batch, too.
    """
    data = write_folders(tmp_path / "images")
    found = {}
    for name, fields in (("whole", {}), ("chunks", {"chunk_size": 3})):
        config = default_config("finetune")
        config = dataclasses.replace(
            config,
            range_augment=range_augment,
            data=dataclasses.replace(config.data, data=data, batch_size=8, workers=0),
            sides=dataclasses.replace(config.sides, sides=(32, 64), base_side=64),
            student=dataclasses.replace(config.student, model="timm:test_vit"),
            optim=dataclasses.replace(config.optim, warmup=1),
            run=dataclasses.replace(config.run, out=str(tmp_path / name), steps=3, log_every=1, **fields),
        )
        found[name] = read_metrics(train("finetune", config))
    for line, expected in zip(found["chunks"], found["whole"], strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert ("augment" in found["whole"][0]["losses"]) == range_augment


def test_the_largest_equal_chunks_that_fit():
    """By hand: 875 bytes that are always there, 10 a sample of the batch (as bytes 4, and 8 of the chunk's)."""
    one = Profile(500, 125, 0, 8.0, 2.0, ((2, 200), (4, 400)), ((4, 0), (8, 0), (12, 0)))
    assert one.at(64).total == 875 + 64 * 10 + 64 * 100
    assert one.at(64, 1, 16, as_bytes=True).total == 875 + 64 * 4 + 16 * 8 + 16 * 100
    for room, chunk in ((10_000, None), (6_500, 32), (3_500, 16), (2_600, 8), (2_000, 8), (1_900, 4)):
        memory = choose([(one, 64)], 1, room / fit.SHARE, None)
        assert (memory.chunk_size, memory.total <= room) == (chunk, True)
    assert choose([(one, 64)], 1, 100, None).chunk_size == 1
    assert choose([(one, 64)], 4, 2_700 / fit.SHARE, None).chunk_size is None, "a share of 16"
    assert choose([(one, 64)], 1, 100, 5).chunk_size == 5, "asked for"
    large = dataclasses.replace(one, activations=((2, 400), (4, 800)))
    assert choose([(one, 64), (large, 32)], 1, 3_500 / fit.SHARE, None).chunk_size == 8, "the larger images decide"


def test_a_batch_that_no_chunk_makes_fit_is_refused_before_the_first_step(root, tmp_path):
    """On a CPU the machine's memory is the limit: killed without a word otherwise."""
    with pytest.raises(UserError) as error:
        train("clip", tiny_config("clip", root, str(tmp_path / "run"), batch_size=100_000_000))
    message = str(error.value)
    assert message.startswith("a step takes about ")
    assert "that are free on this machine, even one sample at a time: take a smaller --batch-size" in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"of the 0\.0 GB of --fit 1e-06, even one sample at a time"):
        train("clip", tiny_config("clip", root, str(tmp_path / "run"), fit=1e-6))
    with pytest.raises(UserError, match="take a --chunk-size below 2, or leave it to --fit"):
        train("clip", tiny_config("clip", root, str(tmp_path / "run"), fit=1e-6, chunk_size=2))
    with pytest.raises(UserError, match=r"--fit 0: must be above 0"):
        tiny_config("clip", root, str(tmp_path / "run"), fit=0)


def test_a_chunk_size_that_was_asked_for_is_warned_of(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fit, "available_bytes", lambda: 1e5)
    train("clip", tiny_config("clip", root, str(tmp_path / "run"), steps=1, warmup=1, chunk_size=2))
    [warning] = told(caplog)
    assert "of the 0.0 GB that are free on this machine: take a --chunk-size below 2" in warning


def overflows_above(monkeypatch, limit, where):
    """An allocator that has no more for chunks above ``limit`` samples, in the forward or the backward pass."""
    compute = Gradients.losses

    def losses(self, batch, step, sizes):
        size = min(self.chunk_size or sizes[0], sizes[0])

        def fail():
            torch.empty(0).sum()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

        if size > limit and where == "forward":
            fail()
        pending = compute(self, batch, step, sizes)
        return pending._replace(backward=fail) if size > limit else pending

    monkeypatch.setattr(Gradients, "losses", losses)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_does_not_fit_after_all_is_halved(where, root, tmp_path, caplog, monkeypatch):
    model = {"model": tiny_clip(tmp_path / "resnet", vision={**TINY_RESNET})}
    for name, fields in (("clip", {}), ("resnet", model)):
        usual = train("clip", tiny_config("clip", root, str(tmp_path / f"{name}-usual"), chunk_size=2, **fields))
        with monkeypatch.context() as patch:
            overflows_above(patch, 2, where)
            halved_run = train("clip", tiny_config("clip", root, str(tmp_path / name), **fields))
        for line, expected in zip(read_metrics(halved_run), read_metrics(usual), strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    found = [text for text in told(caplog) if "out of memory" in text]
    said = ("out of memory with 4 samples at a time", "--chunk-size 2 from here on")
    assert [(text.split(" (")[0], text.split(": ")[-1]) for text in found] == [said] * 2


def test_out_of_memory_names_the_chunk_size(root, tmp_path, monkeypatch):
    overflows_above(monkeypatch, 0, "forward")
    with pytest.raises(
        UserError, match=r"out of memory with 1 sample at a time .*: take a smaller --chunk-size, --batch"
    ):
        train("clip", tiny_config("clip", root, str(tmp_path / "run")))
    with pytest.raises(UserError, match="out of memory with 8 samples at a time"):
        halved(None, 8, 2, "of several processes none may go back alone")


REAL = """
import sys, resource, torch, logging
sys.path.insert(0, {tests!r})
logging.basicConfig(level="INFO")
torch.set_num_threads(1)
torch.backends.mkldnn.set_flags(False)  # its compiled kernels take address space, whatever the chunk is
from training.engine import batch_fit as fit
from training.trainer import Trainer
fit.available_bytes = lambda: 1e12
step = Trainer.step
def limited(self, batch):
    if self.progress.step == 1:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + {room}, -1))
    return step(self, batch)
Trainer.step = limited
import clipmill
sys.argv = ["clipmill", *sys.argv[1:]]
clipmill.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
@pytest.mark.slow
def test_a_real_allocator_without_memory_halves_the_chunk(root, tmp_path):
    """Address space for a third of what a batch of 256 takes, from the second step on."""
    model = tiny_clip(tmp_path / "deep", vision={**TINY_VIT, "layers": 4, "patch_size": 4, "width": 64})
    whole = bytes_of(tiny_config("clip", root, "unused", batch_size=256, model=model), "clip", None)
    code = REAL.format(tests=str(Path(__file__).parents[2] / "support"), room=whole // 3)
    words = [
        "train",
        "clip",
        "--smoke",
        "--data",
        root,
        "--model",
        model,
        "--batch-size",
        "256",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "run"),
    ]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # freed memory is free address space
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | returned,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out of memory with 256 samples at a time" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("rows", [3, 4, 16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda *features, scale: contrastive.clip_loss(*features[:2], scale),
        lambda *features, scale: distillation.affinity_loss(*features, student_scale=scale, teacher_scale=3.0),
        lambda *features, scale: distillation.relation_loss(*features, student_scale=scale, teacher_scale=3.0),
        lambda *features, scale: distillation.interactive_loss(*features, scale),
    ],
    ids=["clip_loss", "affinity_loss", "relation_loss", "interactive_loss"],
)
def test_losses_in_blocks_of_rows_are_the_whole(loss, rows, monkeypatch):
    """In float64, with their gradients at features and scale; also through `torch.autograd.grad`, as chunks do."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.nn.functional.normalize(torch.randn(10, 5, generator=generator).double(), dim=1) for _ in range(4)
    ]
    found = []
    for whole in (10, 9):
        monkeypatch.setattr(similarity, "MAX_WHOLE", whole)
        monkeypatch.setattr(similarity, "BLOCK_ROWS", rows)
        leaves = [value.clone().requires_grad_() for value in features]
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        value = loss(*leaves, scale=scale)
        found.append((value.detach(), *torch.autograd.grad(value, [*leaves[:2], scale])))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_memory_of_losses_in_blocks_is_linear_in_the_batch(root):
    """Above `MAX_WHOLE` pairs the four matrices of all pairs are never there, and are not predicted."""
    config = tiny_config("tinyclip", root, "unused", batch_size=similarity.MAX_WHOLE)
    _, samples, task = prepare("tinyclip", config)
    [(one, _)] = profiles(config, samples, task)
    whole = one.at(similarity.MAX_WHOLE, chunk_size=1).activations
    blocks = one.at(similarity.MAX_WHOLE + 1, chunk_size=1).activations
    assert whole > 3 * similarity.MAX_WHOLE**2 * 4
    assert blocks < whole / 7


def test_available_memory_is_the_smallest_that_is_said(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc, cgroup / "memory"):
        folder.mkdir(parents=True)
    assert available_bytes(str(proc), str(cgroup)) > 2**28, "what the system says, where there are no files"
    (proc / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:  1000000 kB\n")
    assert available_bytes(str(proc), str(cgroup)) == 1_024_000_000
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.stat").write_text("anon 100000000\nfile 5\n")
    assert available_bytes(str(proc), str(cgroup)) == 1_024_000_000
    (cgroup / "memory.max").write_text("500000000\n")
    assert available_bytes(str(proc), str(cgroup)) == 400_000_000
    (cgroup / "memory" / "memory.limit_in_bytes").write_text("300000000\n")
    (cgroup / "memory" / "memory.stat").write_text("cache 1\nrss 50000000\ntotal_rss 60000000\n")
    assert available_bytes(str(proc), str(cgroup)) == 240_000_000


def with_data(recipe, root, labelled, images):
    config = default_config(recipe)
    data = {"catlip": labelled, "probe": images, "finetune": images, "minivit": images}.get(recipe, root)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    if recipe in ("probe", "finetune"):  # they have no default: the tower that CatLIP's defaults leave
        student = dataclasses.replace(config.student, model="timm:catlip_vit_base_patch16_224")
        config = dataclasses.replace(config, student=student)
    untrained = {"siclip": {"base_weights": "random"}, "tinymim": {"teacher_weights": "random"}}
    if recipe == "minivit":
        config = dataclasses.replace(
            config, distillation=dataclasses.replace(config.distillation, teacher_weights="random")
        )
    return dataclasses.replace(config, **untrained.get(recipe, {}))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipes_defaults_fit_24_gigabytes(recipe, root, tmp_path):
    """The real models and batches; 24,320 classes of CatLIP's. In fp32 already, bf16 takes less."""
    labelled = tmp_path / "labelled"
    if recipe == "catlip":
        write_labelled(labelled)
        path = labelled / "vocab" / f"{default_config('catlip').labels.vocabulary}.tsv"
        few = read_vocabulary(str(path))
        more = tuple((f"n9{number:07d}", "made_up", 1, 1) for number in range(24_320 - len(few)))
        Vocabulary(few.rows + more, few.header).write(str(path))
    images = write_folders(tmp_path / "images") if recipe in ("probe", "finetune", "minivit") else ""
    config = with_data(recipe, root, str(labelled), images)
    for precision in ("fp32", "bf16"):
        run = dataclasses.replace(config.run, fit=24.0, precision=precision, device="cpu")
        memory = predict(recipe, dataclasses.replace(config, run=run))[""]
        print(recipe, precision, memory)
        assert memory.total <= fit.SHARE * 24e9


@pytest.mark.slow
def test_the_pages_commands_fit_24_gigabytes(root):
    """`clipmill train` as the pages have it, with the data of the test; catlip needs labels, and has a test above."""
    lines = [line for page in ("README.md", "docs/training.md") for line in (ROOT / page).read_text().splitlines()]
    found = [line.split("#")[0].split() for line in lines if " train " in line and " catlip " not in line]
    commands = [words[words.index("train") :] for words in found if words[:1] in (["clipmill"], ["torchrun"])]
    assert len(commands) >= 4
    ours = {"/data/cc3m": root, "/data/cc12m": root, "mobileclip_s0.pt": "random"}
    for words in commands:
        words = [ours.get(word, word) for word in words]
        call = [sys.executable, "-m", "clipmill", *words, "--predict-memory"]
        done = subprocess.run([*call, "--fit", "24"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split("about ")[1].split(" MiB")[0].replace(",", "")) * 2**20 <= 24e9
