"""Preference pairs: padded batches against brute force, row formats, and rejected rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data import Preferences
from lit_gpt_scratch.data.preferences import PreferencePair, PreferencePairDataset
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.chat_template import Message
from lit_gpt_scratch.text.verifiable_rewards import full_stop, no_digit

FILL = 99
IDS = st.lists(st.integers(0, 98), min_size=1, max_size=13)


@given(texts=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=60)
def test_padded_batches_match_brute_force(texts: list[tuple[list[int], list[int]]], data: st.DataObject) -> None:
    pairs = [tuple(EncodedSequence(np.array(ids), np.array(ids) + 1) for ids in pair) for pair in texts]
    indices = data.draw(st.lists(st.integers(0, len(texts)), min_size=1, max_size=8))
    batch = PreferencePairDataset(pairs, 64, FILL).make_batch(indices)
    taken = [texts[index] if index < len(texts) else ([], []) for index in indices]
    rows = [pair[0] for pair in taken] + [pair[1] for pair in taken]
    width = batch["input_ids"].shape[1]
    assert width == max(8, -(-max(map(len, rows)) // 8) * 8)
    assert batch["input_ids"].tolist() == [ids + [FILL] * (width - len(ids)) for ids in rows]
    assert batch["labels"].tolist() == [[i + 1 for i in ids] + [IGNORE_INDEX] * (width - len(ids)) for ids in rows]
    assert batch["lengths"].tolist() == [len(ids) for ids in rows]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pair_is_the_conversation_with_each_reply(cache: Path) -> None:
    """Labels cover only the last reply and its end of text; the inputs are the whole conversation."""
    data = Preferences(cache=str(cache))
    prompt = [Message("user", "Repeat it."), Message("assistant", "apple"), Message("user", "And twice?")]
    chosen, rejected = data.encode_record(PreferencePair(prompt, "apple apple.", "no"))
    for sequence, reply in ((chosen, "apple apple."), (rejected, "no")):
        ids = data.template.render_prompt(prompt) + data.tokenizer.encode(reply) + [data.tokenizer.end_of_text]
        learned = len(data.tokenizer.encode(reply)) + 1
        assert sequence.ids.tolist() == ids
        assert sequence.labels.tolist() == [IGNORE_INDEX] * (len(ids) - learned - 1) + ids[-learned:] + [IGNORE_INDEX]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say so.", "chosen": "So.", "rejected": "No."},
        {"prompt": [{"role": "user", "content": "Say so."}], "chosen": "So.", "rejected": "No."},
        {"instruction": "Say so.", "input": "", "output": "Whatever.", "chosen": "So.", "rejected": "No."},
        {"prompt": "Say so.", "chosen": [{"role": "assistant", "content": "So."}], "rejected": "No."},
    ],
)
def test_row_formats(row: dict[str, Any]) -> None:
    assert Preferences().parse_row(row) == PreferencePair([Message("user", "Say so.")], "So.", "No.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal, so no reply is preferred"),
        ({"chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": None, "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "message 1 has role user and no content"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "a record must have 'prompt' or 'instruction'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be a list, but its type is int"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "there are no messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, "has role assistant"),
        ({"chosen": [{"role": "user", "content": "x"}], "rejected": "b"}, "'chosen' must be a single assistant"),
        ({"prompt": "long " * 200, "chosen": "a", "rejected": "b"}, "more than the maximum of 64"),
    ],
)
def test_invalid_row_is_reported_with_its_location(
    tmp_path: Path, cache: Path, row: dict[str, Any], message: str
) -> None:
    rows = [{"prompt": f"Prompt {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
    rows[4] = {"prompt": "Prompt", **row}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = Preferences(source=str(path), cache=str(cache), block_size=64, tokenizer="byte")
    with pytest.raises(UserError, match=f"pairs.jsonl: line 5.*{message}"):
        data.prepare_data()


def test_ties_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": "ab"[n % 2]} for n in range(20)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert len(Preferences(source=str(path), ties="drop").records) == 10
    with pytest.raises(UserError, match=r"data\.ties is keep"):
        Preferences(ties="keep")  # type: ignore[arg-type]


def test_truncated_pairs_still_differ(tmp_path: Path, cache: Path) -> None:
    """Of three long pairs, one differs only past the limit, and one has a prompt that leaves no space for a reply."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(30)]
    long = [("p", "y" * 90, "n" * 90), ("p", "y" * 90 + "!", "y" * 90), ("p" * 90, "yes", "no")]
    rows += [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in long]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = Preferences(source=str(path), cache=str(cache), block_size=64, tokenizer="byte", too_long="cut")
    found = [example for side in data.examples.values() for example in side]
    assert len(found) == 31
    assert max(example.n_tokens for example in found) == 64
    assert all(sequence.n_labels for example in found for sequence in example.sequences)


def test_reply_check(tmp_path: Path) -> None:
    assert Preferences().reply_check is full_stop
    assert Preferences(checkable="no_digit").reply_check is no_digit
    assert Preferences(source="some.jsonl").reply_check is None
    assert Preferences(source="some.jsonl", checkable="no_digit").reply_check is no_digit
    with pytest.raises(UserError, match="verifiable reward politeness not found"):
        Preferences(checkable="politeness")
