"""Show the rows of an acceptance run: lines of a table in the terminal, ``acceptance.json`` and ``acceptance.md``."""

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.acceptance.row import STATUSES, RowRecord
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.markdown import format_compact_table

NAME_WIDTH, STATUS_WIDTH, SECONDS_WIDTH = 34, 12, 6
REPORT_FILE: Final = "acceptance.json"
HEADER: Final = f"{'row':{NAME_WIDTH}}{'status':{STATUS_WIDTH}}{'s':>{SECONDS_WIDTH}}  result"
MIN_RESULT_WIDTH = 40


def format_row(record: RowRecord, columns: int | None = None) -> str:
    """Format a row for the terminal; a long result is wrapped below the column of results.

    Args:
        record: The row.
        columns: Width of the terminal; by default, that of this process's terminal.
    """
    start = f"{record['row']:{NAME_WIDTH}}{record['status']:{STATUS_WIDTH}}{record['seconds']:{SECONDS_WIDTH}.0f}  "
    columns = shutil.get_terminal_size((160, 24)).columns if columns is None else columns
    width = max(MIN_RESULT_WIDTH, columns - len(start))
    lines = textwrap.wrap(describe_result(record), width) or [""]
    return ("\n" + " " * len(start)).join([start + lines[0], *lines[1:]]).rstrip()


def describe_result(record: RowRecord) -> str:
    """Return the reason for the status of a row, if there is one, and its values, in one line."""
    values = [f"{name} {format_value(value)}" for name, value in record["values"].items()]
    return "; ".join([*([record["reason"]] if record["reason"] else []), *values])


def format_value(value: Any) -> str:
    """Format a value: four significant digits for numbers with a fraction, thousands separators for large numbers."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def count_statuses(records: Sequence[RowRecord]) -> str:
    """Describe how many rows ended with each status."""
    counts = Counter(record["status"] for record in records)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def write_report(folder: Path, facts: Mapping[str, Any], records: Sequence[RowRecord]) -> None:
    """Write ``acceptance.json`` and ``acceptance.md`` atomically.

    Args:
        folder: Existing folder.
        facts: Properties of the whole run, such as the device.
        records: The rows that have ended, in their order.
    """
    content = json.dumps({**facts, "rows": list(records)}, indent=2, allow_nan=False)
    write_atomically(folder / REPORT_FILE, content + "\n")
    table = [["row", "status", "seconds", "result"]]
    table += [[r["row"], r["status"], f"{r['seconds']:.0f}", describe_result(r)] for r in records]
    head = ", ".join(f"{name}: {format_value(value)}" for name, value in facts.items())
    text = f"# Acceptance\n\n{head}\n\n{format_compact_table(table)}\n\n{count_statuses(records)}\n"
    write_atomically(folder / "acceptance.md", text)
