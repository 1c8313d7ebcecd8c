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

from lit_gpt_scratch.text.cleaning import ComparingStep, LoneStep, Reason, Step
from lit_gpt_scratch.text.document import Document, blank
from lit_gpt_scratch.text.process_pool import end, spawned

BATCH: Final = 2**20
"""Bytes of text that go to a process at once; of shorter documents, up to as many of them as ``MOST``."""
MOST: Final = 256
ALONE: Final = 2**25
"""Bytes of text before which no process is started: it would take longer to start than it saves."""
AHEAD: Final = 2
"""Batches that wait for each process."""


@dataclass(slots=True)
class Passage:
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
    reason: Reason | None = None
    sketch: Any = None

    def passed(self, document: Document) -> None:
        """Note what a step left."""
        same = document.text == self.document.text
        self.sizes.append(self.sizes[-1] if same else len(document.text.encode()))
        if self.texts is not None:
            self.texts.append(self.texts[-1] if same else document.text)
        self.document = document


Batch = list[Passage]
Sketch = Callable[[Document], Any]


def run(
    passages: Iterable[Passage], steps: Sequence[Step], last: Sketch, folder: Path, processes: int
) -> Iterator[Passage]:
    """Send documents through steps.

    Args:
        passages: The documents, in their order.
        steps: Without those that come after the split.
        last: What to find out about each document that passed all steps.
        folder: Where steps may keep what they remember.
        processes: To work in; with 1, in this one.
    """
    with ExitStack() as stack:
        pool = Pool(processes)
        stack.callback(pool.close)
        batches = _batches(passages)
        alone: list[LoneStep] = []
        for step in steps:
            if isinstance(step, ComparingStep):
                work = partial(_work, tuple(alone), step.sketch)
                batches = map(work, batches) if step.cheap and not alone else pool.each(work, batches)
                batches = _judged(batches, stack.enter_context(step.judge(folder)))
                alone = []
            elif isinstance(step, LoneStep):
                alone.append(step)
        for batch in pool.each(partial(_work, tuple(alone), last), batches):
            yield from batch


def _batches(passages: Iterable[Passage]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += passage.sizes[0]
        if size >= BATCH or len(batch) >= MOST:
            yield batch
            batch, size = [], 0
    yield batch


def _work(steps: Sequence[LoneStep], sketch: Sketch, batch: Batch) -> Batch:
    for passage in batch:
        for step in steps if passage.reason is None else ():
            result = step(passage.document)
            if isinstance(result, str):
                passage.reason = result
                break
            if blank(result.text):
                passage.reason = "nothing left"
                break
            passage.passed(result)
        passage.sketch = sketch(passage.document) if passage.reason is None else None
    return batch


def _judged(batches: Iterable[Batch], judge: Callable[[Any], Reason | None]) -> Iterator[Batch]:
    for batch in batches:
        for passage in batch:
            if passage.reason is None:
                passage.reason = judge(passage.sketch)
                passage.sketch = None
                if passage.reason is None:
                    passage.passed(passage.document)
        yield batch


class Pool:
    """Processes that are started when the work turns out to be much, and results in the order of the work."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def each(self, work: Callable[[Batch], Batch], batches: Iterable[Batch]) -> Iterator[Batch]:
        """``work(batch)`` for each batch."""
        seen = 0
        waiting: deque[Future[Batch]] = deque()
        for batch in batches:
            seen += sum(passage.sizes[0] for passage in batch)
            if self.processes == 1 or seen < ALONE:
                yield work(batch)
                continue
            waiting.append(self._start().submit(work, batch))
            if len(waiting) > AHEAD * self.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """End the processes; what still waits is not done."""
        if self._pool is not None:
            end(self._pool)

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = spawned(self.processes)
        return self._pool
