"""The script that runs the acceptance on a machine without a package registry."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "hardware" / "acceptance" / "offline.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_seconds_of_each_stage(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    began, ends = script["BEGAN"], iter([2.0, 7.5])
    time = script["report_stage"].__globals__["time"] = type(sys)("time")
    time.monotonic = lambda: began + next(ends)  # type: ignore[attr-defined]
    script["report_stage"]("start")
    script["report_stage"]("installation")
    assert capsys.readouterr().out.splitlines() == [
        "start: 2.0 s, 2.0 s in total",
        "installation: 5.5 s, 7.5 s in total",
    ]


def test_wheels_that_would_shadow_torch(script: dict[str, Any], tmp_path: Path) -> None:
    require = script["require_wheels"]
    require.__globals__["WHEELS"] = tmp_path
    with pytest.raises(SystemExit, match="no wheels"):
        require()
    (tmp_path / "jinja2-3.1.6-py3-none-any.whl").touch()
    assert [wheel.name for wheel in require()] == ["jinja2-3.1.6-py3-none-any.whl"]
    (tmp_path / "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl").touch()
    with pytest.raises(SystemExit, match="torch-2"):
        require()
