"""Verifiable rewards: which replies satisfy them, and the pairs generated for them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.synthetic_data import preferences, prompts
from lit_gpt_scratch.text.verifiable_rewards import VERIFIABLE_REWARDS, get_verifiable_reward, has_content


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("full_stop", ["Yes.", "It has 5 letters. ", "a.b."], ["Yes", "", ".", "...", "Yes...", ". Yes", "Yes!"]),
        ("shorter", ["12345678", " apple "], ["123456789", "", "  ", "!?"]),
        ("no_digit", ["none", "five"], ["5", "x\u00b2", "\u0665", "", "-"]),
        ("python_expression", ["1 + 1", "'a b'", "f(x)[0]", " x"], ["x = 1", "a b", "1 +", "", "x\0", "(" * 9999]),
    ],
)
def test_which_replies_satisfy_a_preference(name: str, good: list[str], bad: list[str]) -> None:
    satisfied = VERIFIABLE_REWARDS[name].satisfied
    assert [reply for reply in good if not satisfied(reply)] == []
    assert [reply for reply in bad if satisfied(reply)] == []


@given(reply=st.text(min_size=1).filter(has_content), name=st.sampled_from(sorted(VERIFIABLE_REWARDS)))
@settings(deadline=None, max_examples=400)
def test_any_reply_gives_a_preferred_and_a_rejected_one(reply: str, name: str) -> None:
    preference = get_verifiable_reward(name)
    chosen, rejected = preference.make_pair(reply)
    assert preference.satisfied(chosen)
    assert not preference.satisfied(rejected)
    assert rejected.strip()


@pytest.mark.parametrize("name", VERIFIABLE_REWARDS)
def test_synthetic_pairs_follow_the_preference(name: str) -> None:
    asked = [row.fields["prompt"] for row in prompts()]
    rows = list(preferences(name))
    preference = get_verifiable_reward(name)
    assert [row.fields["prompt"] for row in rows] == asked
    assert all(prompt[-1]["role"] == "user" for prompt in asked)
    assert all(preference.satisfied(row.fields["chosen"]) for row in rows)
    assert not any(preference.satisfied(row.fields["rejected"]) for row in rows)


def test_unknown_preference_is_rejected() -> None:
    with pytest.raises(UserError, match="verifiable reward polite not found; choose from full_stop, shorter"):
        get_verifiable_reward("polite")
