"""The table: which curves speak for what. A new symptom is a row.

A row reads names of curves alone (``callbacks/measured.py`` lists them; facts of a run are curves of one point,
``run/...``), and says what it finds with its numbers, the likely cause, and the flag to try. What explains another
symptom stands above it, and that one names it in ``unless``.
"""

from typing import Final

from lit_gpt_scratch.diagnosis import insides, losses, policies, settings, steps
from lit_gpt_scratch.diagnosis.examination import Symptom

RATE: Final = ("steps too large", "steps too small", "loss not falling")
"""All three are of the learning rate: the first that is seen explains the others."""
LABELS: Final = "labels out of place"
SYMPTOMS: Final = (
    Symptom(LABELS, ("run/labels_next",), settings.labels),
    Symptom("duplicated text", ("run/repeated_passages",), settings.duplicates),
    Symptom("small validation", ("run/validation_tokens",), settings.validation),
    Symptom("far from compute-optimal", ("run/steps",), settings.budget),
    Symptom(
        "not finite", ("guard/non_finite", *steps.LOOKED_AT), steps.not_finite, again=True, harmless=steps.left_out,
    ),
    Symptom("loss spike", ("guard/spike", "train/loss"), steps.spike, (LABELS, *RATE), again=True),
    Symptom("rewound", ("guard/rewound_to",), steps.rewound, again=True),
    Symptom("dead units", ("dynamics/dead_units",), insides.dead_units, RATE),
    Symptom("steps too large", (losses.STREAM,), losses.too_large, (*RATE, "not finite")),
    Symptom("steps too small", losses.UPDATES, losses.too_small, (*RATE, "dead units")),
    Symptom("divergence", ("train/loss",), losses.divergence, (LABELS, *RATE, "not finite")),
    Symptom(
        "loss not falling", ("train/loss", "val/bits_per_byte"), losses.not_falling,
        (LABELS, *RATE, "dead units", "not finite", "divergence"),
    ),
    Symptom(
        "exploding gradients", ("train/gradient_norm",), steps.exploding,
        (LABELS, *RATE, "not finite", "divergence"),
    ),
    Symptom(
        "overfitting", ("val/loss",), losses.overfitting,
        (LABELS, "duplicated text", "divergence"),
    ),
    Symptom("suspiciously low loss", ("val/bits_per_byte",), losses.too_good, (LABELS,)),
    Symptom("slow loader", ("throughput/data",), steps.loader),
    Symptom("attention sink", ("attention/sink",), insides.sinks),
    Symptom("repetition", ("samples/repetition",), insides.repetition, (LABELS, *RATE, "divergence")),
    Symptom("KL blow-up", ("train/kl",), policies.far),
    Symptom("reward hacking", ("train/true_reward", "val/true_reward"), policies.hacking),
    Symptom("length collapse", ("train/reply_tokens",), policies.length),
    Symptom("entropy collapse", ("train/entropy",), policies.same_replies, ("KL blow-up", "length collapse")),
)  # fmt: skip
PLANNED: Final = frozenset({"small validation", "far from compute-optimal"})
"""What the plan says before the run begins (``callbacks/plan_of_data.py``), and need not be said twice."""
