"""Weight tying: consecutive blocks of a transformer share some of their sub-modules (MiniViT, arXiv 2204.07154).

`tie` works in place on the list of blocks that a model already has (timm's ViT, a stage of its Swin, either tower of an
open_clip model): in each group the blocks behind the first one refer to the first one's sub-modules. The rest of a
block (its norms, say) stays its own, and the model runs as before.

State dicts hold each shared tensor once, under its first block, and the map from blocks to groups as ``groups``, int64
(L,). Optimizers see a shared parameter once, as torch's ``named_parameters`` gives it. Saving and loading check that
what is shared is the same object, and so does every step of an average of weights, which reads the state dict: a block
that lost its ties would be saved incompletely.

SiCLIP's blocks (`training.models.siclip`) keep their shared projection outside of the blocks, in a list with an entry
per group: their checkpoints have had its names since before this module, so they are not tied by it.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards_spec.files import UserError

Source = Literal["equal", "first", "last", "mean"]
MAP = "groups"  # name of the map in a state dict, behind that of the blocks


class UntiedError(RuntimeError):
    """A block was given a sub-module of its own in place of one that it shares."""


@dataclass(frozen=True)
class Tying:
    """Which blocks share what.

    Attributes:
        groups: The group of each block, ascending from 0.
        shared: Names of sub-modules or parameters of a block, as ``attn.qkv``.
    """

    groups: tuple[int, ...]
    shared: tuple[str, ...]

    def followers(self) -> Iterator[tuple[int, int]]:
        """Yield each block that is not the first of its group, and that first one."""
        for index, group in enumerate(self.groups):
            first = self.groups.index(group)
            if first != index:
                yield index, first


def group_map(depth: int, groups: int | Sequence[int]) -> tuple[int, ...]:
    """Return the group of each of ``depth`` blocks.

    Args:
        depth: Number of blocks.
        groups: The number of groups of equal size, or the size of each.

    Raises:
        ValueError: The groups do not add up to ``depth`` blocks.
    """
    if isinstance(groups, int):
        if groups < 1 or depth % groups:
            raise ValueError(f"groups {groups}: {depth} blocks cannot be divided into so many groups of equal size")
        groups = [depth // groups] * groups
    if sum(groups) != depth or min(groups) < 1:
        raise ValueError(f"groups {list(groups)}: the sizes must be positive and add up to {depth} blocks")
    numbers = list[int]()
    for group, size in enumerate(groups):
        numbers += [group] * size
    return tuple(numbers)


def tie(blocks: Any, groups: Sequence[int], shared: Sequence[str], source: Source = "equal") -> None:
    """Make groups of blocks share sub-modules, in place.

    Args:
        blocks: An ``nn.Sequential`` or ``nn.ModuleList`` of blocks that have sub-modules of the same names and shapes.
        groups: The group of each block, as `group_map` gives it.
        shared: Names of the sub-modules or parameters of a block that a group shares.
        source: Whose weights a group takes: the first block's, the last one's, the mean of all, or (``equal``) those
            that all of them have.

    Raises:
        ValueError: The blocks are tied already, the map is no map of them, they lack a shared part or have it in other
            shapes, a part is within another, or with ``equal`` their weights differ.
    """
    tying = Tying(tuple(groups), tuple(shared))
    if tying_of(blocks) is not None:
        raise ValueError("these blocks are tied already: untie them first")
    _check_map(len(blocks), tying.groups)
    for name, other in permutations(tying.shared, 2):
        if f"{name}.".startswith(f"{other}."):
            raise ValueError(f"shared {list(shared)}: {name} is in it twice, or within another part")
    for index, first in tying.followers():
        for name in tying.shared:
            _check_alike(blocks, name, (first, index), source)
    for group in dict.fromkeys(tying.groups):
        members = [blocks[index] for index, other in enumerate(tying.groups) if other == group]
        for name in tying.shared:
            _take_weights([part_of(block, name) for block in members], source)
    blocks.tying = tying
    blocks.register_buffer(MAP, torch.tensor(tying.groups))
    point_to_first(blocks)
    blocks.tying_hooks = [
        blocks.register_state_dict_post_hook(_drop_copies),
        blocks.register_load_state_dict_pre_hook(_fill_copies),
        blocks.register_load_state_dict_post_hook(_after_load),
    ]


def untie(blocks: Any) -> None:
    """Give each block its own copy of what it shared, in place: the inverse of `tie`. Raises UntiedError."""
    check_blocks(blocks)
    for index, first in blocks.tying.followers():
        for name in blocks.tying.shared:
            _set_part(blocks[index], name, _copy_of(part_of(blocks[first], name)))
    for hook in blocks.tying_hooks:
        hook.remove()
    del blocks.tying, blocks.tying_hooks, blocks.groups


def tying_of(blocks: nn.Module) -> Tying | None:
    """Return what ties a list of blocks, or None where nothing does."""
    return vars(blocks).get("tying")


def tied_blocks(model: nn.Module) -> dict[str, Any]:
    """Return the lists of tied blocks in a model by their names."""
    return {name: module for name, module in model.named_modules() if tying_of(module) is not None}


def check_tied(model: nn.Module) -> None:
    """Raise UntiedError where a block of the model no longer shares what its group shares."""
    for blocks in tied_blocks(model).values():
        check_blocks(blocks)


def check_blocks(blocks: Any) -> None:
    """As `check_tied`, of one list of blocks."""
    for index, first in blocks.tying.followers():
        for name in blocks.tying.shared:
            try:
                same = part_of(blocks[index], name) is part_of(blocks[first], name)
            except (AttributeError, ValueError):  # it is not there any more
                same = False
            if not same:
                raise UntiedError(
                    f"block {index} no longer shares {name} with block {first}: something replaced it in one of them. "
                    "Make such a change on all blocks of a group, or untie them first (training.models.weight_tying)"
                )


def point_to_first(blocks: Any) -> None:
    """Make each block refer to its group's first block again, whose weights then count.

    For code that replaces the shared part in all blocks alike, as a change of the window size does.
    """
    for index, first in blocks.tying.followers():
        for name in blocks.tying.shared:
            _set_part(blocks[index], name, part_of(blocks[first], name))


def part_of(block: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return a block's sub-module or parameter. Raises ValueError when it has none of that name."""
    owner, _, last = name.rpartition(".")
    try:
        part: Any = getattr(block.get_submodule(owner), last)
    except AttributeError as error:
        raise ValueError(f"{type(block).__name__} has no {name} that could be shared") from error
    if not isinstance(part, nn.Module | nn.Parameter):
        raise ValueError(f"{name} of {type(block).__name__} is neither a module nor a parameter")
    return part


def _set_part(block: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(block.get_submodule(owner), last, part)


def _copy_of(part: nn.Module | nn.Parameter) -> nn.Module | nn.Parameter:
    """A copy of a part, without its gradients."""
    if isinstance(part, nn.Parameter):
        return nn.Parameter(part.detach().clone(), part.requires_grad)
    copied = deepcopy(part)
    copied.zero_grad(set_to_none=True)
    return copied


def _tensors_of(part: nn.Module | nn.Parameter) -> dict[str, Tensor]:
    """The tensors of a part by the rest of their names, which is empty for a parameter."""
    if isinstance(part, nn.Parameter):
        return {"": part}
    return {f".{name}": tensor for name, tensor in part.state_dict(keep_vars=True).items()}


def _check_map(depth: int, groups: tuple[int, ...]) -> None:
    """Raise ValueError for a map that is not of ``depth`` blocks, or whose groups are not runs that ascend from 0."""
    steps = [after - before for before, after in zip((-1, *groups), groups, strict=False)]
    if len(groups) != depth or steps[:1] != [1] or not {*steps} <= {0, 1}:
        raise ValueError(f"groups {list(groups)}: give each of the {depth} blocks its group, ascending from 0")


def _check_alike(blocks: Any, name: str, pair: tuple[int, int], source: Source) -> None:
    """Raise ValueError where two blocks cannot share a part."""
    first, index = pair
    theirs = _tensors_of(part_of(blocks[index], name))
    for rest, tensor in _tensors_of(part_of(blocks[first], name)).items():
        counterpart = theirs.get(rest)
        if counterpart is None or counterpart.shape != tensor.shape:
            raise ValueError(f"blocks {first} and {index} cannot share {name}{rest}: their shapes differ")
        if source == "equal" and not torch.equal(tensor, counterpart):
            raise ValueError(
                f"blocks {first} and {index} have other weights in {name}{rest}: "
                "say whose the group takes, first, last or mean"
            )


@torch.no_grad()
def _take_weights(parts: list[nn.Module | nn.Parameter], source: Source) -> None:
    """Give the first block's part the weights of a group."""
    if source == "last":
        chosen = _tensors_of(parts[-1])
    elif source == "mean":
        members = [_tensors_of(part) for part in parts]
        floating = [rest for rest, tensor in members[0].items() if tensor.is_floating_point()]
        chosen = {rest: torch.stack([member[rest] for member in members]).mean(0) for rest in floating}
    else:
        return
    for rest, tensor in _tensors_of(parts[0]).items():
        if tensor.is_floating_point():
            tensor.copy_(chosen[rest])


def _copies(blocks: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the names that tensors would have under later blocks of a group, and those they have under the first."""
    for index, first in blocks.tying.followers():
        for name in blocks.tying.shared:
            for rest in _tensors_of(part_of(blocks[first], name)):
                yield f"{prefix}{index}.{name}{rest}", f"{prefix}{first}.{name}{rest}"


def _drop_copies(blocks: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave each shared tensor in a state dict once."""
    check_blocks(blocks)
    for copy, _ in _copies(blocks, prefix):
        del state[copy]


def _fill_copies(blocks: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict before it is loaded.

    Weights of untied blocks are loaded, too, where those of each group are equal. Raises UserError for weights that
    were tied otherwise, and for untied ones that differ.
    """
    check_blocks(blocks)
    stored = state.get(prefix + MAP)
    if stored is not None and tuple(stored.tolist()) != blocks.tying.groups:
        raise UserError(
            f"these weights were tied in groups {_sizes(stored.tolist())}, the model's blocks {prefix[:-1]} are tied "
            f"in groups {_sizes(blocks.tying.groups)}: build the model with the groups of the weights"
        )
    for copy, original in _copies(blocks, prefix):
        if original not in state:
            continue
        if copy in state and not torch.equal(state[copy], state[original]):
            raise UserError(
                f"these weights are untied: {copy} and {original} differ. Tie them first, by their first, last or mean"
            )
        state[copy] = state[original]
        state.setdefault(prefix + MAP, blocks.groups)


def _after_load(blocks: Any, _incompatible: Any) -> None:
    """Point to the first blocks again: a load with ``assign=True`` makes parameters anew under each name."""
    point_to_first(blocks)
    check_blocks(blocks)


def _sizes(groups: Sequence[int]) -> list[int]:
    """The sizes of the groups of a map."""
    return [list(groups).count(group) for group in dict.fromkeys(groups)]
