"""Packed conversations: windows contain exactly the records, with labels on replies only."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.data import Conversations
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import BinPackingPolicy, InMemoryPlan, RecordTokenStream
from lit_gpt_scratch.text.chat_template import Message
from tests.tokenizer_forms import build_tokenizer

END = 0


def documents(batch: Batch, row: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document in a window, by ``document_ids``."""
    ids, labels, of = (batch[name][row].numpy() for name in ("input_ids", "labels", "document_ids"))
    return [(ids[of == number].tolist(), labels[of == number].tolist()) for number in np.unique(of)]


RECORD = st.lists(st.integers(0, 5), min_size=1, max_size=14)  # the end of text may occur anywhere, and twice


@given(
    records=st.lists(RECORD, min_size=1, max_size=25),
    block_size=st.integers(14, 30),
    policy=st.sampled_from(["best_fit", "one_document"]),
)
@settings(max_examples=100)
def test_windows_contain_every_record_unsplit_and_once(
    records: list[list[int]], block_size: int, policy: BinPackingPolicy
) -> None:
    arrays = [np.array(ids) for ids in records]
    labels = [np.where(ids % 2 == 0, ids + 1, IGNORE_INDEX) for ids in arrays]
    stream = RecordTokenStream([f"row {n}" for n in range(len(records))], arrays, labels)
    windows = PackedDataset([InMemoryPlan(stream, block_size, policy)], block_size, 7, END, document_mask=True)
    batch = windows.make_batch(range(len(windows) + 1))
    found = [document for row in range(len(windows)) for document in documents(batch, row)]
    expected = [(ids, known.tolist()) for ids, known in zip(records, labels, strict=True)]
    fill = batch["input_ids"][:-1].numel() - sum(map(len, records))
    assert sorted(found) == sorted([*expected, *[([END], [IGNORE_INDEX])] * fill])
    assert (batch["labels"][-1] == IGNORE_INDEX).all()
    assert windows.parts[0].cost.padding == fill
    assert [stream.describe_position(token) for token in range(stream.n_tokens)] == [
        f"row {n}" for n, ids in enumerate(records) for _ in ids
    ]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.mark.parametrize("form", ["bpe", "char", "BERT"])
def test_bytes_of_labels_are_those_of_the_replies(tmp_path: Path, form: str) -> None:
    """Also for tokenizers that do not preserve the replies."""
    build_tokenizer(form).save(tmp_path / "tokenizer.json")
    rows = [{"messages": turns(f"Name {n}.", f"It IS {n} é.", "Twice!", f"{n}, 東京")} for n in range(40)]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    data = Conversations(source=str(path), block_size=200, batch_size=2, tokenizer=str(tmp_path / "tokenizer.json"))
    data.prepare_data()
    data.setup("fit")
    counted = sum(int(batch["text_bytes"].sum()) for batch in data.val_dataloader())
    messages = [message for index in data.split_indices["validation"] for message in data.records[index][1].messages]
    assert counted == sum(len(message.content.encode()) for message in messages if message.role == "assistant")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_windows_decode_to_records_and_labels_to_replies(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": turns(f"Name {n}.", f"It is {n}.", "Twice!", f"{n} {n}")} for n in range(40)]
    text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / f"talks{suffix}"
    path.write_text(text, encoding="utf-8")
    data = Conversations(source=str(path), block_size=100, batch_size=2, cache=str(tmp_path), vocab_size=300)
    data.prepare_data()
    data.setup("fit")
    decode = data.tokenizer.decode
    batch = data.train_dataset.make_batch(range(len(data.train_dataset)))
    seen, message = [], []
    for row in range(len(data.train_dataset)):
        for ids, labels in documents(batch, row):
            learned = [label for label in labels if label != IGNORE_INDEX]
            if learned:
                seen.append(decode(ids))
                message.append(decode(learned))
    numbers = [json.loads(data.records[place][1].messages[1].content[6:-1]) for place in data.split_indices["train"]]
    assert sorted(message) == sorted(f"It is {n}.<|endoftext|>{n} {n}<|endoftext|>" for n in numbers)
    assert sorted(seen) == sorted(
        f"<|endoftext|><|user|>Name {n}.\n<|assistant|>It is {n}.<|endoftext|><|user|>Twice!\n<|assistant|>{n} {n}"
        for n in numbers
    )
    assert sum(example.n_labels for example in data.examples["train"]) == int((batch["labels"] != IGNORE_INDEX).sum())


def test_prompt_matches_training_prefix(tmp_path: Path) -> None:
    data = Conversations(cache=str(tmp_path))
    place = int(data.split_indices["test"][0])
    messages = data.records[place][1].messages
    [sequence] = data.examples["test"][0].sequences
    prompt = data.template.render_prompt([*messages[:-1]])
    assert sequence.ids[: len(prompt)].tolist() == prompt
    assert isinstance(messages[-1], Message)
    reply = data.tokenizer.encode(messages[-1].content)
    assert sequence.labels[len(prompt) - 1 :].tolist() == [*reply, data.tokenizer.end_of_text]
