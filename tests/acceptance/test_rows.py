"""Every row of the table: its arguments on both kinds of device, its flags, and a tiny run on the CPU."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.acceptance import fit_rows
from lit_gpt_scratch.acceptance.decoding_rows import measure_decoding
from lit_gpt_scratch.acceptance.fit_rows import start_fit
from lit_gpt_scratch.acceptance.hardware_rows import describe_hardware
from lit_gpt_scratch.acceptance.row import AcceptanceRow, RowContext, RowFailed, RowSkipped, Values
from lit_gpt_scratch.acceptance.row_process import PRELOADED, run_row
from lit_gpt_scratch.acceptance.rows import FIT_124M, GPT2_VOCABULARY, ROWS, SIZES
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.distributed.layout_parity import ARITHMETIC_CASES, LAYOUTS
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from tests.acceptance.simulated_gpu import SimulatedGPU, context_in

ROOT = Path(__file__).parents[2]
DEVICES = [torch.device("cpu"), torch.device("cuda")]
FIT_ROWS = [row for row in ROWS if "flags" in row.sizes]


def distinct_on_cpu() -> list[AcceptanceRow]:
    """Rows that run without another process, once per function and arguments on a CPU; compiling is slow."""
    found: dict[str, AcceptanceRow] = {}
    for row in ROWS:
        compiles = row.sizes.get("compile") or row.name == "all-reduce, two processes"
        if row not in FIT_ROWS and not compiles and not (row.measure is measure_decoding and not row.sizes):
            found.setdefault(f"{row.measure.__name__} {row.sizes_on(DEVICES[0])}", row)
    return list(found.values())


def runs_on_cpu(row: AcceptanceRow, folder: Path) -> bool:
    return row.reason_to_skip(context_in(folder)) is None


def test_names_are_unique_and_every_subject_has_a_row() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for subject in ("machine", "peak", "network", "fit", "MFU", "profile", "tiny Shakespeare", "decoding", "FSDP2",
                    "all-reduce", "PPO", "callbacks", "resume"):  # fmt: skip
        assert any(name.startswith(subject) for name in names), subject
    assert len({re.sub(r"[^\w]", "-", name) for name in names}) == len(names)  # names of log files


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_sizes_are_arguments_of_the_function(row: AcceptanceRow, device: torch.device, tmp_path: Path) -> None:
    if not row.sizes:
        assert row.reason_to_skip(context_in(tmp_path)) or row.measure is describe_hardware
        return
    context = RowContext(device, tmp_path, tmp_path)
    inspect.signature(row.measure).bind(context, **row.sizes_on(device))
    assert row.seconds > 0


def test_parameters_of_the_measured_networks() -> None:
    """124M, 350M and 1.3B by hand: 12 * n_layer * n_embd ** 2, the token table and the positions."""
    for name, expected in {"124M": 124e6, "350M": 355e6, "1.3B": 1.31e9}.items():
        with torch.device("meta"):
            net = GPT(SIZES[name], GPT2_VOCABULARY, 1024)
        n, config = sum(p.numel() for p in net.parameters()), SIZES[name]
        by_hand = 12 * config.n_layer * config.n_embd**2 + (50_304 + 1024) * config.n_embd
        assert n == pytest.approx(by_hand, rel=2e-3)
        assert n == pytest.approx(expected, rel=0.01)


def test_fit_of_124m_has_the_size_of_gpt2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The vocabulary of the tokenizer does not matter, because the table is padded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: None)
    config = FitCLI([*FIT_124M, f"--data.source={ROOT / 'README.md'}"]).config.model.init_args.gpt
    fields = {name: value for name, value in vars(config).items() if name in GPTConfig.__dataclass_fields__}
    with torch.device("meta"):
        net = GPT(GPTConfig(**fields), 1000, 1024)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(124.5e6, rel=1e-3)


@pytest.mark.parametrize("row", FIT_ROWS, ids=lambda row: row.name)
def test_flags_on_a_gpu_are_valid(row: AcceptanceRow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parser accepts the flags of each row; the device is not used yet."""
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in row.sizes["flags"] if not flag.startswith("--trainer.accelerator")]
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: None)
    cli = FitCLI([*flags, f"--data.source={ROOT / 'README.md'}"] if "--data=Prompts" not in flags else flags)
    assert cli.config.trainer.max_steps > 0 or row.name.startswith("callbacks")


def test_layouts_of_the_parity_row_exist() -> None:
    row = next(row for row in ROWS if row.name == "layouts on two GPUs")
    assert set(row.sizes["layouts"]) <= set(LAYOUTS)
    assert set(row.sizes["cases"]) <= set(ARITHMETIC_CASES)


@pytest.mark.parametrize("row", distinct_on_cpu(), ids=lambda row: row.name)
def test_row_runs_on_a_cpu(row: AcceptanceRow, tmp_path: Path) -> None:
    """Rows that require a GPU run, too, as far as the CPU has their kernels."""
    values: Values = {}
    try:
        for found in row.measure(context_in(tmp_path), **row.sizes_on(torch.device("cpu"))):
            values |= found
    except (RowFailed, RowSkipped):
        assert not runs_on_cpu(row, tmp_path)
    assert values
    json.dumps(values)


@pytest.mark.slow
def test_fit_rows_run_on_a_cpu(tmp_path: Path) -> None:
    """The most important row of ``fit``, in a process as in a run; the slow test runs them all."""
    row = next(row for row in ROWS if row.name == "fit, bf16-mixed")
    found = run_row(row, context_in(tmp_path), 120, tmp_path / "fit.log")
    assert (found["status"], found["reason"]) == ("ok", "")
    assert found["values"]["steps"] == 6
    assert found["values"]["tokens/s"] > 0
    assert 5 < found["values"]["train loss"] < 6


@pytest.mark.slow
def test_stopped_fit_is_out_of_time_and_keeps_its_values(tmp_path: Path) -> None:
    """A real run that does not end before the deadline."""
    row = next(row for row in ROWS if row.name == "fit, bf16-mixed")
    endless = [*row.cpu_sizes["flags"], "--trainer.max_steps=1000000"]
    endless_row = replace(row, cpu_sizes={"flags": endless})
    found = run_row(endless_row, context_in(tmp_path), 20, tmp_path / "fit.log")
    assert (found["status"], found["reason"]) == ("out of time", "stopped after 20 s")
    assert found["values"]["steps"] > 2
    assert found["values"]["tokens/s"] > 0
    assert 0 < found["values"]["train loss"] < 6


@pytest.mark.slow
def test_stopped_time_to_loss_keeps_its_validations(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {n} of a text\n" for n in range(4000)), encoding="utf-8")
    row = next(row for row in ROWS if row.name == "tiny Shakespeare")
    flags = [*row.cpu_sizes["flags"], "--trainer.max_steps=1000000", "--trainer.val_check_interval=4"]
    endless = replace(row, cpu_sizes={"flags": flags, "target": 0.0})
    context = replace(context_in(tmp_path), text=tmp_path / "text.txt")
    found = run_row(endless, context, 20, tmp_path / "fit.log")
    assert found["status"] == "out of time"
    assert found["values"]["steps"] % 4 == 0
    points = found["values"]["loss by training s"].split(", ")
    assert len(points) == found["values"]["steps"] // 4
    assert 3 < float(points[0].split(" at ")[0]) < 7


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (SystemExit(0), ""), (SystemExit(None), ""), (None, ""), (SystemExit(3), "exit code 3: see the log"),
        (UserError("--data.block_size is 0"), "exit code 2: --data.block_size is 0"),
    ],
)  # fmt: skip
def test_exit_code_of_fit(
    end: BaseException | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``fit`` ends with ``SystemExit``, whose context is the error that it has printed as one line."""
    commands: list[list[str]] = []

    def run(module: str) -> None:
        commands.append([module, *sys.argv[1:]])
        if isinstance(end, UserError):
            try:
                raise end
            except UserError:
                sys.exit(2)
        if end is not None:
            raise end

    monkeypatch.setattr(fit_rows, "run_module", run)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    found = ""
    try:
        folder = start_fit(SimulatedGPU(torch.device("cpu"), tmp_path, tmp_path), "--x=1", "--trainer.devices=2")
        assert folder.path.is_relative_to(tmp_path)
    except RowFailed as failure:
        found = str(failure)
    assert found.endswith(reason)
    assert bool(found) == bool(reason)
    [command] = commands
    assert command[0] == "lit_gpt_scratch.fit"
    assert command[-2:] == ["--x=1", "--trainer.devices=2"]  # the row's flags override the common ones
    assert {"--trainer.accelerator=gpu", "--trainer.devices=1", f"--data.cache={tmp_path}/cache"} <= set(command)


@pytest.mark.slow
def test_preloaded_modules_do_not_use_a_gpu() -> None:
    """Rows are forked from a process that has imported them; if it had initialized CUDA, no row could use a GPU."""
    lines = [
        "import torch",
        "def used(*args, **options): raise AssertionError('a GPU is used at import')",
        "names = ['is_available', 'device_count', 'init', '_lazy_init', 'current_device', 'get_device_properties']",
        "for name in names: setattr(torch.cuda, name, used)",
        f"import {', '.join(PRELOADED)}, threading",
        "assert threading.active_count() == 1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_command_on_a_cpu(tmp_path: Path) -> None:
    """The whole command: all rows that can run do, the others state why not."""
    (tmp_path / "text.txt").write_text("".join(f"line {n} of a text\n" for n in range(4000)), encoding="utf-8")
    command = [sys.executable, "-m", "lit_gpt_scratch.doctor", "--acceptance", "--text=text.txt", "--out=out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    records = json.loads((tmp_path / "out" / "acceptance.json").read_text(encoding="utf-8"))["rows"]
    assert [record["row"] for record in records] == [row.name for row in ROWS]
    context = replace(context_in(tmp_path), text=tmp_path / "text.txt")
    for record, row in zip(records, ROWS, strict=True):
        reason = row.reason_to_skip(context)
        assert (record["status"], record["reason"]) == (("skipped", reason) if reason else ("ok", "")), record
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "training_trace.json.gz").is_file()
