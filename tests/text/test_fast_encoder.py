"""The fast encoder gives the same ids as ``tokenizers``, or is not used."""

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.text import fast_encoder, tokenizer_training
from lit_gpt_scratch.text.sources import read_documents
from tests.conftest import sentences


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A tenth of the standard library."""
    return [document.text for place, document in enumerate(read_documents("stdlib")) if place % 10 == 0]


@pytest.fixture(scope="module", params=[300, 4000])
def backend(request: pytest.FixtureRequest, texts: list[str]) -> Backend:
    backend = tokenizer_training.train_tokenizer("bpe", texts, request.param, ["<|user|>"])
    backend.encode_special_tokens = True
    return backend


def random_text(rng: random.Random) -> str:
    upto = rng.choice([0x80, 0x300, 0x3000, 0x10000, 0x110000])
    codes = [code for _ in range(rng.randrange(60)) if not 0xD800 <= (code := rng.randrange(upto)) < 0xE000]
    return "".join(map(chr, codes))


def test_ids_are_the_same(backend: Backend, texts: list[str]) -> None:
    proven, rng = fast_encoder.build_tiktoken_encoding(backend), random.Random(0)
    assert proven is not None
    odd = [
        "",
        "a" * 3000,
        " " * 3000,
        "ab" * 700 + " c",
        "<|endoftext|> <|user|>",
        "\r\n \n\t",
        "don't 12,5 x",
        "^\x1c" * 900,
    ]
    corpus = [*texts, *(random_text(rng) for _ in range(3_000)), *odd]
    ours, theirs = (fast_encoder.encode_batch(backend, encoding, corpus) for encoding in (proven, None))
    assert all(a.tolist() == b.tolist() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("separator", fast_encoder.SEPARATORS)
def test_word_with_separators_is_not_encoded_in_quadratic_time(backend: Backend, separator: str) -> None:
    """Python splits this single word at separators, but the pre-tokenization pattern does not."""
    word = f"^{separator}" * 2_000
    [(token, _)] = backend.pre_tokenizer.pre_tokenize_str(word)
    assert len(token) == len(word)
    assert fast_encoder._may_have_long_words(word)  # so tiktoken, whose version 0.12 takes quadratic time, is not used
    [ids] = fast_encoder.encode_batch(backend, fast_encoder.build_tiktoken_encoding(backend), [word])
    assert ids.tolist() == backend.encode(word, add_special_tokens=False).ids


def altered(change: str) -> Backend:
    about: dict[str, Any] = json.loads(
        tokenizer_training.train_tokenizer("bpe", [sentences(seed) for seed in range(20)], 290).to_str()
    )
    model = about["model"]
    if change == "reordered merges":
        model["merges"][3], model["merges"][30] = model["merges"][30], model["merges"][3]
    if change == "a token without a merge":
        model["vocab"]["zqzq"] = len(model["vocab"])
    if change == "an unreachable token":
        model["vocab"] |= {"zq": 290, "qj": 291, "zqj": 292}
        model["merges"] += [["z", "q"], ["q", "j"], ["z", "qj"]]
    if change == "a special token from merges":
        made = "".join(model["merges"][0])
        about["added_tokens"].append({**about["added_tokens"][0], "id": model["vocab"][made], "content": made})
    if change == "normaliser":
        about["normalizer"] = {"type": "NFKC"}
    if change == "another pre-tokenizer":
        about["pre_tokenizer"]["add_prefix_space"] = True
    if change == "an added word":
        about["added_tokens"].append({**about["added_tokens"][0], "id": 290, "content": "thing", "special": False})
    backend = Backend.from_str(json.dumps(about))
    backend.encode_special_tokens = change != "special tokens encoded from text"
    return backend


def test_unaltered_tokenizer_is_proven() -> None:
    assert fast_encoder.build_tiktoken_encoding(altered("nothing")) is not None


@pytest.mark.parametrize(
    "change",
    ["reordered merges", "a token without a merge", "an unreachable token", "normaliser",
     "a special token from merges", "another pre-tokenizer", "an added word", "special tokens encoded from text"],
)  # fmt: skip
def test_unproven_tokenizers_use_the_library(change: str) -> None:
    backend = altered(change)
    assert fast_encoder.build_tiktoken_encoding(backend) is None
    assert [ids.tolist() for ids in fast_encoder.encode_batch(backend, None, ["a b"])] == [backend.encode("a b").ids]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "char"])
def test_other_kinds_use_the_library(kind: str) -> None:
    assert fast_encoder.build_tiktoken_encoding(tokenizer_training.train_tokenizer(kind, [sentences(1)], 600)) is None
