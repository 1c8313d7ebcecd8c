"""Which row a policy sees when: each in every pass of its phase, the same in a step whoever deals it out."""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import RolloutPhase
from lit_gpt_scratch.data.rollout_sampler import RolloutSampler, rank_rows
from lit_gpt_scratch.data.sampler import ShuffledOrder


def order(
    prompts: int, phase: RolloutPhase, batch_size: int, rank: int, world: int, accumulate: int, start: int = 0
) -> RolloutSampler:
    return RolloutSampler(ShuffledOrder([prompts], 5), phase, 7, batch_size, rank, world, (0, start), accumulate)


def batches(found: RolloutSampler) -> Iterator[list[int]]:
    rows = iter(found)
    for _ in range(len(found) // found.batch_size):
        yield [next(rows) for _ in range(found.batch_size)]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)
)
def test_every_row_comes_once_in_each_pass_and_each_step_has_the_same_in_any_layout(
    prompts: int, steps: int, passes: int, batch_size: int, world: int, accumulate: int
) -> None:
    phase, per_step = RolloutPhase(steps, passes), batch_size * world * accumulate
    rows = steps * per_step
    ranks = [list(batches(order(prompts, phase, batch_size, rank, world, accumulate))) for rank in range(world)]
    micro_batches = [joined(parts) for parts in zip(*ranks, strict=True)]
    seen = [
        sorted(joined(micro_batches[first : first + accumulate])) for first in range(0, len(micro_batches), accumulate)
    ]
    alone = list(batches(order(prompts, phase, per_step, 0, 1, 1)))
    assert seen == [sorted(step) for step in alone]
    assert len(alone) == max(1, prompts // rows) * steps * passes  # an epoch is whole phases
    for number in range(len(alone) // steps):
        within_pass = joined(alone[number * steps : (number + 1) * steps])
        first = number // passes * rows
        assert sorted(within_pass) == list(range(first, first + rows))
        if number % passes == 0:
            assert within_pass == sorted(within_pass)
    for rank, found in enumerate(ranks):
        assert rank_rows(batch_size, rank, world, rows).tolist() == joined(found[: steps * accumulate])


def test_later_passes_go_another_way_each() -> None:
    found = list(batches(order(64, RolloutPhase(1, 3), 64, 0, 1, 1)))
    assert len({tuple(rows) for rows in found}) == 3


@pytest.mark.parametrize("start", [1, 7, 11])
def test_it_begins_anywhere(start: int) -> None:
    whole = list(order(30, RolloutPhase(3, 2), 4, 1, 2, 1))
    assert list(order(30, RolloutPhase(3, 2), 4, 1, 2, 1, start)) == whole[start * 4 :]


def test_the_next_epoch_goes_on_with_new_rows() -> None:
    found = order(30, RolloutPhase(3, 2), 2, 0, 1, 1)
    first = set(found)
    found.set_epoch(1)
    assert min(found) == max(first) + 1
    assert len(set(found)) == len(first) == 30
    assert np.unique(list(found)).tolist() == list(range(30, 60))
