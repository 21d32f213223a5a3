"""What a pruned CLIP consists of: sizes of its layers, parameters and multiplications, as data and as a table."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from shards_spec.student_table import student_markdown
from training.models.tinyclip_pruned import PrunedImageTower, PrunedTextTower
from training.models.tinyclip_pruning import kept_units

BLOCK_WEIGHT = re.compile(r"transformer\.resblocks\.\d+\.(attn|mlp)\.")
Tower = PrunedImageTower | PrunedTextTower


@dataclass(frozen=True)
class TowerTable:
    """One tower in numbers.

    Attributes:
        width: D.
        heads: H of each layer.
        neurons: F of each layer.
        parameters: All of them but token embeddings and masks.
        token_embedding: Parameters of the table of tokens; 0 for images.
        blocks: Parameters of attention and MLP, which the sparsity is about.
        sparsity: 1 - blocks / those of the tower before any pruning.
        macs: Multiplications with an addition for one image, or one text of full length.
    """

    width: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    parameters: int
    token_embedding: int
    blocks: int
    sparsity: float
    macs: int


def tower_table(tower: Tower) -> TowerTable:
    """Return a tower's numbers."""
    counts = {name: parameter.numel() for name, parameter in tower.named_parameters()}
    tokens = counts.get("token_embedding.weight", 0)
    masks = sum(count for name, count in counts.items() if name.startswith("masks."))
    blocks = sum(count for name, count in counts.items() if BLOCK_WEIGHT.match(name))
    own = tower.description
    return TowerTable(
        width=own["width"],
        heads=tuple(own["heads"]),
        neurons=tuple(own["neurons"]),
        parameters=sum(counts.values()) - tokens - masks,
        token_embedding=tokens,
        blocks=blocks,
        sparsity=1 - blocks / tower.original.prunable,
        macs=_macs(tower),
    )


def _macs(tower: Tower) -> int:
    """Multiplications of convolution, blocks and projection of one sample."""
    own = tower.description
    width, head_width = own["width"], own["head_width"]
    if isinstance(tower, PrunedImageTower):
        patches = tower.grid_size[0] * tower.grid_size[1]
        tokens = patches + 1
        total = patches * tower.conv1.weight.numel()
    else:
        tokens = tower.context_length
        total = 0
    for heads, neurons in zip(own["heads"], own["neurons"], strict=True):
        inner = heads * head_width
        total += tokens * (4 * width * inner + 2 * width * neurons) + 2 * tokens**2 * inner
    features = tower.output_dim
    pooler = own.get("attn_pool")
    if pooler is None:
        return int(total + width * features)
    total += 2 * tokens * width * features + 2 * pooler["queries"] * (features + tokens) * features
    return int(total + features**2)


def model_table(model: nn.Module) -> dict[str, Any]:
    """Return the numbers of a pruned CLIP for a JSON file: ``image``, ``text``, ``parameters``, ``macs``, ``sparsity``.

    ``parameters`` are those of both towers, the token embeddings and the logit scale.
    """
    towers: dict[str, Any] = {"image": model.visual, "text": model.text}
    tables = {name: tower_table(tower) for name, tower in towers.items()}
    scalars = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("logit_"))
    prunable = sum(tower.original.prunable for tower in towers.values())
    return {
        **{name: asdict(table) for name, table in tables.items()},
        "parameters": sum(table.parameters + table.token_embedding for table in tables.values()) + scalars,
        "macs": sum(table.macs for table in tables.values()),
        "sparsity": 1 - sum(table.blocks for table in tables.values()) / prunable,
    }


def parameters_left(model: nn.Module) -> int:
    """Return the parameters of a CLIP that its masks of evaluation keep; without masks those that it has.

    It is the ``parameters`` of `model_table` once the model is cut.
    """
    kept = kept_units(model)
    towers: dict[str, Any] = {"image": model.visual, "text": model.text}
    scalars = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("logit_"))
    return scalars + sum(_parameters_of_size(tower, **kept[name]) for name, tower in towers.items())


def _parameters_of_size(tower: Tower, width: int, heads: list[int], neurons: list[int]) -> int:
    """Parameters of a tower if it had these sizes."""
    rows = len(tower.positional_embedding) + tower.output_dim  # of the matrices with a column per dimension
    if isinstance(tower, PrunedImageTower):
        rows += tower.conv1.weight[0].numel() + 1 + 2 * (tower.ln_pre is not None) + 2
    else:
        rows += tower.vocab_size + 2
    total = rows * width
    for number in heads:
        inner = number * tower.description["head_width"]
        total += width + (3 * inner * (width + 1) + inner * width + 2 * width if number else 0)
    for number in neurons:
        total += width + (number * (width + 1) + number * width + 2 * width if number else 0)
    return total


def markdown(model: nn.Module) -> str:
    """Return the numbers of a pruned CLIP as a Markdown table."""
    return student_markdown(model_table(model))
