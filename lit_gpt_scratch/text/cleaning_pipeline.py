"""Cleaning pipeline that runs per-document steps in parallel and deduplication steps in document order.

The output and its order do not depend on the number of processes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.text.cleaning import CleaningStep, DeduplicationStep, PerDocumentStep, RejectionReason
from lit_gpt_scratch.text.document import Document, is_blank
from lit_gpt_scratch.text.process_pool import shutdown_process_pool, start_process_pool

BATCH_BYTES: Final = 2**20
"""Approximate bytes of text per batch sent to a worker process; a batch has at most ``BATCH_DOCUMENTS`` documents."""
BATCH_DOCUMENTS: Final = 256
SINGLE_PROCESS_BYTES: Final = 2**25
"""Minimum size of the text in bytes for starting worker processes; for less text, they would not save time."""
QUEUED_BATCHES: Final = 2
"""Number of batches queued per worker process."""


@dataclass(slots=True)
class PipelineItem:
    """A document in the pipeline.

    Attributes:
        document: The document after the last step that it passed.
        source_index: Index of the source from which the document was read.
        sizes: Size of the text in bytes before the first step and after each step that the document passed.
        texts: Text before the first step and after each step that the document passed; None if the document is not in
            the sample used to estimate token counts.
        reason: Reason why a step rejected the document; None if no step rejected it.
        sketch: Result of the next deduplication step's ``sketch`` method, or of ``final_sketch`` after the last step;
            None if the document was rejected.
    """

    document: Document
    source_index: int
    sizes: list[int]
    texts: list[str] | None = None
    reason: RejectionReason | None = None
    sketch: Any = None

    def record_step(self, document: Document) -> None:
        """Record the output of a step that accepted the document."""
        unchanged = document.text == self.document.text
        self.sizes.append(self.sizes[-1] if unchanged else len(document.text.encode()))
        if self.texts is not None:
            self.texts.append(self.texts[-1] if unchanged else document.text)
        self.document = document


ItemBatch = list[PipelineItem]
SketchFunction = Callable[[Document], Any]


def run_pipeline(
    items: Iterable[PipelineItem],
    steps: Sequence[CleaningStep],
    final_sketch: SketchFunction,
    folder: Path,
    processes: int,
    remarks: list[str],
) -> Iterator[PipelineItem]:
    """Run documents through the steps that precede the split.

    Args:
        items: The documents, in order.
        steps: Cleaning steps to apply, in order: per-document and deduplication steps.
        final_sketch: Function that is called with each document that passes all steps; the result is stored in
            ``PipelineItem.sketch``.
        folder: Folder in which steps may store files.
        processes: Number of worker processes; 1 runs all steps in the current process.
        remarks: List to which sentences for the cleaning report are added after the last document. They are read from
            the attribute ``remarks`` of each step's filter, if the filter has this attribute.

    Yields:
        All items in order, including rejected ones.
    """
    with ExitStack() as stack:
        pool = LazyProcessPool(processes)
        stack.callback(pool.close)
        batches = _make_batches(items)
        pending: list[PerDocumentStep] = []
        filters: list[Callable[[Any], RejectionReason | None]] = []
        for step in steps:
            if isinstance(step, DeduplicationStep):
                process = partial(_process_batch, tuple(pending), step.sketch)
                batches = map(process, batches) if step.cheap and not pending else pool.map(process, batches)
                filters.append(stack.enter_context(step.build_filter(folder)))
                batches = _filter_batches(batches, filters[-1])
                pending = []
            elif isinstance(step, PerDocumentStep):
                pending.append(step)
        for batch in pool.map(partial(_process_batch, tuple(pending), final_sketch), batches):
            yield from batch
        remarks.extend(remark for rejection_of in filters for remark in getattr(rejection_of, "remarks", ()))


def _make_batches(items: Iterable[PipelineItem]) -> Iterator[ItemBatch]:
    batch: ItemBatch = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.sizes[0]
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    yield batch


def _process_batch(steps: Sequence[PerDocumentStep], sketch: SketchFunction, batch: ItemBatch) -> ItemBatch:
    for item in batch:
        for step in steps if item.reason is None else ():
            result = step(item.document)
            if isinstance(result, str):
                item.reason = result
                break
            if is_blank(result.text):
                item.reason = "empty after cleaning"
                break
            item.record_step(result)
        item.sketch = sketch(item.document) if item.reason is None else None
    return batch


def _filter_batches(
    batches: Iterable[ItemBatch], rejection_of: Callable[[Any], RejectionReason | None]
) -> Iterator[ItemBatch]:
    for batch in batches:
        for item in batch:
            if item.reason is None:
                item.reason = rejection_of(item.sketch)
                item.sketch = None
                if item.reason is None:
                    item.record_step(item.document)
        yield batch


class LazyProcessPool:
    """Process pool that starts once there is enough work and returns results in order."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def map(self, process: Callable[[ItemBatch], ItemBatch], batches: Iterable[ItemBatch]) -> Iterator[ItemBatch]:
        """Yield ``process(batch)`` for each batch in order, prefetching a bounded number of batches."""
        n_bytes = 0
        queue: deque[Future[ItemBatch]] = deque()
        for batch in batches:
            n_bytes += sum(item.sizes[0] for item in batch)
            if self.processes == 1 or n_bytes < SINGLE_PROCESS_BYTES:
                yield process(batch)
                continue
            queue.append(self._start().submit(process, batch))
            if len(queue) > QUEUED_BATCHES * self.processes:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()

    def close(self) -> None:
        """Stop the worker processes and discard queued work."""
        if self._pool is not None:
            shutdown_process_pool(self._pool)

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = start_process_pool(self.processes)
        return self._pool
