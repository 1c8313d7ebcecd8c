"""Report on the documents kept and rejected by each cleaning step (``audit.json`` and ``audit.md``)."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem
from lit_gpt_scratch.text.document import RejectedDocument
from lit_gpt_scratch.text.markdown import escape_markdown, format_markdown_table, markdown_code

MAX_EXAMPLES: Final = 3
"""Maximum number of example documents per rejection reason."""
EXCERPT_CHARACTERS: Final = 160
"""Maximum number of characters shown per example."""
SAMPLE_BYTES: Final = 2**22
"""Maximum bytes of text in the sample used to estimate token counts; for smaller corpora, the counts are exact."""


@dataclass
class StepStatistics:
    """Statistics of one step; ``documents_in`` is ``documents_out`` plus the number of rejected documents."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_rejected: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def record_kept(self, bytes_in: int, bytes_out: int) -> None:
        """Count a document that passed the step."""
        self.documents_in += 1
        self.documents_out += 1
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out

    def record_rejected(self, id_: str, text: str, n_bytes: int, reason: str) -> None:
        """Count a document that the step rejected; the first ``MAX_EXAMPLES`` per reason are kept as examples."""
        self.documents_in += 1
        self.bytes_in += n_bytes
        self.bytes_rejected += n_bytes
        self.rejected[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append({"id": id_, "text": text[:EXCERPT_CHARACTERS]})


class CleaningReport:
    """Statistics of all steps of a corpus: reading, cleaning, mixing and decontamination.

    Args:
        steps: Names of the cleaning steps that run before the split.
        later_steps: Names of the steps that run after all documents have been read: mixing and decontamination.
    """

    def __init__(self, steps: Sequence[str], later_steps: Sequence[str] = ()) -> None:
        self.steps = [StepStatistics("reading"), *map(StepStatistics, [*steps, *later_steps])]
        self._first_later = 1 + len(steps)
        self._sample: dict[str, list[str]] = {}
        self._sampled_bytes, self._hash_limit = 0, 2**64
        self.remarks: list[str] = []
        """Sentences about limitations of a cleaning step or of the split that affect this corpus."""

    def in_sample(self, id_: str, n_bytes: int = 0) -> bool:
        """Return whether a document is in the sample used to estimate token counts.

        Documents are selected by a hash of their ids; documents larger than ``SAMPLE_BYTES`` are never selected.
        """
        return n_bytes <= SAMPLE_BYTES and _hash_id(id_) < self._hash_limit

    def add_unreadable(self, rejected: RejectedDocument) -> None:
        """Count a document that was skipped when its source was read."""
        self.steps[0].record_rejected(rejected.id, "", rejected.n_bytes, rejected.reason)

    def add(self, item: PipelineItem) -> None:
        """Count a document that passed all steps before the split or was rejected by one of them."""
        sizes = item.sizes
        self.steps[0].record_kept(sizes[0], sizes[0])
        for step, before, after in zip(self.steps[1:], sizes, sizes[1:], strict=False):
            step.record_kept(before, after)
        if item.reason is not None:
            self.steps[len(sizes)].record_rejected(item.document.id, item.document.text, sizes[-1], item.reason)
        if item.texts is not None and self.in_sample(item.document.id):
            self._sample[item.document.id] = item.texts
            self._sampled_bytes += sizes[0]
            while self._sampled_bytes > SAMPLE_BYTES and len(self._sample) > 1:
                self._hash_limit //= 2
                self._sample = {id_: texts for id_, texts in self._sample.items() if self.in_sample(id_)}
                self._sampled_bytes = sum(len(texts[0].encode()) for texts in self._sample.values())

    def add_later_step(self, id_: str, text: str, n_bytes: int, index: int, reason: str | None) -> None:
        """Count a document as passed by ``later_steps[index]`` if ``reason`` is None, or else as rejected by it."""
        step = self.steps[self._first_later + index]
        if reason is not None:
            step.record_rejected(id_, text, n_bytes, reason)
            return
        step.record_kept(n_bytes, n_bytes)
        if texts := self._sample.get(id_):
            texts.append(texts[-1])

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics, excluding token counts, as a JSON-serializable dictionary."""
        first, last = self.steps[0], self.steps[-1]
        return {
            "documents_in": first.documents_in,
            "documents_kept": last.documents_out,
            "bytes_in": first.bytes_in,
            "bytes_kept": last.bytes_out,
            "steps": [vars(step) | {"rejected": dict(step.rejected.most_common())} for step in self.steps],
            "remarks": self.remarks,
        }

    @property
    def sample(self) -> list[list[str]]:
        """Texts of each sampled document, before the first step and after each step that it passed."""
        return list(self._sample.values())


def add_token_counts(
    audit: dict[str, Any], sample: Sequence[Sequence[str]], count: Callable[[Sequence[str]], list[int]], kept: int
) -> dict[str, Any]:
    """Return a copy of an audit with ``tokens_in`` and ``tokens_out`` added to every step.

    The counts are exact if the sample is the whole corpus. Otherwise, the bytes of each step are multiplied by the
    tokens per byte of the sample at that step, and all counts are scaled so that the output of the last step is exact.

    Args:
        audit: Report returned by ``CleaningReport.to_dict``.
        sample: Sampled texts; see ``CleaningReport.sample``.
        count: Function that returns the number of tokens in each string.
        kept: Total number of tokens in all kept documents.
    """
    distinct = list(dict.fromkeys(text for texts in sample for text in texts))
    tokens = dict(zip(distinct, count(distinct), strict=True))
    steps: list[dict[str, Any]] = []
    overall_tokens_per_byte = kept / max(audit["bytes_kept"], 1)
    for index, step in enumerate(audit["steps"]):
        before, after = max(index - 1, 0), index  # reading does not change texts
        counted = dict(step)
        for side, position in (("in", before), ("out", after)):
            texts = [texts[position] for texts in sample if len(texts) > position and len(texts) > before]
            n_bytes = sum(len(text.encode()) for text in texts)
            tokens_per_byte = sum(tokens[text] for text in texts) / n_bytes if n_bytes else overall_tokens_per_byte
            # The input of the reading step includes skipped documents, which have no tokens.
            counted[f"tokens_{side}"] = round(step[f"bytes_{side}" if index else "bytes_out"] * tokens_per_byte)
        steps.append(counted)
    exact = sum(len(texts[0].encode()) for texts in sample) == audit["steps"][0]["bytes_out"]
    if not exact and (last := steps[-1]["tokens_out"]):
        for step, side in product(steps, ("in", "out")):
            step[f"tokens_{side}"] = round(step[f"tokens_{side}"] * kept / last)
    method = "counted" if exact else f"estimated from {len(sample):,} documents; exact after the last step"
    return {**audit, "steps": steps, "tokens": method}


def _hash_id(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


class StoredStep(TypedDict):
    """Entry of ``steps`` in ``audit.json``; see ``StepCounts``."""

    name: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    tokens_in: NotRequired[int]
    tokens_out: NotRequired[int]
    rejected: dict[str, int]


class StoredAudit(TypedDict):
    """Parts of ``audit.json`` that are printed."""

    steps: list[StoredStep]
    tokens: str


def read_remarks(folder: Path) -> list[str]:
    """Return the remarks in the ``audit.json`` of a token store; there are none if the file is missing or unusable."""
    try:
        remarks = read_json(folder / "audit.json", dict[str, Any]).get("remarks", [])
    except (OSError, ValueError):
        return []
    return [remark for remark in remarks if isinstance(remark, str)] if isinstance(remarks, list) else []


def format_step_table(audit: Mapping[str, Any]) -> str:
    """Format the steps of an audit as a Markdown table."""
    rows = [["step", "documents in", "out", "bytes in", "out", "tokens in", "out", "rejected"]]
    for step in audit["steps"]:
        rejected = ", ".join(f"{number:,} {reason}" for reason, number in step["rejected"].items()) or "-"
        counts = [f"{step[f'documents_{side}']:,}" for side in ("in", "out")]
        counts += [f"{step[f'bytes_{side}']:,}" for side in ("in", "out")]
        counts += [f"{step[f'tokens_{side}']:,}" if f"tokens_{side}" in step else "" for side in ("in", "out")]
        rows.append([step["name"], *counts, rejected])
    return format_markdown_table(rows, "<>>>>>><")


def format_report(audit: dict[str, Any]) -> str:
    """Format an audit as a Markdown page that includes examples of rejected documents."""
    lines = [
        "# Audit",
        "",
        f"{audit['documents_kept']:,} of {audit['documents_in']:,} documents kept, "
        f"{audit['bytes_kept']:,} of {audit['bytes_in']:,} bytes. Tokens: {audit.get('tokens', 'not counted')}.",
        "",
        format_step_table(audit),
    ]
    if remarks := audit.get("remarks"):  # version 0.1 wrote none
        lines += ["", *(f"- {escape_markdown(remark)}" for remark in remarks)]
    for step in audit["steps"]:
        for reason, examples in step["examples"].items():
            heading = escape_markdown(f"{step['name']}: {reason}")
            lines += ["", f"## {heading} ({step['rejected'][reason]:,})", ""]
            lines += [f"- {markdown_code(example['id'])}: {_quote(example['text'])}" for example in examples]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return markdown_code(" ".join(text.split())) or "(not shown)"
