"""Rules for activations, attention and generated samples."""

from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

MAX_DEAD_UNITS: Final = 0.5
"""Fraction of dead feed-forward units above which a problem is reported."""
MIN_LOAD_ENTROPY: Final = 0.5
"""Entropy of the load of a block's experts (1 if it is equal, 0 if all tokens choose the same experts) below which a
problem is reported. A healthy run has 0.9 to 1, and an AdamW run without balancing whose learning rate is ten times too
large has 0.05 to 0.3."""
MAX_SINK: Final = 0.7
"""Fraction of attention on the first token, averaged over all heads, above which a problem is reported."""
MAX_REPETITION: Final = 0.5
"""Fraction of repeated phrases in a sample above which a problem is reported. Healthy runs have 0 to 0.2."""


def dead_units(e: MetricHistory) -> Finding | None:
    """Detect feed-forward units that are zero for every token."""
    dead = e["dynamics/dead_units"]
    if len(dead) < 2 or not min(dead.values[-2:]) > MAX_DEAD_UNITS:
        return None
    return Finding(
        f"{dead.last:.0%} of the feed-forward units are zero for every token",
        "optimizer steps so large that units moved to a region where the activation and its gradient are zero",
        "--model.gpt.feed_forward swiglu",
    )


def expert_collapse(e: MetricHistory) -> Finding | None:
    """Detect a router that sends most tokens to a few of the experts."""
    entropy = e["experts/load_entropy"]
    if len(entropy) < 3 or not max(entropy.values[-3:]) < MIN_LOAD_ENTROPY:
        return None
    return Finding(
        f"the evenness of the load of a block's experts is {entropy.last:.2f} (1 if equal, 0 if all tokens choose the "
        f"same experts); "
        f"{e.latest('experts/unused'):.0%} of all experts receive no tokens",
        "the router sends most tokens to a few experts, and the others are not trained",
        "--model.gpt.load_balance_loss 0.1",
    )


def attention_sink(e: MetricHistory) -> Finding | None:
    """Detect attention that is concentrated on the first token, regardless of its content."""
    sink = e["attention/sink"]
    if len(sink) < 2 or not min(sink.values[-2:]) > MAX_SINK:
        return None
    return Finding(
        f"{sink.last:.0%} of the attention goes to the first token",
        "attention weights sum to 1, so inactive heads attend to the first token; a gate lets them output zero (see "
        "my_attention.py in the README)",
        "--model.gpt.attention my_attention.Gated",
    )


def repetition(e: MetricHistory) -> Finding | None:
    """Detect generated samples that repeat themselves."""
    share = e["samples/repetition"]
    if len(share) < 2 or not min(share.values[-2:]) > MAX_REPETITION:
        return None
    return Finding(
        f"{share.last:.0%} of the phrases in a sample are repeated",
        "too little training so far, repetitive training text, or a temperature that is too low",
        "generate --repetition_penalty 1.2",
    )
