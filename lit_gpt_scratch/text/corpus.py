"""Documents read, cleaned, mixed and split, once, and kept beside their audit.

A corpus is a folder with ``train.parquet`` and ``validation.parquet`` (columns ``id`` and ``text``: ``datasets`` and
``pandas`` read it as it is), ``audit.json`` and ``audit.md``. Documents pass through memory a few at a time.
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
from lit_gpt_scratch.text import cleaning_pipeline, hub
from lit_gpt_scratch.text import cleaning_report as account
from lit_gpt_scratch.text.atomic_files import create_folder_atomically
from lit_gpt_scratch.text.cleaning import CleaningStep, DecontaminationStep, validate_steps
from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem
from lit_gpt_scratch.text.cleaning_report import CleaningReport
from lit_gpt_scratch.text.document import Document, RejectedDocument, is_blank
from lit_gpt_scratch.text.document_index import DocumentIndex, hash_document
from lit_gpt_scratch.text.duplicates import sha256_text
from lit_gpt_scratch.text.parquet_io import ParquetDocumentWriter, read_parquet_documents
from lit_gpt_scratch.text.sources import DocumentSource, no_text_message
from lit_gpt_scratch.text.split import TrainValidationSplit

SplitName = Literal["train", "validation"]
SPLITS: Final[tuple[SplitName, ...]] = ("train", "validation")
CORPUS_FORMAT: Final = 2
CLEANED_FILE: Final = "cleaned.parquet"


@dataclass(frozen=True)
class CleanedCorpus:
    """A kept corpus.

    Attributes:
        folder: Where it lies.
        fingerprint: SHA-256 over ids, contents and sides; the corpus changed if it did.
        n_bytes: UTF-8 bytes of the texts of both sides.
        audit: What became of every document.
    """

    folder: Path
    fingerprint: str
    n_bytes: int
    audit: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "CleanedCorpus":
        """Open a folder that ``Selection.prepare`` made.

        Raises:
            UserError: It is no such folder.
        """
        try:
            about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            audit = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
            return cls(folder, about["fingerprint"], about["n_bytes"], audit)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no corpus ({error}); delete it and try again") from error

    def texts(self, side: SplitName, share: float = 1.0) -> Iterator[str]:
        """The texts of one side; or about a share of them, the same whatever their order."""
        for document in read_parquet_documents(self.folder / f"{side}.parquet"):
            if share == 1 or int.from_bytes(sha256_text(document.text)[:8], "big") / 2**64 < share:
                yield document.text

    @property
    def sample(self) -> list[list[str]]:
        """See ``Audit.sample``."""
        found: list[list[str]] = json.loads((self.folder / "sample.json").read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True)
class CorpusSpec:
    """All that decides which texts a corpus has.

    Args:
        sources: Each with its weight; of several, so much of each is taken that their bytes are as the weights.
        cleaning: Steps, in their order.
        validation_share: Share of the documents to hold out.
        max_bytes: Read no further, in each source, than the document that reaches so many bytes of text.
        processes: To clean in; does not change the result.
    """

    sources: tuple[tuple[DocumentSource, float], ...]
    cleaning: tuple[CleaningStep, ...]
    validation_share: float
    max_bytes: int | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        for_hub = any(hub.asked(source.config, source.split, source.streaming) for source, _ in self.sources)
        if for_hub and not any(source.on_hub for source, _ in self.sources):
            raise UserError(f"data.config, split and streaming are for datasets of the Hub; {self.name} is none")
        validate_steps(self.cleaning)

    @property
    def name(self) -> str:
        """The sources, as a user wrote them."""
        return ", ".join(source.name for source, _ in self.sources)

    @cached_property
    def stamps(self) -> list[str]:
        """What changes when the sources do; see ``Source.stamp``."""
        return [source.stamp() for source, _ in self.sources]

    @property
    def settings(self) -> dict[str, Any]:
        """What the corpus follows from beside what is in the sources."""
        return {
            "format": CORPUS_FORMAT,
            # Compared with what a store has on disk, where the class has been called Source since 0.1.
            "source": [[repr(source).removeprefix("Document"), weight] for source, weight in self.sources],
            "cleaning": [f"{step!r} {step.code}" for step in self.cleaning],
            "validation_share": self.validation_share,
            "max_bytes": self.max_bytes,
        }

    def prepare(self, corpora: Path, flag: str = "--data.cache") -> CleanedCorpus:
        """Open the corpus of this selection in a folder of many, making it first if it is not there.

        Raises:
            UserError: A source is unusable, no document is left, or the folder cannot be written.
        """
        here = [source.stamp(here=True) for source, _ in self.sources]
        key = hashlib.sha256(json.dumps([self.settings, here], sort_keys=True).encode()).hexdigest()
        folder = corpora / key[:16]
        create_folder_atomically(folder, self.write, flag)
        return CleanedCorpus.open(folder)

    def write(self, folder: Path) -> None:
        """Make the corpus in an empty folder."""
        before = [step for step in self.cleaning if not isinstance(step, DecontaminationStep)]
        after = [step for step in self.cleaning if isinstance(step, DecontaminationStep)]
        mixing = ["mixing"] if len(self.sources) > 1 else []
        audit = CleaningReport([step.name for step in before], [*mixing, *(step.name for step in after)])
        with tempfile.TemporaryDirectory(dir=folder) as scratch, closing(DocumentIndex(Path(scratch))) as ledger:
            self._clean(Path(scratch), before, audit, ledger)
            names, weights = zip(*((source.name, weight) for source, weight in self.sources), strict=True)
            wanted = ledger.mixed(names, weights)
            parts = ledger.split(wanted, self.validation_share)
            fingerprint, sides = self._divide(folder, Path(scratch), audit, parts, wanted, after)
        sizes = {side: {"documents": shelf.n_documents, "bytes": shelf.n_bytes} for side, shelf in sides.items()}
        found = audit.to_dict() | {"split": sizes}
        about = {"fingerprint": fingerprint, "n_bytes": sum(shelf.n_bytes for shelf in sides.values()), **self.settings}
        for name, content in (("audit", found), ("corpus", about), ("sample", audit.sample)):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        (folder / "audit.md").write_text(account.format_report(found), encoding="utf-8")

    def _clean(
        self, scratch: Path, steps: Sequence[CleaningStep], audit: CleaningReport, ledger: DocumentIndex
    ) -> None:
        """Everything before the split: kept documents on a shelf, in their order, and what is known of each."""
        bar = tqdm(desc="reading and cleaning", unit="B", unit_scale=True, disable=None, leave=False)
        with bar, ParquetDocumentWriter(scratch / CLEANED_FILE) as shelf:
            for passage in cleaning_pipeline.run_pipeline(
                self._read(audit), steps, hash_document, scratch, self.processes
            ):
                audit.add(passage)
                if passage.reason is None:
                    shelf.add(passage.document, passage.sizes[-1])
                    ledger.add(passage)
                bar.update(passage.sizes[0])
        self._refuse_nothing(audit, ledger.n_documents)

    def _read(self, audit: CleaningReport) -> Iterator[PipelineItem]:
        for origin, (source, _) in enumerate(self.sources):
            read = 0
            for found in source.read():
                if isinstance(found, RejectedDocument):
                    audit.passed_over(found)
                    continue
                size = len(found.text.encode())
                if is_blank(found.text):
                    audit.passed_over(RejectedDocument(found.id, "no text", size))
                    continue
                document = found if len(self.sources) == 1 else replace(found, id=f"{source.name}:{found.id}")
                texts = [document.text] if audit.sampled(document.id, size) else None
                yield PipelineItem(document, origin, [size], texts)
                read += size
                if self.max_bytes is not None and read >= self.max_bytes:
                    break

    def _divide(
        self,
        folder: Path,
        scratch: Path,
        audit: CleaningReport,
        parts: TrainValidationSplit,
        wanted: NDArray[np.bool_],
        after: Sequence[DecontaminationStep],
    ) -> tuple[str, dict[SplitName, ParquetDocumentWriter]]:
        """Everything after the split: each document to its side, but for those that are in its way."""
        cleaned = scratch / CLEANED_FILE
        if after and parts.cut is not None:
            raise UserError(f"data.cleaning: {after[0].name} needs documents that are held out; this is one text")
        judges = [step.judge(_held_out(cleaned, parts)) for step in after]
        fingerprint = hashlib.sha256(f"cut {parts.cut}\n".encode())
        with (
            ParquetDocumentWriter(folder / "train.parquet") as train,
            ParquetDocumentWriter(folder / "validation.parquet") as validation,
        ):
            for place, document in enumerate(read_parquet_documents(cleaned)):
                size = len(document.text.encode())
                reason = None if wanted[place] else "more than its weight"
                later = 0
                if len(self.sources) > 1:
                    audit.follow(document.id, document.text, size, later, reason)
                    later += 1
                for judge in judges:
                    if reason is None:
                        reason = None if parts.validation[place] else judge(document)
                        audit.follow(document.id, document.text, size, later, reason)
                        later += 1
                if reason is not None:
                    continue
                for shelf, text in zip((train, validation), parts.parts(place, document.text), strict=True):
                    if text:
                        shelf.add(replace(document, text=text), len(text.encode()))
                side = "validation" if parts.validation[place] else "train"
                fingerprint.update(f"{side} {document.id}\0".encode() + sha256_text(document.text))
        self._refuse_nothing(audit, train.n_documents)
        return fingerprint.hexdigest(), {"train": train, "validation": validation}

    def _refuse_nothing(self, audit: CleaningReport, left: int) -> None:
        if left:
            return
        if not audit.rows[0].documents_out:
            raise UserError(no_text_message(self.name))
        if not any(row.rejected for row in audit.rows):
            raise UserError(f"{self.name} is too short to hold out a part of it; name more text as data.source")
        eaten = [
            f"{row.name} rejected {sum(row.rejected.values()):,} ({row.rejected.most_common(1)[0][0]})"
            for row in audit.rows
            if row.rejected
        ]
        raise UserError(
            f"no document is left of the {audit.rows[0].documents_in:,} of {self.name}: {', '.join(eaten)}; "
            "choose other steps in data.cleaning"
        )


def _held_out(cleaned: Path, parts: TrainValidationSplit) -> Iterator[Document]:
    return (document for place, document in enumerate(read_parquet_documents(cleaned)) if parts.validation[place])
