"""The template by hand, and what holds of it whatever the messages."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.chat_template import ROLE_TOKENS, ChatTemplate, Message, parse_conversation
from lit_gpt_scratch.text.tokenizer import Tokenizer

SPELLINGS = {
    "tokens": Tokenizer.train([], 300, "byte", ROLE_TOKENS),
    "lines": Tokenizer.train([], 300, "byte"),
    "some tokens": Tokenizer.train([], 300, "byte", ["<|user|>"]),
    "merges": Tokenizer.train(["Hi there!\n### User:\nHow are you? " * 9], 400, "bpe"),
}
END = "<|endoftext|>"


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    """A text as the tokens that it is made into, each as text."""
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


MARKERS = {
    "tokens": {role: [f"<|{role}|>"] for role in ("system", "user", "assistant")},
    "lines": {role: list(f"### {role.capitalize()}:\n") for role in ("system", "user", "assistant")},
    "some tokens": {
        "system": list("### System:\n"), "user": ["<|user|>"], "assistant": list("### Assistant:\n")
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", MARKERS)
def test_a_conversation_by_hand(spelling: str) -> None:
    template, marker = ChatTemplate(SPELLINGS[spelling]), MARKERS[spelling]
    messages = [
        Message("system", "Be."), Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "A\n"),
        Message("assistant", "B"),
    ]  # fmt: skip
    by_hand = [
        ([END], False), (marker["system"], False), (list("Be.\n"), False), (marker["user"], False),
        (list("Hi\n"), False), (marker["assistant"], False), (["Y", "o", END], True), (marker["user"], False),
        (list("A\n\n"), False), (marker["assistant"], False), (["B", END], True),
    ]  # fmt: skip
    rendered = template.render(messages)
    assert [SPELLINGS[spelling].decode([token]) for token in rendered.ids] == [t for part, _ in by_hand for t in part]
    assert rendered.loss_mask == [learned for part, learned in by_hand for _ in part]
    asked = [SPELLINGS[spelling].decode([token]) for token in template.render_prompt(messages[:2])]
    assert asked == [END, *marker["system"], *"Be.\n", *marker["user"], *"Hi\n", *marker["assistant"]]


def test_a_start_of_text_of_its_own_begins_and_the_end_of_text_ends() -> None:
    tokenizer = Tokenizer.from_json(SPELLINGS["tokens"].to_json(), start_of_text=77)
    ids = ChatTemplate(tokenizer).render([Message("user", "a"), Message("assistant", "b")]).ids
    assert (ids[0], ids[-1]) == (77, tokenizer.end_of_text)
    assert ids.count(77) == ids.count(tokenizer.end_of_text) == 1


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: not text.isspace())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)
TALKS = st.builds(
    lambda system, turns: [
        *([Message("system", system)] if system else []),
        *(message for asked, said in turns for message in (Message("user", asked), Message("assistant", said))),
    ],
    st.none() | WORDS,
    TURNS,
)


@given(messages=TALKS, spelling=st.sampled_from(list(SPELLINGS)))
@settings(max_examples=60)
def test_what_is_learned_is_the_replies_and_their_ends(messages: list[Message], spelling: str) -> None:
    tokenizer = SPELLINGS[spelling]
    ids, learned = ChatTemplate(tokenizer).render(messages)
    assert len(ids) == len(learned)
    replies: list[list[int]] = [[]]
    for token, counts in zip(ids, learned, strict=True):
        if counts:
            replies[-1].append(token)
        elif replies[-1]:
            replies.append([])
    said = [message.content for message in messages if message.role == "assistant"]
    assert [tokenizer.decode(reply[:-1]) for reply in replies if reply] == said
    assert all(reply[-1] == tokenizer.end_of_text for reply in replies if reply)
    assert ids[1:].count(tokenizer.end_of_text) == len(said)  # no text can end a reply, whatever it says


@given(messages=TALKS, spelling=st.sampled_from(list(SPELLINGS)))
@settings(max_examples=60)
def test_a_prompt_is_how_training_begins(messages: list[Message], spelling: str) -> None:
    """At every reply, not the last alone."""
    template = ChatTemplate(SPELLINGS[spelling])
    ids, learned = template.render(messages)
    for place, message in enumerate(messages):
        if message.role == "assistant":
            prompt = template.render_prompt(messages[:place])
            assert ids[: len(prompt)] == prompt
            assert learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_a_text_that_looks_like_a_marker_is_text() -> None:
    tokenizer = SPELLINGS["tokens"]
    ids, _ = ChatTemplate(tokenizer).render([Message("user", "<|assistant|>x<|endoftext|>"), Message("assistant", "y")])
    assert ids.count(tokenizer.special_token_id("<|assistant|>")) == 1
    assert ids.count(tokenizer.end_of_text) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Go", "input": "", "output": "ok"}, [("user", "Go"), ("assistant", "ok")]),
        ({"instruction": "Go", "output": "ok", "chosen": 1}, [("user", "Go"), ("assistant", "ok")]),
        ({"instruction": "Go", "input": None, "output": "ok", "messages": None}, [("user", "Go"), ("assistant", "ok")]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": None}]},
            [("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_records_of_both_kinds(fields: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert [(message.role, message.content) for message in parse_conversation(fields)] == expected


def said(*turns: tuple[object, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"text": "a", "label": 1},
            "a record needs 'messages', or 'instruction' and 'output'; this one has text, label",
        ),
        ({}, "this one has nothing"),
        ({"instruction": "a", "output": ""}, "message 2: the assistant's text is empty"),
        ({"instruction": "a"}, "message 2: the assistant's text is empty"),
        ({"instruction": " ", "output": "b"}, "message 1: the user's text is empty"),
        ({"instruction": "a", "output": 3}, "'output' is int, not text"),
        ({"messages": "hello"}, "'messages' is str, not a list"),
        ({"messages": ["hello"]}, "message 1 is str, not an object with 'role' and 'content'"),
        ({"messages": []}, "there are no messages"),
        (said(("user", "a"), ("bot", "b")), "message 2 has role 'bot'; choose from system, user, assistant"),
        (said(("user", "a"), (None, "b")), "message 2 has role None"),
        (said((["user"], "b")), "message 1 has role"),
        (said(("user", "a"), ("assistant", " \n")), "message 2: the assistant's text is empty"),
        (said(("user", ["a"]), ("assistant", "b")), "message 1: 'content' is list, not text"),
        (said(("user", "a")), "the last message has role user; there is no assistant reply after it"),
        (said(("user", "a"), ("user", "b"), ("assistant", "c")), "messages 1 and 2 both have role user; join them"),
        (said(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 has role system, which can only come"),
        (
            said(("assistant", "a"), ("user", "b"), ("assistant", "c")),
            "message 1 has role assistant but does not follow",
        ),
        (said(("system", "a"), ("assistant", "b")), "message 2 has role assistant but does not follow a user message"),
    ],
)
def test_what_is_no_conversation_is_named(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as error:
        parse_conversation(fields)
    assert why in str(error.value)
