"""The bytes of text that tokens represent: against decoding, and against sums over whole documents."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.text import text_bytes
from lit_gpt_scratch.text.text_bytes import LabelByteCounter
from lit_gpt_scratch.text.token_shards import ShardedTokenStream, TokenShard
from tests.tokenizer_forms import FORMS, PUBLISHED, build_tokenizer

LOSSLESS = ("bpe", "wordpiece", "unigram", "byte", "GPT-2", "Llama 2")
PREFIXED = "RoBERTa with a space before the text"
SAMPLES = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the cat.\n \u2581é東\u0301A")))


@pytest.mark.parametrize("form", FORMS)
@given(text=SAMPLES)
@settings(max_examples=60)
def test_bytes_of_tokens_sum_to_those_of_the_text(form: str, text: str) -> None:
    tokenizer = build_tokenizer(form)
    ids = tokenizer.encode(text)
    sizes = tokenizer.distribute_bytes(ids, len(text.encode()))
    assert len(sizes) == len(ids)
    assert not ids or sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()


@pytest.mark.parametrize("form", [*LOSSLESS, "char", "Mistral", PREFIXED])
@given(text=SAMPLES)
@settings(max_examples=60)
def test_bytes_of_a_token_are_those_that_it_decodes_to(form: str, text: str) -> None:
    tokenizer = build_tokenizer(form)
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    if decoded.removeprefix(" ") != text.removeprefix(" ") or "\ufffd" in text:
        assert form not in LOSSLESS or "\ufffd" in text or "\u2581" in text
        return
    before = np.cumsum(tokenizer.distribute_bytes(ids, len(text.encode())))
    for n in range(1, len(ids) + 1):
        part = tokenizer.decode(ids[:n])
        if "\ufffd" not in part:  # otherwise, the last character is incomplete
            assert before[n - 1] == len(part.encode()) - (len(decoded) - len(text))


def test_characters_that_other_tokenizers_replace_count_their_own_bytes() -> None:
    tokenizer = build_tokenizer("char")
    trained = type(tokenizer).train(["a\u2581b\u2581"], 10, "char")
    ids = trained.encode("a\u2581b")
    assert trained.decode(ids) == "a\u2581b"
    assert [trained.token_bytes()[id_] for id_ in ids] == [1, 3, 1]


@pytest.mark.parametrize("form", FORMS)
def test_loss_of_exactness_is_reported(form: str) -> None:
    """Mistral's removes the space at the start of a text."""
    tokenizer = build_tokenizer(form)
    assert (tokenizer.round_trip_loss == "") == (form in LOSSLESS)


def test_space_before_a_text_is_reported() -> None:
    assert 'becomes " e' in build_tokenizer(PREFIXED).round_trip_loss


def by_hand(weights: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Bytes of text before each position of a stream, from exact fractions; the first token of a document is a mark."""
    before = [0]
    for tokens, size in zip(weights, sizes, strict=True):
        shares = [Fraction(weight) for weight in tokens]
        if not sum(shares):
            shares = [Fraction(0), *[Fraction(1)] * (len(tokens) - 1)] if len(tokens) > 1 else [Fraction(1)]
        base = before[-1]
        before += [base + int(sum(shares[: n + 1]) * size / sum(shares)) for n in range(len(tokens))]
    return before


@given(
    documents=st.lists(st.tuples(st.lists(st.integers(1, 4), max_size=12), st.integers(0, 40)), min_size=1, max_size=9),
    shards=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60)
def test_bytes_of_labels_equal_a_count_by_hand(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[list[int], int]], shards: int, data: st.DataObject
) -> None:
    """Token 0 separates documents, token 1 decodes to nothing, tokens 2 to 4 to 1, 2 and 3 bytes."""
    folder: Path = tmp_path_factory.mktemp("shards")
    token_bytes = np.array([0, 0, 1, 2, 3])
    parts = [part for part in np.array_split(np.arange(len(documents)), shards) if len(part)]
    written = []
    for index, part in enumerate(parts):
        rows = [[0, *documents[n][0]] for n in part]
        lengths = np.array([len(row) for row in rows])
        about = np.stack([np.cumsum(lengths) - lengths, [documents[n][1] for n in part]], axis=1).astype("<u8")
        written.append(TokenShard.write(folder, f"s{index}", np.concatenate(rows).astype("<u2"), about))
    stream = ShardedTokenStream(tuple(written))
    before = by_hand([token_bytes[[0, *ids]].tolist() for ids, _ in documents], [size for _, size in documents])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_bytes, "TOKENS_PER_SUM", 2)
        patch.setattr(text_bytes, "TOKENS_PER_READ", 4)
        counter = LabelByteCounter(stream, token_bytes)
        start = data.draw(st.integers(0, stream.n_tokens - 1))
        length = data.draw(st.integers(1, stream.n_tokens + 3))
        stop = min(start + 1 + length, stream.n_tokens)
        assert counter.count(start, length) == (before[stop] - before[start + 1] if start + 1 < stop else 0)
        step = data.draw(st.integers(1, 9))
        whole = sum(counter.count(at, step) for at in range(0, stream.n_tokens - 1, step))
        assert whole == (before[-1] - before[1])


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("text", ["{}", "x{}y", " {} the", "{}{}", "the {}s"])
def test_no_text_is_encoded_to_a_special_token(form: str, text: str) -> None:
    tokenizer = build_tokenizer(form)
    special = {entry.content: id_ for id_, entry in tokenizer._backend.get_added_tokens_decoder().items()}
    special = {name: id_ for name, id_ in special.items() if id_ != tokenizer.unknown_id}
    for name in special:
        assert not set(special.values()) & set(tokenizer.encode(text.format(name, name)))
    again = type(tokenizer).from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    for name in special:
        assert again.encode(text.format(name, name)) == tokenizer.encode(text.format(name, name))
