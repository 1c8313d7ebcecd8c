"""The rules about RL policies, on synthetic curves."""

import itertools
from typing import Final

import pytest

from lit_gpt_scratch.diagnostics.rule_engine import Diagnosis, RuleEngine
from lit_gpt_scratch.diagnostics.rules import RULES

LEARNS: Final[dict[str, list[float]]] = {
    "train/kl": [0.1, 0.4, 1.7, 2.9, 3.8, 5.4, 6.7, 7.1, 6.8, 6.9],
    "train/reward": [0.26, 0.35, 0.37, 0.51, 0.66, 0.81, 0.84, 0.93, 0.97, 0.98],
    "train/true_reward": [0.26, 0.35, 0.37, 0.51, 0.66, 0.81, 0.84, 0.93, 0.97, 0.98],
    "train/entropy": [0.53, 0.57, 0.75, 0.69, 0.62, 0.65, 0.63, 0.61, 0.55, 0.54],
    "train/reply_tokens": [7.5, 7.8, 9.1, 8.9, 8.0, 7.9, 7.7, 7.5, 7.4, 7.3],
    "train/ended": [1.0, 1.0, 0.99, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "train/loss": [-0.04, -0.05, -0.24, 0.03, 0.11, 0.02, 0.02, -0.04, 0.03, 0.6],
    "train/gradient_norm": [0.5, 0.5, 0.3, 0.3, 0.6, 0.6, 0.5, 0.5, 40.0, 50.0],
    "train/learning_rate": [0.001, 0.002, 0.0018, 0.0016, 0.0013, 0.001, 0.0007, 0.0005, 0.0003, 0.0002],
    "train/kl_coefficient": [0.05] * 10,
}
"""Rounded figures of a run of ``ppo.yaml``; gradients as far from each other as some of GRPO's."""
STAYS: Final = [0.3, 0.28, 0.31, 0.3, 0.29, 0.3, 0.3, 0.32, 0.29, 0.3]
FALLS: Final = [0.9, 0.9, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.0]
HACKED: Final = {"train/reward": [0.3, 0.4, 0.6, 1, 2, 3, 4, 5, 6, 7]}


def examined(changes: dict[str, list[float]], each: int = 1, facts: dict[str, float] | None = None) -> list[Diagnosis]:
    """Diagnoses of a healthy policy with some curves replaced, with ``each`` log points per phase."""
    engine = RuleEngine(RULES)
    engine.add_metrics(0, {"run/chance_loss": 7.6, "run/begins_trained": 1.0, "run/warmup_steps": 20.0} | (facts or {}))
    curves = LEARNS | changes
    for place, again in itertools.product(range(10), range(each)):
        step = 10 * place + again + 1
        # Validation metrics are as frequent here.
        engine.add_metrics(step, {name: values[place] for name, values in curves.items()})
    engine.finish()
    return engine.diagnoses


def test_a_policy_that_learns_is_healthy_whatever_its_loss() -> None:
    assert examined({}) == examined({}, each=8) == []


CASES: Final[dict[str, tuple[dict[str, list[float]], set[str], str, str]]] = {
    "no penalty": (
        {"train/kl": [6, 13, 19, 62, 75, 31, 28, 26, 29, 29], "train/kl_coefficient": [0.0] * 10},
        {"KL blow-up"}, "kl_coefficient is 0", "--model.kl_coefficient 0.05; --model.optimizer.lr 0.00067",
    ),
    "a penalty too small": (
        {"train/kl": [0, 1, 2, 7, 20, 35, 35, 48, 48, 48]},
        {"KL blow-up"}, "too small", "--model.kl_coefficient 0.2; --model.optimizer.lr 0.00067",
    ),
    "true reward falls": (
        HACKED | {"train/true_reward": [0.3, 0.4, 0.5, 0.6, 0.6, 0.4, 0.2, 0.1, 0.0, 0.0]},
        {"reward hacking"}, "exploit the reward", "--model.kl_coefficient 0.2; --trainer.max_steps 42",
    ),
    "true reward falls from the first phase on": (
        {
            "train/reward": [-9.8, -6.8, -3.7, -2.3, -1.1, -0.6, -0.1, 0, 0, 0],
            "train/true_reward": [0.3, 0.2, 0.05, 0.06, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0],
        },
        {"reward hacking"}, "exploit the reward", "--model.kl_coefficient 0.2",
    ),
    "true reward stays": (
        HACKED | {"train/true_reward": STAYS},
        {"reward hacking"}, "exploit the reward", "--model.kl_coefficient 0.2",
    ),
    "true reward rises with it": (
        HACKED | {"train/true_reward": [0.3, 0.28, 0.31, 0.4, 0.42, 0.5, 0.6, 0.65, 0.7, 0.7]}, set(), "", "",
    ),
    "there is no more to gain": (HACKED | {"train/true_reward": [1.0] * 10}, set(), "", ""),
    "nothing is learned": (
        {"train/reward": STAYS, "train/true_reward": STAYS}, set(), "", "",
    ),
    "both fall": (
        {"train/reward": FALLS, "train/true_reward": FALLS}, set(), "", "",
    ),
    "held-out true reward falls": (
        {"val/reward": [1, 1, 1, 2, 3, 4, 4, 5, 5, 5], "val/true_reward": [0.6, 0.6, 0.6, 0.6, 0.5] + [0.3] * 5},
        {"reward hacking"}, "exploit the reward", "--model.kl_coefficient 0.2; --trainer.max_steps 2",
    ),
    "nearly empty replies": (
        {"train/reply_tokens": [7, 7, 6, 5, 3, 2, 2, 2, 1, 1]},
        {"length collapse"}, "prefers short replies", "--model.kl_coefficient 0.2",
    ),
    "no end": (
        {"train/ended": [1, 0.9, 0.7, 0.5, 0.1, 0.1, 0, 0, 0, 0]},
        {"length collapse"}, "does not penalize replies without an end token", "--model.unended_score 0",
    ),
    "no end from the beginning": (
        {"train/ended": [0.1] * 10, "train/reply_tokens": [15.5] * 10},
        {"length collapse"}, "reply_tokens is too small", "--data.reply_tokens 32",
    ),
    "no end, and nothing gained by it": (
        {
            "train/kl": [107, 75, 143, 141, 142, 140, 141, 142, 140, 141], "train/reward": [0.3] + [0.0] * 9,
            "train/true_reward": [0.3] + [0.0] * 9, "train/ended": [1, 0.5, 0.2] + [0.0] * 7,
        },
        {"KL blow-up"}, "too small", "--model.kl_coefficient 0.2; --model.optimizer.lr 0.00067",
    ),
    "no end, nothing gained by it, and not far": (
        {"train/reward": FALLS, "train/true_reward": FALLS, "train/ended": [1, 0.5] + [0.0] * 8},
        {"length collapse"}, "too large", "--model.optimizer.lr 0.00067",
    ),
    "no end, and the gain is gone": (
        {
            "train/reward": [0.26, 0.32, 0.51, 0.76, 0.25, 0.27, 0.27, 0.28, 0.27, 0.27],
            "train/ended": [1, 1, 1, 1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3],
        },
        {"length collapse"}, "too large", "--model.optimizer.lr 0.00067",
    ),
    "one reply": (
        {"train/entropy": [0.6, 0.6, 0.5, 0.4, 0.06, 0.05, 0.01, 0.01, 0.01, 0.01]},
        {"entropy collapse"}, "too large", "--model.optimizer.lr 0.00067; --model.entropy_coefficient 0.01",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("each", [1, 4])
def test_each_fault_of_a_policy_is_found_with_a_flag_to_try(case: str, each: int) -> None:
    changes, expected, cause, flag = CASES[case]
    found = examined(changes, each)
    assert {diagnosis.name for diagnosis in found} == expected
    assert [diagnosis.flag for diagnosis in found] == [flag] * len(expected)
    assert all(cause in diagnosis.cause for diagnosis in found)


def test_kl_is_compared_with_its_target() -> None:
    kl = {"train/kl": [0.1, 1.0, 2.0, 4.0, 5.0, 6.0, 6.1, 6.2, 6.3, 6.4]}
    assert examined(kl, facts={"run/kl_target": 6.0}) == []
    (found,) = examined(kl, facts={"run/kl_target": 1.0})
    assert (found.name, found.flag) == ("KL blow-up", "--model.optimizer.lr 0.00067")
    far = {"train/kl": [0.1, 1.0, 10.0, 20.0, 40.0, 41.0, 42.0, 43.0, 44.0, 45.0]}
    assert examined(far, facts={"run/kl_target": 40.0}) == []


def test_a_phase_counts_once_however_often_it_is_logged() -> None:
    """Three points of one phase are not three phases."""
    once = {"train/entropy": [0.6] * 8 + [0.01] * 2}
    assert [diagnosis.name for diagnosis in examined(once)] == ["entropy collapse"]
    assert [diagnosis.step for diagnosis in examined(once, each=8)] == [91]
