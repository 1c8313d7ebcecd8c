"""``doctor --coordinates``: table, plot and verdict."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command


def test_the_doctor_names_a_bad_parametrization(command: Command) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--model.gpt.n_layer=1", "--model.optimizer=AdamW", "--widths", "64", "256", "--plot", "scales.svg"]
    steep = command("doctor", "--coordinates", *flags)
    assert steep.code == 1
    assert "| logits" in steep.out
    assert "set --model.gpt.parametrisation mup --model.gpt.mup_base_width 64" in steep.out.splitlines()[-1]
    plot = Path("scales.svg").read_text(encoding="utf-8")
    for text in ("Coordinate check: standard, AdamW", "width n_embd (channels)", "root mean square after 10 steps"):
        assert text in plot
    mup = ["--model.gpt.parametrisation=mup", "--model.gpt.mup_base_width=64"]
    flat = command("doctor", "--coordinates", *flags, *mup)
    assert (flat.code, flat.out.splitlines()[-1][:5]) == (0, "flat:"), flat.out
    unwritable = command("doctor", "--coordinates", *flags, *mup, "--plot", "no/such/folder.png")
    assert (unwritable.code, "argument --plot: cannot write no/such/folder.png" in unwritable.err) == (2, True)
