"""Encoding a corpus several times as fast gives the same ids, or is not done."""

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


def test_the_same_ids(backend: Backend, texts: list[str]) -> None:
    proven, rng = fast_encoder.build_tiktoken_encoding(backend), random.Random(0)
    assert proven is not None
    odd = ["", "a" * 3000, " " * 3000, "ab" * 700 + " c", "<|endoftext|> <|user|>", "\r\n \n\t", "don't 12,5 x"]
    corpus = [*texts, *(random_text(rng) for _ in range(10_000)), *odd]
    ours, theirs = (fast_encoder.encode_batch(backend, encoding, corpus) for encoding in (proven, None))
    assert all(a.tolist() == b.tolist() for a, b in zip(ours, theirs, strict=True))


def altered(change: str) -> Backend:
    about: dict[str, Any] = json.loads(
        tokenizer_training.train_tokenizer("bpe", [sentences(seed) for seed in range(20)], 290).to_str()
    )
    model = about["model"]
    if change == "merges in another order":
        model["merges"][3], model["merges"][30] = model["merges"][30], model["merges"][3]
    if change == "a token that no merge makes":
        model["vocab"]["zqzq"] = len(model["vocab"])
    if change == "a token that is not reached":
        model["vocab"] |= {"zq": 290, "qj": 291, "zqj": 292}
        model["merges"] += [["z", "q"], ["q", "j"], ["z", "qj"]]
    if change == "a special token that merges make":
        made = "".join(model["merges"][0])
        about["added_tokens"].append({**about["added_tokens"][0], "id": model["vocab"][made], "content": made})
    if change == "normaliser":
        about["normalizer"] = {"type": "NFKC"}
    if change == "other words":
        about["pre_tokenizer"]["add_prefix_space"] = True
    if change == "a word added":
        about["added_tokens"].append({**about["added_tokens"][0], "id": 290, "content": "thing", "special": False})
    backend = Backend.from_str(json.dumps(about))
    backend.encode_special_tokens = change != "special tokens that texts can hold"
    return backend


def test_unaltered_is_proven() -> None:
    assert fast_encoder.build_tiktoken_encoding(altered("nothing")) is not None


@pytest.mark.parametrize(
    "change",
    ["merges in another order", "a token that no merge makes", "a token that is not reached", "normaliser",
     "a special token that merges make", "other words", "a word added", "special tokens that texts can hold"],
)  # fmt: skip
def test_what_could_differ_is_left_to_the_library(change: str) -> None:
    backend = altered(change)
    assert fast_encoder.build_tiktoken_encoding(backend) is None
    assert [ids.tolist() for ids in fast_encoder.encode_batch(backend, None, ["a b"])] == [backend.encode("a b").ids]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "char"])
def test_other_kinds_are_left_to_the_library(kind: str) -> None:
    assert fast_encoder.build_tiktoken_encoding(tokenizer_training.train_tokenizer(kind, [sentences(1)], 600)) is None
