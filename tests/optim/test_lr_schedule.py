"""Learning-rate schedules against their equations, torch and transformers."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim import Schedule
from lit_gpt_scratch.optim.lr_schedule import Decay

TOTAL = 100


def factors(schedule: Schedule, total: float = TOTAL) -> list[float]:
    return [schedule.factor(step, total) for step in range(TOTAL + 1)]


def test_default_schedule_warms_up_holds_and_decays() -> None:
    """20 warmup steps, and decay over the last 40% of the run."""
    found = factors(Schedule())
    assert found[:20] == [(step + 1) / 21 for step in range(20)]
    assert found[20:61] == [1.0] * 41
    assert found[60:] == [(100 - step) / 40 for step in range(60, 101)]
    assert found == factors(Schedule(decay="linear", decay_share=0.4))


def test_linear_and_cosine_match_their_equations() -> None:
    linear = factors(Schedule(decay="linear", warmup_steps=10, final=0.2))
    cosine = factors(Schedule(decay="cosine", warmup_steps=10, final=0.2))
    for step in range(10, 101):
        done = (step - 10) / 90
        assert linear[step] == pytest.approx(1 - 0.8 * done)
        assert cosine[step] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done)))


def test_inverse_sqrt_matches_the_paper() -> None:
    """Equation 3 with steps counted from 1, normalized to a peak of 1."""
    warmup = 11
    peak = warmup**-0.5
    expected = [min(step**-0.5, step * warmup**-1.5) / peak for step in range(1, TOTAL + 2)]
    schedule = Schedule(decay="inverse_sqrt", warmup_steps=warmup - 1)
    assert factors(schedule) == pytest.approx(expected)
    assert factors(schedule, math.inf) == factors(schedule)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_decay_matches_torch_schedulers(final: float) -> None:
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
    theirs = {
        "linear": lr_scheduler.LinearLR(optimizers[0], 1.0, final, total_iters=TOTAL),
        "cosine": lr_scheduler.CosineAnnealingLR(optimizers[1], TOTAL, eta_min=final),
    }
    for (name, scheduler), optimizer in zip(theirs.items(), optimizers, strict=True):
        expected = []
        for _ in range(TOTAL + 1):
            expected.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        found = factors(Schedule(decay=name, warmup_steps=0, final=final))  # type: ignore[arg-type]
        assert found == pytest.approx(expected, abs=1e-6)


def test_multistep_matches_the_paper_and_torch() -> None:
    """DeepSeek LLM: the peak until 80% of the run, 31.6% of it until 90%, and then 10%."""
    found = factors(Schedule(decay="multistep", warmup_steps=5))
    assert found[:5] == [(step + 1) / 6 for step in range(5)]
    assert found[5:] == [1.0] * 75 + [0.316] * 10 + [0.1] * 11
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [25, 50, 55], gamma=0.5)
    schedule = Schedule(decay="multistep", warmup_steps=0, stages=((0.25, 0.5), (0.5, 0.25), (0.55, 0.125)))
    for step in range(TOTAL + 1):
        assert schedule.factor(step, TOTAL) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [1, 10])
def test_schedules_match_transformers(warmup: int) -> None:
    """Those of transformers start one step earlier, at zero; ours ends its decay with the run."""
    theirs = pytest.importorskip("transformers.optimization", exc_type=ImportError)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    lengths = {"num_warmup_steps": warmup, "num_training_steps": TOTAL}
    late = {"num_warmup_steps": warmup + 1}
    same = {
        Schedule("constant", warmup): (theirs.get_constant_schedule_with_warmup(optimizer, **late), 1),
        Schedule("inverse_sqrt", warmup): (theirs.get_inverse_sqrt_schedule(optimizer, **late), 1),
        Schedule("linear", warmup): (theirs.get_linear_schedule_with_warmup(optimizer, **lengths), 0),
        Schedule("cosine", warmup): (theirs.get_cosine_schedule_with_warmup(optimizer, **lengths), 0),
        Schedule("wsd", warmup, 0.3, 0.1): (
            theirs.get_wsd_schedule(optimizer, num_decay_steps=30, decay_type="linear", min_lr_ratio=0.1, **lengths), 0
        ),
    }  # fmt: skip
    for schedule, (scheduler, shift) in same.items():
        [factor] = scheduler.lr_lambdas
        for step in range(0 if shift else warmup, TOTAL):
            assert schedule.factor(step, TOTAL) == pytest.approx(factor(step + shift)), (schedule, step)


@given(
    decay=st.sampled_from(get_args(Decay)),
    warmup=st.integers(0, 50),
    share=st.none() | st.floats(0, 1),
    final=st.floats(0, 1),
    total=st.one_of(st.integers(1, 200), st.just(math.inf)),
)
def test_factor_is_between_0_and_1_and_rises_only_in_warmup(
    decay: Decay, warmup: int, share: float | None, final: float, total: float
) -> None:
    schedule = Schedule(decay, warmup, share, final)
    found = [schedule.factor(step, total) for step in range(300)]
    assert all(0.0 <= factor <= 1.0 for factor in found)
    assert found[0] > 0.0
    after = found[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    if math.isinf(total):
        before = found[: warmup + 1]
        assert all(later > earlier for earlier, later in pairwise(before))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "exp"}, "model.schedule.decay is exp; it must be one of wsd, linear, cosine, constant"),
        ({"warmup_steps": -1}, "model.schedule.warmup_steps is -1"),
        ({"decay_share": 1.5}, "model.schedule.decay_share is 1.5"),
        ({"final": -0.5}, "model.schedule.final is -0.5"),
        ({"stages": ((0.5, 0.1),)}, "model.schedule.stages requires model.schedule.decay multistep, but it is wsd"),
        ({"decay": "multistep", "stages": ((0.5, 0.5), (0.5, 0.1))}, "starts must increase between 0 and 1"),
        ({"decay": "multistep", "stages": ((0.0, 0.5),)}, "starts must increase between 0 and 1"),
        ({"decay": "multistep", "stages": ((0.5, 1.5),)}, "rates must decrease between 1 and 0"),
        ({"decay": "multistep", "stages": ((0.5, 0.1), (0.6, 0.2))}, "rates must decrease between 1 and 0"),
        ({"decay": "multistep", "stages": ((0.5, math.nan),)}, "rates must decrease between 1 and 0"),
    ],
)
def test_invalid_schedule_is_an_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**settings)  # type: ignore[arg-type]
