"""The rules, on synthetic curves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard.writer import SummaryWriter

from lit_gpt_scratch.cli.doctor import main
from lit_gpt_scratch.diagnostics.loss_rules import UPDATE_RATIO_TAGS
from lit_gpt_scratch.diagnostics.metric_history import MAX_POINTS, MetricCurve, MetricHistory
from lit_gpt_scratch.diagnostics.repetition import PASSAGE_LENGTH, repeated_passage_share, repeated_phrase_share
from lit_gpt_scratch.diagnostics.rule_engine import Finding, Rule, RuleEngine
from lit_gpt_scratch.diagnostics.rules import RULES
from lit_gpt_scratch.diagnostics.spike_detector import MIN_STEPS, SpikeDetector
from lit_gpt_scratch.diagnostics.tensorboard_reader import replay_events
from lit_gpt_scratch.errors import UserError

CHANCE = math.log(300)
FACTS = {"run/chance_loss": CHANCE, "run/begins_trained": 0.0, "run/warmup_steps": 20.0, "run/guard": 0.0}
Curves = dict[str, list[tuple[int, float]]]


def falling(last: float, steps: int = 300) -> list[tuple[int, float]]:
    return [(step, CHANCE + (last - CHANCE) * min(1.0, step / 200)) for step in range(4, steps, 5)]


RATE = [(step, 0.02) for step in range(4, 300, 5)]


def phases(*values: float) -> list[tuple[int, float]]:
    return [(10 * place + 9, value) for place, value in enumerate(values)]


KL = phases(0.1, 0.7, 1.5, 3, 4, 6, 7, 7.5)
CASES: dict[str, Curves] = {
    "loss not falling": {"train/loss": falling(0.99 * CHANCE)},
    "divergence": {"train/loss": [*falling(3.0, 250), *((step, 4.5) for step in range(254, 300, 5))]},
    "exploding gradients": {
        "train/loss": falling(3.0),
        "train/gradient_norm": [(step, 1.0 if step < 200 else 99.0) for step in range(4, 300, 5)],
    },
    "loss spike": {"train/loss": [(s, (3.0 if s > 20 else CHANCE) + 5 * (s == 249)) for s, _ in falling(3.0)]},
    "not finite": {"train/loss": [(s, math.nan if s > 200 else v) for s, v in falling(3.0)]},
    "overfitting": {
        "train/loss": falling(1.0),
        "val/loss": [(99, 3.5), (149, 3.0), (199, 3.2), (249, 3.3), (299, 3.4)],
    },
    "suspiciously low loss": {"val/bits_per_byte": [(99, 0.1)], "baselines/xz": [(99, 1.9)]},
    "below the word baseline": {"val/accuracy": [(99, 0.6), (199, 0.7)], "baselines/tf-idf": [(99, 0.8)]},
    "slow loader": {"throughput/data": [(9, 0.5), (19, 0.6), (29, 0.5)]},
    "rewound": {"guard/rewound_to": [(300, 250.0)]},
    "dead units": {"dynamics/dead_units": [(0, 0.8), (99, 0.8)]},
    "expert collapse": {"experts/load_entropy": [(9, 0.4), (19, 0.3), (29, 0.1)], "experts/unused": [(29, 0.5)]},
    "attention sink": {"attention/sink": [(0, 0.8), (99, 0.8)]},
    "repetition": {"samples/repetition": [(99, 0.8), (199, 0.9)]},
    "labels out of place": {"run/labels_next": [(0, 0.1)], "run/labels_own": [(0, 1.0)]},
    "duplicated text": {"run/repeated_passages": [(0, 0.9)]},
    "small validation": {"run/validation_tokens": [(0, 1000.0)]},
    "far from compute-optimal": {
        "run/steps": [(0, 100.0)], "run/tokens_per_step": [(0, 100.0)], "run/parameters": [(0, 1e6)],
    },
    "steps too large": {"dynamics/stream_norm/layer_1": [(0, 1.0), (99, 1e6)]},
    "steps too small": {
        "train/learning_rate": RATE, "dynamics/update_ratio/attention": [(0, 0.0), (299, 1e-5)],
    },
    "KL blow-up": {"train/kl": phases(6, 13, 19, 62, 75, 60, 50, 40)},
    "reward hacking": {
        "train/kl": KL, "train/reward": phases(0.3, 0.4, 0.5, 1, 2, 3, 3.5, 4),
        "train/true_reward": phases(0.3, 0.4, 0.5, 0.4, 0.2, 0.1, 0.05, 0),
    },
    "length collapse": {"train/kl": KL, "train/reply_tokens": phases(7, 7, 6, 5, 3, 2, 2, 1)},
    "entropy collapse": {"train/kl": KL, "train/entropy": phases(0.6, 0.6, 0.5, 0.4, 0.06, 0.05, 0.01, 0.01)},
}  # fmt: skip


def examined(curves: Curves) -> RuleEngine:
    engine = RuleEngine(RULES)
    engine.add_metrics(0, FACTS)
    for step in sorted({step for curve in curves.values() for step, _ in curve}):
        engine.add_metrics(step, {name: value for name, curve in curves.items() for at, value in curve if at == step})
    engine.finish()
    return engine


@pytest.mark.parametrize("symptom", [row.name for row in RULES])
def test_each_rule_finds_only_its_own_symptom(symptom: str) -> None:
    found = examined(CASES[symptom]).diagnoses
    assert {diagnosis.name for diagnosis in found} == {symptom}
    assert all(diagnosis.cause and diagnosis.flag for diagnosis in found)


def test_an_empty_history_has_no_symptoms() -> None:
    engine = RuleEngine(RULES)
    engine.finish()
    assert engine.diagnoses == []
    assert all(row.find(MetricHistory()) is None for row in RULES)


def test_a_falling_loss_is_healthy() -> None:
    norms = [(step, 1.0) for step, _ in falling(2.0)]
    assert examined({"train/loss": falling(2.0), "train/gradient_norm": norms}).diagnoses == []


def at_unigrams(loss: float, slope: float, steps: int = 400) -> Curves:
    """A run no better than a unigram model, from the middle on."""
    level = [(s, max(loss, CHANCE - s / 50) - slope * max(0, s - 150)) for s in range(4, steps, 5)]
    facts = {"baselines/unigram": [(0, 3.26)], "run/warmup_steps": [(0, 0.0)], "run/post_norm": [(0, 1.0)]}
    return {"train/loss": level, "train/learning_rate": [(s, 0.006) for s, _ in level], **facts}


def test_a_loss_that_stays_at_the_unigram_level_is_distinguished_from_one_that_passes_it() -> None:
    bits = {"val/bits_per_byte": [(s, 3.28) for s in (99, 199, 299, 399)]}
    [found] = examined(at_unigrams(4.5, 0.0) | bits).diagnoses
    assert found.name == "loss not falling"
    assert "too high for the first steps: post-norm requires a warm-up" in found.cause
    assert examined(at_unigrams(4.5, 0.003) | bits).diagnoses == []
    # An old validation does not describe the current state.
    assert examined(at_unigrams(4.5, 0.0) | {"val/bits_per_byte": [(99, 3.28)]}).diagnoses == []


@pytest.mark.parametrize("back_at", [0.97, 1.02])
def test_a_loss_that_fell_and_jumped_back_is_not_blamed_on_a_low_learning_rate(back_at: float) -> None:
    fell = [(s, v if s < 250 else back_at * CHANCE) for s, v in falling(3.0, 500)]
    found = examined({"train/loss": fell, "train/learning_rate": [(s, 0.02) for s, _ in fell]}).diagnoses
    assert [diagnosis.name for diagnosis in found] == ["divergence"]
    assert "too high" in found[0].cause


@pytest.mark.parametrize(("guard", "expected"), [(2.0, {"not finite", "divergence"}), (1.0, {"not finite"})])
def test_a_skipped_batch_explains_no_later_symptom(guard: float, expected: set[str]) -> None:
    curves = CASES["divergence"] | {"guard/non_finite": [(104, math.nan)], "run/guard": [(0, guard)]}
    curves["train/loss"] = [(s, math.nan if s == 104 else v) for s, v in curves["train/loss"]]
    assert {diagnosis.name for diagnosis in examined(curves).diagnoses} == expected


@pytest.mark.parametrize(("risen", "expected"), [(1.05, False), (1.2, True)])
def test_a_small_validation_set_needs_more_evidence_of_overfitting(risen: float, expected: bool) -> None:
    few = {"run/validation_tokens": [(0, 1000.0)], "train/loss": falling(1.0)}
    curves = few | {"val/loss": [(99, 3.5), (149, 3.0), (199, 3.0 * risen), (249, 3.0 * risen), (299, 3.0 * risen)]}
    assert ("overfitting" in {diagnosis.name for diagnosis in examined(curves).diagnoses}) == expected


BUDGET = CASES["far from compute-optimal"]
ZERO_NORMS = {"train/gradient_norm": [(step, 0.0 if step < 200 else 99.0) for step in range(4, 300, 5)]}


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"train/loss": [(s, math.nan) for s, _ in falling(3.0)], "run/guard": [(0, 2.0)]}, set()),
        (BUDGET | {"run/tokens_per_step": [(0, 0.0)]}, set()),
        (BUDGET | {"run/parameters": [(0, math.inf)]}, set()),
        (CASES["overfitting"] | {"run/train_tokens": [(0, 0.0)]}, {"overfitting"}),
        (CASES["exploding gradients"] | ZERO_NORMS, {"exploding gradients"}),
        ({"train/kl": KL, "train/ended": phases(*[0.1] * 8)}, {"length collapse"}),
    ],
)
def test_extreme_values_are_no_error(curves: Curves, expected: set[str]) -> None:
    """A guarded run may have only losses that are NaN, and event files may contain any number."""
    assert {diagnosis.name for diagnosis in examined(curves).diagnoses} == expected


def test_a_skipped_step_is_not_too_small() -> None:
    ratios = {name: [(99, 0.003), (199, 0.0), (299, 0.003)] for name in UPDATE_RATIO_TAGS}
    assert examined({"train/learning_rate": RATE, **ratios}).diagnoses == []


def test_events_give_the_same_diagnoses_as_the_live_run(tmp_path: Path) -> None:
    live = examined(CASES["divergence"])
    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in FACTS.items():
            writer.add_scalar(name, value, 0)
        for step, value in CASES["divergence"]["train/loss"]:
            writer.add_scalar("train/loss", value, step)
        writer.add_scalar("test/loss", 4.5, 300)
    from_events = RuleEngine(RULES)
    replay_events(tmp_path, from_events)
    assert from_events.history.step == live.history.step
    from_events.finish()
    assert [(d.name, d.step) for d in from_events.diagnoses] == [(d.name, d.step) for d in live.diagnoses]


def test_unknown_curves_are_rejected(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("theirs/loss", 1.0, 0)
    with pytest.raises(UserError, match="none of the curves that doctor reads"):
        main([str(tmp_path)])


def test_points_repeated_by_a_resumed_session_replace_the_earlier_ones(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path), filename_suffix=".0") as writer:
        for step in range(10):
            writer.add_scalar("train/loss", float(step), step)
    with SummaryWriter(str(tmp_path), purge_step=6, filename_suffix=".1") as writer:
        writer.add_scalar("train/loss", 60.0, 6)
    engine = RuleEngine(())
    replay_events(tmp_path, engine)
    assert engine.history["train/loss"].steps == list(range(7))
    assert engine.history["train/loss"].last == 60.0


def test_a_rule_is_evaluated_when_its_curve_has_a_new_point() -> None:
    asked = []
    row = Rule("odd", ("a",), lambda e: asked.append(e.step) or (Finding("x", "y", "z") if e.step == 3 else None))
    engine = RuleEngine([row])
    for step, name in enumerate("ababaa"):
        engine.add_metrics(step, {name: 1.0})
    engine.evaluate()
    assert asked == [0, 2, 4, 5]
    assert json.dumps([diagnosis.to_dict() for diagnosis in engine.diagnoses]) == "[]"


def test_a_thinned_curve_keeps_its_ends() -> None:
    curve = MetricCurve()
    for step in range(10 * MAX_POINTS):
        curve.add(step, float(step))
    assert len(curve) <= MAX_POINTS
    assert (curve.steps[0], curve.steps[-1]) == (0, 10 * MAX_POINTS - 1)
    assert curve.steps == sorted(set(curve.steps))
    assert curve.median(100) == 10 * MAX_POINTS - 50.5


@given(st.lists(st.integers(0, 3), min_size=0, max_size=200))
def test_repeated_passages_match_a_set(ids: list[int]) -> None:
    passages = [tuple(ids[start : start + PASSAGE_LENGTH]) for start in range(len(ids) - PASSAGE_LENGTH + 1)]
    expected = 1 - len(set(passages)) / len(passages) if len(passages) > 1 else 0.0
    assert repeated_passage_share(np.array(ids, np.uint16)) == pytest.approx(expected)


def test_repeated_phrases() -> None:
    assert repeated_phrase_share("a b c d e f g h i j k l") == 0.0
    assert repeated_phrase_share("one two three four " * 20) > 0.9


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [(4.0, 1.0, None), (9.0, 1.0, "spike"), (4.0, 100.0, "spike"), (math.nan, 1.0, "non_finite"),
     (4.0, math.inf, "non_finite"), (1.0, 1.0, None)],
)  # fmt: skip
def test_kinds_of_outliers(loss: float, norm: float, kind: str | None) -> None:
    detector = SpikeDetector()
    rng = np.random.default_rng(0)
    for value in rng.normal(4.0, 0.1, MIN_STEPS):
        assert detector.classify_step(float(value), 1.0) is None
    before = detector.state_dict()
    other = SpikeDetector()
    other.load_state_dict(before)
    assert detector.classify_step(loss, norm) == kind == other.classify_step(loss, norm)
    assert detector.state_dict() == other.state_dict()
    assert (detector.state_dict()["losses"] == before["losses"]) == (kind is not None)
