"""Rows about the curve of the loss: whether it falls, rises, or is better than it can be."""

import math
from typing import Final

from lit_gpt_scratch.diagnostics.config_rules import MIN_VALIDATION_TOKENS
from lit_gpt_scratch.diagnostics.metric_history import Curve, MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

SWEEP_COMMAND: Final = "python -m lit_gpt_scratch.sweep experiments/sweeps/learning_rate.yaml"
N_RECENT: Final = 5
"""Points whose median is what the loss is at now."""
PEAK_SHARE: Final = 0.9
"""Of the highest rate so far; warm-up ends there."""
MIN_STEPS_RUNNING: Final = 150
"""Steps at that rate after which a loss has to have fallen."""
MIN_STEPS_FINISHED: Final = 50
"""The same for a run that is over."""
MIN_DECREASE: Final = 0.1
"""Of the loss of who knows nothing. After ``MIN_STEPS_FINISHED`` steps healthy runs have come down by 0.14 to 0.34,
after ``MIN_STEPS_RUNNING`` by 0.27 to 0.4."""
MAX_ABOVE_CHANCE: Final = 1.1
"""Times the loss of who knows nothing: it takes steps too far to be so wrong. Healthy runs stay within 1.01."""
MAX_ABOVE_INITIAL: Final = 1.5
"""Times the loss of what a run begins with, which can be of other text."""
UPDATE_RATIO_TAGS: Final = ("dynamics/update_ratio/attention", "dynamics/update_ratio/feed_forward")
"""Of parts whose weights begin at a size that says something."""
STREAM_NORM_TAG: Final = "dynamics/stream_norm/layer_1"
MAX_STREAM_GROWTH: Final = 1e3
"""Times what it was, or times 1 where it began below. In healthy runs it is up to 40, however small it began; at a
thousand times the rate 10,000 and more."""
MIN_UPDATE_RATIO: Final = 1e-4
"""Of the norm of the weights, for one step. A thousandth is a rule of thumb, healthy runs have 0.003 to 0.02, and those
at a thousandth of their rate 0.00001 to 0.00002."""
UNIGRAM_SHARE: Final = 0.95
"""Of the bits that counting tokens needs. A network whose layers were spoilt learns their frequencies and no more; a
healthy one is at 0.8 after a hundred steps."""
FLAT_DECREASE: Final = 0.02
"""Of the median of ``N_RECENT`` points, less than which it has fallen since that of as many points
``2 * N_RECENT`` before."""
MIN_RISE: Final = 0.25
"""Of the lowest loss there was."""
MIN_RISE_NATS: Final = 0.1
"""Nats. What is next to nothing may double."""
OVERFIT_RISE: Final = 0.03
"""Of the lowest validation loss, which it has risen by. Ups and downs of healthy runs are within 0.01."""
OVERFIT_RISE_SMALL: Final = 0.1
"""The same where little is validated on, and a few percent mean nothing."""
MIN_BASELINE_SHARE: Final = 0.2
"""Of the bits that compression or counting needs. The best language models need a third of those of ``xz``."""


def initial_loss(e: MetricHistory) -> float:
    """The loss that a run begins with: that of who knows nothing, or of what it begins with.

    NaN, with which no comparison holds, of a policy: its loss is how much better than expected its last replies were,
    which is no measure of what it has learned. What speaks of that is in ``policies.py``.
    """
    if len(e["train/kl"]):
        return math.nan
    chance = e.fact("run/chance_loss")
    first = e["train/loss"].values[0]
    return first if e.fact("run/begins_trained") == 1 or not math.isfinite(chance) else chance


def _steps_at_peak(rate: Curve, step: int) -> int:
    """Steps since the rate came near to the highest so far; all of them where no rate is known."""
    highest = max(rate.values, default=0.0)
    return step - next(
        (at for at, value in zip(rate.steps, rate.values, strict=True) if value >= PEAK_SHARE * highest), 0
    )


def has_learned(e: MetricHistory) -> bool:
    """Whether the loss has come below that of the beginning; before that, nothing stands out."""
    loss = e["train/loss"]
    return len(loss) > 0 and loss.median(N_RECENT) < initial_loss(e)


def loss_not_falling(e: MetricHistory) -> Finding | None:
    """The loss is where it began, or above."""
    loss, rate = e["train/loss"], e["train/learning_rate"]
    if len(loss) < N_RECENT:
        return None
    began, now, peak = initial_loss(e), loss.median(N_RECENT), max(rate.values, default=math.nan)
    trained = e.fact("run/begins_trained") == 1
    whose = "what it began with" if trained else "that of a model that knows nothing"
    evidence = f"{now:.2f} after {loss.step + 1:,} steps, and {began:.2f} is {whose}"
    if (
        now > (MAX_ABOVE_INITIAL if trained else MAX_ABOVE_CHANCE) * began
        and min(loss.values) > (1 - MIN_DECREASE) * began
    ):
        return Finding(evidence, *lower_rate_advice(e))
    long_enough = _steps_at_peak(rate, loss.step) >= (MIN_STEPS_FINISHED if e.over else MIN_STEPS_RUNNING)
    if trained or not long_enough:
        return None  # what is trained may know all that there is to learn
    if now > (1 - MIN_DECREASE) * began:
        if min(median for _, median in loss.medians(N_RECENT)) <= (1 - MIN_DECREASE) * began:
            return None  # it had fallen: no rate that is too low brings it back up
        flag = f"--model.optimizer.lr {10 * peak:.2g}; {SWEEP_COMMAND}"
        return Finding(evidence, f"the learning rate, {peak:.2g}, is too low", flag)
    bits, counting = e["val/bits_per_byte"], e.fact("baselines/unigram")
    # A rate that is too low leads past there as well, but does not stay.
    flat = now > (1 - FLAT_DECREASE) * loss.median(N_RECENT, before=2 * N_RECENT)
    if bits.step >= loss.steps[-N_RECENT] and bits.last > UNIGRAM_SHARE * counting and flat:
        evidence = (
            f"{bits.last:.2f} bits per byte of the validation text; counting its tokens alone takes {counting:.2f}"
        )
        return Finding(evidence, *lower_rate_advice(e))
    return None


def lower_rate_advice(e: MetricHistory) -> tuple[str, str]:
    """Cause and flag, where steps go too far."""
    peak = max(e["train/learning_rate"].values, default=math.nan)
    if not math.isfinite(peak):
        return "the learning rate is too high", f"a tenth of it: --model.optimizer.lr; {SWEEP_COMMAND}"
    if e.fact("run/warmup_steps") == 0:
        behind = ": norms behind the addition need a warm-up" if e.fact("run/post_norm") == 1 else ""
        steps = max(20, int(e.fact("run/steps") / 5)) if math.isfinite(e.fact("run/steps")) else 200
        return (
            f"the learning rate, {peak:.2g}, is too high for the first steps{behind} (https://arxiv.org/abs/2002.04745)",
            f"--model.schedule.warmup_steps {steps}",
        )
    return f"the learning rate, {peak:.2g}, is too high", f"--model.optimizer.lr {peak / 10:.2g}; {SWEEP_COMMAND}"


def steps_too_large(e: MetricHistory) -> Finding | None:
    """Weights have grown so far that nothing that a step adds still counts; norms may hide it from the loss."""
    stream = e[STREAM_NORM_TAG]
    if len(stream) < 2 or not stream.last > MAX_STREAM_GROWTH * max(stream.values[0], 1.0):
        return None
    evidence = f"the stream behind the first block is of size {stream.last:.2g}, and began at {stream.values[0]:.2g}"
    return Finding(evidence, *lower_rate_advice(e))


def steps_too_small(e: MetricHistory) -> Finding | None:
    """A step moves the matrices next to not, at the full rate, while the loss may fall by what else is trained."""
    rate = e["train/learning_rate"]
    peak = max(rate.values, default=math.nan)
    warm = e.step >= e.fact("run/warmup_steps") and rate.last >= PEAK_SHARE * peak
    # A step that was left out moves nothing at all, and is none.
    moved = [
        (e[name].last, name.rpartition("/")[2])
        for name in UPDATE_RATIO_TAGS
        if e[name].last > 0 and e[name].step == e.step
    ]
    ratio, part = min(moved, default=(math.nan, ""))
    if not (ratio < MIN_UPDATE_RATIO and warm) or e.fact("run/begins_trained") == 1:
        return None
    flag = f"--model.optimizer.lr {10 * peak:.2g}; {SWEEP_COMMAND}"
    evidence = f"step {e.step} moved {part} by {ratio:.2g} of its norm; 0.001 to 0.05 is usual"
    return Finding(evidence, f"the learning rate, {peak:.2g}, is too low", flag)


def divergence(e: MetricHistory) -> Finding | None:
    """The loss had fallen, and has risen to stay."""
    loss = e["train/loss"]
    if len(loss) < 2 * N_RECENT:
        return None
    step, best = min(loss.medians(N_RECENT), key=lambda point: point[1])
    now = loss.median(N_RECENT)
    if not (best < (1 - MIN_DECREASE) * initial_loss(e) and now > (1 + MIN_RISE) * best + MIN_RISE_NATS):
        return None
    return Finding(f"{best:.2f} at step {step}, {now:.2f} now", *lower_rate_advice(e))


def overfitting(e: MetricHistory) -> Finding | None:
    """The validation loss rises while that of the training falls."""
    val, train = e["val/loss"], e["train/loss"]
    if len(val) < 3 or len(train) < 2 * N_RECENT or math.isnan(initial_loss(e)):
        return None
    best = min(val.values)
    since = val.steps[val.values.index(best)]
    then = [median for at, median in train.medians(N_RECENT) if at <= since]
    now = train.median(N_RECENT)
    gap = OVERFIT_RISE_SMALL if e.fact("run/validation_tokens") < MIN_VALIDATION_TOKENS else OVERFIT_RISE
    rising = min(val.values[-2:]) > (1 + gap) * best
    if not (rising and then and now < then[-1] and now < val.last):
        return None
    epochs = (val.step + 1) * e.fact("run/tokens_per_step") / e.fact("run/train_tokens")
    read = f", {epochs:.3g} epochs read" if math.isfinite(epochs) else ""
    apart = f"training {now:.3f}, a gap of {val.last - now:.2f}"
    return Finding(
        f"validation {val.last:.3f}, {best:.3f} at step {since}; {apart}{read}",
        "the model learns the text by heart; name more of it, or learn from it for less long",
        f"--trainer.max_steps {since + 1}" if since else "--model.gpt.dropout 0.1",
    )


def suspiciously_low_loss(e: MetricHistory) -> Finding | None:
    """The validation text is predicted better than it can be."""
    bits = e["val/bits_per_byte"]
    bars = [e.fact(f"baselines/{name}") for name in ("xz", "bigram")]
    bar = next((value for value in bars if math.isfinite(value)), math.nan)
    if not bits.last < MIN_BASELINE_SHARE * bar:
        return None
    return Finding(
        f"{bits.last:.3f} bits per byte of the validation text, where counting or compressing it takes {bar:.2f}",
        "what is to be predicted can be seen, or the text was trained on",
        "python -m lit_gpt_scratch.evaluate --data.source VALIDATION --against TRAINING",
    )
