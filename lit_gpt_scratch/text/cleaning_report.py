"""What became of every document, step by step: the account of a corpus."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem
from lit_gpt_scratch.text.document import RejectedDocument

MAX_EXAMPLES: Final = 3
EXCERPT_CHARACTERS: Final = 160
"""Characters of an example."""
SAMPLE_BYTES: Final = 2**22
"""Bytes of text on which tokens are counted step by step; a corpus that is not larger is counted whole."""


@dataclass
class StepStatistics:
    """One step's account: ``documents_in`` is ``documents_out`` plus all that were rejected."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_rejected: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def passed(self, before: int, after: int) -> None:
        """A document of so many bytes went in, and came out with so many."""
        self.documents_in += 1
        self.documents_out += 1
        self.bytes_in += before
        self.bytes_out += after

    def reject(self, id_: str, text: str, size: int, reason: str) -> None:
        """A document went in and did not come out."""
        self.documents_in += 1
        self.bytes_in += size
        self.bytes_rejected += size
        self.rejected[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append({"id": id_, "text": text[:EXCERPT_CHARACTERS]})


class CleaningReport:
    """The rows of all steps: reading first, then the steps that were chosen, then mixing and what follows the split."""

    def __init__(self, steps: Sequence[str], later: Sequence[str] = ()) -> None:
        self.rows = [StepStatistics("reading"), *map(StepStatistics, [*steps, *later])]
        self._later = 1 + len(steps)
        self._sample: dict[str, list[str]] = {}
        self._sampled, self._limit = 0, 2**64

    def sampled(self, id_: str, size: int = 0) -> bool:
        """Whether tokens are counted on a document: a choice by its name, that no order of documents changes."""
        return size <= SAMPLE_BYTES and _place(id_) < self._limit

    def passed_over(self, rejected: RejectedDocument) -> None:
        """Something that the source has, and that is no document."""
        self.rows[0].reject(rejected.id, "", rejected.n_bytes, rejected.reason)

    def add(self, passage: PipelineItem) -> None:
        """A document that was read, and has come to the end of its way or of the steps before the split."""
        sizes = passage.sizes
        self.rows[0].passed(sizes[0], sizes[0])
        for row, before, after in zip(self.rows[1:], sizes, sizes[1:], strict=False):
            row.passed(before, after)
        if passage.reason is not None:
            self.rows[len(sizes)].reject(passage.document.id, passage.document.text, sizes[-1], passage.reason)
        if passage.texts is not None and self.sampled(passage.document.id):
            self._sample[passage.document.id] = passage.texts
            self._sampled += sizes[0]
            while self._sampled > SAMPLE_BYTES and len(self._sample) > 1:
                self._limit //= 2
                self._sample = {id_: texts for id_, texts in self._sample.items() if self.sampled(id_)}
                self._sampled = sum(len(texts[0].encode()) for texts in self._sample.values())

    def follow(self, id_: str, text: str, size: int, step: int, reason: str | None) -> None:
        """A document that came to the ``step``-th of the later steps, and passed it if there is no reason."""
        row = self.rows[self._later + step]
        if reason is not None:
            row.reject(id_, text, size, reason)
            return
        row.passed(size, size)
        if texts := self._sample.get(id_):
            texts.append(texts[-1])

    def to_dict(self) -> dict[str, Any]:
        """All of it but tokens, as JSON has it."""
        first, last = self.rows[0], self.rows[-1]
        return {
            "documents_in": first.documents_in,
            "documents_kept": last.documents_out,
            "bytes_in": first.bytes_in,
            "bytes_kept": last.bytes_out,
            "steps": [vars(row) | {"rejected": dict(row.rejected.most_common())} for row in self.rows],
        }

    @property
    def sample(self) -> list[list[str]]:
        """The texts of some documents before the first step, and after each that they passed."""
        return list(self._sample.values())


def add_token_counts(
    audit: dict[str, Any], sample: Sequence[Sequence[str]], count: Callable[[Sequence[str]], list[int]], kept: int
) -> dict[str, Any]:
    """An audit with ``tokens_in`` and ``tokens_out`` of every step.

    Exact if the sample is the whole corpus; otherwise a step's bytes by the tokens a byte of the sample has there,
    and all in proportion, so that behind the last step there are as many as there are.

    Args:
        audit: Of ``Audit.to_dict``.
        sample: Of ``Audit.sample``.
        count: The numbers of tokens of some texts.
        kept: Tokens of all texts that were kept.
    """
    distinct = list(dict.fromkeys(text for texts in sample for text in texts))
    tokens = dict(zip(distinct, count(distinct), strict=True))
    steps: list[dict[str, Any]] = []
    average = kept / max(audit["bytes_kept"], 1)
    for place, step in enumerate(audit["steps"]):
        before, after = max(place - 1, 0), place  # reading changes nothing
        counted = dict(step)
        for name, at in (("in", before), ("out", after)):
            texts = [texts[at] for texts in sample if len(texts) > at and len(texts) > before]
            n_bytes = sum(len(text.encode()) for text in texts)
            each = sum(tokens[text] for text in texts) / n_bytes if n_bytes else average
            # What was passed over in reading has no tokens.
            counted[f"tokens_{name}"] = round(step[f"bytes_{name}" if place else "bytes_out"] * each)
        steps.append(counted)
    whole = sum(len(texts[0].encode()) for texts in sample) == audit["steps"][0]["bytes_out"]
    if not whole and (last := steps[-1]["tokens_out"]):
        for step, side in product(steps, ("in", "out")):
            step[f"tokens_{side}"] = round(step[f"tokens_{side}"] * kept / last)
    how = "counted" if whole else f"estimated from {len(sample):,} documents, but for the last"
    return {**audit, "steps": steps, "tokens": how}


def _place(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def format_step_table(audit: dict[str, Any]) -> str:
    """The account as a Markdown table that a terminal shows well, too."""
    head = ["step", "documents in", "out", "bytes in", "out", "tokens in", "out", "rejected"]
    rows = [head]
    for step in audit["steps"]:
        rejected = ", ".join(f"{number:,} {reason}" for reason, number in step["rejected"].items()) or "-"
        sizes = [f"{step[f'documents_{side}']:,}" for side in ("in", "out")]
        sizes += [f"{step[f'bytes_{side}']:,}" for side in ("in", "out")]
        sizes += [f"{step[f'tokens_{side}']:,}" if f"tokens_{side}" in step else "" for side in ("in", "out")]
        rows.append([step["name"], *sizes, rejected])
    return format_markdown_table(rows, "<>>>>>><")


def format_markdown_table(rows: Sequence[Sequence[str]], aligned: str) -> str:
    """A head and rows as a Markdown table that a terminal shows well, too; each column to the left or to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = ["-" * width if a == "<" else "-" * (width - 1) + ":" for a, width in zip(aligned, widths, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def format_report(audit: dict[str, Any]) -> str:
    """The whole account, with examples of what was rejected."""
    lines = [
        "# Audit",
        "",
        f"{audit['documents_kept']:,} of {audit['documents_in']:,} documents kept, "
        f"{audit['bytes_kept']:,} of {audit['bytes_in']:,} bytes. Tokens: {audit.get('tokens', 'not counted')}.",
        "",
        format_step_table(audit),
    ]
    for step in audit["steps"]:
        for reason, examples in step["examples"].items():
            lines += ["", f"## {step['name']}: {reason} ({step['rejected'][reason]:,})", ""]
            lines += [f"- `{example['id']}`: {_quoted(example['text'])}" for example in examples]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    shown = " ".join(text.split()).replace("`", "'")
    return f"`{shown}`" if shown else "(not shown)"
