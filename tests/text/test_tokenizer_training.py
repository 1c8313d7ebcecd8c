"""Tokenizer training: the learned tokens of each kind, and the texts that it cannot represent."""

import json
import random
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import (
    BYTES,
    CONTINUATION,
    END_OF_TEXT,
    MAX_BPE_WORD_BYTES,
    MAX_LONG_WORDS_BYTES,
    MAX_WORD_BYTES,
    TOKENIZER_KINDS,
    _count_words,
)
from lit_gpt_scratch.text.wordpiece import train_wordpiece
from tests.conftest import sentences

TEXTS = [sentences(seed) for seed in range(20)]
SIZES = {"bpe": 300, "wordpiece": 600, "unigram": 300, "char": 60, "byte": 258}
LOSSLESS = [kind for kind in TOKENIZER_KINDS if kind != "char"]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: Tokenizer.train(TEXTS, SIZES[kind], kind, ["<|user|>"]) for kind in TOKENIZER_KINDS}


@given(text=st.text())
@settings(max_examples=100)
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


LONG_WORDS = {
    "one character": "^" * 100_000,
    "letters": "".join(random.Random(0).choices("abcdefghij", k=100_000)),
    "genome": "".join(random.Random(0).choices("ACGT", k=200_000)),
    "white space": " " * 100_000,
}


@pytest.mark.parametrize("word", LONG_WORDS)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_long_words_are_learned_and_encoded_in_seconds(kind: str, word: str) -> None:
    """The trainers of ``tokenizers`` take up to minutes for such words, because their run time is quadratic."""
    text = LONG_WORDS[word]
    tokenizer = Tokenizer.train([f"{text} {text}"], 600, kind)
    most = {"bpe": MAX_BPE_WORD_BYTES, "unigram": 16, "wordpiece": MAX_WORD_BYTES, "byte": 1}
    assert max(tokenizer.token_bytes()) <= most[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if kind in ("bpe", "wordpiece"):  # Unigram learns nothing from a text that has only one different word
        assert len(ids) < 0.8 * len(text)


def test_different_long_words_are_limited_and_other_words_are_not() -> None:
    rng = random.Random(0)
    lines = ["".join(rng.choices("ACGT", k=60)) for _ in range(3 * MAX_LONG_WORDS_BYTES // 60)]
    texts = [f"{TEXTS[0]} {lines[0]} {line} {lines[0]}" for line in lines]
    words = _count_words(texts)
    words_of_text = Counter(word for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(TEXTS[0]))
    assert words[f"Ġ{lines[0]}"] == 2 * len(lines) + 1
    assert all(words[word] == count * len(texts) for word, count in words_of_text.items())
    assert sum(len(word) for word in words if word not in words_of_text) == MAX_LONG_WORDS_BYTES


def test_bpe_of_ordinary_text_is_that_of_the_library() -> None:
    """Bit for bit: words of ordinary length are not split."""
    longest = "x" * MAX_BPE_WORD_BYTES
    texts = [*TEXTS, f"{longest}\n{longest}", "Où est 東京?"]
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=[END_OF_TEXT], initial_alphabet=BYTES, show_progress=False),
    )
    assert Tokenizer.train(texts, 320).to_json() == backend.to_str()


ORDINARY = [
    ("USER", "bpe wordpiece unigram"), ("|", "bpe wordpiece unigram char byte"), ("#!", "bpe wordpiece unigram"),
    ("Ġthe", "bpe wordpiece unigram"), ("Ġ|", "bpe wordpiece unigram"), ("é", "bpe wordpiece unigram char byte"),
    ("12", "bpe wordpiece unigram"), ("'s", "bpe wordpiece unigram"), (f"{CONTINUATION}at", "wordpiece"),
    ("東", "char"),
]  # fmt: skip
"""Special tokens, and the kinds in whose vocabulary text may produce a token of the same name."""


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize(("name", "ordinary"), ORDINARY)
def test_special_token_that_text_may_contain_is_rejected(kind: str, name: str, ordinary: str) -> None:
    texts = ["USER USERS | || #! the cat \u9001 é été 東 12 it's 's sat at"] * 9
    if kind in ordinary.split():
        with pytest.raises(UserError, match=r"data.special_tokens: '.*' is an ordinary word or character"):
            Tokenizer.train(texts, 560, kind, [name])
        return
    tokenizer = Tokenizer.train(texts, 560, kind, [name])
    special = tokenizer.special_token_id(name)
    for text in (*texts, name, f"{name}{name}", f"x{name}y", *BYTES):
        assert special not in tokenizer.encode(text)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@given(text=st.text(st.sampled_from("<|user>[INST] é東")))
@settings(max_examples=50)
def test_usual_special_tokens_are_never_encoded_from_text(kind: str, text: str) -> None:
    names = ("<|user|>", "[INST]", "</s>", "<|é|x>")
    tokenizer = with_special_tokens(kind, names)
    special = {tokenizer.special_token_id(name) for name in (*names, END_OF_TEXT)}
    assert len(special) == 5
    assert not special & set(tokenizer.encode(text))


@cache
def with_special_tokens(kind: str, names: tuple[str, ...]) -> Tokenizer:
    """Train on text that consists of the names, so that each would be a token if it could be."""
    return Tokenizer.train([" ".join([name] * 50) for name in names], SIZES[kind], kind, names)


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
