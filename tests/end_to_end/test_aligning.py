"""The lineage of the README, as it is: what a reward model and DPO make of a preference that can be checked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command, Trained

ALIGN = Path(__file__).parents[2] / "experiments/align"


def test_the_dropout_of_a_start_is_left_to_it(
    command: Command, trained: Trained, staged: Callable[[str], list[str]]
) -> None:
    """It comes with the start, whoever aligns it need not know of it; one that is asked for is refused."""
    trained(*staged("instructions"), "--model.gpt.dropout=0.1", "--trainer.max_steps=2")
    flags = ["--model=GRPO", "--data=Prompts", "--data.reply_tokens=4", "--data.block_size=96", "--model.group=4"]
    flags += ["--model.init_from=runs/pretrain/version_0", "--model.compile=false", "--trainer.accelerator=cpu"]
    done = command("fit", *flags, "--trainer.fast_dev_run=1")
    assert done.code == 0, done.err
    refused = command("fit", *flags, "--trainer.fast_dev_run=1", "--model.gpt.dropout=0.1")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "model.gpt.dropout is 0.1, but GRPO" in refused.err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_lineage_ends_with_what_is_preferred(command: Command) -> None:
    """The start does so in at most two of five replies; of held-out pairs both tell nearly all."""

    def fit(config: Path, *flags: str) -> tuple[str, dict[str, float]]:
        outcome = command("fit", "--config", config, "--trainer.accelerator=cpu", *flags)
        assert outcome.code == 0, outcome.err
        run = f"runs/{config.stem}/version_0"
        return f"--model.init_from={run}", json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))

    base, _ = fit(ALIGN.parent / "finetune/base.yaml")
    start, _ = fit(ALIGN / "start.yaml", base)
    _, reward = fit(ALIGN / "reward.yaml", start)
    _, dpo = fit(ALIGN / "dpo.yaml", start)
    before = dpo["baselines"]["true_reward"]  # type: ignore[index]
    assert before <= 0.4
    assert reward["test/accuracy"] >= 0.95
    assert dpo["test/accuracy"] >= 0.95
    assert dpo["test/true_reward"] >= before + 0.3
