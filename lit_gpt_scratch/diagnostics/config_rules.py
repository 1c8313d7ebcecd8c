"""Rows about what a run is given: its labels, its text, its validation, its length."""

from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

MIN_VALIDATION_TOKENS: Final = 10_000
CHINCHILLA_RATIO: Final = 20
"""Tokens a parameter that make the most of the computation (https://arxiv.org/abs/2203.15556)."""
MAX_BUDGET_FACTOR: Final = 30
"""Within this factor of it nothing is said: a first run is short on purpose, a model for use long."""
MANY_EPOCHS: Final = 100
MIN_ALIGNED_LABELS: Final = 0.5
"""Of the labels. Where windows hold many short documents, one a document is not what the next position reads."""
MAX_REPEATED_SHARE: Final = 0.3
"""Of the passages. In the standard library's sources it is 0.04."""


def misaligned_labels(e: MetricHistory) -> Finding | None:
    """Labels are not the tokens that follow."""
    following, own = e.fact("run/labels_next"), e.fact("run/labels_own")
    if not following < MIN_ALIGNED_LABELS:
        return None
    where = "the token of its own position" if own > MIN_ALIGNED_LABELS else "neither its own token nor the next"
    return Finding(
        f"of the first batch {following:.0%} are what the next position reads; a label is {where}",
        "labels are shifted not at all, or twice; once is right, where the batch is made (batch.py)",
        "--data PackedText",
    )


def duplicated_text(e: MetricHistory) -> Finding | None:
    """Much of the text comes again."""
    share = e.fact("run/repeated_passages")
    if not share > MAX_REPEATED_SHARE:
        return None
    return Finding(
        f"{share:.0%} of the passages of 32 tokens at the training's beginning stood there before",
        "documents are in the text several times, and are learned by heart",
        "--data.cleaning+=lit_gpt_scratch.text.duplicates.NearDuplicates",
    )


def small_validation(e: MetricHistory) -> Finding | None:
    """There is too little to validate on."""
    tokens = e.fact("run/validation_tokens")
    if not tokens < MIN_VALIDATION_TOKENS:
        return None
    return Finding(
        f"{tokens:,.0f} tokens: differences of a few percent mean nothing",
        "little text, a small share of it held out, or few batches of it read",
        "--data.validation_share 0.2",
    )


def compute_budget(e: MetricHistory) -> Finding | None:
    """Tokens and parameters are out of proportion."""
    tokens = e.fact("run/steps") * e.fact("run/tokens_per_step")
    each = tokens / e.fact("run/parameters") if e.fact("run/parameters") else CHINCHILLA_RATIO
    epochs = tokens / e.fact("run/train_tokens") if e.fact("run/train_tokens") else 0.0
    far = each < CHINCHILLA_RATIO / MAX_BUDGET_FACTOR or each > CHINCHILLA_RATIO * MAX_BUDGET_FACTOR
    if not far or e.fact("run/begins_trained") == 1 or epochs > MANY_EPOCHS:
        return None
    steps = max(1, round(CHINCHILLA_RATIO * e.fact("run/parameters") / e.fact("run/tokens_per_step")))
    size, length = ("large", "short") if each < CHINCHILLA_RATIO else ("small", "long")
    return Finding(
        f"{each:.3g} tokens a parameter; about {CHINCHILLA_RATIO} make the most of the computation",
        f"the model is too {size} for the run, or the run too {length} for it",
        f"--trainer.max_steps {steps}",
    )
