"""Losses of all pairs, of which each of four processes computes its rows: values, gradients, sizes of matrices."""

import math
from functools import partial
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from small_dist import fork
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.engine.distributed import processes
from training.engine.gradients import Gradients
from training.losses import similarity
from training.losses.clip_kd import FeatureFusion, FeatureProjection, gradient_loss
from training.losses.contrastive import clip_loss
from training.losses.distillation import ensemble_affinity_loss, ensemble_relation_loss, interactive_loss
from training.losses.pair_matching import PairHead, pair_loss, sample_negatives
from training.losses.similarity import RowShare, Similarity
from training.task import Task

# Forked processes must find no pool of threads.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
WIDTH = 5
TEACHER = 3
OTHER = 4
UNEVEN = [4, 3, 5, 2]  # samples of each process, 14 together; of their similarities it has 3, 4, 3 and 4 rows


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.7))


class OneTerm(Task):
    """Two towers, two teachers, and what the losses have of their own; trained by one of them."""

    def __init__(self, term):
        super().__init__(Towers())
        self.term = term
        self.icl_logit_scale = nn.Parameter(torch.tensor(math.log(9.0)))
        self.projection = FeatureProjection(WIDTH, TEACHER)
        self.fusion = FeatureFusion(WIDTH, TEACHER)
        self.head = PairHead(WIDTH)

    def forward(self, batch):
        student = {
            "image": F.normalize(self.student.image(batch["images"]), dim=-1),
            "text": F.normalize(self.student.text(batch["words"]), dim=-1),
        }
        return student | {name: batch[name] for name in ("image_1", "text_1", "image_2", "text_2", "ids")}

    def losses(self, features, step):
        student = Similarity(features["image"], features["text"], self.student.logit_scale.exp())
        pairs = [(features[f"image_{number}"], features[f"text_{number}"]) for number in (1, 2)]
        teachers = [Similarity(*pair, scale) for pair, scale in zip(pairs, (8.0, 3.0), strict=True)]
        return {self.term: TERMS[self.term](self, student, teachers, features["ids"])}


def gradient(task, student, teachers, ids):
    projected = Similarity(*task.projection(student.rows, student.columns), student.scale)
    return 100 * gradient_loss(projected, teachers[0], share=task.row_share)


def interactive(task, student, teachers, ids):
    projected = task.projection(student.rows, student.columns)
    return interactive_loss(*projected, *teachers[0][:2], task.icl_logit_scale.exp(), share=task.row_share)


def pair_matching(task, student, teachers, ids):
    own = task.row_share.rows(len(ids))
    with torch.no_grad():
        logits = student.both_directions(own)
    negatives = sample_negatives(*logits, [ids], seed=3, step=5, start=own.start)
    return pair_loss(task.head, *student[:2], negatives, share=task.row_share)


TERMS = {
    "contrastive": lambda task, student, teachers, ids: clip_loss(*student, share=task.row_share),
    "affinity": lambda task, student, teachers, ids: ensemble_affinity_loss(student, teachers, share=task.row_share),
    "relation": lambda task, student, teachers, ids: ensemble_relation_loss(student, teachers, share=task.row_share),
    "interactive": interactive,
    "gradient": gradient,
    "augmented": lambda task, student, teachers, ids: task.fusion(student[:2], teachers[0][:2], share=task.row_share),
    "pairs": pair_matching,
}
OF_THE_TERM = {
    "interactive": "icl_logit_scale",
    "gradient": "projection.text.weight",
    "augmented": "fusion.logit_scale",
    "pairs": "head.linear.weight",
}
CASES = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "blocks in chunks": {"dtype": torch.float64, "whole": 5, "chunk_size": 2},
    "bf16": {"dtype": torch.float32, "precision": "bf16"},
}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "blocks in chunks": 1e-12, "bf16": 0.02}


def batch_of(count, dtype):
    drawn = torch.Generator().manual_seed(7)
    widths = {"images": 6, "words": 6, "image_1": TEACHER, "text_1": TEACHER, "image_2": OTHER, "text_2": OTHER}
    rows = {name: torch.randn(count, width, generator=drawn).to(dtype) for name, width in widths.items()}
    rows = {name: F.normalize(value, dim=-1) if "_" in name else value for name, value in rows.items()}
    return rows | {
        "ids": torch.arange(count) // 2,
        "positions": torch.arange(30, 30 + count),
        "keys": [str(row) for row in range(count)],
    }


def shares(rank, sizes, cases):
    """Loss and gradients of each term in each case: of this process, which has its samples of the batch, or of one."""
    with processes("cpu") as (ranks, _):
        return {name: {term: of_term(ranks, sizes, term, **case) for term in TERMS} for name, case in cases.items()}


def of_term(ranks, sizes, term, *, dtype, whole=8192, chunk_size=None, precision="fp32"):
    similarity.MAX_WHOLE, similarity.BLOCK_ROWS = whole, 2
    torch.manual_seed(0)
    task = OneTerm(term).to(dtype)
    batch = batch_of(sum(sizes), dtype)
    if ranks.size > 1:
        start = sum(sizes[: ranks.rank])
        order = [*range(0, sum(sizes), 3), *range(1, sum(sizes), 3), *range(2, sum(sizes), 3)]
        keep = order[start : start + sizes[ranks.rank]]  # by turns, as the reader shares a batch
        batch = {name: [value[row] for row in keep] for name, value in batch.items()} | {
            name: value[keep] for name, value in batch.items() if isinstance(value, torch.Tensor)
        }
    else:
        sizes = [sum(sizes)]
    step = Gradients(task, ranks, "cpu", precision=precision, chunk_size=chunk_size)
    losses, backward = step.losses(batch, 5, sizes)
    backward()
    similarity.MAX_WHOLE, similarity.BLOCK_ROWS = 8192, 1024
    return losses[term].detach(), {name: parameter.grad for name, parameter in task.named_parameters()}


@pytest.fixture(scope="module")
def four():
    """All cases by four processes."""
    return fork(4, shares, UNEVEN, CASES)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(case, four):
    alone = CASES["bf16"] if case == "bf16" else CASES["float64"]
    one = shares(0, UNEVEN, {"one": alone})["one"]
    for rank, found in enumerate(four):
        for term, (loss, gradients) in found[case].items():
            expected_loss, expected = one[term]
            assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE[case]), (rank, term)
            assert torch.equal(loss, four[0][case][term][0]), "the processes log one number"
            used = {name for name, value in expected.items() if value is not None}
            assert {name for name, value in gradients.items() if value is not None} == used, term
            assert {"student.image.weight", "student.text.bias"} < used
            assert OF_THE_TERM.get(term, "student.logit_scale") in used
            for name in used:
                error = (gradients[name] - expected[name]).abs().max()
                assert error <= TOLERANCE[case] * expected[name].abs().max(), (rank, term, name)


class LargestTensor(TorchDispatchMode):
    """Within, the most numbers of a tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(outcome) if isinstance(value, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return outcome


@pytest.mark.parametrize("term", TERMS)
def test_no_process_has_a_matrix_of_all_pairs(term):
    """Of 96 pairs one of four processes has 24 rows, in both passes; one process has all 96."""
    torch.manual_seed(0)
    task = OneTerm(term)
    most = []
    for share in (RowShare(), RowShare(2, 4)):
        task.row_share = share
        with LargestTensor() as largest:
            (loss,) = task.losses(task(batch_of(96, torch.float32)), 5).values()
            loss.backward()
        most.append(largest.numbers)
    assert most == [96 * 96, 96 * 24]


def test_shares_of_rows_are_all_rows_once():
    for count, size in ((14, 4), (8, 3), (5, 5), (7, 1)):
        rows = [RowShare(rank, size).rows(count) for rank in range(size)]
        assert [*chain.from_iterable(range(count)[part] for part in rows)] == list(range(count))
        lengths = {part.stop - part.start for part in rows}
        assert max(lengths) - min(lengths) <= 1


def test_the_parts_of_a_loss_are_the_whole():
    """Without processes: what each would give is summed here."""
    task, batch = OneTerm("affinity").double(), batch_of(10, torch.float64)

    def value(term, share):
        task.term, task.row_share = term, share
        (loss,) = task.losses(task(batch), 5).values()
        return loss.item()

    for term in ("contrastive", "affinity", "relation", "interactive", "augmented"):
        parts = map(partial(value, term), (RowShare(rank, 3) for rank in range(3)))
        assert sum(parts) == pytest.approx(value(term, RowShare()), rel=1e-12)
