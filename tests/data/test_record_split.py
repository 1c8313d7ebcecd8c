"""Every record is on one side, the sides have their shares, and nothing but content, order and seed decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt_scratch.data.record_split import count_training_copies, split_records, validate_shares
from lit_gpt_scratch.errors import UserError

KEYS = st.lists(st.text("abc", max_size=2), min_size=20, max_size=80)


@given(keys=KEYS, validation=st.floats(0.1, 0.4), test=st.floats(0.1, 0.4), seed=st.integers(0, 9))
def test_every_record_is_on_one_side_and_sides_have_their_shares(
    keys: list[str], validation: float, test: float, seed: int
) -> None:
    sides = split_records(keys, validate_shares(validation, test), seed)
    every = np.concatenate(list(sides.values()))
    assert sorted(every.tolist()) == list(range(len(keys)))
    assert len(sides["validation"]) == round(validation * len(keys))
    assert len(sides["test"]) == round(test * len(keys))
    assert all((np.diff(places) > 0).all() for places in sides.values())
    again = split_records(keys, validate_shares(validation, test), seed)
    assert {side: places.tolist() for side, places in again.items()} == {
        side: places.tolist() for side, places in sides.items()
    }


@given(keys=KEYS, seed=st.integers(0, 9))
def test_copies_can_be_kept_together(keys: list[str], seed: int) -> None:
    keys = [*keys, *map(str, range(60))]
    sides = split_records(keys, validate_shares(0.2, 0.2), seed, together=True)
    of_side = {side: {keys[place] for place in places} for side, places in sides.items()}
    assert not of_side["train"] & of_side["validation"]
    assert not of_side["train"] & of_side["test"]
    assert not of_side["validation"] & of_side["test"]
    assert count_training_copies(keys, sides) == {"validation": 0, "test": 0}
    most = max(map(keys.count, keys))
    for side in ("validation", "test"):
        assert 0 <= len(sides[side]) - round(0.2 * len(keys)) < most


def test_copies_are_counted_by_brute_force() -> None:
    keys = [str(n % 7 if n < 30 else n) for n in range(90)]
    sides = split_records(keys, validate_shares(0.2, 0.3), 4)
    for side, n in count_training_copies(keys, sides).items():
        assert n == sum(any(keys[a] == keys[b] for b in sides["train"]) for a in sides[side])
        assert n > 0


def test_a_seed_is_another_split_and_each_record_is_held_out_as_often() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        counts[split_records([""] * 50, validate_shares(0.1, 0.2), seed)["test"]] += 1
    assert counts.sum() == 400 * 10
    assert np.abs(counts - 80).max() < 4.5 * np.sqrt(400 * 0.2 * 0.8)  # binomial


def test_no_test_side_without_a_share() -> None:
    assert set(split_records(["a"] * 10, validate_shares(0.2, 0.0), 0)) == {"train", "validation"}


@pytest.mark.parametrize("shares", [(0.0, 0.1), (1.0, 0.0), (0.6, 0.4), (0.1, -0.1), (float("nan"), 0.1)])
def test_shares_that_cannot_be(shares: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"data.validation_share is .* and data.test_share"):
        validate_shares(*shares)


@pytest.mark.parametrize(("n", "side"), [(0, "validation"), (4, "validation"), (1, "validation")])
def test_too_few_records(n: int, side: str) -> None:
    with pytest.raises(UserError, match=f"few.csv has too few records, {n}, to leave any for {side}"):
        split_records([""] * n, validate_shares(0.1, 0.2), 0, name="few.csv")
