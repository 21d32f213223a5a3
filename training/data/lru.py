"""A small store of what was used last: open shards, cached rows, permutations."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """At most ``capacity`` values, the least recently used leaves first, before its successor is made."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made when it is not there."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        while len(self.values) >= self.capacity:
            self.values.popitem(last=False)
        value = self.values[key] = make()
        return value
