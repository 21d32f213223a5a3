"""A bounded store of the values used last: open shards, cached features, permutations."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """At most ``capacity`` values; the least recently used one is dropped before a new one is made."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``; ``make`` makes it when it is missing."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        while len(self.values) >= self.capacity:
            self.values.popitem(last=False)
        value = make()
        self.values[key] = value
        return value
