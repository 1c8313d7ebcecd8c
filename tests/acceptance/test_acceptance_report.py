"""Formats of rows and values."""

import json
from pathlib import Path

import pytest

from lit_gpt_scratch.acceptance.acceptance_report import describe_result, format_row, format_value, write_report
from lit_gpt_scratch.acceptance.row import RowRecord


def record(status: str = "ok", reason: str = "", **values: object) -> RowRecord:
    return RowRecord(row="MFU, 124M", status=status, reason=reason, seconds=12.34, values=values)  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "yes"), (False, "no"), (None, "unknown"), (3, "3"), (1234567, "1,234,567"), (0.123456, "0.1235"),
        (123456.7, "123,457"), (2.5e-7, "2.5e-07"), ("text", "text"), (0, "0"), (-1234.5, "-1,234"),
    ],
)  # fmt: skip
def test_format_value(value: object, expected: str) -> None:
    assert format_value(value) == expected


def test_reason_precedes_values() -> None:
    assert describe_result(record("failed", "too slow", speed=1.5, name="x")) == "too slow; speed 1.5; name x"
    assert describe_result(record()) == ""


def test_long_results_are_wrapped_below_the_column() -> None:
    values = {f"value {n}": n for n in range(30)}
    lines = format_row(record(**values), columns=100).splitlines()
    assert lines[0].startswith("MFU, 124M")
    assert lines[0][34:46].strip() == "ok"
    assert lines[0][46:52].strip() == "12"
    assert len(lines) > 3
    assert all(line.startswith(" " * 54) and len(line) <= 100 for line in lines[1:])
    assert format_row(record(), columns=100).split() == ["MFU,", "124M", "ok", "12"]


def test_reports_escape_markdown(tmp_path: Path) -> None:
    write_report(tmp_path, {"device": "cpu"}, [record("failed", "a | b `c` <d>")])
    assert json.loads((tmp_path / "acceptance.json").read_text())["rows"][0]["reason"] == "a | b `c` <d>"
    rows = [line for line in (tmp_path / "acceptance.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 3  # the header, a rule, the row
    assert "a \\| b" in rows[2]
