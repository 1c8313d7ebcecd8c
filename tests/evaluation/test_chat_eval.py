"""Generated replies against a token-by-token loop; well-formedness by hand."""

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import chat_eval as module
from lit_gpt_scratch.evaluation.chat_eval import ChatExample, ChatReply, evaluate_chat, generate_replies
from lit_gpt_scratch.evaluation.intervals import summarize
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat_template import ChatTemplate, Message
from lit_gpt_scratch.text.document import TableRow
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
def test_well_formed_replies(text: str, ended: bool, good: bool) -> None:
    assert ChatReply(text, ended, 1).well_formed is good


def test_greedy_reply_ends_at_the_end_of_text(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    prompts = [ChatTemplate(tokenizer).render_prompt([Message("user", "ab c"[:n])]) for n in (1, 2, 4)]
    expected = []
    for prompt in prompts:
        new: list[int] = []
        while len(new) < 5 and tokenizer.end_of_text not in new:
            new.append(int(model(torch.tensor([prompt + new]))[0, -1].argmax()))
        ended = new[-1] == tokenizer.end_of_text
        expected.append(ChatReply(tokenizer.decode(new[: len(new) - ended]), ended, len(new)))
    assert generate_replies(model, tokenizer, prompts, 5) == expected
    first = model(torch.tensor([prompts[0]]))[0, -1].argmax()
    with torch.no_grad():  # the first prompt's first token becomes the end of text
        model.head.weight[tokenizer.end_of_text] = 3 * model.head.weight[first]
    assert generate_replies(model, tokenizer, prompts[:1], 5) == [ChatReply("", ended=True, n_tokens=1)]


ALPACA = {"instruction": "ab", "input": "c", "output": "d"}
MESSAGES = {"messages": [{"role": "user", "content": "ab\n\nc"}, {"role": "assistant", "content": "d"}]}


def test_replies_use_the_chat_template_and_are_scored(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [ChatExample.from_row(TableRow("r:1", "r: line 1", fields)) for fields in (ALPACA, MESSAGES)]
    assert asked[0] == asked[1]
    assert asked[0].text == "ab\n\nc\n\nd"
    given = []

    def written(_: GPT, __: Tokenizer, prompts: list[list[int]], most: int) -> list[ChatReply]:
        given.append((prompts, most))
        return [ChatReply("d", ended=True, n_tokens=2), ChatReply("d", ended=False, n_tokens=most)]

    monkeypatch.setattr(module, "generate_replies", written)
    found = summarize(evaluate_chat(model, tokenizer, asked, 7))
    assert given == [([ChatTemplate(tokenizer).render_prompt([Message("user", "ab\n\nc")])] * 2, 7)]
    assert (found.metrics["exact_match"], found.metrics["in_form"]) == (1.0, 0.5)
    assert found.intervals["in_form"] is not None


def test_records_without_a_reply_and_long_ones_are_rejected(model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="r: line 3: a record must have 'messages', or 'instruction'"):
        ChatExample.from_row(TableRow("r:3", "r: line 3", {"text": "x"}))
    with pytest.raises(UserError, match="r: line 3: the last message has role user"):
        ChatExample.from_row(TableRow("r:3", "r: line 3", {"messages": MESSAGES["messages"][:1]}))
    long = ChatExample.from_row(TableRow("r:3", "r: line 3", ALPACA | {"input": "word " * 60}))
    with pytest.raises(UserError, match=r"r: line 3 has \d{3} tokens before the reply, but the context length is 64"):
        evaluate_chat(model, tokenizer, [long])
