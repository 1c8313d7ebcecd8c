"""Read a Chrome trace of ``torch.profiler``: time on the device by kind of kernel, and calls per step."""

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

    Events before the first mark and after the last mark are not counted.

    Returns:
        Counts per step, keyed by the name of a runtime call, ``READ_SCALAR`` or ``COPY_TO_HOST``.
    """
    marks = sorted(
        (float(event["ts"]), int(event["name"].removeprefix(STEP_MARK)))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(STEP_MARK)
    )
    counts = {step: Counter[str]() for _, step in marks[:-1]}
    starts = [start for start, _ in marks]
    for event in events:
        name = next((name for name in (*SYNCHRONIZATIONS, READ_SCALAR) if event["name"] == name), None)
        name = COPY_TO_HOST if name is None and str(event["name"]).startswith(COPY_TO_HOST) else name
        place = bisect_right(starts, float(event["ts"])) - 1
        if name is not None and 0 <= place < len(starts) - 1:
            counts[marks[place][1]][name] += 1
    return counts


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
