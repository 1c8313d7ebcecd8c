"""Rules of thumb by which well-known corpora were cleaned. Each is chosen; none is applied by default."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from lit_gpt_scratch.text.cleaning import PerDocumentStep, RejectionReason
from lit_gpt_scratch.text.document import Document

STOP_WORDS: Final = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


@dataclass(frozen=True)
class GopherQuality(PerDocumentStep):
    """Does it look like English prose? Gopher's quality rules (https://arxiv.org/abs/2112.11446, appendix A.1.1).

    Args:
        words_at_least: Words in the document.
        words_at_most: Words in the document.
        mean_word_length: Characters, least and most.
        symbols_per_word: Hash signs, and ellipses, of each at most.
        bullet_lines: Share of lines that begin with a bullet, at most.
        ellipsis_lines: Share of lines that end with an ellipsis, at most.
        alphabetic_words: Share of words with a letter in them, at least.
        stop_words: How many of eight very common English words occur, at least; 0 for other languages.
    """

    words_at_least: int = 50
    words_at_most: int = 100_000
    mean_word_length: tuple[float, float] = (3.0, 10.0)
    symbols_per_word: float = 0.1
    bullet_lines: float = 0.9
    ellipsis_lines: float = 0.3
    alphabetic_words: float = 0.8
    stop_words: int = 2

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Apply one rule after the other; the first that is broken is the reason."""
        text, words = document.text, document.text.split()
        if not self.words_at_least <= len(words) <= self.words_at_most or not words:
            return "number of words"
        if not self.mean_word_length[0] <= sum(map(len, words)) / len(words) <= self.mean_word_length[1]:
            return "mean word length"
        if text.count("#") > self.symbols_per_word * len(words):
            return "hash signs"
        if text.count("...") + text.count("…") > self.symbols_per_word * len(words):
            return "ellipses"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(("•", "‣", "●", "-", "*")) for line in lines) > self.bullet_lines * len(lines):
            return "lines that begin with a bullet"
        if sum(line.endswith(("...", "…")) for line in lines) > self.ellipsis_lines * len(lines):
            return "lines that end with an ellipsis"
        if sum(any(map(str.isalpha, word)) for word in words) < self.alphabetic_words * len(words):
            return "words without a letter"
        common = STOP_WORDS & {word.strip(".,;:!?\"'()").lower() for word in words}
        if len(common) < self.stop_words:
            return "no common English words"
        return document


TOP: Final = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATED: Final = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class GopherRepetition(PerDocumentStep):
    """Does it say the same thing over and over? Gopher's rules (https://arxiv.org/abs/2112.11446, table A1).

    Args:
        lines: Share of lines that stand there already, at most.
        paragraphs: Share of paragraphs that stand there already, at most.
        line_characters: Share of characters in such lines, at most.
        paragraph_characters: Share of characters in such paragraphs, at most.
        ngrams: Whether the most common 2- to 4-gram, and all repeated 5- to 10-grams, are weighed against the text
            by the paper's shares (20% to 16%, 15% to 10% of the characters of all words).
    """

    lines: float = 0.30
    paragraphs: float = 0.30
    line_characters: float = 0.20
    paragraph_characters: float = 0.20
    ngrams: bool = True

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Apply one rule after the other; the first that is broken is the reason."""
        text = document.text
        for name, parts, share, in_them in (
            ("lines", text.splitlines(), self.lines, self.line_characters),
            ("paragraphs", text.split("\n\n"), self.paragraphs, self.paragraph_characters),
        ):
            parts = [part.strip() for part in parts if part.strip()]
            again = list(_again(parts))
            if len(again) > share * len(parts):
                return f"repeated {name}"
            if sum(map(len, again)) > in_them * sum(map(len, parts)):
                return f"characters in repeated {name}"
        if self.ngrams:
            words = text.split()
            characters = sum(map(len, words))
            for n, most in TOP.items():
                if _top(words, n) > most * characters:
                    return f"most common {n}-gram"
            for n, most in DUPLICATED.items():
                if _duplicated(words, n) > most * characters:
                    return f"repeated {n}-grams"
        return document


def _again(parts: Iterable[str]) -> Iterable[str]:
    seen: set[str] = set()
    for part in parts:
        if part in seen:
            yield part
        seen.add(part)


def _top(words: list[str], n: int) -> int:
    """Characters in all occurrences of the most common n-gram, if it occurs more than once."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0
    often = max(counts.values())
    return 0 if often == 1 else often * max(sum(map(len, gram)) for gram, count in counts.items() if count == often)


def _duplicated(words: list[str], n: int) -> int:
    """Characters in words that lie in an n-gram that occurs more than once, no character counted twice."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    counts = Counter(grams)
    inside = [False] * len(words)
    for place, gram in enumerate(grams):
        if counts[gram] > 1:
            inside[place : place + n] = [True] * n
    return sum(len(word) for word, within in zip(words, inside, strict=True) if within)


@dataclass(frozen=True)
class C4(PerDocumentStep):
    """Keep sentences, drop pages: the rules of C4 (https://arxiv.org/abs/1910.10683, section 2.2).

    Lines without a full stop, exclamation mark, question mark or closing quote at their end, with fewer than
    ``words_per_line`` words, with "javascript" or about cookies and policies are dropped; a page with a curly
    bracket, with "lorem ipsum" or with fewer than ``sentences`` sentences is rejected. Not applied: the list of bad
    words, the language filter, and the removal of spans of three sentences that stand elsewhere.

    Args:
        words_per_line: Words in a line, at least.
        sentences: Sentences in the rest, at least.
        curly_brackets: Whether a page with one is rejected, as source code is.
    """

    words_per_line: int = 5
    sentences: int = 3
    curly_brackets: bool = True

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Keep the sentences, or say what is wrong with the page."""
        lowered = document.text.lower()
        if "lorem ipsum" in lowered:
            return "lorem ipsum"
        if self.curly_brackets and "{" in lowered:
            return "curly bracket"
        kept = [line for line in document.text.splitlines() if self._is_prose(line.strip())]
        text = "\n".join(kept)
        if len(SENTENCE_END.findall(text)) < self.sentences:
            return f"fewer than {self.sentences} sentences"
        return replace(document, text=text)

    def _is_prose(self, line: str) -> bool:
        lowered = line.lower()
        return (
            line.endswith((".", "!", "?", '"', "”"))
            and not line.endswith("...")
            and len(line.split()) >= self.words_per_line
            and "javascript" not in lowered
            and not any(phrase in lowered for phrase in POLICY)
        )


SENTENCE_END: Final = re.compile(r"[.!?][\"\u201d\u2019')\]]*(?=\s|$)")
POLICY: Final = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
