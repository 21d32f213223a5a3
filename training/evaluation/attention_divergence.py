"""How similar the attention of adjacent blocks is: SiCLIP's reason (arXiv 2411.14789) to share their weights.

The paper shows a figure of the Jensen-Shannon divergence between neighbours and does not say what is averaged. Here it
is a mean over inputs and query rows, in float32, with the natural logarithm: 0 means equal, ln 2 = 0.6931 disjoint.
Heads are either averaged first, or matched one to one for the least divergence, which is never below the former. Use
the trained MobileCLIP-S0; in a new SAS-P model all attention is uniform.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, product

import networkx
import torch
from torch import Tensor, nn

from shards_spec.files import write_bytes
from training.models.taps import attention_maps

LEFT = 110  # pixels of the chart: labels of the rows
WIDE = 400  # the longest bar, ln 2
HIGH = 46  # a row of two bars
BARS = (("averaged", "#35618f"), ("matched", "#c98a3b"))


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions along the last dimension, (..., T) -> (...)."""
    middle = (p + q) / 2
    p_to_middle = (torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1)
    q_to_middle = (torch.xlogy(q, q) - torch.xlogy(q, middle)).sum(-1)
    return (p_to_middle + q_to_middle) / 2


def averaged_divergence(one: Tensor, other: Tensor) -> float:
    """Return the mean divergence of two layers' attention (N, H, T, T), averaged over heads first."""
    return js_divergence(one.mean(1), other.mean(1)).mean().item()


def matched_divergence(one: Tensor, other: Tensor) -> float:
    """Return the mean divergence of two layers' attention (N, H, T, T), each head against its best match."""
    costs = [[js_divergence(a, b).mean().item() for b in other.unbind(1)] for a in one.unbind(1)]
    return sum(costs[row][column] for row, column in enumerate(assignment(costs))) / len(costs)


def assignment(costs: Sequence[Sequence[float]]) -> list[int]:
    """Return the column of each row in the cheapest one-to-one assignment of a square matrix."""
    size = len(costs)
    largest = max(map(max, costs))
    graph = networkx.Graph()
    for row, column in product(range(size), repeat=2):
        graph.add_edge(row, size + column, weight=largest - costs[row][column])
    pairs = dict(map(sorted, networkx.max_weight_matching(graph, maxcardinality=True)))
    return [pairs[row] - size for row in range(size)]


def adjacent_divergences(tower: nn.Module, batches: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Return (heads averaged, heads matched) for each pair of adjacent attention blocks of a tower.

    Args:
        tower: An image or text tower of MobileCLIP or SiCLIP.
        batches: Batches of its inputs, all of one size; the result is their mean.
    """
    total: list[tuple[float, float]] = []
    for inputs in batches:
        pairs = list(pairwise(attention_maps(tower, inputs)))
        total = total or [(0.0, 0.0)] * len(pairs)
        total = [
            (averaged + averaged_divergence(*pair), matched + matched_divergence(*pair))
            for (averaged, matched), pair in zip(total, pairs, strict=True)
        ]
    return [(averaged / len(batches), matched / len(batches)) for averaged, matched in total]


def write_divergences(path: str, divergences: dict[str, list[tuple[float, float]]]) -> None:
    """Write an SVG bar chart.

    Args:
        path: The file.
        divergences: For each tower's name what `adjacent_divergences` returned; bars go from 0 to ln 2.
    """
    rows: list[tuple[str, tuple[float, float]]] = []
    for tower, pairs in divergences.items():
        rows += [(f"{tower} {block}-{block + 1}", pair) for block, pair in enumerate(pairs, start=1)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + 80}" height="{HIGH * len(rows) + 50}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18">Jensen-Shannon divergence of adjacent attention, 0 to ln 2</text>',
    ]
    for row, (label, pair) in enumerate(rows):
        top = 30 + HIGH * row
        parts.append(f'<text x="{LEFT - 8}" y="{top + 22}" text-anchor="end">{label}</text>')
        for line, (value, (kind, colour)) in enumerate(zip(pair, BARS, strict=True)):
            y = top + 17 * line
            length = WIDE * value / math.log(2)
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="14" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 5:.1f}" y="{y + 12}" font-size="11">{value:.4f} {kind}</text>')
    write_bytes(path, "\n".join([*parts, "</svg>\n"]).encode())
