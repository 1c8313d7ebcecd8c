"""The parser reads flags in the same way in every environment."""

import json
import subprocess
import sys

import pytest

from lit_gpt_scratch.cli.config_files import FitParser


@pytest.mark.parametrize("first", ["float", pytest.param("int", marks=pytest.mark.slow)])
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
