"""Rules about activations, attention, and generated samples."""

from typing import Final

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding

MAX_DEAD_UNITS: Final = 0.5
"""Share of the feed-forward units."""
MAX_SINK: Final = 0.7
"""Share of the attention that goes to the first token, over all heads."""
MAX_REPETITION: Final = 0.5
"""Share of repeated phrases in a sample. In samples of healthy runs it is 0 to 0.2."""


def dead_units(e: MetricHistory) -> Finding | None:
    """Feed-forward units that are zero for every token."""
    dead = e["dynamics/dead_units"]
    if len(dead) < 2 or not min(dead.values[-2:]) > MAX_DEAD_UNITS:
        return None
    return Finding(
        f"{dead.last:.0%} of the feed-forward units are zero for every token",
        "steps so large that units ended up where the activation and its slope are zero",
        "--model.gpt.feed_forward swiglu",
    )


def attention_sink(e: MetricHistory) -> Finding | None:
    """Most attention goes to the first token, independent of its content."""
    sink = e["attention/sink"]
    if len(sink) < 2 or not min(sink.values[-2:]) > MAX_SINK:
        return None
    return Finding(
        f"{sink.last:.0%} of the attention goes to the first token",
        "softmax must attend somewhere, so idle heads attend to the first token; a gate lets them output nothing "
        "(README, my_attention.py)",
        "--model.gpt.attention my_attention.Gated",
    )


def repetition(e: MetricHistory) -> Finding | None:
    """Generated samples repeat themselves."""
    share = e["samples/repetition"]
    if len(share) < 2 or not min(share.values[-2:]) > MAX_REPETITION:
        return None
    return Finding(
        f"{share.last:.0%} of the phrases of a sample are repeated",
        "not trained enough yet, text that repeats itself, or too low a temperature",
        "generate --repetition_penalty 1.2",
    )
