"""Tokenizer training: the learned tokens of each kind, and the texts that it cannot represent."""

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import CONTINUATION, END_OF_TEXT, TOKENIZER_KINDS
from lit_gpt_scratch.text.wordpiece import train_wordpiece
from tests.conftest import sentences

TEXTS = [sentences(seed) for seed in range(20)]
SIZES = {"bpe": 300, "wordpiece": 600, "unigram": 300, "char": 60, "byte": 258}
LOSSLESS = [kind for kind in TOKENIZER_KINDS if kind != "char"]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: Tokenizer.train(TEXTS, SIZES[kind], kind, ["<|user|>"]) for kind in TOKENIZER_KINDS}


@given(text=st.text())
@settings(max_examples=200)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_any_text_round_trips(trained: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(map(tokenizer.stream_decoder(), ids)) == text
    assert sum(tokenizer.token_bytes()[i] for i in ids) == len(text.encode())
    assert tokenizer.round_trip_loss == ""


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_special_tokens_are_not_encoded_from_text(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer, text = trained[kind], f"{TEXTS[0]} {END_OF_TEXT} <|user|>"
    special = {token["content"]: token["id"] for token in json.loads(tokenizer.to_json())["added_tokens"]}
    assert special[END_OF_TEXT] == tokenizer.end_of_text == 0
    assert special["<|user|>"] == 1
    assert not {0, 1} & set(tokenizer.encode(text))
    assert tokenizer.vocab_size <= SIZES[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == tokenizer.encode(text)
    assert [ids.tolist() for ids in tokenizer.encode_many(TEXTS, fast=True)] == [tokenizer.encode(t) for t in TEXTS]


def test_round_trip_loss_of_characters(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["char"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    ids = tokenizer.encode("東")
    assert tokenizer.decode(ids) == "<unk>"
    assert tokenizer.token_bytes()[ids[0]] == 0
    assert "東京" in tokenizer.round_trip_loss


def test_most_frequent_characters_are_kept() -> None:
    tokenizer = Tokenizer.train(["aaabbc"], 4, "char")
    assert tokenizer.decode(tokenizer.encode("abc")) == "ab<unk>"


def test_wordpiece_by_hand() -> None:
    """Hugging Face's course: hug 10, pug 5, pun 12, bun 4, hugs 5.

    "##g" and "##s" occur together 5 times, in all 20 and 5 times: 5 / (20 * 5) = 1/20, above all pairs with "##u"
    (1/36 each). Then those tie, and "h" "##u" comes first. Then "hu" "##gs" has 5 / (15 * 5) = 1/15, "hu" "##g"
    10 / (15 * 15).
    """
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    alphabet = ["h", "##u", "##g", "p", "##n", "b", "##s"]
    assert train_wordpiece(words, [], len(alphabet) + 3, min_count=1) == [*alphabet, "##gs", "hu", "hugs"]


def by_brute_force(words: dict[str, int], steps: int) -> list[str]:
    """The score in exact fractions, with all counts recomputed at each step."""
    rows = {word: [word[0], *("##" + letter for letter in word[1:])] for word in words}
    pieces = list(dict.fromkeys(piece for row in rows.values() for piece in row))
    for _ in range(steps):
        single, together = Counter[str](), Counter[tuple[str, str]]()
        for word, row in rows.items():
            for piece in row:
                single[piece] += words[word]
            for pair in pairwise(row):
                together[pair] += words[word]
        if not together:
            break
        scores = {pair: Fraction(n, single[pair[0]] * single[pair[1]]) for pair, n in together.items()}
        best = {pair for pair, score in scores.items() if score == max(scores.values())}
        pieces.append("|".join(sorted(a + b.removeprefix("##") for a, b in best)))
        if len(best) > 1:
            break  # ties depend on the order
        [(left, right)] = best
        joined = left + right.removeprefix("##")
        for word, row in rows.items():
            place, new = 0, []
            while place < len(row):
                here = row[place : place + 2] == [left, right]
                new.append(joined if here else row[place])
                place += 1 + here
            rows[word] = new
    return pieces


@given(words=st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 50), min_size=1, max_size=8))
def test_wordpiece_merges_the_pair_with_the_best_score(words: dict[str, int]) -> None:
    expected = by_brute_force(words, steps=8)
    learned = train_wordpiece(words, [], len(expected), min_count=1)
    for ours, theirs in zip(learned, expected, strict=False):
        assert ours in theirs.split("|")


def test_wordpiece_is_not_byte_pair_encoding() -> None:
    """The library's WordPiece trainer merges the most frequent pair (issue tracker of ``tokenizers``)."""
    theirs = Backend(models.WordPiece(unk_token="?"))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    ours = Tokenizer.train(TEXTS, 700, "wordpiece")._backend
    vocabulary = {token.replace(CONTINUATION, "##") for token in ours.get_vocab()}
    assert len(vocabulary - theirs.get_vocab().keys()) > 20


def test_transformers_reads_a_wordpiece_file(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained["wordpiece"].save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, "## a ‿ b \n東京 " + "x" * 300):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == trained["wordpiece"].encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(("kind", "least"), [("bpe", 257), ("wordpiece", 513), ("unigram", 257), ("char", 3)])
def test_too_small_vocabulary_is_rejected(kind: str, least: int) -> None:
    with pytest.raises(UserError, match=rf"data.vocab_size is {least - 1}; a {kind} tokenizer .* {least} "):
        Tokenizer.train(TEXTS, least - 1, kind)


def test_gpt2_files_are_read(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    model = json.loads(trained["bpe"].to_json())["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.end_of_text == trained["bpe"].end_of_text
    for text in TEXTS:
        assert loaded.encode(text) == trained["bpe"].encode(text)
    (tmp_path / "vocab.bpe").write_text("nonsense")
    with pytest.raises(UserError, match=r"encoder.json and vocab.bpe are not GPT-2's vocabulary and merges"):
        Tokenizer.load(tmp_path)
