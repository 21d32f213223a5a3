"""How alike the attention of adjacent blocks is: the ground on which SiCLIP (arXiv 2411.14789) shares their weights.

The paper draws a figure of the Jensen-Shannon divergence between neighbours and does not say what is averaged. Here:
natural logarithm, so that 0 is the same and ln 2 = 0.6931 is disjoint; a mean over inputs and query rows, in fp32;
heads either averaged before, or matched one to one for the least divergence, which is never below the first. Ask it of
the trained MobileCLIP-S0; in a new SAS-P model all attention is uniform.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import networkx
import torch
from timm.models.fastvit import Attention
from torch import Tensor, nn

from shards_spec.files import write_bytes
from training.models.siclip import SasStack
from training.models.text_tower import TransformerLayer


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions along the last dimension (..., T) -> (...)."""
    middle = (p + q) / 2
    divergences = [(torch.xlogy(one, one) - torch.xlogy(one, middle)).sum(-1) for one in (p, q)]
    return (divergences[0] + divergences[1]) / 2


def averaged_divergence(one: Tensor, other: Tensor) -> float:
    """Of two layers' attention (N, H, T, T), averaged over heads first."""
    return js_divergence(one.mean(1), other.mean(1)).mean().item()


def matched_divergence(one: Tensor, other: Tensor) -> float:
    """Of two layers' attention (N, H, T, T), mean over the best assignment of heads to heads."""
    costs = [[js_divergence(a, b).mean().item() for b in other.unbind(1)] for a in one.unbind(1)]
    return sum(costs[row][column] for row, column in enumerate(assignment(costs))) / len(costs)


def assignment(costs: Sequence[Sequence[float]]) -> list[int]:
    """The column of each row in the cheapest one-to-one assignment of a square matrix."""
    size, largest = len(costs), max(map(max, costs))
    graph = networkx.Graph()
    for row, column in product(range(size), repeat=2):
        graph.add_edge(row, size + column, weight=largest - costs[row][column])
    pairs = dict(map(sorted, networkx.max_weight_matching(graph, maxcardinality=True)))
    return [pairs[row] - size for row in range(size)]


@torch.no_grad()
def attention_maps(tower: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Softmax attention (B, H, T, T) in fp32 of each attention block of a tower, in the order in which they run.

    Of MobileCLIP's and SiCLIP's towers, image and text; not the shaped matrices of SAS-P, which are no distributions.
    """
    maps: list[Tensor] = []

    def keep(heads: int) -> Callable[..., None]:
        def hook(module: nn.Linear, _: object, projected: Tensor) -> None:
            query, key = projected.float().split(module.in_features, -1)[:2]
            query, key = (side.unflatten(-1, (heads, -1)).transpose(1, 2) for side in (query, key))
            maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))

        return hook

    handles = []
    for module in tower.modules():
        if isinstance(module, Attention):
            handles.append(module.qkv.register_forward_hook(keep(module.num_heads)))
        elif isinstance(module, TransformerLayer):
            handles.append(module.qkv.register_forward_hook(keep(module.heads)))
        elif isinstance(module, SasStack):
            handles += [qk.register_forward_hook(keep(module.heads)) for qk in module.qk]
    try:
        tower(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def adjacent_divergences(tower: nn.Module, batches: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(heads averaged, heads matched) of each pair of adjacent attention blocks, mean over batches of equal size."""
    total: list[tuple[float, float]] = []
    for inputs in batches:
        pairs = list(pairwise(attention_maps(tower, inputs)))
        total = total or [(0.0, 0.0)] * len(pairs)
        total = [
            (averaged + averaged_divergence(*pair), matched + matched_divergence(*pair))
            for (averaged, matched), pair in zip(total, pairs, strict=True)
        ]
    return [(averaged / len(batches), matched / len(batches)) for averaged, matched in total]


def write_divergences(path: str, found: dict[str, list[tuple[float, float]]]) -> None:
    """An SVG of bars: for each tower's name its adjacent pairs, heads averaged and heads matched, from 0 to ln 2."""
    rows = [(f"{tower} {i + 1}-{i + 2}", pair) for tower, pairs in found.items() for i, pair in enumerate(pairs)]
    left, wide, high = 110, 400, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 80}" height="{high * len(rows) + 50}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">Jensen-Shannon divergence of adjacent attention, 0 to ln 2</text>',
    ]
    for row, (label, pair) in enumerate(rows):
        top = 30 + high * row
        parts.append(f'<text x="{left - 8}" y="{top + 22}" text-anchor="end">{label}</text>')
        for line, (value, colour, kind) in enumerate(
            zip(pair, ("#35618f", "#c98a3b"), ("averaged", "matched"), strict=True)
        ):
            y, length = top + 17 * line, wide * value / math.log(2)
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="14" fill="{colour}"/>')
            parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 12}" font-size="11">{value:.4f} {kind}</text>')
    write_bytes(path, "\n".join([*parts, "</svg>\n"]).encode())
