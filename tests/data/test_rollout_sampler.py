"""The order of rollouts: each comes once in every pass of its phase, and a step is independent of the layout."""

from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import BatchLayout, RolloutPhase
from lit_gpt_scratch.data.rollout_sampler import RolloutSampler
from lit_gpt_scratch.data.sampler import ShuffledOrder
from lit_gpt_scratch.tasks.rl.rollouts import rank_rows


def order(
    prompts: int, phase: RolloutPhase, batch_size: int, rank: int, world: int, accumulate: int, start: int = 0
) -> RolloutSampler:
    return RolloutSampler(ShuffledOrder([prompts], 5), phase, 7, batch_size, rank, world, (0, start), accumulate)


def batches(sampler: RolloutSampler) -> list[list[int]]:
    found = [micro_batch.rows for micro_batch in sampler]
    assert len(found) == len(sampler)
    return found


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)
)
def test_every_rollout_comes_once_per_pass_and_steps_are_independent_of_the_layout(
    prompts: int, steps: int, passes: int, batch_size: int, world: int, accumulate: int
) -> None:
    phase, per_step = RolloutPhase(steps, passes), batch_size * world * accumulate
    rows = steps * per_step
    ranks = [batches(order(prompts, phase, batch_size, rank, world, accumulate)) for rank in range(world)]
    micro_batches = [joined(parts) for parts in zip(*ranks, strict=True)]
    seen = [
        sorted(joined(micro_batches[first : first + accumulate])) for first in range(0, len(micro_batches), accumulate)
    ]
    alone = batches(order(prompts, phase, per_step, 0, 1, 1))
    assert seen == [sorted(step) for step in alone]
    assert len(alone) == max(1, prompts // rows) * steps * passes  # an epoch is whole phases
    for number in range(len(alone) // steps):
        within_pass = joined(alone[number * steps : (number + 1) * steps])
        first = number // passes * rows
        assert sorted(within_pass) == list(range(first, first + rows))
        if number % passes == 0:
            assert within_pass == sorted(within_pass)
    for rank, found in enumerate(ranks):
        layout = BatchLayout(batch_size, world, accumulate)
        assert rank_rows(layout, rank, rows) == joined(found[: steps * accumulate])


def test_later_passes_have_different_orders() -> None:
    found = batches(order(64, RolloutPhase(1, 3), 64, 0, 1, 1))
    assert len({tuple(rows) for rows in found}) == 3


@pytest.mark.parametrize("start", [1, 7, 11])
def test_rollout_sampler_resumes_at_any_micro_batch(start: int) -> None:
    whole = batches(order(30, RolloutPhase(3, 2), 4, 1, 2, 1))
    later = order(30, RolloutPhase(3, 2), 4, 1, 2, 1, start)
    assert [micro_batch.rows for micro_batch in later] == whole[start:]


def test_next_epoch_continues_with_new_rollouts() -> None:
    found = order(30, RolloutPhase(3, 2), 2, 0, 1, 1)
    first = joined(batches(found))
    found.set_epoch(1)
    second = joined(batches(found))
    assert min(second) == max(first) + 1
    assert len(set(second)) == len(set(first)) == 30
    assert np.unique(second).tolist() == list(range(30, 60))
