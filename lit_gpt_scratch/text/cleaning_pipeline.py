"""Documents through cleaning steps: side by side where a step looks at one document, in order where it compares.

The same documents come out, in the same order, whatever the number of processes.
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
"""Bytes of text that go to a process at once; of shorter documents, up to as many of them as ``BATCH_DOCUMENTS``."""
BATCH_DOCUMENTS: Final = 256
SINGLE_PROCESS_BYTES: Final = 2**25
"""Bytes of text before which no process is started: it would take longer to start than it saves."""
QUEUED_BATCHES: Final = 2
"""Batches that wait for each process."""


@dataclass(slots=True)
class PipelineItem:
    """What becomes of a document on its way through the steps.

    Attributes:
        document: As the last step that it passed left it.
        origin: The number of its source.
        sizes: UTF-8 bytes before the first step, and after each that it passed.
        texts: The texts of these sizes, if the document is one of those whose tokens are counted.
        reason: Why the next step rejected it, if one did.
        sketch: What the next comparing step has to know of it.
    """

    document: Document
    origin: int
    sizes: list[int]
    texts: list[str] | None = None
    reason: RejectionReason | None = None
    sketch: Any = None

    def passed(self, document: Document) -> None:
        """Note what a step left."""
        same = document.text == self.document.text
        self.sizes.append(self.sizes[-1] if same else len(document.text.encode()))
        if self.texts is not None:
            self.texts.append(self.texts[-1] if same else document.text)
        self.document = document


ItemBatch = list[PipelineItem]
Sketch = Callable[[Document], Any]


def run_pipeline(
    passages: Iterable[PipelineItem], steps: Sequence[CleaningStep], last: Sketch, folder: Path, processes: int
) -> Iterator[PipelineItem]:
    """Send documents through steps.

    Args:
        passages: The documents, in their order.
        steps: Without those that come after the split.
        last: What to find out about each document that passed all steps.
        folder: Where steps may keep what they remember.
        processes: To work in; with 1, in this one.
    """
    with ExitStack() as stack:
        pool = LazyProcessPool(processes)
        stack.callback(pool.close)
        batches = _batches(passages)
        alone: list[PerDocumentStep] = []
        for step in steps:
            if isinstance(step, DeduplicationStep):
                work = partial(_work, tuple(alone), step.sketch)
                batches = map(work, batches) if step.cheap and not alone else pool.each(work, batches)
                batches = _judged(batches, stack.enter_context(step.judge(folder)))
                alone = []
            elif isinstance(step, PerDocumentStep):
                alone.append(step)
        for batch in pool.each(partial(_work, tuple(alone), last), batches):
            yield from batch


def _batches(passages: Iterable[PipelineItem]) -> Iterator[ItemBatch]:
    batch: ItemBatch = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += passage.sizes[0]
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    yield batch


def _work(steps: Sequence[PerDocumentStep], sketch: Sketch, batch: ItemBatch) -> ItemBatch:
    for passage in batch:
        for step in steps if passage.reason is None else ():
            result = step(passage.document)
            if isinstance(result, str):
                passage.reason = result
                break
            if is_blank(result.text):
                passage.reason = "nothing left"
                break
            passage.passed(result)
        passage.sketch = sketch(passage.document) if passage.reason is None else None
    return batch


def _judged(batches: Iterable[ItemBatch], judge: Callable[[Any], RejectionReason | None]) -> Iterator[ItemBatch]:
    for batch in batches:
        for passage in batch:
            if passage.reason is None:
                passage.reason = judge(passage.sketch)
                passage.sketch = None
                if passage.reason is None:
                    passage.passed(passage.document)
        yield batch


class LazyProcessPool:
    """Processes that are started when the work turns out to be much, and results in the order of the work."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def each(self, work: Callable[[ItemBatch], ItemBatch], batches: Iterable[ItemBatch]) -> Iterator[ItemBatch]:
        """``work(batch)`` for each batch."""
        seen = 0
        waiting: deque[Future[ItemBatch]] = deque()
        for batch in batches:
            seen += sum(passage.sizes[0] for passage in batch)
            if self.processes == 1 or seen < SINGLE_PROCESS_BYTES:
                yield work(batch)
                continue
            waiting.append(self._start().submit(work, batch))
            if len(waiting) > QUEUED_BATCHES * self.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """End the processes; what still waits is not done."""
        if self._pool is not None:
            shutdown_process_pool(self._pool)

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = start_process_pool(self.processes)
        return self._pool
