"""The parser reads flags in the same way in every environment."""

import json
import re
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from lit_gpt_scratch.cli import fit
from lit_gpt_scratch.cli.config_files import FitParser, find_writers, parse_run_config, read_config
from lit_gpt_scratch.cli.early_flags import EarlyFlags
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.trust import record_written_config


@pytest.mark.slow
@pytest.mark.parametrize("first", ["float", "int"])
def test_whole_numbers_stay_whole_in_every_environment(first: str) -> None:
    """For every flag of a mixed type, on the command line and in a file, whichever union was created first."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.mixed_number_flags", first], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    limits = {f"Trainer.limit_{stage}_batches" for stage in ("train", "val", "test", "predict")}
    others = {"Trainer.overfit_batches", "Trainer.val_check_interval", "StochasticWeightAveraging.swa_epoch_start"}
    assert limits | others <= found.keys()
    for name, values in found.items():
        assert [*map(repr, values)] == ["1", "1.0", "1", "1.0"], name


@pytest.mark.parametrize("hint", [int | float, float | int | None, str | float | int | None, list[float | int]])
@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5)])
def test_numbers_keep_their_type(hint: object, text: str, value: float) -> None:
    """The order of a union made with | is not cached."""
    parser = FitParser(exit_on_error=False)
    is_list = str(hint).startswith("list")
    parser.add_argument("--x", type=hint)
    found = parser.parse_args([f"--x=[{text}]" if is_list else f"--x={text}"]).x
    assert repr(found) == repr([value] if is_list else value)


LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/elsewhere"}}
CHECKPOINT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "/elsewhere"}}
PROFILER = {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {"dirpath": "/elsewhere"}}
PLUGIN = {"class_path": "lightning.pytorch.plugins.io.TorchCheckpointIO"}
WRITERS = {
    "logger": (LOGGER, LOGGER["class_path"]),
    "loggers": ([LOGGER], LOGGER["class_path"]),
    "callbacks": ([CHECKPOINT], CHECKPOINT["class_path"]),
    "callback": (CHECKPOINT, CHECKPOINT["class_path"]),
    "profiler": (PROFILER, PROFILER["class_path"]),
    "plugins": ([PLUGIN], "lightning.pytorch.plugins"),
    "default_root_dir": ("/elsewhere", "trainer.default_root_dir"),
}


def run_config_parser() -> FitParser:
    parser = FitParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, "trainer")
    return parser


@pytest.mark.parametrize("case", WRITERS)
def test_config_of_another_user_writes_nowhere_else(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    value, name = WRITERS[case]
    flag = {"loggers": "logger", "callback": "callbacks"}.get(case, case)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {flag: value}}))
    with pytest.raises(UserError, match=rf"sets trainer.{flag}, which .* pass --trust {name}") as refused:
        parse_run_config(run_config_parser(), path, ())
    assert "\n" not in str(refused.value)
    trusted = str(refused.value).rpartition(" ")[2]
    config = parse_run_config(run_config_parser(), path, {trusted})
    assert list(find_writers(config)) == [(f"trainer.{flag}", trusted)]
    record_written_config(path.read_text(), restricted=True)
    assert parse_run_config(run_config_parser(), path, ()) == config


@pytest.mark.parametrize(
    "trainer", [{}, {"logger": False, "callbacks": [], "profiler": "simple"}, {"callbacks": None, "logger": True}]
)
def test_other_settings_of_another_user_are_accepted(trainer: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"max_steps": 3, **trainer}}))
    assert parse_run_config(run_config_parser(), path, ()).trainer.max_steps == 3


CHAIN = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 12)
)
HOSTILE_YAML = {
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "is nested more than 50 levels deep"),
    "recursive": ("a: &a {b: *a}", "contains a YAML alias inside the value that it refers to"),
    "aliases": (CHAIN, "has more than 100,000 values"),
    "integer": (f"a: 0x{'f' * 20_000}", "contains an integer of more than 400 characters"),
    "large": ("a: " + "x" * 2**19, "is larger than 256 KB"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_in_configs_and_flags(tmp_path: Path, name: str) -> None:
    text, message = HOSTILE_YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_config(str(path)) == {}
    assert EarlyFlags.scan(["--config", str(path)]).trusted == frozenset()
    parser = FitParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--a", type=list | dict | int | None)
    for flags in (["--config", str(path)], [f"--a={text}"]):
        with pytest.raises((UserError, ArgumentError)) as refused:
            parser.parse_args(flags)
        assert message in str(refused.value)
        assert len(str(refused.value)) < 2000


def test_yaml_without_bounds_is_refused_once(tmp_path: Path) -> None:
    """A long config of a run, with dates and many flags, is accepted."""
    content = {"a": [{"name": "2024-01-01", "values": list(range(1000))}] * 3}
    (tmp_path / "config.yaml").write_text("day: 2024-01-01\n" + yaml.safe_dump(content), encoding="utf-8")
    assert read_config(str(tmp_path / "config.yaml"))["a"] == content["a"]


@pytest.mark.parametrize("value", ["[1]", "3", "null"])
@pytest.mark.parametrize("group", ["trainer", "checkpoint", "inspect"])
def test_groups_of_flags_must_be_mappings(tmp_path: Path, group: str, value: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{group}: {value}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"config.yaml: {group} is .*; it must be a mapping of flags to values"):
        fit.main([f"--config={path}", "--print_config"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ('--data={"class_path": "PackedText", "init_args": {}, "other": 1}',
         r"--data: expected the name of a LightningDataModule, or a mapping of class_path and init_args, got \{.*\}"),
        ("--data.seed=\x1b[31m\x00\n", r"--data.seed: expected int, got \\x1b\[31m\\x00"),
    ],
)  # fmt: skip
def test_messages_of_the_parser_are_one_line(flag: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        fit.main([flag, "--print_config"])
    assert re.fullmatch(message, str(error.value))
