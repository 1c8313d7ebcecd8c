"""Cleaned corpora: documents that are read, cleaned, mixed and split once, and stored with a cleaning report.

A corpus is a folder with ``train.parquet`` and ``validation.parquet`` (columns ``id`` and ``text``, readable by
``datasets`` and ``pandas``), ``audit.json`` and ``audit.md``. Documents are streamed, so that only a few of them are in
memory at a time.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text import hub
from lit_gpt_scratch.text.atomic_files import create_folder_atomically
from lit_gpt_scratch.text.cleaning import CleaningStep, DecontaminationStep, Length, validate_steps
from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem, run_pipeline
from lit_gpt_scratch.text.cleaning_report import CleaningReport, format_report
from lit_gpt_scratch.text.decontamination import Leakage
from lit_gpt_scratch.text.document import Document, RejectedDocument, is_blank
from lit_gpt_scratch.text.duplicates import ExactDuplicates, sha256_text
from lit_gpt_scratch.text.parquet_io import ParquetDocumentWriter, read_parquet_documents
from lit_gpt_scratch.text.quality import C4
from lit_gpt_scratch.text.sources import DocumentSource, no_text_message
from lit_gpt_scratch.text.split import DocumentIndex, TrainValidationSplit, hash_document

SplitName = Literal["train", "validation"]
SPLITS: Final[tuple[SplitName, ...]] = ("train", "validation")
CORPUS_FORMAT: Final = 2
SPLIT_VERSION: Final = 2
"""Version of the split rules. Cached corpora with another version are not used; token stores remain valid."""
CLEANED_FILE: Final = "cleaned.parquet"
MAX_SAMPLE_BYTES: Final = 2**28
"""Maximum size of ``sample.json`` in bytes; it contains a few megabytes of text before and after each cleaning step."""
EARLIER_SOURCE_HASHES: Final[dict[str, type[CleaningStep]]] = {
    "e4fa37893ecb56c8": Length, "790f8039a5ec7fa8": C4, "f192f1cb0df98d89": ExactDuplicates,
    "ef71f33303efd7d9": Leakage,  # version 0.1
    "824cac3d6f438e0b": ExactDuplicates,  # before NearDuplicates reported truncated comparisons
}  # fmt: skip
"""Maps the ``source_hash`` of an earlier version of a cleaning module to one of the module's current steps; the rules
of the two versions are the same."""


@dataclass(frozen=True)
class CleanedCorpus:
    """A cleaned corpus on disk.

    Attributes:
        folder: Folder of the corpus.
        fingerprint: SHA-256 digest of the id, text and split of every document.
        n_bytes: Total text size of both splits in UTF-8 bytes.
        audit: Cleaning report; see ``CleaningReport.to_dict``.
    """

    folder: Path
    fingerprint: str
    n_bytes: int
    audit: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "CleanedCorpus":
        """Open a corpus that was created by ``CorpusSpec.prepare``.

        Raises:
            UserError: The folder does not contain a usable corpus.
        """
        try:
            metadata = read_json(folder / "corpus.json", dict[str, Any])
            audit = read_json(folder / "audit.json", dict[str, Any])
            fingerprint = validate(metadata.get("fingerprint"), str, "fingerprint")
            return cls(folder, fingerprint, validate(metadata.get("n_bytes"), int, "n_bytes"), audit)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a usable corpus ({error}); delete the folder and try again") from error

    def texts(self, split: SplitName, fraction: float = 1.0) -> Iterator[str]:
        """Yield the text of each document in a split.

        Args:
            split: Name of the split.
            fraction: Approximate fraction of the documents to include, which are selected by a hash of their texts.
        """
        for document in read_parquet_documents(self.folder / f"{split}.parquet"):
            if fraction == 1 or int.from_bytes(sha256_text(document.text)[:8], "big") / 2**64 < fraction:
                yield document.text

    @property
    def sample(self) -> list[list[str]]:
        """Sampled texts used to estimate token counts; see ``CleaningReport.sample``."""
        return read_json(self.folder / "sample.json", list[list[str]], MAX_SAMPLE_BYTES)


@dataclass(frozen=True)
class CorpusSpec:
    """Specification of a corpus: its sources, cleaning steps and split.

    Args:
        sources: Pairs of a source and its weight. The number of bytes used from each source is proportional to its
            weight.
        cleaning: Cleaning steps, in order.
        validation_share: Approximate fraction of the text to hold out for validation.
        max_bytes: Maximum number of bytes of text to read from each source; reading stops after the document that
            reaches this limit. If None, all documents are read.
        processes: Number of worker processes for cleaning; does not affect the result.
    """

    sources: tuple[tuple[DocumentSource, float], ...]
    cleaning: tuple[CleaningStep, ...]
    validation_share: float
    max_bytes: int | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        hub_options = any(
            hub.has_hub_options(source.config, source.split, source.streaming) for source, _ in self.sources
        )
        if hub_options and not any(source.on_hub for source, _ in self.sources):
            raise UserError(f"data.config, split and streaming apply only to Hub datasets; remove them for {self.name}")
        validate_steps(self.cleaning)

    @property
    def name(self) -> str:
        """Names of the sources as specified by the user, separated by commas."""
        return ", ".join(source.name for source, _ in self.sources)

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """Names of the sources that are Hub datasets, because no files with these names exist now."""
        return tuple(source.name for source, _ in self.sources if source.on_hub)

    @cached_property
    def source_fingerprints(self) -> list[str]:
        """Fingerprints of the sources; see ``DocumentSource.fingerprint``."""
        return [source.fingerprint() for source, _ in self.sources]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that, together with the source data, determine the corpus; stored with the corpus and its tokens."""
        return {
            "format": CORPUS_FORMAT,
            # The class was named Source in version 0.1; token stores that contain this string must still match.
            "source": [[repr(source).removeprefix("Document"), weight] for source, weight in self.sources],
            "cleaning": [f"{step!r} {step.source_hash}" for step in self.cleaning],
            "validation_share": self.validation_share,
            "max_bytes": self.max_bytes,
        }

    def prepare(self, corpora: Path, flag: str = "--data.cache") -> CleanedCorpus:
        """Open the corpus, creating it first if it does not exist.

        Args:
            corpora: Folder that contains a subfolder for each corpus, named after a hash of its settings and sources.
            flag: Name of the flag that sets ``corpora``, used in error messages.

        Raises:
            UserError: A source cannot be read, no documents are left, or the folder is not writable.
        """
        sources = [source.fingerprint(local=True) for source, _ in self.sources]
        key = hashlib.sha256(json.dumps([self.settings, sources, SPLIT_VERSION], sort_keys=True).encode()).hexdigest()
        folder = corpora / key[:16]
        create_folder_atomically(folder, self.write, flag)
        return CleanedCorpus.open(folder)

    def write(self, folder: Path) -> None:
        """Create the corpus in an empty folder."""
        before = [step for step in self.cleaning if not isinstance(step, DecontaminationStep)]
        after = [step for step in self.cleaning if isinstance(step, DecontaminationStep)]
        mixing = ["mixing"] if len(self.sources) > 1 else []
        report = CleaningReport([step.name for step in before], [*mixing, *(step.name for step in after)])
        with tempfile.TemporaryDirectory(dir=folder) as scratch, closing(DocumentIndex(Path(scratch))) as index:
            self._clean(Path(scratch), before, report, index)
            names, weights = zip(*((source.name, weight) for source, weight in self.sources), strict=True)
            selected = index.select_by_weight(names, weights)
            parts = index.split(selected, self.validation_share)
            report.remarks += parts.remarks
            fingerprint, writers = self._write_splits(folder, Path(scratch), report, parts, selected, after)
        sizes = {split: {"documents": file.n_documents, "bytes": file.n_bytes} for split, file in writers.items()}
        audit = report.to_dict() | {"split": sizes}
        n_bytes = sum(file.n_bytes for file in writers.values())
        metadata = {"fingerprint": fingerprint, "n_bytes": n_bytes, **self.settings}
        for name, content in (("audit", audit), ("corpus", metadata), ("sample", report.sample)):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        (folder / "audit.md").write_text(format_report(audit), encoding="utf-8")

    def _clean(
        self, scratch: Path, steps: Sequence[CleaningStep], report: CleaningReport, index: DocumentIndex
    ) -> None:
        """Run the steps before the split, write the kept documents to a Parquet file, and add them to the index."""
        progress = tqdm(desc="reading and cleaning", unit="B", unit_scale=True, disable=None, leave=False)
        with progress, ParquetDocumentWriter(scratch / CLEANED_FILE) as writer:
            for item in run_pipeline(self._read(report), steps, hash_document, scratch, self.processes, report.remarks):
                report.add(item)
                if item.reason is None:
                    writer.add(item.document, item.sizes[-1])
                    index.add(item)
                progress.update(item.sizes[0])
        self._require_documents(report, index.n_documents)

    def _read(self, report: CleaningReport) -> Iterator[PipelineItem]:
        for source_index, (source, _) in enumerate(self.sources):
            bytes_read = 0
            for found in source.read():
                if isinstance(found, RejectedDocument):
                    report.add_unreadable(found)
                    continue
                size = len(found.text.encode())
                if is_blank(found.text):
                    report.add_unreadable(RejectedDocument(found.id, "no text", size))
                    continue
                document = found if len(self.sources) == 1 else replace(found, id=f"{source.name}:{found.id}")
                texts = [document.text] if report.in_sample(document.id, size) else None
                yield PipelineItem(document, source_index, [size], texts)
                bytes_read += size
                if self.max_bytes is not None and bytes_read >= self.max_bytes:
                    break

    def _write_splits(
        self,
        folder: Path,
        scratch: Path,
        report: CleaningReport,
        parts: TrainValidationSplit,
        selected: NDArray[np.bool_],
        after: Sequence[DecontaminationStep],
    ) -> tuple[str, dict[SplitName, ParquetDocumentWriter]]:
        """Run the steps after the split, write both splits, and return the fingerprint and the closed writers."""
        cleaned = scratch / CLEANED_FILE
        if after and parts.tail is not None:
            raise UserError(
                f"data.cleaning: {after[0].name} requires validation documents, but the corpus consists of a single "
                "document or a single cluster of near-duplicates; remove the step"
            )
        filters = [step.build_filter(_validation_documents(cleaned, parts)) for step in after]
        fingerprint = hashlib.sha256(f"cut {parts.tail}\n".encode())
        train_path, validation_path = (folder / f"{split}.parquet" for split in SPLITS)
        with ParquetDocumentWriter(train_path) as train, ParquetDocumentWriter(validation_path) as validation:
            for index, document in enumerate(read_parquet_documents(cleaned)):
                size = len(document.text.encode())
                reason = None if selected[index] else "over the weight of its source"
                later_step = 0
                if len(self.sources) > 1:
                    report.add_later_step(document.id, document.text, size, later_step, reason)
                    later_step += 1
                for rejection_of in filters:
                    if reason is None:
                        reason = None if parts.validation[index] else rejection_of(document)
                        report.add_later_step(document.id, document.text, size, later_step, reason)
                        later_step += 1
                if reason is not None:
                    continue
                texts = parts.split_text(index, document.text)
                for writer, text in zip((train, validation), texts, strict=True):
                    if text:
                        writer.add(replace(document, text=text), len(text.encode()))
                side = "validation" if parts.validation[index] else "train"
                fingerprint.update(f"{side} {document.id}\0".encode() + sha256_text(document.text))
        self._require_documents(report, train.n_documents)
        return fingerprint.hexdigest(), {"train": train, "validation": validation}

    def _require_documents(self, report: CleaningReport, n_left: int) -> None:
        if n_left:
            return
        if not report.steps[0].documents_out:
            raise UserError(no_text_message(self.name)) from FileNotFoundError(self.name)
        if not any(step.rejected for step in report.steps):
            raise UserError(f"{self.name} contains too little text for a validation split; add text to data.source")
        rejected = [
            f"{step.name} rejected {sum(step.rejected.values()):,} ({step.rejected.most_common(1)[0][0]})"
            for step in report.steps
            if step.rejected
        ]
        raise UserError(
            f"none of the {report.steps[0].documents_in:,} documents of {self.name} is left for training: "
            f"{', '.join(rejected)}; change the steps in data.cleaning"
        )


def upgrade_stored_cleaning(entries: Sequence[str]) -> list[str]:
    """Replace earlier source hashes in ``CorpusSpec.settings["cleaning"]`` with the current hashes.

    The cleaning rules have not changed since version 0.1.
    """
    upgraded = []
    for entry in entries:
        step, _, source_hash = entry.rpartition(" ")
        current = EARLIER_SOURCE_HASHES.get(source_hash)
        upgraded.append(entry if current is None else f"{step} {current().source_hash}")
    return upgraded


def _validation_documents(cleaned: Path, parts: TrainValidationSplit) -> Iterator[Document]:
    return (document for index, document in enumerate(read_parquet_documents(cleaned)) if parts.validation[index])
