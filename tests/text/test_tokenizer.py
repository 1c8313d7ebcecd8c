"""The tokenizer: lossless round trips, files and their checksums, no special tokens from text."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.conftest import sentences


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(seed) for seed in range(5)], 290)


@given(text=st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.train(["some text"], 260)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(map(tokenizer.stream_decoder(), ids)) == text
    sizes = tokenizer.token_bytes()
    assert sum(sizes[i] for i in ids) == len(text.encode())
    assert tokenizer.end_of_text not in ids


def test_text_cannot_encode_to_the_end_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"before{END_OF_TEXT}after")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == f"before{END_OF_TEXT}after"
    assert next(iter(tokenizer.encode_many([END_OF_TEXT]))).tolist() == tokenizer.encode(END_OF_TEXT)


def test_merges_are_the_most_frequent_pairs() -> None:
    """Against byte-pair encoding by hand (Sennrich et al. 2016): "ab" occurs three times, then "ab c" twice."""
    tokenizer = Tokenizer.train(["abc", "abc", "abd"], 257 + 2)
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    assert [tuple(merge) for merge in merges] == [("a", "b"), ("ab", "c")]


def test_save_and_load_keep_the_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    again = Tokenizer.load(path)
    assert again.vocab_size == tokenizer.vocab_size == 290
    assert again.encode(sentences(99)) == tokenizer.encode(sentences(99))
    assert again.to_json() == tokenizer.to_json()
    assert END_OF_TEXT not in "".join(again.decode(again.encode(f"{END_OF_TEXT} x")).split(END_OF_TEXT)[1:])


def test_encode_many_equals_encode(tokenizer: Tokenizer) -> None:
    texts = [sentences(seed) for seed in range(20)]
    assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == [tokenizer.encode(text) for text in texts]


def test_vocabulary_smaller_than_the_bytes_is_rejected() -> None:
    with pytest.raises(UserError, match=r"data.vocab_size is 256; .* 257"):
        Tokenizer.train(["x"], 256)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xff", b"not json", b'{"model": 3}'])
def test_bad_tokenizer_file_is_reported(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json is not a usable tokenizer file"):
        Tokenizer.load(path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("exploded",))


def test_altered_file_is_rejected(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, rng = tmp_path / "tokenizer.json", random.Random(0)
    tokenizer.save(path)
    assert Tokenizer.load(path).to_json() == tokenizer.to_json()
    whole = path.read_bytes()
    other = Tokenizer.train([sentences(99)], 280).to_json().encode()
    contents = [b"", b"text", b"{}", b"null", other, pickle.dumps(Bomb()), whole[::-1], whole + b" "]
    for _ in range(1200):
        here, there = sorted(rng.sample(range(len(whole)), 2))
        contents.append(altered(whole, here, there, 1 << rng.randrange(8))[rng.randrange(4)])
    rejected = 0
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            Tokenizer.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        rejected += 1
    assert rejected > 1200
    assert not Path("exploded").exists()


def altered(whole: bytes, here: int, there: int, bit: int) -> list[bytes]:
    """One bit flipped, truncated, a part missing, two parts swapped."""
    flipped = whole[:here] + bytes([whole[here] ^ bit]) + whole[here + 1 :]
    return [flipped, whole[:here], whole[:here] + whole[there:], whole[there:] + whole[:there]]


def test_stream_decoder_keeps_the_space_after_a_prompt() -> None:
    """Llama 2's and Mistral's decoder: only the first word's space is stripped."""
    backend = Backend(models.BPE({"<unk>": 0, "</s>": 1, "\u2581the": 2, "\u2581cat": 3}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.stream_decoder()(3) == "cat"
    assert tokenizer.stream_decoder([2])(3) == " cat"
