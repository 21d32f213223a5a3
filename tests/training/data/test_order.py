"""The order of samples: every one once per epoch, the same for any cut of the work."""

from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards_spec.files import UserError
from training.data.lru import LRUCache
from training.data.order import Order, SampleLocation, batch_positions


def places(order: Order, start: int, stop: int) -> list[SampleLocation]:
    return [order.locate(position) for position in range(start, stop)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 9),
    streams=st.integers(1, 9),
    window=st.integers(1, 4),
)
def test_every_sample_comes_once_per_epoch(sizes, seed, streams, window):
    order = Order(sizes, seed, streams, window)
    wanted = list(chain.from_iterable(product([shard], range(size)) for shard, size in enumerate(sizes)))
    for epoch in range(3):
        got = places(order, epoch * order.total, (epoch + 1) * order.total)
        assert {place.epoch for place in got} == {epoch}
        assert sorted((place.shard, place.index) for place in got) == wanted
        positions = [order.position(epoch, place.shard, place.index) for place in got]
        assert positions == list(range(epoch * order.total, (epoch + 1) * order.total))


def test_epochs_and_seeds_differ_and_both_shards_and_samples_are_mixed():
    first, second = (places(Order([10] * 6, 0, 1, 2), e * 60, e * 60 + 60) for e in range(2))
    other = places(Order([10] * 6, 1, 1, 2), 0, 60)
    orders = [[(p.shard, p.index) for p in epoch] for epoch in (first, second, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({p.shard for p in first[:20]}) == 2, "a window holds as many shards as it says"
    assert [p.index for p in first[:20]] != sorted(p.index for p in first[:20])


def test_order_is_this_one_for_ever():
    got = [(p.epoch, p.shard, p.index) for p in places(Order([2, 3, 1], 7, 2, 1), 4, 9)]
    assert got == GOLDEN, "runs could no longer be resumed: another order for the same seed"


GOLDEN = [(0, 1, 0), (0, 0, 0), (1, 1, 2), (1, 2, 0), (1, 1, 0)]


def test_locating_anywhere_needs_no_history():
    sizes = [5, 0, 9, 3, 8]
    walked = places(Order(sizes, 4, 2, 2), 0, 100)
    for position in (99, 3, 57, 24, 25, 26, 0):
        assert Order(sizes, 4, 2, 2).locate(position) == walked[position]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_slices_of_the_ranks_tile_the_global_batch(world_size):
    ranks = [list(batch_positions(12, 5, 12, rank, world_size)) for rank in range(world_size)]
    for batch, slices in enumerate(zip(*ranks, strict=True)):
        joined = sorted(chain.from_iterable(slices))
        assert joined == list(range(12 + 12 * batch, 24 + 12 * batch))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"--batch-size 10: must be a multiple of the 4 processes"):
        next(batch_positions(0, 1, 10, 0, 4))


def test_resume_equals_going_on_also_with_another_world_size():
    undisturbed = list(chain.from_iterable(batch_positions(0, 10, 6)))
    for done in range(10):
        ranks = [list(batch_positions(done * 6, 10 - done, 6, rank, 3)) for rank in range(3)]
        rest = []
        for slices in zip(*ranks, strict=True):
            rest += chain.from_iterable(zip(*slices, strict=True))
        assert undisturbed[: done * 6] + rest == undisturbed


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="no sample"):
        Order([0, 0], 0)


def test_recent_drops_the_oldest_before_making_the_next():
    alive, seen = set(), []
    store = LRUCache(2)

    class Token:
        def __init__(self, name):
            self.name = name
            alive.add(name)
            seen.append(len(alive))

        def __del__(self):
            alive.discard(self.name)

    for name in (1, 2, 1, 3, 1, 2):
        store.get(name, lambda name=name: Token(name))
    assert max(seen) == 2
    assert list(store.values) == [1, 2]
