"""The order is a bijection, looks like chance, knows no ranks, and is found at any place at once."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lit_gpt_scratch.data.permutation import Permutation
from lit_gpt_scratch.data.sampler import AT_ONCE, EveryWindow, Shuffle, WindowOrder

SLOW_LENGTHS = pytest.param(range(1, 100_001), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


def everything(n: int, *key: int) -> NDArray[np.int64]:
    return Permutation(n, *key)[np.arange(n)]


@pytest.mark.parametrize(
    "lengths", [range(1, 1200), [2**k + d for k in range(10, 18) for d in (-1, 0, 1)], SLOW_LENGTHS]
)
def test_every_place_has_another_value(lengths: list[int]) -> None:
    for n in lengths:
        seen = np.zeros(n, dtype=bool)
        seen[everything(n, n % 7, 0, 1)] = True
        assert seen.all(), n


@pytest.mark.parametrize("n", [10**12, 2**40, 2**40 + 1, 2**62])
def test_far_places_are_inside_and_differ(n: int) -> None:
    rng = np.random.default_rng(0)
    places = np.unique(rng.integers(0, n, 100_000))
    values = Permutation(n, 3, 0, 1)[places]
    assert values.min() >= 0
    assert values.max() < n
    assert len(np.unique(values)) == len(places)
    # Uniform over the range: the largest distance between the shares below and the line (Kolmogorov and Smirnov).
    distance = np.abs(np.sort(values / n) - np.arange(1, len(values) + 1) / len(values)).max()
    assert distance < 1.95 / math.sqrt(len(values))  # exceeded by chance once in a thousand times


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_come_up_equally_often(n: int) -> None:
    draws = 60 * math.factorial(n)
    counts = Counter(tuple(everything(n, seed, 0, 0).tolist()) for seed in range(draws))
    assert len(counts) == math.factorial(n)
    chi2 = sum((count - 60) ** 2 / 60 for count in counts.values())
    freedom = math.factorial(n) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


def test_seeds_epochs_and_neighbours_are_uncorrelated() -> None:
    """Of 60 pairs of orders: rank correlation, and how many places agree, are as chance has them."""
    n = 5000
    orders = [everything(n, seed, 0, epoch) for seed in range(4) for epoch in range(3)]
    pairs = list(itertools.combinations(orders, 2))
    correlations = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    assert np.abs(correlations).max() < 4.5 / math.sqrt(n)
    assert 0.7 < correlations.std() * math.sqrt(n) < 1.3
    agreeing = np.array([(a == b).sum() for a, b in pairs])  # Poisson with mean 1
    assert 0.6 < agreeing.mean() < 1.5
    assert agreeing.max() < 8
    for order in orders:
        within = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(within) < 4.5 / math.sqrt(n)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    batch=st.integers(1, 8),
    world=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@settings(deadline=None)
def test_the_global_order_does_not_depend_on_the_number_of_ranks(
    sizes: list[int], batch: int, world: int, seed: int, epoch: int
) -> None:
    def order(batch_size: int, rank: int, world_size: int) -> list[int]:
        sampler = WindowOrder(Shuffle(sizes, seed), batch_size, rank, world_size)
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        return indices

    alone = order(batch * world, 0, 1)
    ranks = [order(batch, rank, world) for rank in range(world)]
    steps = [
        [index for rank in ranks for index in rank[s * batch : (s + 1) * batch]] for s in range(len(ranks[0]) // batch)
    ]
    assert [index for step in steps for index in step] == alone
    n = sum(sizes)
    assert len(set(alone)) == len(alone) == n // (batch * world) * batch * world
    one_by_one = order(1, 0, 1)
    assert sorted(one_by_one) == list(range(n))
    assert one_by_one[: len(alone)] == alone  # nor on how many make a batch


@pytest.mark.parametrize("n", [100, 3 * AT_ONCE + 7])
def test_an_order_goes_on_from_any_step(n: int) -> None:
    whole = WindowOrder(Shuffle([n], seed=3), 10)
    whole.set_epoch(2)
    everything = list(whole)
    for step in (0, 4, n // 20, n // 10 - 1, n // 10):
        later = WindowOrder(Shuffle([n], seed=3), 10, start=(2, step))
        assert list(later) == everything[10 * step :]
        later.set_epoch(3)
        whole.set_epoch(3)
        assert list(later) == list(whole)


def test_seeking_and_going_on_need_no_memory_for_the_rest() -> None:
    tracemalloc.start()
    order = iter(WindowOrder(Shuffle([10**12], seed=0), 8, start=(0, 10**9)))
    some = list(itertools.islice(order, 10_000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(some)) == 10_000
    assert most < 2_000_000


def test_a_mixture_has_its_shares_and_repeats_nothing_before_its_time() -> None:
    """3 to 1 of stores of 100 and 300 windows: the small one is gone through 3 times an epoch, the large a third."""
    shuffle = Shuffle([100, 300], seed=1, weights=[3, 1])
    small, large = [], []
    for epoch in range(3):
        windows = shuffle.windows(epoch, np.arange(400))
        small.append(windows[windows < 100])
        large.append(windows[windows >= 100])
    assert [len(part) for part in small] == [300] * 3
    assert set(Counter(np.concatenate(small[:1]).tolist()).values()) == {3}
    assert sorted(np.concatenate(large).tolist()) == list(range(100, 400))  # 3 epochs make one pass
    early = (shuffle.windows(0, np.arange(200)) < 100).mean()
    assert 0.65 < early < 0.85  # the shares hold along the way, too


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0, 10), min_size=4, max_size=4),
    epochs=st.integers(1, 4),
)
@settings(deadline=None)
def test_no_window_of_a_store_comes_twice_before_all_have_come_once(
    sizes: list[int], weights: list[float], epochs: int
) -> None:
    weights = [*weights[: len(sizes) - 1], 1.0]
    shuffle = Shuffle(sizes, 5, weights)
    assert sum(shuffle.quotas) == sum(sizes)
    exact = [weight / sum(weights) * sum(sizes) for weight in weights]
    assert all(abs(quota - share) < 1 for quota, share in zip(shuffle.quotas, exact, strict=True))
    drawn = np.concatenate([shuffle.windows(epoch, np.arange(sum(sizes))) for epoch in range(epochs)])
    first = 0
    for size in sizes:
        counts = np.bincount(drawn[(drawn >= first) & (drawn < first + size)] - first, minlength=size)
        assert counts.max() - counts.min() <= 1
        first += size


@given(n=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_validation_sees_every_window_once(n: int, batch: int, world: int) -> None:
    ranks = [list(EveryWindow(n, batch, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % batch == 0
    assert sorted(index for rank in ranks for index in rank if index < n) == list(range(n))
    assert all(index == n for rank in ranks for index in rank if index >= n)
