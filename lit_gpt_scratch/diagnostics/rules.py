"""The table: which curves speak for what. A new symptom is a row.

A row reads names of curves alone (``callbacks/measured.py`` lists them; facts of a run are curves of one point,
``run/...``), and says what it finds with its numbers, the likely cause, and the flag to try. What explains another
symptom stands above it, and that one names it in ``unless``.
"""

from typing import Final

from lit_gpt_scratch.diagnostics import activation_rules, config_rules, loss_rules, rl_rules, step_rules
from lit_gpt_scratch.diagnostics.rule_engine import Symptom

RATE: Final = ("steps too large", "steps too small", "loss not falling")
"""All three are of the learning rate: the first that is seen explains the others."""
LABELS: Final = "labels out of place"
SYMPTOMS: Final = (
    Symptom(LABELS, ("run/labels_next",), config_rules.labels),
    Symptom("duplicated text", ("run/repeated_passages",), config_rules.duplicates),
    Symptom("small validation", ("run/validation_tokens",), config_rules.validation),
    Symptom("far from compute-optimal", ("run/steps",), config_rules.budget),
    Symptom(
        "not finite",
        ("guard/non_finite", *step_rules.LOOKED_AT),
        step_rules.not_finite,
        again=True,
        harmless=step_rules.left_out,
    ),
    Symptom("loss spike", ("guard/spike", "train/loss"), step_rules.spike, (LABELS, *RATE), again=True),
    Symptom("rewound", ("guard/rewound_to",), step_rules.rewound, again=True),
    Symptom("dead units", ("dynamics/dead_units",), activation_rules.dead_units, RATE),
    Symptom("steps too large", (loss_rules.STREAM,), loss_rules.too_large, (*RATE, "not finite")),
    Symptom("steps too small", loss_rules.UPDATES, loss_rules.too_small, (*RATE, "dead units")),
    Symptom("divergence", ("train/loss",), loss_rules.divergence, (LABELS, *RATE, "not finite")),
    Symptom(
        "loss not falling", ("train/loss", "val/bits_per_byte"), loss_rules.not_falling,
        (LABELS, *RATE, "dead units", "not finite", "divergence"),
    ),
    Symptom(
        "exploding gradients", ("train/gradient_norm",), step_rules.exploding,
        (LABELS, *RATE, "not finite", "divergence"),
    ),
    Symptom(
        "overfitting", ("val/loss",), loss_rules.overfitting,
        (LABELS, "duplicated text", "divergence"),
    ),
    Symptom("suspiciously low loss", ("val/bits_per_byte",), loss_rules.too_good, (LABELS,)),
    Symptom("slow loader", ("throughput/data",), step_rules.loader),
    Symptom("attention sink", ("attention/sink",), activation_rules.sinks),
    Symptom("repetition", ("samples/repetition",), activation_rules.repetition, (LABELS, *RATE, "divergence")),
    Symptom("KL blow-up", ("train/kl",), rl_rules.far),
    Symptom("reward hacking", ("train/true_reward", "val/true_reward"), rl_rules.hacking),
    Symptom("length collapse", ("train/reply_tokens",), rl_rules.length),
    Symptom("entropy collapse", ("train/entropy",), rl_rules.same_replies, ("KL blow-up", "length collapse")),
)  # fmt: skip
PLANNED: Final = frozenset({"small validation", "far from compute-optimal"})
"""What the plan says before the run begins (``callbacks/plan_of_data.py``), and need not be said twice."""
