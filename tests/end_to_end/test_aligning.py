"""The lineage of the README, as it is: what a reward model and DPO make of a preference that can be checked."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command

ALIGN = Path(__file__).parents[2] / "experiments/align"


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
