"""Samples: their prompts."""

from collections.abc import Callable
from typing import Any

import pytest

from lit_gpt_scratch.callbacks.samples import Samples

Build = Callable[..., Any]


@pytest.mark.parametrize(("prompts", "beginning"), [(None, "def "), (["import"], "import")])
def test_the_first_sample_of_the_default_corpus_continues_a_prompt(
    packed_text: Build, trainer: Build, task: Build, prompts: list[str] | None, beginning: str
) -> None:
    samples = Samples(prompts, tokens=4, greedy_tokens=2)
    data = packed_text(source="stdlib", max_bytes=200_000)
    trainer(callbacks=[samples], max_steps=1, val_check_interval=1).fit(task(), data)
    assert samples.latest.startswith(beginning)
    assert len(samples.latest) > len(beginning)


def test_other_corpora_start_with_an_empty_prompt(packed_text: Build) -> None:
    data = packed_text()
    data.setup("fit")
    assert data.prompts[0] == [data.tokenizer.start_of_text]
    assert len(data.prompts) == 3
