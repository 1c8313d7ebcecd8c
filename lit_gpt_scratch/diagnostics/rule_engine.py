"""Asking every row of the table what it makes of the evidence, whenever there is news for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple

from lit_gpt_scratch.diagnostics.metric_history import MetricHistory

MAX_REPEATED_DIAGNOSES: Final = 100
"""Diagnoses of one symptom that are kept, of those that come again."""


class Finding(NamedTuple):
    """What a row says of the evidence.

    Attributes:
        evidence: What was measured, with its numbers.
        cause: The likely one.
        flag: What to try, as one would type it.
    """

    evidence: str
    cause: str
    flag: str


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Args:
        name: Of the symptom; a diagnosis begins with it.
        reads: Names of curves; the row is asked when one of them has a new point, and all are asked when a run is over.
        find: What it says of the evidence, or None.
        unless: Symptoms that explain this one: when one of them is known, it is not looked for.
        harmless: Whether it explains nothing else, by the same evidence, because it left no trace in the run.
        again: Whether each point of its curves may be a case of its own; the others are said once.
    """

    name: str
    reads: tuple[str, ...]
    find: Callable[[MetricHistory], Finding | None]
    unless: tuple[str, ...] = ()
    again: bool = False
    harmless: Callable[[MetricHistory], bool] = lambda _: False


@dataclass(frozen=True)
class Diagnosis:
    """A line of ``doctor.json``."""

    symptom: str
    cause: str
    flag: str
    step: int

    @property
    def name(self) -> str:
        """Of the symptom, without its numbers."""
        return self.symptom.partition(":")[0]

    def plain(self) -> dict[str, str | int]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.symptom}. Likely: {self.cause}. Try: {self.flag}"


class RuleEngine:
    """A run, examined step by step: while it trains, or from its events, which comes to the same.

    Args:
        table: The rows, in the order in which they are asked.
    """

    def __init__(self, table: Sequence[Rule]) -> None:
        self.table = table
        self.evidence = MetricHistory()
        self.found: list[Diagnosis] = []
        self._news: set[str] = set()

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Measurements of a step; what was seen of the one before is judged first, when it is whole."""
        if step != self.evidence.step:
            self.examine()
        self.evidence.see(step, values)
        self._news.update(values)

    def note(self, step: int, name: str, text: str) -> None:
        """A text under a name."""
        self.evidence.note(step, name, text)

    def examine(self) -> None:
        """Judge what has been seen."""
        if self._news:
            news, self._news = self._news, set()
            self._ask(row for row in self.table if not news.isdisjoint(row.reads))

    def end(self) -> None:
        """Judge the run as one that is over."""
        self.examine()
        self.evidence.over = True
        self._ask(row for row in self.table if not row.again)
        self.evidence.over = False

    def forget(self, step: int) -> None:
        """Go back to before a step."""
        self.examine()
        self.evidence.forget(step)
        self.found = [diagnosis for diagnosis in self.found if diagnosis.step < step]

    def _ask(self, rows: Iterable[Rule]) -> None:
        step = self.evidence.step
        harmless = {row.name for row in self.table if row.harmless(self.evidence)}
        for row in rows:
            steps = [diagnosis.step for diagnosis in self.found if diagnosis.name == row.name]
            known = {diagnosis.name for diagnosis in self.found} - harmless
            done = len(steps) >= MAX_REPEATED_DIAGNOSES or step in steps if row.again else bool(steps)
            if not done and known.isdisjoint(row.unless) and (finding := row.find(self.evidence)) is not None:
                self.found.append(Diagnosis(f"{row.name}: {finding.evidence}", finding.cause, finding.flag, step))
