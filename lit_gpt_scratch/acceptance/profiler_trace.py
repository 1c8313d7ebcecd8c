"""Read a Chrome trace of ``torch.profiler``: time on the device by kind of kernel, and calls per step."""

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Event = Mapping[str, Any]
DEVICE_CATEGORIES: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of events on a GPU; on a CPU, the time of operators is counted instead."""
CPU_CATEGORIES: Final = frozenset({"cpu_op"})
KINDS: Final = {
    "compiled elementwise": r"^triton_(poi|red|per)_",  # their names list the fused operators, also attention
    "attention": r"flash|fmha|attention|sdpa|cudnn.*mha",
    "matmul": r"gemm|cutlass|cublas|nvjet|xmma|aten::(mm|addmm|bmm|baddbmm|linear|matmul)$|onednn|mkldnn",
    "communication": r"nccl|all_?reduce|all_?gather|reduce_?scatter",
    "optimizer": r"multi_tensor|foreach|adam",
    "copies": r"memcpy|memset|aten::(copy_|to|_to_copy)$",
    "other compiled": r"triton",
}
"""Patterns of kernel and operator names, case-insensitive; the first kind that matches counts, otherwise ``other``."""
STEP_MARK: Final = "acceptance step "
"""Prefix of the annotations that mark the start of a step."""
SYNCHRONIZATIONS: Final = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Runtime calls with which the host waits for the device."""
READ_SCALAR: Final = "aten::_local_scalar_dense"
"""Operator behind ``Tensor.item``, which copies a number to the host."""
COPY_TO_HOST: Final = "Memcpy DtoH"
COUNTED_CALLS: Final = frozenset({*SYNCHRONIZATIONS, READ_SCALAR})
RUNTIME_CATEGORIES: Final = frozenset({"cuda_runtime", "cuda_driver"})
ENCLOSING_CATEGORIES: Final = frozenset({"cpu_op", "user_annotation"})


def read_trace(path: Path) -> list[Event]:
    """Read the complete events of a trace written by ``export_chrome_trace``, compressed or not, in order of time.

    Times (``ts``, ``dur``) are in microseconds.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: float(event["ts"]))


def time_by_kind(events: Sequence[Event]) -> dict[str, float]:
    """Return the seconds that each kind of kernel takes on the device and, as ``idle``, the time between kernels.

    If the trace has no events of a GPU, the operators of the CPU are counted instead.
    """
    categories = DEVICE_CATEGORIES if any(event.get("cat") in DEVICE_CATEGORIES for event in events) else CPU_CATEGORIES
    counted = [event for event in events if event.get("cat") in categories]
    seconds: dict[str, float] = defaultdict(float)
    for event, own in _self_microseconds(counted):
        seconds[_kind(event["name"])] += own / 1e6
    if counted:
        seconds["idle"] = (_span(counted) - _busy(counted)) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def longest_events(events: Sequence[Event], count: int) -> list[tuple[str, float, int]]:
    """Return the kernels that take most time in total: name, seconds and number of calls of each."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in DEVICE_CATEGORIES:
            durations[event["name"]].append(float(event["dur"]) / 1e6)
    totals = [(name, sum(seconds), len(seconds)) for name, seconds in durations.items()]
    return sorted(totals, key=lambda total: -total[1])[:count]


def count_by_step(events: Sequence[Event]) -> dict[int, Counter[str]]:
    """Count synchronizations and copies to the host between the marks of consecutive steps, keyed by step.

    Events before the first mark and after the last mark are not counted. A copy belongs to the step that submitted it.

    Returns:
        Counts per step, keyed by the name of a runtime call, ``READ_SCALAR`` or ``COPY_TO_HOST``.
    """
    steps = _StepMarks(events)
    counts = {step: Counter[str]() for step in steps.complete}
    submitted = {_correlation(event): float(event["ts"]) for event in events if event.get("cat") in RUNTIME_CATEGORIES}
    for event in events:
        name, ts = str(event["name"]), float(event["ts"])
        if name.startswith(COPY_TO_HOST):
            name = COPY_TO_HOST
            if (correlation := _correlation(event)) is not None:
                ts = submitted.get(correlation, ts)
        elif name not in COUNTED_CALLS:
            continue
        if (step := steps.at(ts)) is not None:
            counts[step][name] += 1
    return counts


def find_origins(events: Sequence[Event], names: Collection[str], steps: Collection[int]) -> Counter[str]:
    """Count the places from which operators or runtime calls were called in some steps.

    Args:
        events: Events in order of time.
        names: Names of the operators or calls.
        steps: Steps, as marked in the trace.

    Returns:
        Counts, keyed by the innermost annotation that encloses the call, such as a hook of a callback, and the
        outermost operator in it.
    """
    marks = _StepMarks(events)
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ENCLOSING_CATEGORIES and not event["name"].startswith(STEP_MARK):
            by_thread[event.get("pid"), event.get("tid")].append(event)
    origins: Counter[str] = Counter()
    for event in events:
        if event["name"] not in names or marks.at(float(event["ts"])) not in steps:
            continue
        own = by_thread[event.get("pid"), event.get("tid")]
        around = [e for e in own if float(e["ts"]) <= float(event["ts"]) and _end(event) <= _end(e) and e is not event]
        last = max((n for n, each in enumerate(around) if each["cat"] != "cpu_op"), default=-1)
        annotation = around[last]["name"] if last >= 0 else "no annotation"
        operator = around[last + 1]["name"] if last + 1 < len(around) else event["name"]
        origins[f"{annotation}: {operator}"] += 1
    return origins


class _StepMarks:
    """The marks of steps in a trace.

    Args:
        events: Events of the trace.

    Attributes:
        complete: Steps that end with the mark of another step.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        marks = sorted(
            (float(event["ts"]), int(event["name"].removeprefix(STEP_MARK)))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(STEP_MARK)
        )
        self._starts = [start for start, _ in marks]
        self.complete = [step for _, step in marks[:-1]]

    def at(self, ts: float) -> int | None:
        """Return the complete step at a time in microseconds, if there is one."""
        place = bisect_right(self._starts, ts) - 1
        return self.complete[place] if 0 <= place < len(self.complete) else None


def _correlation(event: Event) -> int | None:
    """Return the number that a runtime call shares with the work on the device that it has submitted."""
    return (event.get("args") or {}).get("correlation")


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _self_microseconds(events: Sequence[Event]) -> Iterator[tuple[Event, float]]:
    """Yield each event with its duration without the events that it contains on the same thread or stream."""
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        by_thread[event.get("pid"), event.get("tid")].append(event)
    for own in by_thread.values():
        inner: dict[int, float] = defaultdict(float)
        open_events: list[int] = []
        order = sorted(range(len(own)), key=lambda index: (float(own[index]["ts"]), -float(own[index]["dur"])))
        for index in order:
            start, duration = float(own[index]["ts"]), float(own[index]["dur"])
            while open_events and start >= _end(own[open_events[-1]]):
                open_events.pop()
            if open_events:
                inner[open_events[-1]] += duration
            open_events.append(index)
        for index in order:
            yield own[index], max(0.0, float(own[index]["dur"]) - inner[index])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])


def _span(events: Sequence[Event]) -> float:
    return max(map(_end, events)) - min(float(event["ts"]) for event in events)


def _busy(events: Sequence[Event]) -> float:
    """Return the length of the union of the events' intervals, in microseconds."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: float(event["ts"])):
        busy += max(0.0, _end(event) - max(until, float(event["ts"])))
        until = max(until, _end(event))
    return busy
