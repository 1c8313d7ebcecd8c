"""A trial as the report sees it: settings, and what became of their runs."""

from dataclasses import dataclass, field

from lit_gpt_scratch.sweeps.run_results import RunResult
from lit_gpt_scratch.sweeps.statistics import Estimate, estimate
from lit_gpt_scratch.sweeps.sweep_config import Assignment


@dataclass(frozen=True)
class TrialResult:
    """One assignment and its runs.

    Args:
        number: Of the trial.
        assignment: Settings by dimension.
        runs: By seed.
        flags: The arguments of ``fit``, without seed and folder.
        wanted: How many runs it is to have.
    """

    number: int
    assignment: Assignment
    runs: list[RunResult] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    wanted: int = 1

    @property
    def label(self) -> str:
        """The settings in few words."""
        return ", ".join(format_setting(setting) for setting in self.assignment.values()) or "the runs"

    @property
    def state(self) -> str:
        """``finished`` if all runs did, else what kept one from it; ``unfinished`` where some are still to come."""
        ended = [run.state for run in self.runs if run.state != "finished"]
        if ended:
            return "failed" if "failed" in ended else "pruned"
        return "finished" if len(self.runs) >= self.wanted else "unfinished"

    def values(self, metric: str) -> dict[int, float]:
        """The metric of the runs that finished, by seed."""
        return {run.seed: run.metrics[metric] for run in self.runs if run.state == "finished" and metric in run.metrics}

    def estimate(self, metric: str) -> Estimate:
        """Its mean over the seeds; of an arm that has a value."""
        return estimate(list(self.values(metric).values()))


def format_setting(setting: str | float) -> str:
    """A setting as a table has it."""
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def finished(arms: list[TrialResult], metric: str) -> list[TrialResult]:
    """Those whose runs all came to their end with a value."""
    return [arm for arm in arms if arm.state == "finished" and arm.values(metric)]


def best(arms: list[TrialResult], metric: str, direction: str) -> TrialResult | None:
    """The arm with the best mean."""
    sign = 1 if direction == "minimize" else -1
    return min(finished(arms, metric), key=lambda arm: sign * arm.estimate(metric).mean, default=None)
