"""Hostile tokenizer files: one error, in seconds, without a message of the Rust library."""

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import tokenizer_validation
from lit_gpt_scratch.text.tokenizer import GPT2_FILES, Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS
from tests.conftest import sentences
from tests.mutations import DEPTH, fuzz, mutate_bytes, mutate_json, nested_json

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEMPLATE = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
    "special_tokens": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: Tokenizer.train([sentences(seed) for seed in range(3)], 600, kind) for kind in TOKENIZER_KINDS}


def changed(tokenizer: Tokenizer, **parts: Any) -> str:
    return json.dumps(json.loads(tokenizer.to_json()) | parts)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": split("(a|a)*b")},
        {"pre_tokenizer": split(r"(.*)*x")},
        {"pre_tokenizer": split(r"(\w+\s?)*;")},
        {"pre_tokenizer": split(r"\s*\s*\s*\s*q")},
        {"pre_tokenizer": split(r"(foo|foofoo)*bar")},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "([a-z]+)*[0-9]"}, "content": ""}},
        {"normalizer": replace(" ", "x" * 1_000_000)},
        {"normalizer": sequence("normalizers", *[replace("a", "aa")] * 40)},
        {"normalizer": sequence("normalizers", *[replace("zq", "zqzqzq")] * 12)},
        {"normalizer": sequence("normalizers", *[{"type": "ByteLevel"}] * 30)},
        {"decoder": sequence("decoders", *[replace("a", "aa")] * 40)},
        {"decoder": replace("a", "x" * 1_000_000)},
        # These panic in the library.
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"post_processor": TEMPLATE},
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}},
    ],
)  # fmt: skip
def test_hostile_tokenizer_is_refused(
    trained: dict[str, Tokenizer],
    parts: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_validation, "PROBE_SECONDS", 1)
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        Tokenizer.from_json(changed(trained["bpe"], **parts))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "panicked" not in capfd.readouterr().err
    assert time.process_time() - began < 5


@pytest.mark.parametrize("longest", [10**9, 201, 1e9, "x", None])
def test_length_of_a_word_is_bounded(trained: dict[str, Tokenizer], longest: object) -> None:
    """The time to encode a word with WordPiece is quadratic in its length: days for 100,000 characters."""
    spec = json.loads(trained["wordpiece"].to_json())
    assert Tokenizer.from_json(json.dumps(spec | {"model": spec["model"] | {"max_input_chars_per_word": 200}}))
    with pytest.raises(UserError, match=r"max_input_chars_per_word is .*; it must be an integer up to 200"):
        Tokenizer.from_json(json.dumps(spec | {"model": spec["model"] | {"max_input_chars_per_word": longest}}))


FILLER = "".join(map(chr, range(0x3041, 0x3060)))


@pytest.mark.parametrize(
    "pattern",
    [
        "[A-Z1-8]|(x+x+)+y", f"[{FILLER}]|(x+x+)+y", f"[{FILLER}]|(x|x)*y", "(x?x?)+y", "(?:(?:x+))+y", "(x*){2,9}y",
        "x{1,9}+y", "(?<a>x+){0}\\g<a>\\g<a>", "(?x)# [\n(x+x+)+y]", "\\c[(x+x+)+y]", "(?i:(x+)+)y", "[]](x+x+)+y",
        f"[{FILLER}]|x*x*x*x*y",
    ],
)  # fmt: skip
def test_patterns_that_backtrack_are_refused_whatever_precedes_them(
    trained: dict[str, Tokenizer], pattern: str
) -> None:
    with pytest.raises(UserError, match=r"catastrophic backtracking|too much time|retry-limit"):
        Tokenizer.from_json(changed(trained["bpe"], pre_tokenizer=split(pattern)))


@pytest.mark.parametrize(
    "pattern",
    [
        LLAMA3, r"(?=(\d{3})+(?!\d))", r" ?[^(\s|[.,!?…。])]+", "(?:ab)+|a{2}b",
        r"[\p{Lu}&&[^\p{Han}]]*[\p{Ll}]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[\p{L}\p{M}]+(?i:'s|'t)?""",
    ],
)  # fmt: skip
def test_patterns_of_published_tokenizers_are_accepted(trained: dict[str, Tokenizer], pattern: str) -> None:
    Tokenizer.from_json(changed(trained["bpe"], pre_tokenizer=split(pattern))).encode("A text, 1234.")


def test_panic_while_encoding_is_one_line(
    trained: dict[str, Tokenizer], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe cannot contain every text."""
    monkeypatch.setattr("lit_gpt_scratch.text.tokenizer.validate_tokenizer_json", lambda text: None)
    tokenizer = Tokenizer.from_json(changed(trained["bpe"], pre_tokenizer=split("(x+x+)+y")))
    for encode in (tokenizer.encode, lambda text: list(tokenizer.encode_many([text]))):
        with pytest.raises(UserError, match=r"cannot encode the text: .*retry-limit-in-match over") as refused:
            encode("x" * 8000)
        assert "\n" not in str(refused.value)
    os.write(2, b"visible")
    assert capfd.readouterr().err == "visible"


def test_token_ids_far_beyond_the_vocabulary_are_refused(trained: dict[str, Tokenizer]) -> None:
    """Lists have an entry for each id: four billion entries would take 32 GB."""
    spec = json.loads(trained["bpe"].to_json())
    spec["model"]["vocab"]["zz"] = 2**32 - 1
    with pytest.raises(UserError, match="but ids up to 4,294,967,295"):
        Tokenizer.from_json(json.dumps(spec))


def test_repeated_keys_cannot_hide_a_component(trained: dict[str, Tokenizer]) -> None:
    """Python keeps the last of two equal keys, while ``tokenizers`` keeps a component that a later null follows."""
    hidden = json.dumps({"pre_tokenizer": split("(a+)+$")})[1:-1]
    with pytest.raises(UserError, match="duplicate key"):
        Tokenizer.from_json(f"{{{hidden}, {changed(trained['bpe'], pre_tokenizer=None)[1:]}")


@pytest.mark.parametrize("kind", sorted(TOKENIZER_KINDS))
def test_own_tokenizers_need_no_probe(
    trained: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_validation, "_probe", lambda text: pytest.fail("started a process"))
    monkeypatch.setattr(tokenizer_validation, "_valid", set())
    loaded = Tokenizer.from_json(trained[kind].to_json())
    assert loaded.encode(sentences(7)) == trained[kind].encode(sentences(7))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
        ])),
        lambda b: setattr(b, "normalizer", normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC(),
        ])),
        lambda b: setattr(b, "decoder", decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])),
        lambda b: setattr(b, "normalizer", normalizers.Replace(Regex(" {2,}"), "▁")),
    ],
    ids=["llama 3", "llama 2", "llama 2 decoder", "collapsed spaces"],
)  # fmt: skip
def test_components_of_published_tokenizers_are_accepted(
    trained: dict[str, Tokenizer], change: Callable[[Backend], None]
) -> None:
    backend = Backend.from_str(trained["bpe"].to_json())
    change(backend)
    assert Tokenizer.from_json(backend.to_str()).vocab_size == trained["bpe"].vocab_size


def test_text_that_a_tokenizer_cannot_encode_is_a_user_error(trained: dict[str, Tokenizer]) -> None:
    spec = json.loads(trained["char"].to_json())
    spec["model"]["unk_token"] = "absent"
    for encode in (lambda tokenizer: tokenizer.encode("東"), lambda tokenizer: list(tokenizer.encode_many(["東"]))):
        with pytest.raises(UserError, match="cannot encode the text"):
            encode(Tokenizer.from_json(json.dumps(spec)))


def load_and_use(text: str) -> None:
    tokenizer = Tokenizer.from_json(text)
    tokenizer.decode(tokenizer.encode(sentences(0, 3)))
    tokenizer.token_bytes()


def fuzz_tokenizers(trained: dict[str, Tokenizer], folder: Path, seeds: range) -> None:
    # Half of the mutations are of a tokenizer with many settings and a small vocabulary.
    small = json.loads(Tokenizer.train(["a b"], 300, "byte").to_json())
    small |= {
        "normalizer": sequence("normalizers", replace("x", "y"), {"type": "Strip", "strip_left": True,
                                                                  "strip_right": False}),
        "decoder": sequence("decoders", replace("y", "x"), {"type": "ByteLevel", "add_prefix_space": True,
                                                            "trim_offsets": True, "use_regex": True}),
    }  # fmt: skip

    def attempt(seed: int, rng: random.Random) -> None:
        spec = small if seed % 2 else json.loads(trained[rng.choice(sorted(trained))].to_json())
        if seed % 10 < 8:
            load_and_use(json.dumps(mutate_json(spec, rng)))
        else:
            load_and_use(mutate_bytes(json.dumps(spec).encode(), rng).decode(errors="replace"))

    fuzz("tokenizer.json", folder, seeds, attempt)


def test_damaged_tokenizers(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    fuzz_tokenizers(trained, tmp_path, range(50))
    for text in (nested_json(), '{"model": ' * DEPTH):
        with pytest.raises(UserError):
            load_and_use(text)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_tokenizers(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    fuzz_tokenizers(trained, tmp_path, range(50, 550))


@pytest.mark.parametrize("name", GPT2_FILES[1])
def test_damaged_gpt2_files(tmp_path: Path, name: str) -> None:
    vocabulary = {character: id_ for id_, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    files = {"vocab.json": json.dumps(vocabulary | {"ab": 256}).encode(), "merges.txt": b"#version: 0.2\na b\n"}
    for seed in range(30):
        rng = random.Random(seed)
        content = mutate_bytes(files[name], rng)
        if name == "vocab.json" and seed % 2:
            content = json.dumps(mutate_json(json.loads(files[name]), rng)).encode()
        for file, written in (files | {name: content}).items():
            (tmp_path / file).write_bytes(written)
        with suppress(UserError):
            Tokenizer.load(tmp_path).encode("ab")
