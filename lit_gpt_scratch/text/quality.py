"""Quality filters with the published rules of Gopher and C4; no filter is enabled by default."""

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
    """Cleaning step with Gopher's quality rules for English text (https://arxiv.org/abs/2112.11446, appendix A.1.1).

    Args:
        words_at_least: Minimum number of words.
        words_at_most: Maximum number of words.
        mean_word_length: Minimum and maximum mean word length, in characters.
        symbols_per_word: Maximum ratio of hash signs to words, and of ellipses to words.
        bullet_lines: Maximum fraction of lines that begin with a bullet.
        ellipsis_lines: Maximum fraction of lines that end with an ellipsis.
        alphabetic_words: Minimum fraction of words with at least one letter.
        stop_words: Minimum number of distinct words from a list of eight very common English words. 0 disables this
            rule; set it to 0 for text in other languages.
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
        """Return the document, or the name of the first rule that it violates."""
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


TOP_NGRAM_SHARES: Final = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAM_SHARES: Final = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class GopherRepetition(PerDocumentStep):
    """Cleaning step that rejects repetitive documents with Gopher's rules (https://arxiv.org/abs/2112.11446, table A1).

    Args:
        lines: Maximum fraction of lines that repeat an earlier line.
        paragraphs: Maximum fraction of paragraphs that repeat an earlier paragraph.
        line_characters: Maximum fraction of characters in repeated lines.
        paragraph_characters: Maximum fraction of characters in repeated paragraphs.
        ngrams: Whether to limit the fraction of characters in the most common 2-gram, 3-gram and 4-gram (to 20%, 18%
            and 16%) and in repeated n-grams of 5 to 10 words (to 15% for 5 words, decreasing to 10% for 10 words).
    """

    lines: float = 0.30
    paragraphs: float = 0.30
    line_characters: float = 0.20
    paragraph_characters: float = 0.20
    ngrams: bool = True

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Return the document, or the name of the first rule that it violates."""
        text = document.text
        for name, parts, max_share, max_characters in (
            ("lines", text.splitlines(), self.lines, self.line_characters),
            ("paragraphs", text.split("\n\n"), self.paragraphs, self.paragraph_characters),
        ):
            parts = [part.strip() for part in parts if part.strip()]
            repeated = list(_repeated(parts))
            if len(repeated) > max_share * len(parts):
                return f"repeated {name}"
            if sum(map(len, repeated)) > max_characters * sum(map(len, parts)):
                return f"characters in repeated {name}"
        if self.ngrams:
            words = text.split()
            characters = sum(map(len, words))
            for n, max_share in TOP_NGRAM_SHARES.items():
                if _top_ngram_characters(words, n) > max_share * characters:
                    return f"most common {n}-gram"
            for n, max_share in REPEATED_NGRAM_SHARES.items():
                if _repeated_ngram_characters(words, n) > max_share * characters:
                    return f"repeated {n}-grams"
        return document


def _repeated(parts: Iterable[str]) -> Iterable[str]:
    seen: set[str] = set()
    for part in parts:
        if part in seen:
            yield part
        seen.add(part)


def _top_ngram_characters(words: list[str], n: int) -> int:
    """Return the number of characters in all occurrences of the most common n-gram; 0 if no n-gram occurs twice."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0
    top = max(counts.values())
    return 0 if top == 1 else top * max(sum(map(len, gram)) for gram, count in counts.items() if count == top)


def _repeated_ngram_characters(words: list[str], n: int) -> int:
    """Return the number of characters in repeated n-grams; words in several of these n-grams are counted only once."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    counts = Counter(grams)
    inside = [False] * len(words)
    for index, gram in enumerate(grams):
        if counts[gram] > 1:
            inside[index : index + n] = [True] * n
    return sum(len(word) for word, counted in zip(words, inside, strict=True) if counted)


@dataclass(frozen=True)
class C4(PerDocumentStep):
    """Cleaning step that keeps only lines of prose, following C4 (https://arxiv.org/abs/1910.10683, section 2.2).

    A line is removed if it does not end with a full stop, exclamation mark, question mark or quotation mark, ends with
    an ellipsis, has fewer than ``words_per_line`` words, or mentions JavaScript, the use of cookies, a privacy policy
    or terms of use. A document is rejected if it contains a curly bracket or "lorem ipsum", or if fewer than
    ``sentences`` sentences remain. C4's list of bad words, its language filter and its removal of repeated
    three-sentence spans are not implemented.

    Args:
        words_per_line: Minimum number of words per line.
        sentences: Minimum number of sentences in the remaining text.
        curly_brackets: Whether to reject documents with a curly bracket, such as source code.
    """

    words_per_line: int = 5
    sentences: int = 3
    curly_brackets: bool = True

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Return the document without lines that are not prose, or the reason for rejecting it."""
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
