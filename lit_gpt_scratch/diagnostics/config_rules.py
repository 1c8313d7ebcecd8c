"""Rules for the labels, text, validation set and number of training tokens of a run."""

import math
from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

MIN_VALIDATION_TOKENS: Final = 10_000
CHINCHILLA_RATIO: Final = 20
"""Compute-optimal number of training tokens per parameter (https://arxiv.org/abs/2203.15556)."""
MAX_BUDGET_FACTOR: Final = 30
"""If the number of tokens per parameter differs from ``CHINCHILLA_RATIO`` by more than this factor, it is reported.

The range is wide, because test runs are often much shorter than compute-optimal, and production runs much longer.
"""
MAX_EPOCHS: Final = 100
MIN_ALIGNED_LABELS: Final = 0.5
"""If fewer than this fraction of labels equal the next input token, the labels are reported as misaligned.

The fraction may be below 1 even for correct labels, because the last label of a document may differ from the next input
token. This matters most in windows with many short documents.
"""
MAX_REPEATED_SHARE: Final = 0.3
"""Fraction of repeated passages above which a problem is reported. It is 0.04 in Python's standard library."""


def misaligned_labels(e: MetricHistory) -> Finding | None:
    """Detect labels that differ from the next tokens."""
    following, own = e.latest("run/labels_next"), e.latest("run/labels_own")
    if not following < MIN_ALIGNED_LABELS:
        return None
    label = "most labels equal" if own > MIN_ALIGNED_LABELS else "at most half equal"
    return Finding(
        f"only {following:.0%} of the labels in the first batch equal the next input token; {label} the token at "
        "their own position",
        "the labels are not shifted, or are shifted twice; shift them once, when the batch is created (batch_types.py)",
        "--data PackedText",
    )


def duplicated_text(e: MetricHistory) -> Finding | None:
    """Detect training text that consists largely of repeated passages."""
    share = e.latest("run/repeated_passages")
    if not share > MAX_REPEATED_SHARE:
        return None
    return Finding(
        f"{share:.0%} of the 32-token passages at the beginning of the training text are repeated",
        "documents occur several times in the text, and the model memorizes them",
        "--data.cleaning+=lit_gpt_scratch.text.duplicates.NearDuplicates",
    )


def small_validation(e: MetricHistory) -> Finding | None:
    """Detect a validation set that is too small for meaningful metrics."""
    tokens = e.latest("run/validation_tokens")
    if not tokens < MIN_VALIDATION_TOKENS:
        return None
    return Finding(
        f"only {tokens:,.0f} tokens, so differences of a few percent are noise",
        "too little text, too small a validation split, or too few validation batches",
        "--data.validation_share 0.2",
    )


def compute_budget(e: MetricHistory) -> Finding | None:
    """Detect a number of training tokens that is far from compute-optimal for the model size."""
    parameters, tokens_per_step = e.latest("run/parameters"), e.latest("run/tokens_per_step")
    if not (0 < parameters < math.inf and 0 < tokens_per_step < math.inf):
        return None
    tokens = e.latest("run/steps") * tokens_per_step
    ratio = tokens / parameters
    epochs = tokens / e.latest("run/train_tokens") if e.latest("run/train_tokens") else 0.0
    is_far = ratio < CHINCHILLA_RATIO / MAX_BUDGET_FACTOR or ratio > CHINCHILLA_RATIO * MAX_BUDGET_FACTOR
    if not is_far or e.latest("run/begins_trained") == 1 or epochs > MAX_EPOCHS:
        return None
    steps = max(1, round(CHINCHILLA_RATIO * parameters / tokens_per_step))
    size, length = ("large", "short") if ratio < CHINCHILLA_RATIO else ("small", "long")
    return Finding(
        f"{ratio:.3g} tokens per parameter; about {CHINCHILLA_RATIO} are compute-optimal",
        f"the model is too {size} for the run, or the run is too {length} for the model",
        f"--trainer.max_steps {steps}",
    )
