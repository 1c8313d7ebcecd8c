"""Script that tests an untrusted tokenizer: ``python tokenizer_probe.py SECONDS BYTES < tokenizer.json``.

A tokenizer file may contain regular expressions that take exponential time, replacements that make the text many times
longer, and settings that make the Rust library panic or abort. Only this script's process is affected, and its time and
memory are limited. The script prints one line that describes the problem, or nothing if the tokenizer can be used. It
imports nothing from the package, so that it starts in a tenth of a second.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

RUN_LENGTH: Final = 2**11
"""Approximate length of a sample in characters; at this length, a pattern that takes cubic time exceeds the limit of 10
million steps of the regular expression library."""
MAX_UNITS: Final = 400
"""Maximum number of distinct characters and words from which samples are built."""
MAX_WORD: Final = 32
"""Minimum length in characters at which words in the patterns are excluded from the samples."""
MAX_GROWTH: Final = 20
"""Maximum factor by which normalization or decoding may increase the length of a text."""
CHARACTERS: Final = "\n\t\r" + "".join(map(chr, range(32, 127))) + "éßЖжαאع१क東あ가\u0301\u3000—€🎉"
"""All printable ASCII characters, and characters of other scripts and classes that patterns may distinguish."""
N_DECODED: Final = 1000
"""Maximum number of tokens to decode individually."""


def main() -> None:
    """Read a tokenizer from standard input; if it cannot be used, print a line that describes the problem.

    The script's arguments limit the CPU time and address space of the process.
    """
    from tokenizers import Tokenizer

    content = sys.stdin.buffer.read().decode()
    limit_resources(*map(int, sys.argv[1:]))
    try:
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        problem = _try_samples(tokenizer, json.loads(content))
        tokenizer.encode("", add_special_tokens=True)
    except BaseException as error:  # a panic in Rust is not an Exception
        problem = " ".join(str(error).split())[:200]
    if problem:
        print(problem)


def _try_samples(tokenizer: Any, spec: Any) -> str:
    for sample in make_samples(spec):
        if tokenizer.normalizer is not None:
            normalized = tokenizer.normalizer.normalize_str(sample)
            if len(normalized) > MAX_GROWTH * (len(sample) + MAX_GROWTH):
                return f"its normalizer expands {len(sample):,} characters to {len(normalized):,}"
        try:
            encoded = tokenizer.encode(sample, add_special_tokens=False)
        except Exception:  # the text has unknown characters, and the vocabulary has no unknown token
            continue
        length = sum(map(len, encoded.tokens))
        if len(decoded := tokenizer.decode(encoded.ids)) > MAX_GROWTH * (length + MAX_GROWTH):
            return f"its decoder expands {length:,} characters to {len(decoded):,}"
    for token, token_id in list(tokenizer.get_vocab().items())[:N_DECODED]:
        if len(tokenizer.decode([token_id])) > MAX_GROWTH * (len(token) + MAX_GROWTH):
            return "its decoder expands a token to a much longer text"
    return ""


def make_samples(spec: Any) -> Iterator[str]:
    """Yield texts for which patterns in a tokenizer file may backtrack or replacements may produce long output.

    Each text is a long run of one character, or of one word from a pattern. It ends with characters that few patterns
    match, followed by all characters in the patterns, because a search fails immediately if a required character is
    missing.

    Raises:
        ValueError: The patterns contain too many characters and words.
    """
    patterns = list(dict.fromkeys(_find_patterns(spec)))
    literals = list(dict.fromkeys("".join(patterns)))
    words = [
        word for pattern in patterns for word in (pattern, *re.findall(r"\w{2,}", pattern)) if len(word) < MAX_WORD
    ]
    end = "\0\n" + "".join(literals)
    units = list(dict.fromkeys([*CHARACTERS, "ab", "a1", "a ", *literals, *words]))
    if len(units) > MAX_UNITS:
        raise ValueError("its patterns contain too many distinct characters and words to be tested")
    for unit in filter(None, units):
        yield unit * (RUN_LENGTH // len(unit) + 1) + end


def _find_patterns(spec: Any) -> Iterator[str]:
    """Yield the strings and regular expressions in the ``pattern`` fields of a tokenizer file."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            if key in ("String", "Regex", "pattern") and isinstance(value, str):
                yield value
            elif key not in ("vocab", "merges"):
                yield from _find_patterns(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _find_patterns(value)


def limit_resources(seconds: int, memory: int) -> None:
    """Limit this process's CPU time, counted from now, and its memory, where the platform supports it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for limit, value in ((resource.RLIMIT_CPU, int(used) + seconds), (resource.RLIMIT_AS, memory)):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
