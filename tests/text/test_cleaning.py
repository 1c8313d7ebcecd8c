"""Cleaning steps: each has its documented effect and no other."""

import random
import sys
import types
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import (
    ControlCharacters,
    Length,
    MaskContacts,
    PerDocumentStep,
    UnicodeNormalization,
    Whitespace,
)
from lit_gpt_scratch.text.decontamination import Leakage
from lit_gpt_scratch.text.document import Document
from lit_gpt_scratch.text.duplicates import NearDuplicates
from lit_gpt_scratch.text.quality import C4, REPEATED_NGRAM_SHARES, TOP_NGRAM_SHARES, GopherQuality, GopherRepetition


def after(step: PerDocumentStep, text: str) -> str | None:
    """The text after a step, or None if it rejects the document."""
    result = step(Document("id", text))
    return None if isinstance(result, str) else result.text


def reason(step: PerDocumentStep, text: str) -> str:
    result = step(Document("id", text))
    return result if isinstance(result, str) else ""


@pytest.mark.parametrize(
    ("step", "before", "expected"),
    [
        (UnicodeNormalization(), "e\u0301 \ufb01 \uff21", "\u00e9 \ufb01 \uff21"),
        (UnicodeNormalization("NFKC"), "e\u0301 \ufb01 \uff21", "\u00e9 fi A"),
        (UnicodeNormalization("NFD"), "\u00e9", "e\u0301"),
        (ControlCharacters(), "a\u2060b\ufffe\uffffc", "abc"),
        (ControlCharacters(), "\ufeffa\0b\x07\tc\r\nd\x1b[0m\u200be\u200df\x0c", "ab\tc\r\nd[0me\u200df\x0c"),
        (Whitespace(), "a  b \t\r\n\r\n\r\n\n  c\rd\u2028e", "a  b\n\n  c\nd\ne"),
        (Whitespace(blank_lines=0), "a\n\n\nb", "a\nb"),
        (Whitespace(spaces=True), "  a \t b\u00a0c", "  a b c"),
        (Length(at_least=3), "ab", None),
        (Length(at_least=3), "abc", "abc"),
        (Length(at_most=3), "abcd", None),
        (MaskContacts(), "to a.b+c@mail.example.co.uk, or not@home", "to email@example.com, or not@home"),
        (MaskContacts(email="E", ip="I"), "x@y.org 10.0.0.255 10.0.0.256 1.2.3.4.5", "E I 10.0.0.256 1.2.3.4.5"),
        (MaskContacts(ip="I"), "2001:db8::ff00:42:8329, fe80::1, 12:30:45", "I, I, 12:30:45"),
        (MaskContacts(ip="I"), "a::b, x[10::20], ace::Face, ::1", "a::b, x[10::20], ace::Face, ::1"),
        (MaskContacts(ip="I"), "http://192.168.1.10:8080/ and 8.8.8.8.", "http://I:8080/ and I."),
    ],
)  # fmt: skip
def test_step_examples(step: PerDocumentStep, before: str, expected: str | None) -> None:
    assert after(step, before) == expected


PURE = [UnicodeNormalization(), ControlCharacters(), Whitespace(), Whitespace(0, spaces=True), MaskContacts()]


@pytest.mark.parametrize("step", PURE, ids=repr)
@given(text=st.text(max_size=80))
@settings(max_examples=60)
def test_steps_are_idempotent(step: PerDocumentStep, text: str) -> None:
    once = after(step, text)
    assert once is not None
    assert after(step, once) == once


@given(text=st.text(max_size=200))
@settings(max_examples=100)
def test_only_invisible_characters_are_removed(text: str) -> None:
    kept = after(ControlCharacters(), text)
    seen = [c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cn") or c in "\t\n\r\x0c\x85"]
    assert [c for c in kept or "" if c in seen] == seen


PROSE = (
    "The people of the town have always known that the river would rise. They built with it in mind, and to the "
    "south of the bridge they left a field for the water to be wide in. Nobody lives there now."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE * 2, ""),
        ("too few words", "number of words"),
        ("word " * 100_001, "number of words"),
        ("a b c d e " * 20, "mean word length"),
        ("extraordinarily incomprehensible " * 30, "mean word length"),
        (f"{PROSE} {PROSE}" + " # tag" * 20, "hash signs"),
        (f"{PROSE} {PROSE}" + " and so ..." * 20, "ellipses"),
        ("\n".join(f"- {PROSE}" for _ in range(10)), "lines that begin with a bullet"),
        ("\n".join([f"{PROSE} and more…", PROSE, PROSE]), "lines that end with an ellipsis"),
        (f"{PROSE} {PROSE}" + " 1984" * 30, "words without a letter"),
        ("Der Fluss war schon immer so breit gewesen wie heute. " * 9, "no common English words"),
    ],
)  # fmt: skip
def test_gopher_quality_rules(text: str, expected: str) -> None:
    assert reason(GopherQuality(), text) == expected


def test_gopher_repetition_rules() -> None:
    lines = [f"line number {n} says something of its own" for n in range(10)]
    assert reason(GopherRepetition(ngrams=False), "\n".join(lines)) == ""
    # Four of thirteen lines occurred before: 31%.
    assert reason(GopherRepetition(ngrams=False), "\n".join([*lines[:9], *lines[:4]])) == "repeated lines"
    assert reason(GopherRepetition(ngrams=False), "\n".join([*lines, *lines[:4]])) == "characters in repeated lines"
    long, short = "x" * 200, [f"line {n}" for n in range(9)]
    assert reason(GopherRepetition(ngrams=False), "\n".join([*short, long, long])) == "characters in repeated lines"
    paragraphs = "\n\n".join(["one\ntwo"] * 2 + ["three\nfour", "five\nsix"])
    assert reason(GopherRepetition(lines=1, line_characters=1, ngrams=False), paragraphs) == (
        "characters in repeated paragraphs"
    )
    assert reason(GopherRepetition(), "ab cd " * 2 + " ".join(f"w{n}x{n}" for n in range(9))) == ""
    assert reason(GopherRepetition(), " ".join(f"ab cd w{n}" for n in range(9))) == "most common 2-gram"
    # 80 of 455 characters, 18%, are in repeated n-grams; 40, 9%, in the most common 4-gram.
    phrase, others = "alpha bravo delta gamma omega kappa sigma theta", " ".join(f"w{n:04}" for n in range(60))
    assert reason(GopherRepetition(), f"{phrase} {others} {phrase}") == "repeated 5-grams"


@given(words=st.lists(st.sampled_from("abcd"), min_size=0, max_size=40), n=st.integers(2, 6))
@settings(max_examples=200)
def test_repeated_ngrams_match_brute_force(words: list[str], n: int) -> None:
    from lit_gpt_scratch.text.quality import _repeated_ngram_characters

    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    covered = {i + k for i, gram in enumerate(grams) if grams.count(gram) > 1 for k in range(n)}
    assert _repeated_ngram_characters(words, n) == len(covered)


def test_c4_rules() -> None:
    sentences = [f"This is the sentence of number {n}." for n in range(6)]
    page = [
        "Menu",
        *sentences,
        "no full stop here",
        "It is too short.",
        "Please enable Javascript to go on.",
        "By going on you accept our cookie policy.",
        "And so it went on and on...",
    ]
    assert after(C4(), "\n".join(page)) == "\n".join(sentences)
    assert reason(C4(), "\n".join(sentences[:2])) == "fewer than 3 sentences"
    assert after(
        C4(), "\n".join([*sentences, "Read our terms of use, all of them.", "See the Privacy Policy of ours."])
    ) == ("\n".join(sentences))
    assert reason(C4(), "\n".join([*sentences, "int main() { return 0; }"])) == "curly bracket"
    assert after(C4(curly_brackets=False), "\n".join([*sentences, "set {a}"])) == "\n".join(sentences)
    assert reason(C4(), "\n".join([*sentences, "Lorem ipsum dolor."])) == "lorem ipsum"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Length(at_least=5, at_most=4),
        lambda: Whitespace(blank_lines=-1),
        lambda: NearDuplicates(similarity=0),
        lambda: NearDuplicates(similarity=0.4),
        lambda: NearDuplicates(permutations=100, bands=32),
        lambda: Leakage(words=0),
    ],
)
def test_invalid_settings_are_rejected(make: object) -> None:
    with pytest.raises(UserError, match=r"data\.cleaning: \w+\.\w+ "):
        make()  # type: ignore[operator]


def test_leakage_matches_brute_force() -> None:
    """Against sets of word tuples, on random texts from a small vocabulary; case and commas are ignored."""
    rng = random.Random(0)

    def text(words: int) -> list[str]:
        return rng.choices(["one", "two", "three"], k=words)

    for _ in range(40):
        held_out = [text(rng.randrange(0, 30)) for _ in range(3)]
        training = [text(rng.randrange(0, 30)) for _ in range(30)] + [list(held_out[0])]
        n = 11
        rejection_of = Leakage(words=n).build_filter(Document("", " ".join(words)) for words in held_out)

        def ngrams(words: list[str], n: int = n) -> set[tuple[str, ...]]:
            return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

        def leaks(words: list[str], held_out: list[list[str]] = held_out, n: int = n) -> bool:
            for of in held_out:
                if len(of) < 8:  # too short to be matched inside a document: only as a whole
                    if of and of == words:
                        return True
                elif ngrams(words, min(len(of), n)) & ngrams(of, min(len(of), n)):
                    return True
            return False

        for words in training:
            document = Document("", ", ".join(words).title())
            assert (rejection_of(document) is not None) == leaks(words)


def test_gopher_ngram_limits_match_the_paper() -> None:
    """Table A1 of https://arxiv.org/abs/2112.11446."""
    assert TOP_NGRAM_SHARES == {2: 0.20, 3: 0.18, 4: 0.16}
    assert REPEATED_NGRAM_SHARES == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def test_step_defined_in_a_notebook_hashes_its_code() -> None:
    hashes = []
    for suffix in ("a", "b"):
        scope: dict[str, Any] = {"__name__": "__main__", "PerDocumentStep": PerDocumentStep, "replace": replace}
        exec(
            "class Mine(PerDocumentStep):\n"
            f"    def __call__(self, document): return replace(document, text=document.text + '{suffix}')",
            scope,
        )
        scope["Mine"].__module__ = "no_such_module"
        hashes.append(_source_hash(scope["Mine"]))
    assert len(set(hashes)) == 2


def _source_hash(step: type[PerDocumentStep]) -> str:
    """As in an interactive session: the module has no source file."""
    sys.modules["no_such_module"] = types.ModuleType("no_such_module")
    try:
        return step().source_hash
    finally:
        del sys.modules["no_such_module"]


def test_step_name_and_source_hash() -> None:
    assert Whitespace().name == "Whitespace"
    assert Whitespace().source_hash == Length().source_hash != C4().source_hash
    assert repr(replace(Whitespace(), blank_lines=2)) != repr(Whitespace())
