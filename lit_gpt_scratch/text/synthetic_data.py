"""Deterministic synthetic datasets based on simple rules, used for fine-tuning by default."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

from lit_gpt_scratch.text.chat_template import ASSISTANT, parse_conversation
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.verifiable_rewards import get_verifiable_reward

SOURCE_NAME: Final = "generated"

THINGS: Final = ("soup", "film", "hotel", "teacher", "garden", "phone", "train", "song")
ADVERBS: Final = ("very", "rather", "to everybody who asked me")
GOOD: Final = ("good", "lovely", "bright", "friendly")
BAD: Final = ("bad", "awful", "dull", "unfriendly")
WORDS: Final = (
    "apple", "bird", "cloud", "door", "egg", "fish", "glass", "hand", "ink", "jam", "key", "lamp", "moon", "nest",
    "orange", "paper", "queen", "river", "stone", "table", "umbrella", "voice", "water", "yard", "zebra", "bread",
    "chair", "dream", "field", "grass", "horse", "island", "juice", "kite", "lemon", "mouse", "night", "ocean",
    "plant", "rain", "salt", "tree", "uncle", "valley", "wind", "year", "bell", "coat",
    "arm", "boat", "candle", "desk", "eagle", "forest", "gate", "hill", "idea", "jacket", "king", "leaf", "market",
    "needle", "office", "piano", "quilt", "road", "ship", "tower", "unit", "village", "wall", "yarn", "zoo", "brick",
    "circle", "doctor", "engine", "flower", "goat", "hammer", "iron", "jewel", "knife", "letter", "mirror", "number",
    "oven", "pencil", "rabbit", "silver", "tiger", "uniform", "violin", "window", "yogurt", "basket",
)  # fmt: skip


def labelled_sentences() -> Iterator[TableRow]:
    """Yield 288 rows with a sentence (``text``) and its ``label``: praise, complaint or question."""
    sentences = []
    for thing, adverb, (good, bad) in product(THINGS, ADVERBS, zip(GOOD, BAD, strict=True)):
        questioned = good if len(thing) % 2 else bad
        sentences += [
            {"text": f"The {thing} was {adverb} {good}.", "label": "praise"},
            {"text": f"The {thing} was {adverb} {bad}.", "label": "complaint"},
            {"text": f"Was the {thing} {adverb} {questioned}?", "label": "question"},
        ]
    return _as_rows(sentences)


def conversations() -> Iterator[TableRow]:
    """Yield 576 conversations about words. One in six has two user messages, each with a reply; the others have one."""
    records: list[dict[str, Any]] = []
    for word in WORDS:
        turns = [f"Repeat the word {word}.", word, "And twice?", f"{word} {word}"]
        roles = ["user", "assistant"] * 2
        records += [
            {"instruction": "Repeat the word.", "input": word, "output": word},
            {"instruction": f"Write {word} twice.", "input": "", "output": f"{word} {word}"},
            {"instruction": f"Spell {word}.", "input": "", "output": "-".join(word)},
            {"instruction": f"What does {word} begin with?", "input": "", "output": f"It begins with {word[0]}."},
            {"instruction": f"How many letters has {word}?", "input": "", "output": f"It has {len(word)} letters."},
            {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]},
        ]
    return _as_rows(records)


def prompts() -> Iterator[TableRow]:
    """Yield a row for each conversation, with the messages before the last reply as ``prompt``."""
    return (TableRow(row.id, row.where, {"prompt": prompt}) for row, prompt, _ in _last_turns())


def preferences(name: str) -> Iterator[TableRow]:
    """Yield a row for each conversation, with a ``prompt`` and two replies, ``chosen`` and ``rejected``.

    Args:
        name: Name of the verifiable reward whose rule determines which reply is chosen.

    Raises:
        UserError: No verifiable reward has this name.
    """
    reward = get_verifiable_reward(name)
    for row, prompt, reply in _last_turns():
        chosen, rejected = reward.make_pair(reply)
        yield TableRow(row.id, row.where, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _last_turns() -> Iterator[tuple[TableRow, list[dict[str, Any]], str]]:
    for row in conversations():
        *before, reply = parse_conversation(row.fields)
        assert reply.role == ASSISTANT
        yield row, [{"role": message.role, "content": message.content} for message in before], reply.content


def _as_rows(records: Sequence[dict[str, Any]]) -> Iterator[TableRow]:
    return (TableRow(f"{SOURCE_NAME}:{n}", f"{SOURCE_NAME} row {n}", fields) for n, fields in enumerate(records, 1))
