"""The table: which curves speak for what. A new symptom is a row.

A row reads names of curves alone (``callbacks/measured.py`` lists them; facts of a run are curves of one point,
``run/...``), and says what it finds with its numbers, the likely cause, and the flag to try. What explains another
symptom stands above it, and that one names it in ``unless``.
"""

from typing import Final

from lit_gpt_scratch.diagnosis import insides, losses, settings, steps
from lit_gpt_scratch.diagnosis.examination import Symptom

RATE: Final = ("steps too large", "steps too small")
SYMPTOMS: Final = (
    Symptom("labels out of place", ("run/labels_next",), settings.labels),
    Symptom("duplicated text", ("run/repeated_passages",), settings.duplicates),
    Symptom("small validation", ("run/validation_tokens",), settings.validation),
    Symptom("far from compute-optimal", ("run/steps",), settings.budget),
    Symptom("not finite", ("guard/non_finite", *steps.LOOKED_AT), steps.not_finite, again=True),
    Symptom("loss spike", ("guard/spike", "train/loss"), steps.spike, (*RATE, "loss not falling"), again=True),
    Symptom("steps too large", (losses.STREAM,), losses.too_large, ("loss not falling", "not finite")),
    Symptom("steps too small", losses.UPDATES, losses.too_small, ("loss not falling",)),
    Symptom(
        "loss not falling", ("train/loss", "val/bits_per_byte"), losses.not_falling,
        ("labels out of place", *RATE, "not finite"),
    ),
    Symptom("divergence", ("train/loss",), losses.divergence, ("loss not falling", *RATE, "not finite")),
    Symptom(
        "exploding gradients", ("train/gradient_norm",), steps.exploding,
        ("not finite", "loss not falling", *RATE, "divergence"),
    ),
    Symptom("overfitting", ("val/loss",), losses.overfitting, ("duplicated text", "divergence", "small validation")),
    Symptom("suspiciously low loss", ("val/bits_per_byte",), losses.too_good, ("labels out of place",)),
    Symptom("slow loader", ("throughput/data",), steps.loader),
    Symptom("dead units", ("dynamics/dead_units",), insides.dead_units, (*RATE, "loss not falling")),
    Symptom("attention sink", ("attention/sink",), insides.sinks),
    Symptom("repetition", ("samples/repetition",), insides.repetition, ("loss not falling", "divergence")),
)  # fmt: skip
PLANNED: Final = frozenset({"small validation", "far from compute-optimal"})
"""What the plan says before the run begins (``callbacks/plan_of_data.py``), and need not be said twice."""
