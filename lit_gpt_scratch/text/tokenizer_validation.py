"""Check that an untrusted ``tokenizer.json`` can be used without a hang, a panic or excessive memory use."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import describe, parse_json, validate
from lit_gpt_scratch.terminal_output import quote_short

PROBE: Final = Path(__file__).with_name("tokenizer_probe.py")
PROBE_SECONDS: Final = 2
"""Maximum CPU time of the probe in seconds."""
PROBE_MEMORY: Final = 3 * 2**29
"""Maximum address space of the probe in bytes, three times as much as a tokenizer of 256,000 tokens requires."""
PROBE_TIMEOUT: Final = 60
"""Maximum elapsed time of the probe in seconds; on a busy machine, elapsed time exceeds CPU time."""
MAX_BYTES: Final = 2**27
"""Maximum size of a ``tokenizer.json`` in bytes."""
MAX_REPLACEMENT: Final = 100
"""Maximum number of characters in a string that a normalizer or decoder inserts, or substitutes for another string."""
MAX_COMPONENTS: Final = 8
"""Maximum number of components in a tokenizer that is accepted without being probed."""
LINEAR_PATTERN: Final = r"(\.|\\[sSdDwW]|\[(\\[sSdDwW]|[^\[\]\\])*\])(\{\d+(,\d+)?\}|[+*?])?"
"""Pattern that matches a regular expression with one repeated character class, which therefore takes linear time."""
PLAIN_COMPONENTS: Final = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "BertNormalizer", "Prepend"},
    "pre_tokenizer": {
        "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits",
    },
    "post_processor": {"ByteLevel"},
    "decoder": {"ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "Fuse", "ByteFallback"},
}  # fmt: skip
"""Component types whose run time and output length are at most proportional to the text length, regardless of their
settings."""
MAX_WORD_CHARACTERS: Final = 200
"""Maximum length of a word that a WordPiece model may accept, because its run time is quadratic in this length."""
REGEX_TOKEN: Final = re.compile(r"\\.|\(\?#[^)]*\)|\(\?[a-zA-Z-]*x|[*+?]|\{\d*,?\d*\}|.", re.DOTALL)
"""Pattern that matches one token of a regular expression, except character classes."""
PLAIN_MODELS: Final = ("BPE", "WordPiece", "WordLevel", "Unigram")

_valid: set[str] = set()
"""SHA-256 digests of the tokenizers that this process has validated."""


def validate_tokenizer_json(text: str) -> None:
    """Check the text of a ``tokenizer.json`` before ``tokenizers`` loads it in this process.

    A tokenizer that consists only of harmless components, such as a tokenizer trained by this package, is accepted
    immediately. Regular expressions that repeat a group with a variable number of characters are rejected, because most
    of them take exponential time on some text. Any other tokenizer is tested in a separate process, with limits on time
    and memory. The test detects patterns that take cubic time on a run of characters; patterns that take quadratic time
    are accepted.

    Raises:
        UserError: The text is not a valid tokenizer, or the tokenizer cannot be used.
    """
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    if digest in _valid:
        return
    try:
        spec = parse_json(text, dict[str, Any], MAX_BYTES)
        model = validate(spec.get("model"), dict[str, Any], "model")
    except ValueError as error:
        raise UserError(f"invalid tokenizer: {error}") from error
    longest = model.get("max_input_chars_per_word", 0)
    if not isinstance(longest, int) or longest > MAX_WORD_CHARACTERS:
        raise UserError(
            f"max_input_chars_per_word is {describe(longest)}; it must be an integer up to {MAX_WORD_CHARACTERS}, "
            "because the time to encode a word is quadratic in its length"
        )
    components = [(kind, part) for kind in PLAIN_COMPONENTS for part in _list_components(spec.get(kind))]
    for _, part in components:
        for name in ("content", "prepend"):
            if isinstance(inserted := part.get(name), str) and len(inserted) > MAX_REPLACEMENT:
                raise UserError(
                    f"the tokenizer inserts a string of {len(inserted):,} characters into the text; the maximum is "
                    f"{MAX_REPLACEMENT}"
                )
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and may_repeat_ambiguously(regex):
            raise UserError(
                f"the pattern {describe(regex)} may have a quantified group that contains a quantifier or an "
                "alternation, which may cause catastrophic backtracking; use another tokenizer"
            )
    plain = len(components) <= MAX_COMPONENTS and all(_is_plain(kind, part) for kind, part in components)
    if not plain or not _is_plain_model(model) or spec.get("padding") or spec.get("truncation"):
        _probe(text)
    _valid.add(digest)


def _probe(text: str) -> None:
    """Test a tokenizer in a separate process.

    Raises:
        UserError: The tokenizer cannot be used, or the process exceeded its limits.
    """
    # Rust prints panics and stack traces to standard error.
    command = [sys.executable, str(PROBE), str(PROBE_SECONDS), str(PROBE_MEMORY)]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=PROBE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise UserError(
            "encoding and decoding short texts with the tokenizer takes too much time or memory, because of a pattern "
            "that backtracks or a replacement that makes the text much longer; use another tokenizer"
        )
    if problem := done.stdout.decode(errors="replace").strip():
        raise UserError(f"invalid tokenizer: {quote_short(problem)}")


def may_repeat_ambiguously(regex: str) -> bool:
    """Return whether a regular expression has a quantified group that contains a quantifier or an alternation.

    The result is also True for syntax that could hide such a group: group calls, backreferences, control escapes and
    comments.
    """
    groups, position = [False], 0  # for each open group, whether it contains a quantifier or an alternation
    closed = False  # whether the previous token closed a group that contains a quantifier or an alternation
    quantifier = ""
    while position < len(regex):
        if regex[position] == "[":
            position = _skip_class(regex, position)
            closed, quantifier = False, ""
            continue
        token = REGEX_TOKEN.match(regex, position)
        assert token is not None
        part, position = token[0], token.end()
        if part.startswith("(?") or (part[0] == "\\" and (len(part) == 1 or part[1] in "cCMgk123456789")):
            return True
        if part in ("*", "+", "?") or (part[0] == "{" and len(part) > 2):
            if quantifier:
                if part != "?" and not (part == "+" and len(quantifier) == 1):  # neither lazy nor possessive
                    return True
                quantifier = ""
                continue
            if closed and part != "?":
                return True
            is_fixed = part[0] == "{" and "," not in part
            groups[-1] |= not is_fixed
            closed, quantifier = False, part
            continue
        quantifier, closed = "", False
        if part == "(":
            groups.append(False)
            head = re.compile(r"\?(<?[=!]|>|~|<\w+>|'\w+'|[a-zA-Z-]*:|[a-zA-Z-]*(?=\)))").match(regex, position)
            position = head.end() if head else position
        elif part == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif part == "|":
            groups[-1] = True
    return False


def _skip_class(regex: str, position: int) -> int:
    """Return the position after a character class, which may contain other classes."""
    depth = 0
    while position < len(regex):
        depth += {"[": 1, "]": -1}.get(regex[position], 0)
        position += 2 if regex[position] == "\\" else 1
        if not depth:
            break
    return position


def _list_components(component: Any) -> Iterator[dict[str, Any]]:
    """Yield a component or, if it is a sequence, its components; an invalid component is yielded as an empty dict."""
    if isinstance(component, dict) and component.get("type") == "Sequence":
        for parts in component.values():
            for part in parts if isinstance(parts, list) else ():
                yield from _list_components(part)
    elif component is not None:
        yield component if isinstance(component, dict) else {}


def _is_plain(kind: str, part: dict[str, Any]) -> bool:
    """Return whether a component's run time and output length are at most proportional to the text length."""
    if part.get("type") in ("Split", "Replace"):
        pattern, content = part.get("pattern"), part.get("content", "")
        if isinstance(pattern, dict) and isinstance(content, str):
            string, regex = pattern.get("String"), pattern.get("Regex")
            if isinstance(string, str):
                return bool(string) and len(content) <= len(string)
            return isinstance(regex, str) and not content and bool(re.fullmatch(LINEAR_PATTERN, regex))
    return isinstance(part.get("type"), str) and part["type"] in PLAIN_COMPONENTS[kind]


def _is_plain_model(model: dict[str, Any]) -> bool:
    unknown, vocabulary = model.get("unk_token"), model.get("vocab")
    has_unknown = unknown is None or (
        isinstance(unknown, str) and isinstance(vocabulary, dict) and unknown in vocabulary
    )
    return model.get("type") in PLAIN_MODELS and has_unknown and not model.get("dropout")
