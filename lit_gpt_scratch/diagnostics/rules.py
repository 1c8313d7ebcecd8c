"""Table of diagnostic rules; to detect a new symptom, add a rule.

A rule reads metrics by name and returns the evidence, the likely cause, and the flag to try. The metrics are listed in
``callbacks/metric_logging.py``; properties of a run are stored as curves ``run/...`` with a single point. If symptom A
explains symptom B, the rule for A must precede the rule for B, and the ``unless`` of the rule for B must contain A.
"""

from typing import Final

from lit_gpt_scratch.diagnostics import activation_rules, config_rules, loss_rules, rl_rules, step_rules
from lit_gpt_scratch.diagnostics.rule_engine import Rule

RATE_SYMPTOMS: Final = ("steps too large", "steps too small", "loss not falling")
"""Symptoms caused by the learning rate; only the first one found is reported."""
MISALIGNED_LABELS: Final = "labels out of place"
RULES: Final = (
    Rule(MISALIGNED_LABELS, ("run/labels_next",), config_rules.misaligned_labels),
    Rule("duplicated text", ("run/repeated_passages",), config_rules.duplicated_text),
    Rule("small validation", ("run/validation_tokens",), config_rules.small_validation),
    Rule("far from compute-optimal", ("run/steps",), config_rules.compute_budget),
    Rule(
        "not finite", ("guard/non_finite", *step_rules.CHECKED_METRICS), step_rules.not_finite,
        repeatable=True, harmless=step_rules.steps_are_skipped,
    ),
    Rule(
        "loss spike", ("guard/spike", "train/loss"), step_rules.loss_spike, (MISALIGNED_LABELS, *RATE_SYMPTOMS),
        repeatable=True,
    ),
    Rule("rewound", ("guard/rewound_to",), step_rules.rewound, repeatable=True),
    Rule("dead units", ("dynamics/dead_units",), activation_rules.dead_units, RATE_SYMPTOMS),
    Rule(
        "steps too large", (loss_rules.STREAM_NORM_TAG,), loss_rules.steps_too_large, (*RATE_SYMPTOMS, "not finite"),
    ),
    Rule(
        "steps too small", loss_rules.UPDATE_RATIO_TAGS, loss_rules.steps_too_small, (*RATE_SYMPTOMS, "dead units"),
    ),
    Rule("divergence", ("train/loss",), loss_rules.divergence, (MISALIGNED_LABELS, *RATE_SYMPTOMS, "not finite")),
    Rule(
        "loss not falling", ("train/loss", "val/bits_per_byte"), loss_rules.loss_not_falling,
        (MISALIGNED_LABELS, *RATE_SYMPTOMS, "dead units", "not finite", "divergence"),
    ),
    Rule(
        "exploding gradients", ("train/gradient_norm",), step_rules.exploding_gradients,
        (MISALIGNED_LABELS, *RATE_SYMPTOMS, "not finite", "divergence"),
    ),
    Rule(
        "overfitting", ("val/loss",), loss_rules.overfitting, (MISALIGNED_LABELS, "duplicated text", "divergence"),
    ),
    Rule("suspiciously low loss", ("val/bits_per_byte",), loss_rules.suspiciously_low_loss, (MISALIGNED_LABELS,)),
    Rule(
        "below the word baseline", ("val/accuracy",), loss_rules.below_word_baseline, (*RATE_SYMPTOMS, "divergence"),
    ),
    Rule("slow loader", ("throughput/data",), step_rules.slow_loader),
    Rule("expert collapse", ("experts/load_entropy",), activation_rules.expert_collapse),
    Rule("attention sink", ("attention/sink",), activation_rules.attention_sink),
    Rule(
        "repetition", ("samples/repetition",), activation_rules.repetition,
        (MISALIGNED_LABELS, *RATE_SYMPTOMS, "divergence"),
    ),
    Rule("KL blow-up", ("train/kl",), rl_rules.kl_blow_up),
    Rule("reward hacking", ("train/true_reward", "val/true_reward"), rl_rules.reward_hacking),
    Rule("length collapse", ("train/reply_tokens",), rl_rules.length_collapse),
    Rule("entropy collapse", ("train/entropy",), rl_rules.entropy_collapse, ("KL blow-up", "length collapse")),
)  # fmt: skip
REPORTED_BY_PLAN: Final = frozenset({"small validation", "far from compute-optimal"})
"""Symptoms about which ``RunPlan`` warns before training; ``DiagnosticsCallback`` does not print them again."""
