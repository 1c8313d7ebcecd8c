"""Replies against tokens taken one by one; their form by hand."""

import pytest
import torch

from lit_gpt_scratch.evaluation import replies as module
from lit_gpt_scratch.evaluation.replies import Reply, replies
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat import Message, Template
from lit_gpt_scratch.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "ended", "good"),
    [
        ("Yes.", True, True),
        ("Yes.", False, False),
        (" \n", True, False),
        ("", True, False),
        ("Yes.### User:\nAnd now?", True, False),
        ("Yes.<|assistant|>No.", True, False),
        ("### Summary: the user is right.", True, True),
    ],
)
def test_a_reply_says_something_and_ends_before_another_turn_begins(text: str, ended: bool, good: bool) -> None:
    assert Reply(text, ended, 1).well_formed is good


def test_a_reply_is_the_likeliest_tokens_up_to_the_end_of_text(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    prompts = [Template(tokenizer).prompt([Message("user", "ab c"[:n])]) for n in (1, 2, 4)]
    expected = []
    for prompt in prompts:
        new: list[int] = []
        while len(new) < 5 and tokenizer.end_of_text not in new:
            new.append(int(model(torch.tensor([prompt + new]))[0, -1].argmax()))
        ended = new[-1] == tokenizer.end_of_text
        expected.append(Reply(tokenizer.decode(new[: len(new) - ended]), ended, len(new)))
    assert replies(model, tokenizer, prompts, 5) == expected
    first = model(torch.tensor([prompts[0]]))[0, -1].argmax()
    with torch.no_grad():  # the first prompt's first token becomes the end of text
        model.head.weight[tokenizer.end_of_text] = 3 * model.head.weight[first]
    assert replies(model, tokenizer, prompts[:1], 5) == [Reply("", ended=True, n_tokens=1)]
