"""Prompts: their encoding, order and reply checks, and settings that leave no tokens for a reply."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lit_gpt_scratch.data import Prompts
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.tasks import LanguageModel
from lit_gpt_scratch.text.synthetic_data import prompts as generated
from lit_gpt_scratch.text.verifiable_rewards import full_stop, no_digit, shorter


@pytest.fixture
def prompts(cache: Path) -> Callable[..., Prompts]:
    def build(**changes: Any) -> Prompts:
        data = Prompts(**({"cache": str(cache), "vocab_size": 300, "block_size": 96, "reply_tokens": 8} | changes))
        data.prepare_data()
        data.setup("test")
        return data

    return build


def test_prompt_is_the_template_up_to_the_reply(prompts: Callable[..., Prompts]) -> None:
    data = prompts()
    asked = {"\n".join(message["content"] for message in row.fields["prompt"]) for row in generated()}
    for side in ("train", "validation", "test"):
        ids, texts = data.lookup_prompts(side, range(data.info.prompts.counts[side]))
        assert ids == data.prompt_ids(side)
        assert set(texts) <= asked
        for row, text in zip(ids, texts, strict=True):
            prompt = data.tokenizer.decode(row)
            assert prompt.endswith("<|assistant|>")
            assert all(line in prompt for line in text.splitlines())
    assert data.find_text_reward(None).name == "full_stop"
    assert data.find_text_reward(None).function(["", ""], ["Yes.", "No"]) == [1.0, 0.0]


def test_replies_are_checked_by_the_reward_unless_another_check_is_named() -> None:
    """A verifiable reward can check replies to the user's own prompts; a function or a model cannot."""
    cases: list[tuple[dict[str, Any], str | None, Any, Any]] = [
        ({}, None, full_stop, full_stop),
        ({}, "shorter", full_stop, shorter),
        ({}, "tests.custom_reward.letters", full_stop, full_stop),
        ({"checkable": "no_digit"}, "shorter", no_digit, no_digit),
        ({"source": "mine.jsonl"}, "full_stop", None, full_stop),
        ({"source": "mine.jsonl"}, "tests.custom_reward.letters", None, None),
        ({"source": "mine.jsonl", "checkable": "shorter"}, None, shorter, shorter),
    ]
    for settings, reward, before, then in cases:
        data = Prompts(**settings)
        assert data.reply_check is before
        assert data.find_text_reward(reward).name == (reward or data.checkable)
        assert data.reply_check is then
    data = Prompts()
    data.find_text_reward("shorter")
    data.find_text_reward("tests.custom_reward.letters")  # of another run
    assert data.reply_check is full_stop


def test_every_prompt_comes_once_before_any_repeats(prompts: Callable[..., Prompts]) -> None:
    data = prompts(seed=3)
    n = data.info.prompts.counts["train"]
    drawn = data.shuffled_prompts(range(3 * n))
    for first in range(0, 3 * n, n):
        assert sorted(drawn[first : first + n]) == list(range(n))
    assert drawn[:n] != drawn[n : 2 * n]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 24, "reply_tokens": 8}, "more than the maximum of 16; raise --data.block_size"),
        ({"too_long": "cut"}, "data.too_long is 'cut'"),
        ({"reply_tokens": 96}, "leaves no tokens for prompts if data.block_size is 96"),
    ],
)
def test_settings_without_room_for_a_reply_are_rejected(
    prompts: Callable[..., Prompts], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prompts(**changes)


def test_prompts_alone_cannot_train_a_language_model(
    prompts: Callable[..., Prompts], trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(UserError, match=r"Prompts has no replies to train on; .*--model PPO or GRPO"):
        trainer(limit_val_batches=0).fit(LanguageModel(compile=False), prompts())
