"""Flight record: the latest collective operations of a process, which tell where a run that hangs is waiting.

PyTorch's flight recorder keeps them in a ring buffer, for Gloo as well as for NCCL.
"""

import json
import os
from pathlib import Path
from typing import Any, Final

from torch._C import _distributed_c10d

from lit_gpt_scratch.text.atomic_files import write_atomically

N_RECORDED: Final = 1000
"""Number of collective operations to keep."""


def enable_flight_record() -> None:
    """Record the collective operations of process groups that are created after this call.

    If a collective operation of NCCL times out, PyTorch itself writes the record before it terminates the process, to
    the file that the environment variable ``TORCH_FR_DUMP_TEMP_FILE`` specifies.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(N_RECORDED))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def read_flight_record() -> dict[str, Any]:
    """Return PyTorch's record; its ``entries`` are the latest collective operations, oldest first."""
    record: dict[str, Any] = json.loads(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    return record


def latest_by_group(record: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return the number and a description of the latest collective operation in each process group, keyed by group.

    A description is, for example, ``all_reduce of 4 x 5``. The last group is that of the latest operation.
    """
    latest: dict[str, tuple[int, str]] = {}
    for entry in record.get("entries", ()):
        name = entry["profiling_name"].partition(":")[2]
        sizes = [" x ".join(map(str, size)) or "1" for size in entry["input_sizes"][:3]]
        group = str(entry["pg_id"])
        latest.pop(group, None)
        latest[group] = entry["collective_seq_id"], f"{name} of {', '.join(sizes)}" if sizes else name
    return latest


def save_flight_record(record: dict[str, Any], folder: Path, rank: int) -> Path:
    """Save a record as ``flight_record/rank_<rank>.json`` in a run folder, and return its path."""
    file = folder / "flight_record" / f"rank_{rank}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1))
    return file
