"""Bytes that torch operations hold on the CPU, counted as a GPU's allocator counts its own."""

import weakref
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationMeter(TorchDispatchMode):
    """Within, every operation's new storages count until they are freed; what was there before does not.

    It has the methods of `training.engine.device_memory.Meter`. What a kernel takes and frees by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = weakref.WeakSet[Any]()
        self._now = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._known.add(value.untyped_storage())
        outcome = func(*args, **(kwargs or {}))
        for value in tree_leaves(outcome):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self._known:
                self._count(value.untyped_storage())
        return outcome

    def _count(self, storage: torch.UntypedStorage) -> None:
        count = storage.nbytes()
        self._known.add(storage)
        self._now += count
        self._most = max(self._most, self._now)
        weakref.finalize(storage, self._free, count)

    def _free(self, count: int) -> None:
        self._now -= count

    def held(self) -> int:
        """Bytes that are held now."""
        return self._now

    def peak(self) -> int:
        """The most since the last call."""
        most, self._most = self._most, self._now
        return most

    def clear(self) -> None:
        """Forget the peak; there is no cache."""
        self._most = self._now


def held_after(function):
    """Bytes that a call allocated and did not free, as torch's allocator counts them; the graph stays alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        outcome = function()
    total = sum(event.self_cpu_memory_usage for event in found.events())
    del outcome
    return total
