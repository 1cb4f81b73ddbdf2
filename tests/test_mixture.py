"""The order of examples: weights are honoured, nothing is forgotten, and it depends on seed and epoch alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import ConfigError
from alignment.mixture import epoch_order, per_epoch


def test_shares_by_hand():
    assert per_epoch([10], [1.0]) == [10]
    assert per_epoch([6, 2], [3.0, 1.0]) == [6, 2]
    assert per_epoch([6, 2], [1.0, 1.0]) == [4, 4]
    assert per_epoch([5, 5], [0.75, 0.25]) == [8, 2]  # of 7.5 and 2.5 the first rounds up
    assert per_epoch([100, 1, 1], [1.0, 1.0, 2.0]) == [26, 25, 51]
    with pytest.raises(ConfigError, match=r"sft\.train gives a source the weight 0\.01 of 1\.01, .* of the 4 examples"):
        per_epoch([2, 2], [1.0, 0.01])


def test_one_source_is_read_once_an_epoch_in_an_order_of_its_own():
    epochs = [epoch_order((7,), (2.0,), seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == [(0, i) for i in range(7)] for order in epochs)
    assert len(set(epochs)) == 3
    assert epochs[1] == epoch_order((7,), (2.0,), seed=1, epoch=1)
    assert epochs[1] != epoch_order((7,), (2.0,), seed=2, epoch=1)


def test_a_heavy_small_source_repeats_and_a_light_large_one_spreads_over_epochs():
    sizes, weights = (4, 12), (1.0, 1.0)  # an epoch is 16 examples, 8 from each
    epochs = [epoch_order(sizes, weights, seed=0, epoch=epoch) for epoch in range(3)]
    for order in epochs:
        assert Counter(source for source, _ in order) == {0: 8, 1: 8}
        assert Counter(i for source, i in order if source == 0) == dict.fromkeys(range(4), 2)
        assert max(Counter(i for source, i in order if source == 1).values()) <= 2
    read = Counter(i for order in epochs for source, i in order if source == 1)
    assert read == dict.fromkeys(range(12), 2)  # 24 draws of 12 examples


weighted = st.lists(st.tuples(st.integers(1, 40), st.floats(0.5, 4)), min_size=1, max_size=4)


@given(sources=weighted, seed=st.integers(0, 9), epochs=st.integers(1, 4))
def test_every_source_gives_its_share_and_its_examples_evenly(sources, seed, epochs):
    sizes, weights = zip(*sources, strict=True)
    try:
        counts = per_epoch(sizes, weights)
    except ConfigError:
        return
    total, whole = sum(sizes), sum(weights)
    assert sum(counts) == total
    assert all(abs(n - total * w / whole) < 1 for n, w in zip(counts, weights, strict=True))
    read = Counter()
    for epoch in range(epochs):
        order = epoch_order(sizes, weights, seed=seed, epoch=epoch)
        assert Counter(source for source, _ in order) == dict(enumerate(counts))
        read.update(order)
    for source, size in enumerate(sizes):
        often = [read[source, i] for i in range(size)]
        assert max(often) - min(often) <= 1
