"""The order is a bijection, looks like chance, knows no ranks, and is found at any place at once."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lit_gpt_scratch.data import sampler as module
from lit_gpt_scratch.data.sampler import AT_ONCE, EvaluationSampler, Permutations, ShuffledOrder, ShuffledSampler

SLOW_LENGTHS = pytest.param(range(1, 100_001), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


def everything(n: int, seed: int, number: int) -> NDArray[np.int64]:
    return Permutations(n, (seed, 0)).at(number, np.arange(n))


@pytest.mark.parametrize(
    "lengths", [range(1, 1200), [2**k + d for k in range(10, 18) for d in (-1, 0, 1)], SLOW_LENGTHS]
)
def test_every_place_has_another_value(lengths: list[int]) -> None:
    for n in lengths:
        seen = np.zeros(n, dtype=bool)
        seen[everything(n, n % 7, n % 5)] = True
        assert seen.all(), n


@pytest.mark.parametrize("n", [10**12, 2**40, 2**40 + 1, 2**62])
def test_far_places_are_inside_and_differ(n: int) -> None:
    rng = np.random.default_rng(0)
    places = np.unique(rng.integers(0, n, 100_000))
    values = Permutations(n, (3, 0)).at(1, places)
    assert values.min() >= 0
    assert values.max() < n
    assert len(np.unique(values)) == len(places)
    # Uniform over the range: the largest distance between the shares below and the line (Kolmogorov and Smirnov).
    distance = np.abs(np.sort(values / n) - np.arange(1, len(values) + 1) / len(values)).max()
    assert distance < 1.95 / math.sqrt(len(values))  # exceeded by chance once in a thousand times


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_come_up_equally_often(n: int) -> None:
    draws = 60 * math.factorial(n)
    counts = Counter(tuple(everything(n, seed, 0).tolist()) for seed in range(draws))
    assert len(counts) == math.factorial(n)
    chi2 = sum((count - 60) ** 2 / 60 for count in counts.values())
    freedom = math.factorial(n) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


def test_seeds_epochs_and_neighbours_are_uncorrelated() -> None:
    """Of 66 pairs of orders: rank correlation, and how many places agree, are as chance has them."""
    n = 5000
    orders = [everything(n, seed, epoch) for seed in range(4) for epoch in range(3)]
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
def test_the_global_order_does_not_depend_on_the_number_of_ranks(
    sizes: list[int], batch: int, world: int, seed: int, epoch: int
) -> None:
    def order(batch_size: int, rank: int, world_size: int) -> list[int]:
        sampler = ShuffledSampler(ShuffledOrder(sizes, seed), batch_size, rank, world_size)
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
    whole = ShuffledSampler(ShuffledOrder([n], seed=3), 10)
    whole.set_epoch(2)
    everything = list(whole)
    for step in (0, 4, n // 20, n // 10 - 1, n // 10):
        later = ShuffledSampler(ShuffledOrder([n], seed=3), 10, start=(2, step))
        assert list(later) == everything[10 * step :]
        later.set_epoch(3)
        whole.set_epoch(3)
        assert list(later) == list(whole)


def test_seeking_and_going_on_need_no_memory_for_the_rest() -> None:
    tracemalloc.start()
    order = iter(ShuffledSampler(ShuffledOrder([10**12], seed=0), 8, start=(0, 10**9)))
    some = list(itertools.islice(order, 10_000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(some)) == 10_000
    assert most < 2_000_000


def test_numbers_may_differ_by_place() -> None:
    permutations, places = Permutations(1000, (1, 2)), np.arange(1000)
    numbers = places % 7
    found = permutations.at(numbers, places)
    for number in range(7):
        assert (found[numbers == number] == permutations.at(number, places)[numbers == number]).all()


def test_a_mixture_has_its_shares_all_along() -> None:
    """3 to 1 of stores of 10,000 and 90,000 windows: the small one is gone through 7 times and a half an epoch."""
    shuffle = ShuffledOrder([10_000, 90_000], seed=1, weights=[3, 1])
    for epoch in range(2):
        small = shuffle.windows(epoch, np.arange(100_000)) < 10_000
        for begin in range(0, 90_000, 10_000):
            assert abs(small[begin : begin + 10_000].mean() - 0.75) < 0.03


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0, 10), min_size=4, max_size=4),
    block=st.integers(1, 50),
)
def test_no_window_of_a_store_comes_again_before_all_have_come(
    sizes: list[int], weights: list[float], block: int
) -> None:
    """In the order of time, and not of epochs: at the end of every block the counts differ by at most one."""
    weights = [*weights[: len(sizes) - 1], 1.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        shuffle = ShuffledOrder(sizes, 5, weights)
    exact = [weight / sum(weights) * shuffle.block for weight in weights]
    assert sum(shuffle.quotas) == shuffle.block
    assert all(abs(quota - share) < 1 for quota, share in zip(shuffle.quotas, exact, strict=True))
    drawn = np.concatenate([shuffle.windows(epoch, np.arange(sum(sizes))) for epoch in range(3)])
    for end in range(shuffle.block, len(drawn) + 1, shuffle.block):
        first = 0
        for size, quota in zip(sizes, shuffle.quotas, strict=True):
            so_far = drawn[:end]
            counts = np.bincount(so_far[(so_far >= first) & (so_far < first + size)] - first, minlength=size)
            assert counts.sum() == end // shuffle.block * quota
            assert counts.max() - counts.min() <= 1
            first += size


def test_a_small_store_with_a_large_weight_costs_no_more() -> None:
    """Its passes are looked up together: as many calls of numpy for a thousand of them as for one."""
    shuffle = ShuffledOrder([100, 10**9], seed=0, weights=[1.0, 1.0])
    windows = shuffle.windows(5, np.arange(1024))
    counts = np.bincount(windows[windows < 100], minlength=100)
    assert 300 < counts.sum() < 700
    assert counts.min() > 0


@given(n=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_validation_sees_every_window_once(n: int, batch: int, world: int) -> None:
    ranks = [list(EvaluationSampler(n, batch, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % batch == 0
    assert sorted(index for rank in ranks for index in rank if index < n) == list(range(n))
    assert all(index == n for rank in ranks for index in rank if index >= n)
