"""A pytest plugin that lists the tests skipped because a library is not installed, so that they can run elsewhere.

In an environment with few libraries: ``python -m pytest --missing-libraries FILE``; then, in one with all of them:
``python -m pytest @FILE``.
"""

from pathlib import Path

import pytest

IMPORT_REASON = "could not import"
"""Start of the skip reason of ``pytest.importorskip``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    parser.addoption(
        "--missing-libraries", type=Path, metavar="FILE", help="write the tests skipped because a library is missing"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the skipped tests, and the files skipped as a whole, one per line."""
    if path := config.getoption("missing_libraries"):
        skipped = terminalreporter.stats.get("skipped", [])
        names = {report.nodeid for report in skipped if IMPORT_REASON in str(report.longrepr)}
        path.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
