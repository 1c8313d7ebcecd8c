"""Preferences that can be checked: what they hold of, and the pairs that are made for them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.verifiable_rewards import (
    VERIFIABLE_PREFERENCES,
    get_verifiable_preference,
    has_content,
    preferences,
    prompts,
)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("full_stop", ["Yes.", "It has 5 letters. ", "a.b."], ["Yes", "", ".", "...", "Yes...", ". Yes", "Yes!"]),
        ("shorter", ["12345678", " apple "], ["123456789", "", "  ", "!?"]),
        ("no_digit", ["none", "five"], ["5", "x\u00b2", "\u0665", "", "-"]),
        ("python_expression", ["1 + 1", "'a b'", "f(x)[0]", " x"], ["x = 1", "a b", "1 +", "", "x\0", "(" * 9999]),
    ],
)
def test_what_holds_and_what_does_not(name: str, good: list[str], bad: list[str]) -> None:
    holds = VERIFIABLE_PREFERENCES[name].holds
    assert [reply for reply in good if not holds(reply)] == []
    assert [reply for reply in bad if holds(reply)] == []


@given(reply=st.text(min_size=1).filter(has_content), name=st.sampled_from(sorted(VERIFIABLE_PREFERENCES)))
@settings(deadline=None, max_examples=400)
def test_of_any_reply_a_better_and_a_worse_one_are_made(reply: str, name: str) -> None:
    prefer = get_verifiable_preference(name)
    chosen, rejected = prefer.pair(reply)
    assert prefer.holds(chosen)
    assert not prefer.holds(rejected)
    assert rejected.strip()


@pytest.mark.parametrize("name", VERIFIABLE_PREFERENCES)
def test_generated_pairs_are_as_preferred(name: str) -> None:
    asked = [row.fields["prompt"] for row in prompts()]
    rows = list(preferences(name))
    assert [row.fields["prompt"] for row in rows] == asked
    assert all(prompt[-1]["role"] == "user" for prompt in asked)
    assert all(get_verifiable_preference(name).holds(row.fields["chosen"]) for row in rows)
    assert not any(get_verifiable_preference(name).holds(row.fields["rejected"]) for row in rows)


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(UserError, match="there is no checkable preference polite; there are full_stop, shorter"):
        get_verifiable_preference("polite")
