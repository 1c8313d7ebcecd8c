"""Rules for RL policies: KL from the initial policy, reward, and changes in the replies.

The metrics of a rollout phase are logged at each step of the phase, but the rules count them only once. "Healthy runs"
are those of ``experiments/align/ppo.yaml`` and ``grpo.yaml``, with a program or a reward model as the reward.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

N_RECENT: Final = 3
"""Number of most recent rollout phases whose median represents the current policy."""
MIN_SEPARATION: Final = 1.5
"""Minimum rise of a metric between two groups of rollout phases, as a multiple of its noise; smaller rises are ignored.

The rise is the difference between the medians of the groups. The noise is the range of the values (maximum minus
minimum) within the group that has the larger range. In a simulation with two groups of three phases and normally
distributed noise, the second group exceeds the first by this much in 1 of 125 cases.
"""
MIN_REWARD_DROP: Final = 0.15
"""If the true reward (fraction of correct replies) drops by more than this from its best value, a problem is reported.

The mean over 115 replies, as in validation, has a standard deviation of about 0.05.
"""
MIN_REWARD_GAIN: Final = 0.1
"""Gain in true reward, as a fraction of the largest possible gain, below which reward hacking is reported.

Healthy runs reach 0.6 or more.
"""
MAX_KL: Final = 30.0
"""KL divergence from the initial policy, in nats per reply, above which a problem is reported.

Healthy runs reach 5 to 12, or 19 for GRPO with a reward model. A run without a KL penalty and with ten times the
learning rate reaches 75.
"""
MAX_KL_TO_TARGET: Final = 4.0
"""Ratio of the KL to the target KL of an adaptive KL coefficient above which a problem is reported."""
MIN_ENTROPY_SHARE: Final = 0.1
"""Entropy per token, as a fraction of its initial value, below which a problem is reported.

Healthy runs stay between 0.4 and 2.
"""
MIN_LENGTH_SHARE: Final = 0.3
"""Reply length in tokens, as a fraction of its initial value, below which a problem is reported.

The length includes the end token. Healthy runs stay above 0.6, even if short replies are preferred.
"""
MIN_ENDED_SHARE: Final = 0.5
"""If fewer than this fraction of replies have an end token, a problem is reported. Healthy runs reach 0.93 or more."""
PENALTY_FACTOR: Final = 4
"""Factor by which a KL coefficient that is too small should be increased."""
DEFAULT_PENALTY: Final = 0.05
"""KL coefficient that is suggested for a run without a KL penalty."""
NO_STEP: Final = -1


def _phases(e: MetricHistory, name: str) -> list[tuple[int, float]]:
    """Return the first point of a curve in each rollout phase; a new phase starts when ``train/kl`` changes."""
    kl, curve = e["train/kl"], e[name]
    firsts = {step for place, step in enumerate(kl.steps) if place == 0 or kl.values[place] != kl.values[place - 1]}
    return [point for point in zip(curve.steps, curve.values, strict=True) if point[0] in firsts]


def _first_and_recent(e: MetricHistory, name: str) -> tuple[float, float]:
    """Return a metric's value in the first rollout phase and its median over the most recent phases.

    Both are NaN if there are at most ``N_RECENT`` phases.
    """
    values = [value for _, value in _phases(e, name)]
    return (values[0], statistics.median(values[-N_RECENT:])) if len(values) > N_RECENT else (math.nan, math.nan)


def _all_above(before: Sequence[float], after: Sequence[float]) -> bool:
    """Return whether every value of ``after`` is higher than every value of ``before``."""
    return min(after) > max(before)


def _has_risen(before: Sequence[float], after: Sequence[float]) -> bool:
    """Return whether the values have risen by more than ``MIN_SEPARATION`` times their noise."""
    spread = max(max(values) - min(values) for values in (before, after))
    rise = statistics.median(after) - statistics.median(before)
    return _all_above(before, after) and rise > MIN_SEPARATION * spread


def _penalty_flag(e: MetricHistory) -> str:
    """Return a flag that sets a larger KL coefficient."""
    coefficient = e.latest("train/kl_coefficient")
    return f"--model.kl_coefficient {PENALTY_FACTOR * coefficient if coefficient > 0 else DEFAULT_PENALTY:.2g}"


def _slower_flag(e: MetricHistory) -> str:
    """Return a flag that reduces the learning rate to a third."""
    peak = max(e["train/learning_rate"].values, default=math.nan)
    return f"--model.optimizer.lr {peak / 3:.2g}" if math.isfinite(peak) else "a third of --model.optimizer.lr"


def reward_hacking(e: MetricHistory) -> Finding | None:
    """Detect a training reward that rises while the true reward does not."""
    evidence, step = _training_hack(e) or _validation_hack(e) or _no_gain(e) or ("", NO_STEP)
    if not evidence:
        return None
    return Finding(
        evidence,
        "the replies exploit the reward without becoming better; stay closer to the initial policy, stop at the best "
        "true reward, or correct the reward",
        _penalty_flag(e) + (f"; --trainer.max_steps {step + 1}" if step != NO_STEP else ""),
    )


def _reward_curves(e: MetricHistory) -> tuple[list[int], list[float], list[float]]:
    """Return the steps, rewards and true rewards of rollout phases, or empty lists if the true reward is unknown."""
    reward, true = _phases(e, "train/reward"), dict(_phases(e, "train/true_reward"))
    shared = [(step, value, true[step]) for step, value in reward if step in true]
    return [each[0] for each in shared], [each[1] for each in shared], [each[2] for each in shared]


def _training_hack(e: MetricHistory) -> tuple[str, int] | None:
    """Detect a true reward that falls during training while the training reward rises.

    Returns:
        The evidence, and the step with the best true reward (``NO_STEP`` if the true reward fell from the start), or
        None if the true reward does not fall or the training reward does not rise.
    """
    steps, reward, true = _reward_curves(e)
    if len(steps) < 2 * N_RECENT:
        return None
    ends = range(N_RECENT, len(steps) - N_RECENT + 1)
    best = max(ends, key=lambda end: statistics.median(true[end - N_RECENT : end]))
    before, after = slice(best - N_RECENT, best), slice(-N_RECENT, None)
    high, low = statistics.median(true[before]), statistics.median(true[after])
    has_fallen = high - low > MIN_REWARD_DROP and _all_above(true[after], true[before])
    if not (has_fallen and _all_above(reward[before], reward[after])):
        return None
    rise, since = _arrow(statistics.median(reward[before]), statistics.median(reward[after])), steps[best - 1]
    evidence = f"reward {rise} in training, but true reward {_arrow(high, low)}, since step {since}"
    return evidence, since if best > N_RECENT else NO_STEP


def _validation_hack(e: MetricHistory) -> tuple[str, int] | None:
    """Detect a falling true reward on the held-out prompts, whose replies are always sampled with the same seeds."""
    reward, true = e["val/reward"], e["val/true_reward"]
    if len(true) < 2 or reward.steps != true.steps:
        return None
    best = max(range(len(true)), key=true.values.__getitem__)
    if not (true.values[best] - true.last > MIN_REWARD_DROP and reward.last > reward.values[best]):
        return None
    rise, fall = _arrow(reward.values[best], reward.last), _arrow(true.values[best], true.last)
    return f"reward {rise} in validation, but true reward {fall}, since step {true.steps[best]}", true.steps[best]


def _no_gain(e: MetricHistory) -> tuple[str, int] | None:
    """Detect a finished run whose reward has risen while its true reward has not."""
    steps, reward, true = _reward_curves(e)
    if len(steps) < 2 * N_RECENT or not e.is_over or not _has_risen(reward[:N_RECENT], reward[-N_RECENT:]):
        return None
    initial, now = statistics.median(true[:N_RECENT]), statistics.median(true[-N_RECENT:])
    if not now - initial < MIN_REWARD_GAIN * (1 - initial):
        return None
    rise = _arrow(statistics.median(reward[:N_RECENT]), statistics.median(reward[-N_RECENT:]))
    return f"reward {rise} in training, but true reward {_arrow(initial, now)}", NO_STEP


def _arrow(before: float, after: float) -> str:
    return f"{before:.3g} -> {after:.3g}"


def kl_blow_up(e: MetricHistory) -> Finding | None:
    """Detect a policy that has moved far away from the initial policy."""
    initial, now = _first_and_recent(e, "train/kl")
    target = e.latest("run/kl_target")
    has_target = math.isfinite(target)
    if not now > (MAX_KL_TO_TARGET * target if has_target else MAX_KL):
        return None
    cause = "steps too large for the penalty" if has_target else "a KL penalty too small for this reward and step size"
    has_no_penalty = not has_target and not e.latest("train/kl_coefficient") > 0
    usual = f"; the target is {target:.3g}" if has_target else "; 5 to 20 is typical"
    return Finding(
        f"KL from the initial policy is {now:.1f} nats per reply, {initial:.1f} in the first phase{usual}",
        "no KL penalty: kl_coefficient is 0" if has_no_penalty else cause,
        _slower_flag(e) if has_target else f"{_penalty_flag(e)}; {_slower_flag(e)}",
    )


def entropy_collapse(e: MetricHistory) -> Finding | None:
    """Detect a policy that generates nearly the same reply every time."""
    initial, now = _first_and_recent(e, "train/entropy")
    if not now < MIN_ENTROPY_SHARE * initial:
        return None
    return Finding(
        f"{now:.2g} nats per token, {initial:.2g} in the first phase; the replies to a prompt are nearly identical",
        "optimizer steps too large, so the policy always generates the first rewarded reply and explores no others",
        f"{_slower_flag(e)}; --model.entropy_coefficient 0.01",
    )


def _reward_was_kept(e: MetricHistory) -> bool:
    """Return whether the policy retains more than half of its largest gain in reward."""
    reward = [value for _, value in _phases(e, "train/reward")]
    if len(reward) <= N_RECENT:
        return False
    best = max(statistics.median(reward[end - N_RECENT : end]) for end in range(N_RECENT, len(reward) + 1))
    return best > reward[0] and statistics.median(reward[-N_RECENT:]) > (reward[0] + best) / 2


def length_collapse(e: MetricHistory) -> Finding | None:
    """Detect replies that become very short or do not end."""
    initial, now = _first_and_recent(e, "train/reply_tokens")
    initially_ended, ended = _first_and_recent(e, "train/ended")
    if not (now < MIN_LENGTH_SHARE * initial or ended < MIN_ENDED_SHARE):
        return None
    evidence = f"{now:.1f} tokens per reply including the end token, {initial:.1f} in the first phase"
    if ended < MIN_ENDED_SHARE:
        evidence = (
            f"{ended:.0%} of the replies end, {initially_ended:.0%} in the first phase; {now:.1f} tokens per reply"
        )
    is_rewarded = _reward_was_kept(e)
    if not is_rewarded and kl_blow_up(e):
        return None  # the KL blow-up explains the symptom
    if initially_ended < MIN_ENDED_SHARE:
        flag = f"--data.reply_tokens {2 * math.ceil(now)}" if math.isfinite(now) else "a larger --data.reply_tokens"
        return Finding(evidence, "the initial model does not end its replies, or reply_tokens is too small", flag)
    if not is_rewarded:
        return Finding(evidence, "optimizer steps too large; the change does not increase the reward", _slower_flag(e))
    if ended < MIN_ENDED_SHARE:
        cause = "the reward prefers long replies and does not penalize replies without an end token"
        return Finding(evidence, cause, f"--model.unended_score {min(0.0, *e['train/reward'].values):.2g}")
    cause = (
        "the reward prefers short replies regardless of their content; reward the content, or stay closer to the "
        "initial policy"
    )
    return Finding(evidence, cause, _penalty_flag(e))
