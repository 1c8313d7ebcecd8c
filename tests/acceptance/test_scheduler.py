"""The whole run: order, time limit, reports after each row, kills, and mistakes of the user."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.acceptance import row_process, scheduler
from lit_gpt_scratch.acceptance.row import AcceptanceRow, RowContext, a_gpu_per_process, cuda, gpus, libraries, text
from lit_gpt_scratch.acceptance.scheduler import AcceptanceRun
from lit_gpt_scratch.errors import UserError
from tests.acceptance import sample_rows
from tests.acceptance.test_row_process import is_alive

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _light_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_process, "PRELOADED", ("tests.acceptance.sample_rows",))


def test_rows_run_in_order_and_a_failure_stops_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *sample_rows.rows(sample_rows.succeed, sample_rows.crash),
        AcceptanceRow("on a GPU", sample_rows.succeed, 60, requires=(cuda,)),
        *sample_rows.rows(sample_rows.fail, sample_rows.not_finite),
    ]
    records = AcceptanceRun(rows, tmp_path / "new" / "out", device=torch.device("cpu")).run()
    statuses = ["ok", "failed", "skipped", "failed", "ok"]
    assert [record["status"] for record in records] == statuses
    written = json.loads((tmp_path / "new" / "out" / "acceptance.json").read_text(encoding="utf-8"))
    assert written["rows"] == records
    assert written["device"] == "cpu"
    table = (tmp_path / "new" / "out" / "acceptance.md").read_text(encoding="utf-8")
    assert "| on a GPU | skipped | 0 | requires a CUDA GPU |" in table
    assert "2 ok, 2 failed, 1 skipped" in table
    log = (tmp_path / "new" / "out" / "acceptance.log").read_text(encoding="utf-8")
    assert log.startswith("\n== succeed\nto the log\n\n== crash\nabout to crash\n\n== fail\n")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["row", "status", "s", "result"]
    assert [line.split()[0] for line in printed if not line.startswith(" ")][1:-1] == [
        row.name.split()[0] for row in rows
    ]


def test_time_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row gets its own limit, scaled by the length of the run, and no more than what is left of the run."""
    now, limits = [0.0], []
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])

    def take(row: AcceptanceRow, context: RowContext, seconds: float, log: Path, method: str) -> dict[str, object]:
        limits.append(seconds)
        log.touch()
        now[0] += seconds
        return {"row": row.name, "status": "ok", "reason": "", "seconds": seconds, "values": {}}

    monkeypatch.setattr(scheduler, "run_row", take)
    monkeypatch.setattr(scheduler, "choose_start_method", lambda context: ("spawn", ""))
    rows = [AcceptanceRow(str(n), sample_rows.succeed, 100) for n in range(5)]
    records = AcceptanceRun(rows, tmp_path, minutes=2, device=torch.device("cpu")).run()
    assert limits == [20.0] * 5
    assert {record["status"] for record in records} == {"ok"}
    now[0], limits[:] = 0.0, []
    records = AcceptanceRun(rows, tmp_path, minutes=20, device=torch.device("cpu")).run()
    assert limits == [200.0] * 5
    now[0], limits[:] = 0.0, []
    rows = [AcceptanceRow(str(n), sample_rows.succeed, 400) for n in range(3)]
    records = AcceptanceRun(rows, tmp_path, minutes=10, device=torch.device("cpu")).run()
    assert limits == [400.0, 200.0 - row_process.EXIT_GRACE_SECONDS]
    assert [record["status"] for record in records] == ["ok", "ok", "out of time"]
    assert records[-1]["reason"] == "not started"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_run_leaves_valid_reports_and_no_processes(tmp_path: Path) -> None:
    """kill -9 at random moments, in one folder; each report is complete, and the next run continues to write it."""
    draw = random.Random(0)
    counts = []
    mark = f"ACCEPTANCE_TEST={uuid.uuid4()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **dict([mark.split("=")])}
    for hangs in ([], ["hang"]):  # then a row that has started a process in a session of its own
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.sample_rows", str(tmp_path), *hangs],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # the header
        process.stdout.readline()  # the first row
        time.sleep(draw.uniform(0, 1.0))
        while hangs and not (tmp_path / "child.pid").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))
        rows = [record["row"] for record in found["rows"]]
        assert rows == [f"doze {n}" for n in range(len(rows))]
        assert (tmp_path / "acceptance.md").read_text(encoding="utf-8").startswith("# Acceptance\n")
        counts.append(len(rows))
        deadline = time.monotonic() + 10
        while (left := processes_with(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, "the processes of a row outlive the run"
    assert max(counts) >= 1


def processes_with(variable: str) -> list[int]:
    """Live processes that have inherited an environment variable, whatever their session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if variable.encode() in content and is_alive(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def test_selected_rows_replace_their_records(tmp_path: Path) -> None:
    """A second run measures two rows, in the order of the table; the record of the third row is kept."""
    cpu_device = torch.device("cpu")
    table = sample_rows.rows(sample_rows.fail, sample_rows.leave, sample_rows.skip)
    AcceptanceRun(table, tmp_path, device=cpu_device).run()
    before = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))["rows"]
    repaired = [AcceptanceRow(row.name, sample_rows.succeed, 60) for row in table]
    run = AcceptanceRun(repaired, tmp_path, device=cpu_device, patterns=["^sk", "a.l$"])
    kept = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))["rows"]
    assert kept == before  # a run that is killed in its first row keeps all records
    assert [record["row"] for record in run.run()] == ["fail", "skip"]
    after = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))["rows"]
    assert [(each["row"], each["status"]) for each in after] == [("fail", "ok"), ("leave", "failed"), ("skip", "ok")]
    assert after[1] == before[1]
    log = (tmp_path / "acceptance.log").read_text(encoding="utf-8")
    assert log.count("== fail") == 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["succ", "x"], "no row matches 'x'; the rows are: succeed; fail$"),
        (["("], "'\\(' is not a regular expression"),
    ],
)
def test_mistakes_in_patterns(tmp_path: Path, patterns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AcceptanceRun(sample_rows.rows(sample_rows.succeed, sample_rows.fail), tmp_path, patterns=patterns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"torch": torch.__version__, "device": "cuda", "rows": []}, "measured with device cuda, not cpu"),
        ({"torch": "2.0", "device": "cpu", "rows": []}, "measured with torch 2.0, not"),
        ({"torch": "2.0"}, "cannot read"),
        ({"torch": torch.__version__, "device": "cpu", "rows": [{"row": 3}]}, "cannot read"),
    ],
)
def test_reports_that_cannot_be_continued(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        AcceptanceRun(sample_rows.rows(sample_rows.succeed), tmp_path, device=torch.device("cpu"), patterns=["succeed"])
    assert json.loads(path.read_text(encoding="utf-8")) == content


def test_rows_are_spawned_if_forked_processes_cannot_use_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that a forked process inherits makes the device unusable there, and only there."""
    monkeypatch.setattr(row_process, "use_device", sample_rows.use_device_unless_forked)
    rows = sample_rows.rows(sample_rows.name_start_method)
    [record] = AcceptanceRun(rows, tmp_path, device=torch.device("cpu")).run()
    assert record["values"] == {"forked": False}
    written = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))
    reason = "forkserver: RuntimeError: CUDA error: initialization error"
    assert written["start method"] == f"spawn ({reason})"


def test_rows_are_forked_if_they_can_use_the_device(tmp_path: Path) -> None:
    rows = sample_rows.rows(sample_rows.name_start_method)
    [record] = AcceptanceRun(rows, tmp_path, device=torch.device("cpu")).run()
    assert record["values"] == {"forked": row_process.START_METHOD == "forkserver"}
    written = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))
    assert written["start method"] == row_process.START_METHOD


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_time_limit_must_be_positive(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="--minutes"):
        AcceptanceRun([], tmp_path, minutes)


def test_missing_text_and_folder_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text: .*missing\.txt is not a file"):
        AcceptanceRun([], tmp_path, text=tmp_path / "missing.txt")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out: cannot write to"):
        AcceptanceRun([], tmp_path / "file")
    with pytest.raises(UserError, match="--out: cannot write to"):
        AcceptanceRun([], tmp_path / "file" / "inside")


def test_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = RowContext(torch.device("cpu"), tmp_path, tmp_path)
    on_gpu = RowContext(torch.device("cuda"), tmp_path, tmp_path, text=tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda(on_cpu) == "requires a CUDA GPU"
    assert cuda(on_gpu) is None
    assert gpus(1)(on_gpu) is None
    assert gpus(2)(on_gpu) == "requires 2 GPUs; this machine has 1"
    assert gpus(1)(on_cpu) == "requires 1 GPUs; this machine has 0"
    assert a_gpu_per_process(on_cpu) is None
    assert a_gpu_per_process(on_gpu) == "requires 2 GPUs; this machine has 1"
    assert libraries("torch", "no_such_library")(on_cpu) == "requires no_such_library, which is not installed"
    assert libraries("torch")(on_cpu) is None
    assert text(on_gpu) is None
    assert str(text(on_cpu)).startswith("requires the text")
