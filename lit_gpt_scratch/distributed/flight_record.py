"""Flight record: the latest collective operations of a process, which show where a hung run is blocked.

PyTorch's flight recorder keeps them in a ring buffer.
"""

import json
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch._C import _distributed_c10d

from lit_gpt_scratch.text.atomic_files import write_atomically

RECORDERS: Final = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Functions of PyTorch that return the records of Gloo and of NCCL."""


class Collective(NamedTuple):
    """Collective operation that a rank has entered.

    Attributes:
        number: Its number within the process group, the same on all ranks.
        name: Description, such as ``all_reduce of 4 x 5``.
    """

    number: int
    name: str


def enable_flight_record() -> None:
    """Make NCCL's watchdog write the record before it aborts the process after a timeout.

    The environment variable ``TORCH_FR_DUMP_TEMP_FILE`` specifies the file.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def read_flight_record() -> list[dict[str, Any]]:
    """Return the latest collective operations, oldest first."""
    entries: list[dict[str, Any]] = []
    for name in RECORDERS:
        if (dump := getattr(_distributed_c10d, name, None)) is not None:  # NCCL's is missing in CPU builds
            entries += json.loads(dump()).get("entries", [])
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def latest_collectives(record: list[dict[str, Any]]) -> dict[str, Collective]:
    """Return the latest collective operation in each process group, keyed by the name of the group.

    The latest operation of all is the last one.
    """
    latest: dict[str, Collective] = {}
    for entry in record:
        name = entry["profiling_name"].partition(":")[2]
        sizes = [" x ".join(map(str, size)) or "1" for size in entry["input_sizes"][:3]]
        group = str(entry["process_group"][0])
        latest.pop(group, None)
        latest[group] = Collective(entry["collective_seq_id"], f"{name} of {', '.join(sizes)}" if sizes else name)
    return latest


def find_absent_ranks(latest: dict[int, dict[str, Collective]]) -> tuple[list[int], str] | None:
    """Find the ranks that the others are waiting for.

    A rank waits in its latest collective operation for the members of the process group that have not entered it. Those
    may themselves wait for other ranks in another group; the ranks that wait for nobody are the cause.

    Args:
        latest: Latest collective operations of each rank; see ``latest_collectives``.

    Returns:
        The ranks and the name of a collective operation that they have not entered, or None if there are none.
    """
    absent_from: dict[int, str] = {}
    waiting: set[int] = set()
    for rank, groups in latest.items():
        if groups:
            group, (number, name) = [*groups.items()][-1]
            absent = [other for other, theirs in latest.items() if group in theirs and theirs[group].number < number]
            absent_from |= dict.fromkeys(absent, name)
            waiting |= {rank} if absent else set()
    causes = sorted(absent_from.keys() - waiting)
    return (causes, absent_from[causes[0]]) if causes else None


def save_flight_record(record: list[dict[str, Any]], file: Path) -> None:
    """Save a record as JSON.

    Raises:
        OSError: The file cannot be written.
    """
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1))
