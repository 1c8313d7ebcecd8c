"""Run the rows of the acceptance table one after another until the time is used up, and report each when it ends."""

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lit_gpt_scratch.acceptance.acceptance_report import HEADER, REPORT_FILE, count_statuses, format_row, write_report
from lit_gpt_scratch.acceptance.row import AcceptanceRow, RowContext, RowRecord
from lit_gpt_scratch.acceptance.row_process import EXIT_GRACE_SECONDS, START_METHOD, choose_start_method, run_row
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.terminal_output import quote_short
from lit_gpt_scratch.text.atomic_files import remove_unfinished, write_atomically

USUAL_MINUTES: Final = 10.0
"""Duration for which the time limits in the table are set."""
MIN_ROW_SECONDS: Final = EXIT_GRACE_SECONDS + 2.0
"""A row is not started if less time than this is left."""
LOG_FILE: Final = "acceptance.log"
"""File for the output of all rows, for example of ``fit``."""
MAX_MINUTES: Final = 24 * 60.0


@dataclass
class AcceptanceRun:
    """A run of the acceptance rows.

    Args:
        rows: The rows, the most valuable first.
        out: Folder for the reports and for files that rows keep.
        minutes: Time limit of the whole run.
        text: Text of tiny Shakespeare, if the user gave one.
        device: Device to measure; by default, the first CUDA GPU or, if there is none, the CPU.
        patterns: Regular expressions; if there are any, only rows whose names match one of them are measured, and the
            other rows of a report in ``out`` are kept.

    Raises:
        UserError: The time limit is not positive, the text is missing, the folder is not writable, a pattern matches no
            row, or the report in ``out`` is of another device or version of PyTorch.
    """

    rows: Sequence[AcceptanceRow]
    out: Path
    minutes: float = USUAL_MINUTES
    text: Path | None = None
    device: torch.device | None = None
    patterns: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= MAX_MINUTES:
            raise UserError(f"argument --minutes is {self.minutes:g}; it must be above 0 and at most {MAX_MINUTES:g}")
        if self.text is not None and not self.text.is_file():
            raise UserError(f"argument --text: {self.text} is not a file; pass the text of tiny Shakespeare")
        if self.device is None:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.began = time.monotonic()
        self.selected = select_rows(self.rows, self.patterns)
        self.start_method = START_METHOD
        self.start_reason = ""
        """Why the usual start method cannot be used; empty if it can."""
        self.kept = self._read_kept_records() if self.patterns else []
        self.records: list[RowRecord] = []
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.out)  # of a run that was killed
            self._write_report()
            if not self.patterns:
                write_atomically(self.out / LOG_FILE, "")
        except OSError as error:
            raise UserError(
                f"argument --out: cannot write to {self.out} ({error.strerror}); use another folder"
            ) from error

    def run(self) -> list[RowRecord]:
        """Run all rows, print each when it ends, and rewrite the reports after it; return the records."""
        assert self.device is not None
        with tempfile.TemporaryDirectory(prefix="acceptance-", ignore_cleanup_errors=True) as scratch:
            text = self.text.resolve() if self.text else None
            context = RowContext(self.device, self.out.resolve(), Path(scratch), text)
            self.start_method, self.start_reason = choose_start_method(context)
            print(HEADER, flush=True)
            for row in self.selected:
                self.records.append(self._run_row(row, context))
                self._write_report()
                print(format_row(self.records[-1]), flush=True)
        print(f"{count_statuses(self.records)}; {self.seconds:.0f} s; reports in {self.out}", flush=True)
        return self.records

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.began

    def _run_row(self, row: AcceptanceRow, context: RowContext) -> RowRecord:
        record = RowRecord(row=row.name, status="skipped", reason="", seconds=0.0, values={})
        if reason := row.reason_to_skip(context):
            return RowRecord({**record, "reason": reason})
        left = 60 * self.minutes - self.seconds
        if left < MIN_ROW_SECONDS:
            return RowRecord({**record, "status": "out of time", "reason": "not started"})
        limit = min(left - EXIT_GRACE_SECONDS, row.seconds * self.minutes / USUAL_MINUTES)
        log = context.scratch / f"{_file_name(row.name)}.log"
        record = run_row(row, context, limit, log, self.start_method)
        with (self.out / LOG_FILE).open("ab") as file:
            file.write(f"\n== {row.name}\n".encode() + log.read_bytes())
        return record

    def _write_report(self) -> None:
        method = f"{self.start_method} ({self.start_reason})" if self.start_reason else self.start_method
        facts = {
            "torch": torch.__version__,
            "device": str(self.device),
            "minutes": self.minutes,
            "start method": method,
        }
        measured = {record["row"] for record in self.records}
        records = [*self.records, *(record for record in self.kept if record["row"] not in measured)]
        places = {row.name: place for place, row in enumerate(self.rows)}
        records.sort(key=lambda record: places.get(record["row"], len(places)))
        write_report(self.out, {**facts, "seconds": round(self.seconds, 1)}, records)

    def _read_kept_records(self) -> list[RowRecord]:
        """Return the records of an earlier run in the same folder."""
        path = self.out / REPORT_FILE
        try:
            found = read_json(path, dict[str, Any])
            records = validate(found["rows"], list[RowRecord], "rows")
            facts = {name: found[name] for name in ("torch", "device")}
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"argument --rows: cannot read {path} ({quote_short(str(error), 100)}); delete it"
            ) from error
        for name, own in {"torch": torch.__version__, "device": str(self.device)}.items():
            if facts[name] != own:
                raise UserError(
                    f"argument --rows: {path} was measured with {name} {facts[name]}, not {own}; use another --out"
                )
        return records


def select_rows(rows: Sequence[AcceptanceRow], patterns: Sequence[str]) -> list[AcceptanceRow]:
    """Return the rows whose names match one of the regular expressions, in their order; all rows if there are none.

    Raises:
        UserError: A pattern is not a regular expression, or matches no row.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {row.name for row in rows if re.search(pattern, row.name)}
        except re.error as error:
            raise UserError(f"argument --rows: {pattern!r} is not a regular expression ({error})") from error
        if not found:
            names = "; ".join(row.name for row in rows)
            raise UserError(f"argument --rows: no row matches {pattern!r}; the rows are: {names}")
        chosen |= found
    return [row for row in rows if not patterns or row.name in chosen]


def _file_name(row: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in row)
