"""Rules for the loss curve: insufficient decrease, divergence, overfitting, or an implausibly low loss."""

import math
from typing import Final

from lit_gpt_scratch.diagnostics.config_rules import MIN_VALIDATION_TOKENS
from lit_gpt_scratch.diagnostics.metric_history import MetricCurve, MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

SWEEP_COMMAND: Final = "python -m lit_gpt_scratch.sweep experiments/sweeps/learning_rate.yaml"
N_RECENT: Final = 5
"""Number of most recent points whose median is used as the current loss."""
PEAK_SHARE: Final = 0.9
"""The warm-up is considered finished once the learning rate reaches this fraction of its highest value so far."""
MIN_STEPS_RUNNING: Final = 150
"""Number of steps after the warm-up required to check the loss of an ongoing run for a decrease."""
MIN_STEPS_FINISHED: Final = 50
"""Number of steps after the warm-up required to check the loss of a finished run for a decrease."""
MIN_DECREASE: Final = 0.1
"""If the loss decreases by less than this fraction of the initial loss, it counts as not falling.

The loss of healthy runs has decreased by 0.14 to 0.34 after ``MIN_STEPS_FINISHED`` steps, and by 0.27 to 0.4 after
``MIN_STEPS_RUNNING`` steps.
"""
MAX_ABOVE_CHANCE: Final = 1.1
"""If the loss exceeds that of uniform predictions by more than this factor, the learning rate is reported as too high.

Healthy runs stay below 1.01.
"""
MAX_ABOVE_INITIAL: Final = 1.5
"""If the loss exceeds a pretrained model's initial loss by more than this factor, the learning rate is reported."""
UPDATE_RATIO_TAGS: Final = ("dynamics/update_ratio/attention", "dynamics/update_ratio/feed_forward")
"""TensorBoard tags of the update ratios of attention and feed-forward layers.

Other layers are not checked, because the initial norm of their weights may be zero or arbitrary, in which case their
update ratio says little about the learning rate.
"""
STREAM_NORM_TAG: Final = "dynamics/stream_norm/layer_1"
"""TensorBoard tag of the norm of the residual stream after the first block."""
MAX_STREAM_GROWTH: Final = 1e3
"""If the norm of the residual stream grows by more than this factor, optimizer steps are reported as too large.

The norm is divided by its first value, or by 1 if its first value is below 1. In healthy runs, the norm grows up to
40-fold, even if its first value is small. If the learning rate of these runs is multiplied by 1,000, the norm grows
10,000-fold or more.
"""
MIN_UPDATE_RATIO: Final = 1e-4
"""Per-step ratio of the update norm to the weight norm below which steps are reported as too small.

A common rule of thumb is 0.001. Healthy runs have ratios of 0.003 to 0.02. If the learning rate of these runs is
divided by 1,000, the ratios are 0.00001 to 0.00002.
"""
UNIGRAM_SHARE: Final = 0.95
"""Ratio of the validation bits per byte to those of a unigram model above which a flat loss is reported.

Optimizer steps that are too large can destroy the layers of a network, which then learns only the token frequencies. A
healthy network reaches a ratio of 0.8 after a hundred steps.
"""
FLAT_DECREASE: Final = 0.02
"""If the loss decreases by less than this fraction, it is considered flat.

The median of the newest ``N_RECENT`` points is compared with the median of the ``N_RECENT`` points that precede the
newest ``2 * N_RECENT`` points.
"""
MIN_RISE: Final = 0.25
"""If the loss rises by more than this fraction above its lowest value, the run is reported as diverged."""
MIN_RISE_NATS: Final = 0.1
"""Rise in nats required in addition to ``MIN_RISE``, because a loss near 0 may double without diverging."""
OVERFIT_RISE: Final = 0.03
"""If the validation loss rises by more than this fraction above its lowest value, overfitting is reported.

In healthy runs, the validation loss rises by at most 1%.
"""
OVERFIT_RISE_SMALL: Final = 0.1
"""Value used instead of ``OVERFIT_RISE`` if the validation set is small, as changes of a few percent are then noise."""
MIN_LAG: Final = 0.02
"""If a classifier's accuracy is more than this below that of a word-based baseline, the classifier is reported.

The value is one standard deviation of the accuracy on 500 validation records.
"""
MIN_BASELINE_SHARE: Final = 0.2
"""Ratio of the bits per byte to those of ``xz`` or a bigram model below which the loss is reported as too low.

The best language models need about a third of the bits of ``xz``.
"""


def initial_loss(e: MetricHistory) -> float:
    """Return the initial loss of a run: the loss of uniform predictions, or that of the pretrained model.

    For an RL policy, return NaN, so that every comparison is false. The loss of a policy depends on how much better
    than expected its most recent replies were, and does not measure the progress of training. The rules for RL policies
    are in ``rl_rules.py``.
    """
    if len(e["train/kl"]):
        return math.nan
    chance = e.latest("run/chance_loss")
    first = e["train/loss"].values[0]
    return first if e.latest("run/begins_trained") == 1 or not math.isfinite(chance) else chance


def _steps_at_peak(rate: MetricCurve, step: int) -> int:
    """Return the number of steps since the end of the warm-up, or since step 0 if no learning rate has been logged."""
    peak = max(rate.values, default=0.0)
    return step - next((at for at, value in zip(rate.steps, rate.values, strict=True) if value >= PEAK_SHARE * peak), 0)


def has_learned(e: MetricHistory) -> bool:
    """Return whether the loss has fallen below the initial loss; only then are spikes reported."""
    loss = e["train/loss"]
    return len(loss) > 0 and loss.median(N_RECENT) < initial_loss(e)


def loss_not_falling(e: MetricHistory) -> Finding | None:
    """Detect a loss that has not fallen below its initial value, or that is flat at the level of a unigram model."""
    loss, rate = e["train/loss"], e["train/learning_rate"]
    if len(loss) < N_RECENT:
        return None
    initial, now, peak = initial_loss(e), loss.median(N_RECENT), max(rate.values, default=math.nan)
    is_pretrained = e.latest("run/begins_trained") == 1
    reference = "the initial loss of the pretrained model" if is_pretrained else "the loss of uniform predictions"
    evidence = f"the loss is {now:.2f} after {loss.step + 1:,} steps; {initial:.2f} is {reference}"
    max_ratio = MAX_ABOVE_INITIAL if is_pretrained else MAX_ABOVE_CHANCE
    if now > max_ratio * initial and min(loss.values) > (1 - MIN_DECREASE) * initial:
        return Finding(evidence, *lower_rate_advice(e))
    is_long_enough = _steps_at_peak(rate, loss.step) >= (MIN_STEPS_FINISHED if e.is_over else MIN_STEPS_RUNNING)
    if is_pretrained or not is_long_enough:
        return None  # a pretrained model may have nothing left to learn
    if now > (1 - MIN_DECREASE) * initial:
        if min(median for _, median in loss.rolling_medians(N_RECENT)) <= (1 - MIN_DECREASE) * initial:
            return None  # the loss has fallen before, and too low a learning rate cannot make it rise again
        flag = f"--model.optimizer.lr {10 * peak:.2g}; {SWEEP_COMMAND}"
        return Finding(evidence, f"the learning rate, {peak:.2g}, is too low", flag)
    bits, unigram = e["val/bits_per_byte"], e.latest("baselines/unigram")
    # With too low a learning rate, the loss also passes this level, but does not stay there.
    is_flat = now > (1 - FLAT_DECREASE) * loss.median(N_RECENT, before=2 * N_RECENT)
    if bits.step >= loss.steps[-N_RECENT] and bits.last > UNIGRAM_SHARE * unigram and is_flat:
        evidence = f"{bits.last:.2f} bits per byte of the validation text; a unigram model reaches {unigram:.2f}"
        return Finding(evidence, *lower_rate_advice(e))
    return None


def lower_rate_advice(e: MetricHistory) -> tuple[str, str]:
    """Return the likely cause of steps that are too large, and a flag to try."""
    peak = max(e["train/learning_rate"].values, default=math.nan)
    if not math.isfinite(peak):
        return "the learning rate is too high", f"a tenth of --model.optimizer.lr; {SWEEP_COMMAND}"
    if e.latest("run/warmup_steps") == 0:
        post_norm = ": post-norm requires a warm-up" if e.latest("run/post_norm") == 1 else ""
        steps = max(20, int(e.latest("run/steps") / 5)) if math.isfinite(e.latest("run/steps")) else 200
        return (
            f"the learning rate, {peak:.2g}, is too high for the first steps{post_norm} "
            "(https://arxiv.org/abs/2002.04745)",
            f"--model.schedule.warmup_steps {steps}",
        )
    return f"the learning rate, {peak:.2g}, is too high", f"--model.optimizer.lr {peak / 10:.2g}; {SWEEP_COMMAND}"


def steps_too_large(e: MetricHistory) -> Finding | None:
    """Detect weights so large that further updates have no effect; with norm layers, the loss may not show this."""
    stream = e[STREAM_NORM_TAG]
    if len(stream) < 2 or not stream.last > MAX_STREAM_GROWTH * max(stream.values[0], 1.0):
        return None
    evidence = f"the norm of the residual stream after block 1 is {stream.last:.2g}, initially {stream.values[0]:.2g}"
    return Finding(evidence, *lower_rate_advice(e))


def steps_too_small(e: MetricHistory) -> Finding | None:
    """Detect optimizer steps after the warm-up that barely change the weight matrices.

    The loss may fall nevertheless, because of the other parameters.
    """
    rate = e["train/learning_rate"]
    peak = max(rate.values, default=math.nan)
    is_warm = e.step >= e.latest("run/warmup_steps") and rate.last >= PEAK_SHARE * peak
    # A skipped step does not count, because it changes no weights.
    ratios = [
        (e[name].last, name.rpartition("/")[2])
        for name in UPDATE_RATIO_TAGS
        if e[name].last > 0 and e[name].step == e.step
    ]
    ratio, part = min(ratios, default=(math.nan, ""))
    if not (ratio < MIN_UPDATE_RATIO and is_warm) or e.latest("run/begins_trained") == 1:
        return None
    flag = f"--model.optimizer.lr {10 * peak:.2g}; {SWEEP_COMMAND}"
    evidence = f"step {e.step} changed {part} by {ratio:.2g} of its norm; 0.001 to 0.05 is typical"
    return Finding(evidence, f"the learning rate, {peak:.2g}, is too low", flag)


def divergence(e: MetricHistory) -> Finding | None:
    """Detect a loss that fell, then rose and did not recover."""
    loss = e["train/loss"]
    if len(loss) < 2 * N_RECENT:
        return None
    step, best = min(loss.rolling_medians(N_RECENT), key=lambda point: point[1], default=(0, math.nan))
    now = loss.median(N_RECENT)
    if not (best < (1 - MIN_DECREASE) * initial_loss(e) and now > (1 + MIN_RISE) * best + MIN_RISE_NATS):
        return None
    return Finding(f"the loss was {best:.2f} at step {step}, and is {now:.2f} now", *lower_rate_advice(e))


def overfitting(e: MetricHistory) -> Finding | None:
    """Detect a validation loss that rises while the training loss falls."""
    val, train = e["val/loss"], e["train/loss"]
    if len(val) < 3 or len(train) < 2 * N_RECENT or math.isnan(initial_loss(e)):
        return None
    best = min(val.values)
    since = val.steps[val.values.index(best)]
    medians_before = [median for at, median in train.rolling_medians(N_RECENT) if at <= since]
    now = train.median(N_RECENT)
    is_small = e.latest("run/validation_tokens") < MIN_VALIDATION_TOKENS
    is_rising = min(val.values[-2:]) > (1 + (OVERFIT_RISE_SMALL if is_small else OVERFIT_RISE)) * best
    if not (is_rising and medians_before and now < medians_before[-1] and now < val.last):
        return None
    train_tokens = e.latest("run/train_tokens")
    epochs = (val.step + 1) * e.latest("run/tokens_per_step") / train_tokens if train_tokens else math.nan
    seen = f", after {epochs:.3g} epochs" if math.isfinite(epochs) else ""
    gap = f"training loss {now:.3f}, a gap of {val.last - now:.2f}"
    return Finding(
        f"validation loss {val.last:.3f}, {best:.3f} at step {since}; {gap}{seen}",
        "the model memorizes the training text; use more text, or train for fewer steps",
        f"--trainer.max_steps {since + 1}" if since else "--model.gpt.dropout 0.1",
    )


def suspiciously_low_loss(e: MetricHistory) -> Finding | None:
    """Detect a validation loss that is implausibly low."""
    bits = e["val/bits_per_byte"]
    baselines = [e.latest(f"baselines/{name}") for name in ("xz", "bigram")]
    baseline = next((value for value in baselines if math.isfinite(value)), math.nan)
    if not bits.last < MIN_BASELINE_SHARE * baseline:
        return None
    return Finding(
        f"{bits.last:.3f} bits per byte of the validation text; a compressor or n-gram model reaches {baseline:.2f}",
        "the model has access to the tokens that it must predict, or was trained on the validation text",
        "python -m lit_gpt_scratch.evaluate --data.source VALIDATION --against TRAINING",
    )


def below_word_baseline(e: MetricHistory) -> Finding | None:
    """Detect a finished classifier whose best validation accuracy is below that of a classifier that counts words."""
    best = max(e["val/accuracy"].values, default=math.nan)
    for name in ("tf-idf", "naive bayes"):
        baseline = e.latest(f"baselines/{name}")
        if e.is_over and best < baseline - MIN_LAG:
            return Finding(
                f"the accuracy on the validation records is {best:.3f} at best; {name} reaches {baseline:.3f}",
                "the initial model was trained on too little text, or the learning rate does not suit it",
                "--model.init_from a model trained on more text; "
                "notebooks/reference/finetuning.md says when a small model is the wrong tool",
            )
    return None
