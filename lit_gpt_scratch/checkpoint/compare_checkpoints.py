"""Compare the checkpoints of two runs bit by bit, and their logged curves point by point."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lit_gpt_scratch.checkpoint.loop_state import normalize_progress
from lit_gpt_scratch.diagnostics.rules import RULES
from lit_gpt_scratch.diagnostics.tensorboard_reader import DIAGNOSES_NAME, TEXT_SUFFIX, tensor_values
from lit_gpt_scratch.errors import UserError

TIMING_NAMES: Final = r"seconds|time_elapsed|tokens_per_second|throughput/.*"
"""Pattern that matches the keys and tags of wall-clock measurements, which differ between any two runs."""
TIMING_SYMPTOMS: Final = tuple(
    rule.name for rule in RULES if any(re.fullmatch(TIMING_NAMES, name) for name in rule.reads)
)
"""Names of the diagnostic rules that read wall-clock measurements."""
DIAGNOSES_TAG: Final = f"{DIAGNOSES_NAME}{TEXT_SUFFIX}"
REPEATABLE_TAGS: Final = (
    r"(val|baselines|samples?|views|weights|activations|doctor|loss_by_\w+)/.*|epoch|custom_scalars.*"
)
"""Pattern that matches the tags whose points may be logged twice with the same value.

If a process is killed after it has logged the results of a validation run, but before it has recorded this validation
run as completed, the resumed run repeats it. Also, the layout of the TensorBoard charts is logged each time a run is
started or resumed.
"""


def iterate_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all leaf values of a checkpoint as (path, value) pairs, skipping wall-clock measurements."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not re.fullmatch(TIMING_NAMES, str(key)):
                yield from iterate_leaves(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from iterate_leaves(inner, f"{name}/{index}")
    else:
        yield name, value


def count_differing_bits(one: Any, other: Any) -> int:
    """Count the differing bits between two leaf values; if their types or shapes differ, all bits are counted."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape == other.shape and one.dtype == other.dtype:
            a, b = (t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (one, other))
            return int.from_bytes((a ^ b).tobytes(), "little").bit_count()
        return 8 * max(one.nbytes, other.nbytes)
    return 0 if type(one) is type(other) and one == other else 64


def compare_checkpoints(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, int]:
    """Count the differing bits between two checkpoints, across weights, optimizer, schedule, counters and callbacks.

    Loop counters are normalized before the comparison, as when a run is resumed.

    Returns:
        Number of differing bits keyed by path; paths without differences are omitted.
    """
    a, b = dict(iterate_leaves(_normalize_counters(one))), dict(iterate_leaves(_normalize_counters(other)))
    bits = {name: count_differing_bits(a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())}
    return {name: n for name, n in bits.items() if n}


def _normalize_counters(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    loops = deepcopy(checkpoint["loops"])
    normalize_progress(loops["fit_loop"])
    return {**checkpoint, "loops": loops}


def read_curves(run: Path) -> dict[str, list[tuple[int, str]]]:
    """Read a run's TensorBoard scalars and text as (step, value) pairs keyed by tag, excluding wall-clock measurements.

    Each row in a table of diagnoses becomes one pair, with the step that the row contains.

    Raises:
        UserError: An event file is corrupted.
    """
    try:
        events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
        curves = {
            tag: [(event.step, tensor_values(event.tensor_proto)) for event in events.Tensors(tag)]
            for tag in events.Tags()["tensors"]
            if not re.fullmatch(TIMING_NAMES, tag)
        }
        diagnoses = _split_diagnoses([text.decode() for _, texts in curves.pop(DIAGNOSES_TAG, []) for text in texts])
    except Exception as error:  # the files may contain anything
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"the TensorBoard events of {run} are corrupted ({type(error).__name__}: {reason})") from error
    points = {tag: [(step, repr(value)) for step, value in curve] for tag, curve in curves.items()}
    return points | ({DIAGNOSES_TAG: diagnoses} if diagnoses else {})


def _split_diagnoses(tables: Sequence[str]) -> list[tuple[int, str]]:
    """Split tables of diagnoses into distinct rows, excluding diagnoses that are based on wall-clock measurements."""
    found = set()
    for row in (row for table in tables for row in table.splitlines()[2:]):
        _, step, symptom, _ = row.split("|", maxsplit=3)
        if symptom.partition(":")[0].strip() not in TIMING_SYMPTOMS:
            found.add((int(step), row))
    return sorted(found)


def compare_curves(one: Path, other: Path) -> dict[str, int]:
    """For each tag, count the points at which the logged curves of two runs differ.

    A point that one run logged twice and the other run once counts as a difference, unless the tag matches
    ``REPEATABLE_TAGS``.
    """
    a, b = read_curves(one), read_curves(other)
    differences: dict[str, int] = {}
    for tag in sorted(a.keys() | b.keys()):
        x, y = _count_points(tag, a.get(tag, [])), _count_points(tag, b.get(tag, []))
        if x != y:
            differences[f"curve {tag}"] = ((x - y) + (y - x)).total()
    return differences


def _count_points(tag: str, curve: list[tuple[int, str]]) -> "Counter[tuple[int, str]]":
    return Counter(set(curve) if re.fullmatch(REPEATABLE_TAGS, tag) else curve)
