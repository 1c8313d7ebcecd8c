"""Rows about a policy, which learns from its own replies: what it is paid for, and what has become of it.

What they know of a phase's replies is logged at each of its steps, and counts once. Healthy runs are those of
``experiments/align/ppo.yaml`` and ``grpo.yaml``, with a program and with a reward model that say what is good.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

N_RECENT: Final = 3
"""Phases whose median is what a policy was, or is."""
MIN_SEPARATION: Final = 1.5
"""Times the larger spread of three phases, between their medians. What only wavers is so far apart once in 125 times,
in a simulation with normal noise."""
MIN_REWARD_DROP: Final = 0.15
"""Of all replies, from the best there was. The share of 115 replies, as validation has, wavers by 0.05."""
MIN_REWARD_GAIN: Final = 0.1
"""Of what true reward lacked. Healthy runs make up for 0.6 and more."""
MAX_KL: Final = 30.0
"""Nats of a reply. Healthy runs reach 5 to 12, and 19 where a reward model pays for GRPO's replies; one without a
penalty, at ten times the rate, 75."""
MAX_KL_TO_TARGET: Final = 4.0
"""Of the KL that the coefficient is adapted to reach."""
MIN_ENTROPY_SHARE: Final = 0.1
"""Of the entropy at the beginning. In healthy runs that of a token stays between 0.4 and 2 times what it was."""
MIN_LENGTH_SHARE: Final = 0.3
"""Of the tokens of a reply at the beginning, its end among them. Healthy runs stay above 0.6, also where short
replies are preferred."""
MIN_ENDED_SHARE: Final = 0.5
"""Of the replies. In healthy runs 0.93 and more come to their end."""
PENALTY_FACTOR: Final = 4
"""Times the coefficient that was not enough; where there was none, ``DEFAULT_PENALTY``."""
DEFAULT_PENALTY: Final = 0.05
NO_STEP: Final = -1
"""No step."""


def _phases(e: MetricHistory, name: str) -> list[tuple[int, float]]:
    """Points of a curve that is logged beside ``train/kl``, one for each phase: that of its first step with a point."""
    kl, curve = e["train/kl"], e[name]
    firsts = {step for place, step in enumerate(kl.steps) if place == 0 or kl.values[place] != kl.values[place - 1]}
    return [point for point in zip(curve.steps, curve.values, strict=True) if point[0] in firsts]


def _first_and_recent(e: MetricHistory, name: str) -> tuple[float, float]:
    """Of the first phase that is known, and the median of the newest; NaN of too few."""
    values = [value for _, value in _phases(e, name)]
    return (values[0], statistics.median(values[-N_RECENT:])) if len(values) > N_RECENT else (math.nan, math.nan)


def _all_above(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether each value of the one is higher than each of the other."""
    return min(after) > max(before)


def _has_risen(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether values are higher, by more than they waver."""
    spread = max(max(values) - min(values) for values in (before, after))
    return _all_above(before, after) and statistics.median(after) - statistics.median(before) > MIN_SEPARATION * spread


def _penalty_flag(e: MetricHistory) -> str:
    """A larger one."""
    coefficient = e.fact("train/kl_coefficient")
    return f"--model.kl_coefficient {PENALTY_FACTOR * coefficient if coefficient > 0 else DEFAULT_PENALTY:.2g}"


def _slower_flag(e: MetricHistory) -> str:
    """A third of the learning rate."""
    peak = max(e["train/learning_rate"].values, default=math.nan)
    return f"--model.optimizer.lr {peak / 3:.2g}" if math.isfinite(peak) else "a third of --model.optimizer.lr"


def reward_hacking(e: MetricHistory) -> Finding | None:
    """The reward that is learned from rises, and what it stands for does not."""
    evidence, step = _training_hack(e) or _validation_hack(e) or _no_gain(e) or ("", NO_STEP)
    if not evidence:
        return None
    return Finding(
        evidence,
        "replies that please what gives the reward, and not what it stands for; stay nearer to the start, stop where "
        "true reward was best, or mend the reward",
        _penalty_flag(e) + (f"; --trainer.max_steps {step + 1}" if step != NO_STEP else ""),
    )


def _reward_curves(e: MetricHistory) -> tuple[list[int], list[float], list[float]]:
    """Steps of phases, their reward, and their true reward; nothing where it is not known."""
    reward, true = _phases(e, "train/reward"), dict(_phases(e, "train/true_reward"))
    shared = [(step, value, true[step]) for step, value in reward if step in true]
    return [each[0] for each in shared], [each[1] for each in shared], [each[2] for each in shared]


def _training_hack(e: MetricHistory) -> tuple[str, int] | None:
    """What is wrong, and the step of the best true reward, if that was better than at the beginning."""
    steps, reward, true = _reward_curves(e)
    if len(steps) < 2 * N_RECENT:
        return None
    ends = range(N_RECENT, len(steps) - N_RECENT + 1)
    best = max(ends, key=lambda end: statistics.median(true[end - N_RECENT : end]))
    before, after = slice(best - N_RECENT, best), slice(-N_RECENT, None)
    high, low = statistics.median(true[before]), statistics.median(true[after])
    if not (
        high - low > MIN_REWARD_DROP
        and _all_above(true[after], true[before])
        and _all_above(reward[before], reward[after])
    ):
        return None
    rise, since = _arrow(statistics.median(reward[before]), statistics.median(reward[after])), steps[best - 1]
    evidence = f"reward {rise} in training, and true reward {_arrow(high, low)}, since step {since}"
    return evidence, since if best > N_RECENT else NO_STEP


def _validation_hack(e: MetricHistory) -> tuple[str, int] | None:
    """The same, of prompts that are held out and replied to with the same random numbers."""
    reward, true = e["val/reward"], e["val/true_reward"]
    if len(true) < 2 or reward.steps != true.steps:
        return None
    best = max(range(len(true)), key=true.values.__getitem__)
    if not (true.values[best] - true.last > MIN_REWARD_DROP and reward.last > reward.values[best]):
        return None
    rise, fall = _arrow(reward.values[best], reward.last), _arrow(true.values[best], true.last)
    return f"reward {rise} in validation, and true reward {fall}, since step {true.steps[best]}", true.steps[best]


def _no_gain(e: MetricHistory) -> tuple[str, int] | None:
    """Of a run that is over: true reward stayed."""
    steps, reward, true = _reward_curves(e)
    if len(steps) < 2 * N_RECENT or not e.over or not _has_risen(reward[:N_RECENT], reward[-N_RECENT:]):
        return None
    began, now = statistics.median(true[:N_RECENT]), statistics.median(true[-N_RECENT:])
    if not now - began < MIN_REWARD_GAIN * (1 - began):
        return None
    rise = _arrow(statistics.median(reward[:N_RECENT]), statistics.median(reward[-N_RECENT:]))
    return f"reward {rise} in training, and true reward {_arrow(began, now)}", NO_STEP


def _arrow(before: float, after: float) -> str:
    return f"{before:.3g} -> {after:.3g}"


def kl_blow_up(e: MetricHistory) -> Finding | None:
    """The policy says what its start hardly would."""
    began, now = _first_and_recent(e, "train/kl")
    target = e.fact("run/kl_target")
    adapted = math.isfinite(target)
    if not now > (MAX_KL_TO_TARGET * target if adapted else MAX_KL):
        return None
    cause = "steps too large to be held back" if adapted else "a penalty too small for this reward and these steps"
    free = not adapted and not e.fact("train/kl_coefficient") > 0
    aim = f"; the target is {target:.3g}" if adapted else "; 5 to 20 is usual"
    return Finding(
        f"{now:.1f} nats a reply from the start, {began:.1f} in the first phase seen{aim}",
        "nothing holds replies to the start: kl_coefficient is 0" if free else cause,
        _slower_flag(e) if adapted else f"{_penalty_flag(e)}; {_slower_flag(e)}",
    )


def entropy_collapse(e: MetricHistory) -> Finding | None:
    """Nothing is left to choose from."""
    began, now = _first_and_recent(e, "train/entropy")
    if not now < MIN_ENTROPY_SHARE * began:
        return None
    return Finding(
        f"{now:.2g} nats a token, {began:.2g} in the first phase seen: replies to a prompt are all but the same",
        "steps too large, which settled on the first reply that paid; what is never written is never learned from",
        f"{_slower_flag(e)}; --model.entropy_coefficient 0.01",
    )


def _reward_was_kept(e: MetricHistory) -> bool:
    """Whether most of the reward that was ever gained is still there."""
    reward = [value for _, value in _phases(e, "train/reward")]
    if len(reward) <= N_RECENT:
        return False
    best = max(statistics.median(reward[end - N_RECENT : end]) for end in range(N_RECENT, len(reward) + 1))
    return best > reward[0] and statistics.median(reward[-N_RECENT:]) > (reward[0] + best) / 2


def length_collapse(e: MetricHistory) -> Finding | None:
    """Replies say next to nothing, or do not come to an end."""
    (began, now), (ended, ends) = _first_and_recent(e, "train/reply_tokens"), _first_and_recent(e, "train/ended")
    if not (now < MIN_LENGTH_SHARE * began or ends < MIN_ENDED_SHARE):
        return None
    evidence = f"{now:.1f} tokens a reply, its end among them, {began:.1f} in the first phase seen"
    if ends < MIN_ENDED_SHARE:
        evidence = (
            f"{ends:.0%} of the replies come to their end, {ended:.0%} in the first phase seen; {now:.1f} tokens each"
        )
    paid = _reward_was_kept(e)
    if not paid and kl_blow_up(e):
        return None  # which explains it
    if ended < MIN_ENDED_SHARE:
        room = f"--data.reply_tokens {2 * math.ceil(now)}"
        return Finding(evidence, "the start does not end its replies, or they have too little room", room)
    if not paid:
        return Finding(evidence, "steps too large: nothing is gained by it", _slower_flag(e))
    if ends < MIN_ENDED_SHARE:
        cause = "the reward prefers more, and it costs nothing not to end"
        return Finding(evidence, cause, f"--model.unended_score {min(0.0, *e['train/reward'].values):.2g}")
    cause = "the reward prefers less, whatever it says; let it look at what a reply says, or stay nearer to the start"
    return Finding(evidence, cause, _penalty_flag(e))
