"""The order of rows: permutations, their statistics, independence of the number of ranks, random access."""

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data import sampler as module
from lit_gpt_scratch.data.sampler import (
    ROWS_AT_ONCE,
    EvaluationSampler,
    MicroBatch,
    Permutations,
    ShuffledOrder,
    ShuffledSampler,
)
from lit_gpt_scratch.tasks import LanguageModel

SLOW_LENGTHS = pytest.param(range(1, 100_001), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


def flat(sampler: Iterable[MicroBatch]) -> list[int]:
    return [row for micro_batch in sampler for row in micro_batch.rows]


def everything(n: int, seed: int, number: int) -> NDArray[np.int64]:
    return Permutations(n, (seed, 0)).at(number, np.arange(n))


@pytest.mark.parametrize(
    "lengths", [range(1, 1200), [2**k + d for k in range(10, 18) for d in (-1, 0, 1)], SLOW_LENGTHS]
)
def test_permutation_is_a_bijection(lengths: list[int]) -> None:
    for n in lengths:
        seen = np.zeros(n, dtype=bool)
        seen[everything(n, n % 7, n % 5)] = True
        assert seen.all(), n


@pytest.mark.parametrize("n", [10**12, 2**40, 2**40 + 1, 2**62])
def test_permutation_of_a_huge_range_is_uniform_and_injective(n: int) -> None:
    rng = np.random.default_rng(0)
    places = np.unique(rng.integers(0, n, 100_000))
    values = Permutations(n, (3, 0)).at(1, places)
    assert values.min() >= 0
    assert values.max() < n
    assert len(np.unique(values)) == len(places)
    # Uniform over the range: the largest distance between the shares below and the line (Kolmogorov and Smirnov).
    distance = np.abs(np.sort(values / n) - np.arange(1, len(values) + 1) / len(values)).max()
    assert distance < 1.95 / math.sqrt(len(values))  # exceeded by chance once in a thousand times


@pytest.mark.parametrize("n", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_all_orders_of_few_values_are_equally_probable(n: int) -> None:
    draws = 60 * math.factorial(n)
    counts = Counter(tuple(everything(n, seed, 0).tolist()) for seed in range(draws))
    assert len(counts) == math.factorial(n)
    chi2 = sum((count - 60) ** 2 / 60 for count in counts.values())
    freedom = math.factorial(n) - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


def test_orders_of_seeds_and_epochs_are_uncorrelated() -> None:
    """Rank correlations and numbers of fixed points of 66 pairs of orders are those of random permutations."""
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
def test_global_order_is_independent_of_the_number_of_ranks(
    sizes: list[int], batch: int, world: int, seed: int, epoch: int
) -> None:
    def order(batch_size: int, rank: int, world_size: int) -> list[int]:
        sampler = ShuffledSampler(ShuffledOrder(sizes, seed), batch_size, rank, world_size)
        sampler.set_epoch(epoch)
        indices = flat(sampler)
        assert len(indices) == len(sampler) * batch_size
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
    assert one_by_one[: len(alone)] == alone  # and independent of the batch size


@pytest.mark.parametrize("n", [100, 3 * ROWS_AT_ONCE + 7])
def test_sampler_resumes_at_any_micro_batch(n: int) -> None:
    whole = ShuffledSampler(ShuffledOrder([n], seed=3), 10)
    whole.set_epoch(2)
    everything = flat(whole)
    for step in (0, 4, n // 20, n // 10 - 1, n // 10):
        later = ShuffledSampler(ShuffledOrder([n], seed=3), 10, start=(2, step))
        assert flat(later) == everything[10 * step :]
        later.set_epoch(3)
        whole.set_epoch(3)
        assert flat(later) == flat(whole)


def test_seeking_and_iterating_need_constant_memory() -> None:
    tracemalloc.start()
    order = iter(ShuffledSampler(ShuffledOrder([10**12], seed=0), 8, start=(0, 10**9)))
    some = flat(itertools.islice(order, 1250))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(some)) == 10_000
    assert most < 2_000_000


def test_steps_longer_than_an_epoch_need_memory_for_the_epoch() -> None:
    sampler = ShuffledSampler(ShuffledOrder([40], 0), batch_size=4, accumulate=10**9)
    assert sampler.step_rows(0, np.array([0])).shape == (1, 10, 1, 4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    assert sorted(flat(batches)) == list(range(40))


def test_permutation_numbers_can_differ_by_position() -> None:
    permutations, places = Permutations(1000, (1, 2)), np.arange(1000)
    numbers = places % 7
    found = permutations.at(numbers, places)
    for number in range(7):
        assert (found[numbers == number] == permutations.at(number, places)[numbers == number]).all()


def test_mixture_keeps_its_proportions_throughout() -> None:
    """3 to 1 from stores of 10,000 and 90,000 rows: the small one is passed through 7.5 times per epoch."""
    shuffle = ShuffledOrder([10_000, 90_000], seed=1, weights=[3, 1])
    for epoch in range(2):
        small = shuffle.rows(epoch, np.arange(100_000)) < 10_000
        for begin in range(0, 90_000, 10_000):
            assert abs(small[begin : begin + 10_000].mean() - 0.75) < 0.03


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0, 10), min_size=4, max_size=4),
    block=st.integers(1, 50),
)
def test_no_row_repeats_before_all_rows_of_its_store_have_come(
    sizes: list[int], weights: list[float], block: int
) -> None:
    """Across epochs: at the end of every block the counts of rows differ by at most one."""
    weights = [*weights[: len(sizes) - 1], 1.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIXTURE_BLOCK", block)
        shuffle = ShuffledOrder(sizes, 5, weights)
    exact = [weight / sum(weights) * shuffle.block for weight in weights]
    assert sum(shuffle.quotas) == shuffle.block
    assert all(abs(quota - share) < 1 for quota, share in zip(shuffle.quotas, exact, strict=True))
    drawn = np.concatenate([shuffle.rows(epoch, np.arange(sum(sizes))) for epoch in range(3)])
    for end in range(shuffle.block, len(drawn) + 1, shuffle.block):
        first = 0
        for size, quota in zip(sizes, shuffle.quotas, strict=True):
            so_far = drawn[:end]
            counts = np.bincount(so_far[(so_far >= first) & (so_far < first + size)] - first, minlength=size)
            assert counts.sum() == end // shuffle.block * quota
            assert counts.max() - counts.min() <= 1
            first += size


def test_small_store_with_a_large_weight_is_as_cheap() -> None:
    """All its passes are computed together: as many numpy calls for a thousand of them as for one."""
    shuffle = ShuffledOrder([100, 10**9], seed=0, weights=[1.0, 1.0])
    rows = shuffle.rows(5, np.arange(1024))
    counts = np.bincount(rows[rows < 100], minlength=100)
    assert 300 < counts.sum() < 700
    assert counts.min() > 0


@given(n=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_evaluation_sampler_yields_every_row_once(n: int, batch: int, world: int) -> None:
    ranks = [flat(EvaluationSampler(n, batch, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % batch == 0
    assert sorted(index for rank in ranks for index in rank if index < n) == list(range(n))
    assert all(index == n for rank in ranks for index in rank if index >= n)


@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 4),
    limit=st.one_of(st.integers(1, 30), st.floats(0.1, 1.0)),
)
def test_step_rows_are_those_of_all_micro_batches_and_ranks(
    n: int, batch: int, world: int, accumulate: int, limit: float
) -> None:
    """Also in an epoch's last step, which ``trainer.limit_train_batches`` can shorten."""
    ranks = [
        list(ShuffledSampler(ShuffledOrder([n], 1), batch, rank, world, (0, 0), accumulate, limit))
        for rank in range(world)
    ]
    total = len(ShuffledSampler(ShuffledOrder([n], 1), batch, 0, world, (0, 0), accumulate))
    end = min(total, limit) if isinstance(limit, int) else int(total * limit)
    for begin in range(0, end, accumulate):
        step = range(begin, min(begin + accumulate, end))  # the micro-batches before Lightning's optimizer step
        rows = [row for number in step for rank in ranks for row in rank[number].rows]
        for number in step:
            for rank in ranks:
                assert rank[number].step_rows is not None
                assert rank[number].step_rows.tolist() == rows


class Rows(L.Callback):
    """Record the input of each micro-batch."""

    def __init__(self) -> None:
        self.train: list[torch.Tensor] = []
        self.validation: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: Any, batch_idx: int) -> None:
        self.train.append(batch["input_ids"])

    def on_validation_batch_start(
        self, trainer: object, pl_module: object, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validation.append(batch["input_ids"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_overfit_batches_repeats_the_first_batches(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    accumulate: int,
) -> None:
    """Of whole batches, not of single rows, and those of an ordinary run's first epoch."""
    ordinary, repeated = Rows(), Rows()
    flags = {"max_steps": -1, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    trainer(callbacks=[ordinary], max_epochs=1, limit_train_batches=2, limit_val_batches=2, **flags).fit(
        task(), packed_text()
    )
    trainer(callbacks=[repeated], max_epochs=3, overfit_batches=2, **flags).fit(task(), packed_text())
    assert [batch.shape for batch in repeated.train] == [(4, 32)] * 6
    for batch, expected in zip(repeated.train, [*ordinary.train] * 3, strict=True):
        assert torch.equal(batch, expected)
    for batch, expected in zip(repeated.validation, [*ordinary.validation] * 3, strict=True):
        assert torch.equal(batch, expected)
