"""Rule engine that evaluates diagnostic rules whenever their metrics have new points."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory

MAX_REPEATED_DIAGNOSES: Final = 100
"""Maximum number of diagnoses per repeatable symptom; further occurrences are not reported."""


class Finding(NamedTuple):
    """Problem found by a rule.

    Attributes:
        evidence: Description of the evidence, including the measured numbers.
        cause: Likely cause of the problem.
        flag: Flag to try, as typed on the command line.
    """

    evidence: str
    cause: str
    flag: str


@dataclass(frozen=True)
class Rule:
    """Rule that detects one symptom.

    Args:
        name: Name of the symptom, with which the text of its diagnoses starts.
        reads: Names of the metrics that trigger the rule. It is evaluated when one of them has a new point and, unless
            it is ``repeatable``, at the end of the run.
        find: Function that maps a metric history to a finding, or to None if there is no problem.
        unless: Names of symptoms that explain this symptom; the rule is skipped if one of them has been found.
        repeatable: Whether the symptom can be diagnosed at several steps; other symptoms are reported only once.
        harmless: Function that returns True for a metric history in which the symptom did not affect the weights and
            therefore does not explain other symptoms.
    """

    name: str
    reads: tuple[str, ...]
    find: Callable[[MetricHistory], Finding | None]
    unless: tuple[str, ...] = ()
    repeatable: bool = False
    harmless: Callable[[MetricHistory], bool] = lambda _: False


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of a symptom, stored as an entry of ``doctor.json``."""

    symptom: str
    cause: str
    flag: str
    step: int

    @property
    def name(self) -> str:
        """Name of the symptom, without the evidence."""
        return self.symptom.partition(":")[0]

    def to_dict(self) -> dict[str, str | int]:
        """Return the diagnosis as a JSON-serializable dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.symptom}. Likely cause: {self.cause}. Try: {self.flag}"


class RuleEngine:
    """Engine that evaluates rules on the metrics of a run.

    The diagnoses are the same during training and when the logged events are replayed after training.

    Args:
        rules: Rules in the order of evaluation.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.history = MetricHistory()
        self.diagnoses: list[Diagnosis] = []
        self.pending: set[str] = set()
        """Names of metrics with new points on which the rules have not been evaluated yet."""

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step; if it is a new step, first evaluate the rules on the previous step."""
        if step != self.history.step:
            self.evaluate()
        self.history.add(step, values)
        self.pending.update(values)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add the text logged as ``name`` at ``step``."""
        self.history.add_text(step, name, text)

    def evaluate(self) -> None:
        """Evaluate the rules whose metrics have new points."""
        if self.pending:
            pending, self.pending = self.pending, set()
            self._evaluate(rule for rule in self.rules if not pending.isdisjoint(rule.reads))

    def finish(self) -> None:
        """Evaluate the rules one last time, on the finished run."""
        self.evaluate()
        self.history.is_over = True
        self._evaluate(rule for rule in self.rules if not rule.repeatable)
        self.history.is_over = False

    def drop_from(self, step: int) -> None:
        """Drop all points and diagnoses at or after a step, because a resumed run repeats these steps."""
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
