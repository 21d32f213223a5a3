"""Real processes joined by gloo, and a tiny task with everything that makes gradients over processes hard."""

import multiprocessing
import os
import pickle
import socket
import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from training.engine.distributed import processes
from training.engine.gradients import Gradients
from training.engine.sync_batch_norm import statistics, synchronise
from training.task import Task


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def start(size: int, function: Any, *args: Any) -> list[Any]:
    """Fork ``function(rank, *args)``; (process, connection) of each. The connection has (kind, result)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, found = multiprocessing.get_context("fork"), []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(rank, size, port, send, function, args), daemon=False)
        process.start()
        send.close()
        found.append((process, receive))
    return found


def _work(rank, size, port, send, function, args):
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    try:
        send.send_bytes(pickle.dumps(("fine", function(rank, *args))))  # a sender of tensors would have to stay
    except BaseException as error:
        send.send_bytes(pickle.dumps((type(error).__name__, f"{error}\n{traceback.format_exc()}")))


def finish(found: list[Any], seconds: float = 100) -> list[tuple[str, Any]]:
    """(kind, result) of each process: ("fine", what it returned) or (name of the error, its text)."""
    results = []
    for process, receive in found:
        assert receive.poll(seconds), "a process hangs"
        results.append(pickle.loads(receive.recv_bytes()))
        process.join(20)
    for process, _ in found:
        if process.is_alive():
            process.kill()
    return results


def fork(size: int, function: Any, *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returned in each of ``size`` processes."""
    results = finish(start(size, function, *args))
    assert all(kind == "fine" for kind, _ in results), results
    return [result for _, result in results]


class Net(nn.Module):
    """Image and text tower, 6 features; ``norm`` is trained or frozen, ``held`` is always frozen."""

    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.conv, self.held = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.image = nn.Linear(4, 6)
        self.words = nn.Embedding(11, 5)
        self.text = nn.Linear(5, 6)
        self.drop = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.3))

    def encode_image(self, images):
        return F.normalize(self.image(self.drop(self.norm(self.held(self.conv(images))).relu().mean((2, 3)))), dim=-1)

    def encode_text(self, tokens):
        return F.normalize(self.text(self.drop(self.words(tokens).mean(1))), dim=-1)


class Tiny(Task):
    """Contrastive loss, a head used in the losses only, a per-sample loss, a teacher, ids, a parameter of no use."""

    def __init__(self, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__(Net(norm, dropout))
        self.head, self.useless = nn.Linear(6, 2), nn.Parameter(torch.ones(3))

    def train(self, mode=True):
        super().train(mode)
        self.student.held.eval()
        return self

    def forward(self, batch):
        image, text = self.student.encode_image(batch["images"]), self.student.encode_text(batch["tokens"])
        return {
            "raw": image,
            "image": 2 * image,  # one feature of another: the gradient must not be multiplied twice
            "text": text,
            "teacher": batch["teacher"],
            "ids": batch["ids"],
            "own": (image - text).square().sum(1),
        }

    def losses(self, features, step):
        logits = self.student.logit_scale.exp() * features["image"] @ features["text"].T
        labels = torch.arange(len(logits))
        rolled = features["text"].roll(features["ids"][0].item(), 0)
        return {
            "contrastive": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,
            "head": 0.5 * F.cross_entropy(self.head(features["raw"] * rolled), labels % 2),
            "teacher": (features["raw"] @ features["raw"].T - features["teacher"] @ features["teacher"].T)
            .square()
            .mean(),
            "own": 0.3 * features["own"].mean(),
        }


def gram(rows):
    return rows @ rows.T


def tiny_batch(count: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "images": torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
        "tokens": torch.randint(0, 11, (count, 4), generator=generator),
        "teacher": torch.randn(count, 7, generator=generator, dtype=torch.float64).to(dtype),
        "ids": torch.arange(3, 3 + count),
        "positions": torch.arange(20, 20 + count),
        "keys": [str(index) for index in range(count)],
        "skipped": [],
    }


def gradients(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses, gradients and state after two backward passes of each case; one process without torchrun's variables."""
    with processes("cpu") as (ranks, device):
        return [_gradients(ranks, device, **case) for case in cases]


def _gradients(ranks, device, dtype, sizes, chunk_size=None, checkpointed=False, **model):
    """``model``: ``norm`` and ``dropout`` of the task, ``sync`` of its batch norms over the processes."""
    norm, dropout = model.get("norm", True), model.get("dropout", 0.0)
    sync = model.get("sync", True)
    torch.manual_seed(0)
    task = Tiny(norm, dropout).to(dtype).train()
    if sync and ranks.size > 1:
        assert synchronise(task, device) == norm
    if checkpointed:
        _checkpoint(task.student)
    batch = tiny_batch(sum(sizes), dtype)
    if ranks.size > 1:
        start, order = sum(sizes[: ranks.rank]), [*range(0, sum(sizes), 2), *range(1, sum(sizes), 2)]
        keep = order[start : start + sizes[ranks.rank]]  # by turns, as the reader shares a batch
        batch = {
            name: value[keep] if isinstance(value, torch.Tensor) else value[: len(keep)]
            for name, value in batch.items()
        }
        sizes = ranks.sizes(len(batch["keys"]))
    else:
        sizes = [sum(sizes)]
    step = Gradients(task, ranks, device, precision="fp32", chunk_size=chunk_size)
    step.losses(batch, 0, sizes)  # one that is not followed by a backward pass, as a skipped step
    for buffer in statistics(task):
        buffer.zero_()
    torch.manual_seed(1)
    for _ in range(2):
        task.zero_grad()
        losses, backward = step.losses(batch, 0, sizes)
        backward()
    return {
        "losses": {name: value.detach() for name, value in losses.items()},
        "gradients": {name: p.grad for name, p in task.named_parameters()},
        "state": {name: value.clone() for name, value in task.state_dict().items()},
        "drawn": torch.rand(3),
    }


def _checkpoint(student):
    from torch.utils.checkpoint import checkpoint

    encode = student.encode_image
    student.encode_image = lambda images: checkpoint(encode, images, use_reentrant=False)
