"""Evaluates the diagnostic rules whenever their metrics have new points."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory

MAX_REPEATED_DIAGNOSES: Final = 100
"""Diagnoses kept per repeatable symptom."""


class Finding(NamedTuple):
    """The result of a rule that found a problem.

    Attributes:
        evidence: The measurement, with its numbers.
        cause: The likely cause.
        flag: What to try, as typed on the command line.
    """

    evidence: str
    cause: str
    flag: str


@dataclass(frozen=True)
class Rule:
    """A rule that recognises one symptom.

    Args:
        name: Name of the symptom; a diagnosis begins with it.
        reads: Names of metrics; the rule is evaluated when one of them has a new point, and when the run is over.
        find: Returns a finding for a metric history, or None.
        unless: Symptoms that explain this one: the rule is skipped once one of them was found.
        repeatable: Whether each point of its metrics may be a separate case; other symptoms are reported once.
        harmless: Whether the symptom explains no other, given the history, because it left no trace in the weights.
    """

    name: str
    reads: tuple[str, ...]
    find: Callable[[MetricHistory], Finding | None]
    unless: tuple[str, ...] = ()
    repeatable: bool = False
    harmless: Callable[[MetricHistory], bool] = lambda _: False


@dataclass(frozen=True)
class Diagnosis:
    """An entry of ``doctor.json``."""

    symptom: str
    cause: str
    flag: str
    step: int

    @property
    def name(self) -> str:
        """Name of the symptom, without its numbers."""
        return self.symptom.partition(":")[0]

    def to_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.symptom}. Likely cause: {self.cause}. Try: {self.flag}"


class RuleEngine:
    """Evaluates rules on a run's metrics: while it trains, or from its events, with the same result.

    Args:
        rules: In the order in which they are evaluated.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.history = MetricHistory()
        self.diagnoses: list[Diagnosis] = []
        self.pending: set[str] = set()
        """Names of metrics with points that no rule has read yet."""

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add metrics of a step; those of an earlier step are complete then, and evaluated first."""
        if step != self.history.step:
            self.evaluate()
        self.history.add(step, values)
        self.pending.update(values)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add a text under a name."""
        self.history.add_text(step, name, text)

    def evaluate(self) -> None:
        """Evaluate the rules that read pending metrics."""
        if self.pending:
            pending, self.pending = self.pending, set()
            self._evaluate(rule for rule in self.rules if not pending.isdisjoint(rule.reads))

    def finish(self) -> None:
        """Evaluate the run as one that is over."""
        self.evaluate()
        self.history.is_over = True
        self._evaluate(rule for rule in self.rules if not rule.repeatable)
        self.history.is_over = False

    def drop_from(self, step: int) -> None:
        """Drop points and diagnoses from a step on: a run resumed from a checkpoint repeats them."""
        self.evaluate()
        self.history.drop_from(step)
        self.diagnoses = [diagnosis for diagnosis in self.diagnoses if diagnosis.step < step]

    def _evaluate(self, rules: Iterable[Rule]) -> None:
        step = self.history.step
        harmless = {rule.name for rule in self.rules if rule.harmless(self.history)}
        for rule in rules:
            steps = [diagnosis.step for diagnosis in self.diagnoses if diagnosis.name == rule.name]
            explanations = {diagnosis.name for diagnosis in self.diagnoses} - harmless
            is_done = len(steps) >= MAX_REPEATED_DIAGNOSES or step in steps if rule.repeatable else bool(steps)
            if (
                not is_done
                and explanations.isdisjoint(rule.unless)
                and (finding := rule.find(self.history)) is not None
            ):
                diagnosis = Diagnosis(f"{rule.name}: {finding.evidence}", finding.cause, finding.flag, step)
                self.diagnoses.append(diagnosis)
