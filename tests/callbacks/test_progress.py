"""Progress lines, and numbers in the terminal."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from lit_gpt_scratch.callbacks.progress import RunProgressBar, format_bytes, format_count, format_duration

Build = Callable[..., Any]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (2240, "2.24 k"),
        (2_164_928, "2.16 M"),
        (999_600, "1 M"),
        (3e9, "3 G"),
        (1.5e13, "15 T"),
    ],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


def test_sizes_and_durations_are_short() -> None:
    assert [format_bytes(12), format_bytes(27_600_000)] == ["12 B", "27.6 MB"]
    assert [format_duration(5), format_duration(84.4), format_duration(3 * 3600 + 61)] == ["0:05", "1:24", "3:01:01"]


def test_a_loss_of_an_earlier_step_is_shown_with_its_step(
    caplog: pytest.LogCaptureFixture, trainer: Build, task: Build, packed_text: Build
) -> None:
    bar = RunProgressBar()
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        run = trainer(callbacks=[bar], enable_progress_bar=True, max_steps=10, log_every_n_steps=4, limit_val_batches=0)
        run.fit(task(), packed_text())
    lines = [record.getMessage() for record in caplog.records if "step" in record.getMessage()]
    found = {}
    for line in lines:
        if match := re.match(r"step (\d+) of 10, loss [\d.]+( at step (\d+))?", line):
            found[int(match[1])] = int(match[3] or match[1])
    assert found == {1: 1, 2: 1, 3: 1, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 9: 8, 10: 8}
