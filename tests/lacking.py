"""Tests that are skipped for want of a library, by name: whoever has the libraries has only those left to run.

In an environment with few: ``python -m pytest --lacking FILE``. In one with all: ``python -m pytest @FILE``.
"""

from pathlib import Path

import pytest

SAID = "could not import"
"""What ``pytest.importorskip`` gives as its reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    parser.addoption("--lacking", type=Path, metavar="FILE", help="write there what is skipped for want of a library")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write tests, and files that were skipped whole, one a line."""
    if path := config.getoption("lacking"):
        skipped = terminalreporter.stats.get("skipped", [])
        names = {report.nodeid for report in skipped if SAID in str(report.longrepr)}
        path.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
