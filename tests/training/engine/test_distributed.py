"""Two real processes joined by gloo: gradients, norms, whole runs, stopping and failing; and chunks by one."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_dist import Tiny, finish, fork, gradients, start, tiny_batch
from small_training import (
    TINY_RESNET,
    steady_metrics,
    tiny_clip,
    tiny_config,
    tiny_siclip,
    write_packed,
    write_retrieval,
    write_teacher,
)
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from shards_spec.files import DataError, UserError
from training.data.order import Order
from training.engine.distributed import processes
from training.engine.gradients import Gradients, split
from training.engine.sync_batch_norm import CpuSyncBatchNormAct, statistics, synchronise
from training.engine.updater import Updater
from training.recipes import tinyclip
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.trainer import Trainer, train

EVEN, UNEVEN = [6, 6], [7, 5]
CASES = {
    "even": {"sizes": EVEN},
    "uneven": {"sizes": UNEVEN},
    "chunks": {"sizes": EVEN, "chunk_size": 3, "norm": False},
    "uneven chunks": {"sizes": UNEVEN, "chunk_size": 2, "norm": False},
    "without a norm": {"sizes": UNEVEN, "norm": False},
    "recomputed": {"sizes": UNEVEN, "checkpointed": True},
}
CASES = {
    f"{name} {str(dtype)[6:]}": case | {"dtype": dtype}
    for name, case in CASES.items()
    for dtype in (torch.float32, torch.float64)
}


# Forked processes must find no pool of threads.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def two():
    """Each case by two processes."""
    return fork(2, gradients, list(CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process_on_the_joined_batch(name, two):
    case = CASES[name]
    (one,) = gradients(0, [case | {"chunk_size": None, "checkpointed": False}])
    tolerance = 1e-5 if case["dtype"] == torch.float32 else 1e-13
    for rank in range(2):
        found = two[rank][list(CASES).index(name)]
        for kind in ("losses", "gradients", "state"):
            assert found[kind].keys() == one[kind].keys()
            for key, value in one[kind].items():
                if value is None:
                    assert found[kind][key] is None, key
                else:
                    torch.testing.assert_close(found[kind][key], value, rtol=tolerance, atol=tolerance, msg=key)
    untouched = [key for key in one["state"] if "held" in key]
    fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    assert len(untouched) == 5
    assert all((one["state"][key] == fresh[key.split(".")[-1]]).all() for key in untouched)
    assert {key for key, value in one["gradients"].items() if value is None} == {
        "useless",
        "student.held.weight",
        "student.held.bias",
    }


def reductions(rank, chunk_size):
    """How often DDP sends gradients in a step."""
    with processes("cpu") as (ranks, device):
        task, sent = Tiny(norm=False).train(), []
        step = Gradients(task, ranks, device, precision="fp32", chunk_size=chunk_size)

        def note(state, bucket):
            sent.append(1)
            return allreduce_hook(None, bucket)

        step.whole.register_comm_hook(None, note)
        step.losses(tiny_batch(6, torch.float32), 0, ranks.sizes(6)).backward()
        return len(sent)


def test_gradients_are_sent_once_for_all_chunks():
    assert fork(2, reductions, None) == fork(2, reductions, 2) == [1, 1]


def cached_by_hand(case, chunks):
    """What chunks should give: their features one after another with a graph, one backward pass through all."""
    torch.manual_seed(0)
    task = Tiny(dropout=case["dropout"]).double().train()
    for buffer in statistics(task):
        buffer.zero_()  # as `gradients` does
    torch.manual_seed(1)
    for _ in range(2):
        task.zero_grad()
        pieces = [task(piece) for piece in split(tiny_batch(sum(case["sizes"]), torch.float64), chunks)]
        features = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        torch.stack(list(task.losses(features, 0).values())).sum().backward()
    return {"gradients": {name: p.grad for name, p in task.named_parameters()}, "state": task.state_dict()}


def test_chunks_draw_the_same_twice_and_move_statistics_once():
    """Dropout and a BatchNorm, which normalises over each chunk: gradients, statistics, and the random stream after."""
    case = {"dtype": torch.float64, "sizes": [11], "dropout": 0.4}
    (found,) = gradients(0, [case | {"chunk_size": 4}])
    drawn = torch.rand(3)
    assert torch.equal(found["drawn"], gradients(0, [case | {"chunk_size": 4}])[0]["drawn"])
    expected = cached_by_hand(case, 3)
    assert torch.equal(torch.rand(3), found["drawn"])
    assert not torch.equal(drawn, found["drawn"])
    assert found["state"]["student.norm.num_batches_tracked"] == 6  # three chunks, two steps
    for kind in ("gradients", "state"):
        for name, value in expected[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-13, atol=1e-13, msg=name)


def test_timms_norm_with_activation_is_synchronised_with_it():
    for device, kind in (("cpu", CpuSyncBatchNormAct), ("cuda", SyncBatchNormAct)):
        shared = BatchNormAct2d(4)
        module = nn.Sequential(
            shared, nn.Sequential(shared), nn.BatchNorm1d(4), nn.BatchNorm2d(4).requires_grad_(False)
        )
        module.append(nn.BatchNorm2d(4).eval())
        names = list(module.state_dict())
        assert synchronise(module, device) == 2
        assert type(module[0]) is kind
        assert module[1][0] is module[0]
        assert [type(norm) for norm in module[3:]] == [nn.BatchNorm2d] * 2
        assert list(module.state_dict()) == names
    images = torch.randn(3, 4, 5, 5)
    assert torch.equal(module.eval()[0](images), BatchNormAct2d(4).eval()(images))


def sync_act(rank, sizes):
    with processes("cpu") as (ranks, _):
        norm, images = BatchNormAct2d(4), tiny_images(sum(sizes))
        if ranks.size > 1:
            synchronise(norm, "cpu")
            images = images.split(sizes)[ranks.rank]
        return norm.double()(images).detach(), norm.running_var


def tiny_images(count):
    return torch.randn(count, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_norm_with_activation_sees_all_ranks():
    (whole, variance), parts = sync_act(0, [8]), fork(2, sync_act, [5, 3])
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole, rtol=1e-13, atol=1e-13)
    assert all(torch.allclose(part[1], variance) for part in parts)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A packed dataset with a broken image and a teacher, and students: with trained BatchNorms, and without."""
    root = tmp_path_factory.mktemp("data")
    write_teacher(str(root), write_packed(str(root), [9, 8, 6], broken=("000020001",)))
    tiny_clip(root / "models" / "clip", vision=TINY_RESNET)
    tiny_clip(root / "models" / "vit")
    return str(root)


def run(rank, root, out, spoil, fields):
    """A run of the TinyCLIP recipe; ``spoil(rank)`` is called before."""
    spoil(rank)
    return train("tinyclip", tiny_config("tinyclip", root, out, **{"batch_size": 6, "steps": 8, **fields}))


def nothing(rank):
    pass


def assert_close_runs(one, other, tolerance=1e-4):
    """Two runs log nearly the same.

    Gradients are compared to 1e-13 in float64 above. Here a norm of 365 in float32 depends on the last bits of all
    steps before it (9e-4 at the sixth), where the losses still agree to 1e-6.
    """
    assert len(steady_metrics(one)) == len(steady_metrics(other)) == 8
    for line, expected in zip(steady_metrics(one), steady_metrics(other), strict=True):
        assert line.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-2)
        assert {**line.pop("losses"), **line} == pytest.approx(
            {**expected.pop("losses"), **expected}, abs=tolerance, rel=tolerance
        )


def torchrun(*options):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    return subprocess.run(
        [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "clipmill", *options],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[3],
    )


@pytest.fixture(scope="module")
def one(root, tmp_path_factory):
    """The run by one process."""
    return run(0, root, str(tmp_path_factory.mktemp("one") / "run"), nothing, {})


@pytest.mark.slow
def test_torchrun_gives_the_run_of_one_process_and_goes_on_with_one(root, one, tmp_path):
    fields = {"batch_size": 6, "steps": 8, "lr": 1e-3, "checkpoint_steps": 2, "keep_checkpoints": 9, "workers": 0}
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out, model = tmp_path / "run", f"local-dir:{root}/models/clip"
    done = torchrun("train", "tinyclip", "--smoke", "--data", root, "--out", str(out), "--model", model, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]  # rank 0 alone says it
    assert done.stderr.count("step 8/8") == 1
    assert_close_runs(out, one)
    assert steady_metrics(out)[-1]["skipped"] == 2
    weights = load_checkpoint(RunFolder(str(out)).newest())["task"]
    for name, value in load_checkpoint(RunFolder(one).newest())["task"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-4, msg=name)
    for step in (6, 8):
        (out / "checkpoints" / f"step_{step:06d}.pt").unlink()
    run(0, root, str(out), nothing, {"checkpoint_steps": 2, "keep_checkpoints": 9})
    assert_close_runs(out, one)


def test_a_run_in_chunks_by_two_processes(root, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    fields = {"model": f"local-dir:{root}/models/vit"}
    assert fork(2, run, root, two, nothing, fields | {"chunk_size": 2}) == [two, two]
    assert_close_runs(two, run(0, root, one, nothing, fields))


def siclip(rank, root, out):
    fields = {"batch_size": 6, "steps": 8, "lr": 1e-3, "precision": "fp32", "pm_weight": 1.0}
    fields |= {"gd_weight": 100.0, "afd_weight": 1.0}
    return train("siclip", tiny_config("siclip", root, out, **fields))


def test_two_processes_draw_the_hard_negatives_of_one(root, tmp_path):
    """A batch is gathered in the order of its positions, so pair n takes the same draws; BatchNorms are one."""
    tiny_siclip(Path(root) / "models" / "siclip")
    tiny_siclip(Path(root) / "models" / "base", "MobileCLIP-tiny")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    fork(2, siclip, root, two)
    siclip(0, root, one)
    terms = {"pairs", "relation", "interactive", "feature", "contrastive", "gradient", "augmented"}
    assert set(steady_metrics(one)[0]["losses"]) == terms
    assert_close_runs(two, one, tolerance=1e-3)


def test_two_processes_measure_and_average(root, tmp_path):
    fields = {"model": f"local-dir:{root}/models/vit", "ema_decay": 0.7, "eval_every_steps": 4}
    fields["eval_data"] = write_retrieval(tmp_path / "eval")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    fork(2, run, root, two, nothing, fields)
    run(0, root, one, nothing, fields)
    assert [line.get("eval") for line in steady_metrics(one)] == [line.get("eval") for line in steady_metrics(two)]
    states = [(RunFolder(out).best(), RunFolder(out).newest()) for out in (one, two)]
    for mine, theirs in zip(*states, strict=True):
        averages = [load_checkpoint(path)["ema"] for path in (mine, theirs)]
        for name, value in averages[0].items():
            torch.testing.assert_close(averages[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared(root, tmp_path):
    results = finish(start(2, run, root, str(tmp_path / "odd"), nothing, {"batch_size": 5}))
    assert all("--batch-size 5: must be a multiple of the 2 processes" in text for _, text in results)
    assert not (tmp_path / "odd").exists()


def stop_rank_1(rank):
    step = Trainer.step

    def interrupted(self, batch):
        if rank == 1 and self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    Trainer.step = interrupted


def test_a_signal_to_one_process_stops_all_after_the_same_step(root, tmp_path):
    fields = {"checkpoint_minutes": 99.0}
    out, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    assert [kind for kind, _ in finish(start(2, run, root, out, stop_rank_1, fields))] == ["SystemExit"] * 2
    assert RunFolder(out).newest().name == "step_000004.pt"
    assert len(load_checkpoint(RunFolder(out).newest())["rng"]) == 2
    fork(2, run, root, out, nothing, fields)
    fork(2, run, root, whole, nothing, fields)
    assert steady_metrics(out) == steady_metrics(whole)
    weights, others = (load_checkpoint(RunFolder(path).newest())["task"] for path in (out, whole))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def data_error_on_1(rank):
    locate = Order.locate

    def broken(self, position):
        if rank == 1 and position > 12:
            raise DataError("shard 7 is gone")
        return locate(self, position)

    Order.locate = broken


def bug_on_1(rank):
    if rank == 1:
        Updater._unscale_and_clip = lambda self: 1 / 0


def refused_on_0(rank):
    if rank == 0:
        RunFolder.start = refuse


def refuse(*args, **options):
    raise UserError("another config")


@pytest.mark.parametrize(
    ("spoil", "failing", "kind", "text"),
    [
        (data_error_on_1, 1, "DataError", "shard 7 is gone"),
        (bug_on_1, 1, "ZeroDivisionError", "division"),
        (refused_on_0, 0, "UserError", "another config"),
    ],
)
def test_an_error_on_one_rank_ends_all(spoil, failing, kind, text, root, tmp_path):
    begun = time.monotonic()
    results = finish(start(2, run, root, str(tmp_path / "run"), spoil, {}))
    assert time.monotonic() - begun < 30
    assert results[failing][0] == kind
    assert text in results[failing][1]
    assert results[1 - failing][0] == ("RuntimeError" if kind == "ZeroDivisionError" else "SystemExit")


def nan_on_1(rank):
    draw = tinyclip.TinyclipTask.draw

    def poisoned(self, batch):
        is_poisoned = rank == 1 and "000010003" in batch["keys"]
        return draw(self, {**batch, "images": batch["images"] * math.nan} if is_poisoned else batch)

    tinyclip.TinyclipTask.draw = poisoned


def test_a_loss_that_is_not_finite_is_skipped_by_all(root, tmp_path):
    out = str(tmp_path / "run")
    fork(2, run, root, out, nan_on_1, {"steps": 20})
    found = steady_metrics(out)
    skipped = [line["step"] for line in found if line["loss"] is None]
    assert 0 < len(skipped) == found[-1]["nonfinite"] < 10
    state = torch.load(Path(out) / "nonfinite" / f"step_{skipped[-1]:06d}.pt")
    assert math.isnan(state["losses"]["affinity"])
    assert "000010003" in state["batches"][1]["keys"]
    assert [batch["images"].shape[1:] for batch in state["batches"]] == [(3, 32, 32)] * 2
    assert all(value.isfinite().all() for value in load_checkpoint(RunFolder(out).newest())["task"].values())
