"""What the doctor of each run said, choice by choice: where figures differ, often why."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from lit_gpt_scratch.sweeps.html_report import Heading, Part, Text
from lit_gpt_scratch.sweeps.trial import TrialResult


def diagnoses(arms: Sequence[TrialResult]) -> Iterator[Part]:
    """A section of the report; nothing, where no run has a diagnosis.

    What every run was told says nothing about the choices, and is one sentence. Of the rest there is one for each
    choice and symptom, with the words that the first of its runs was told: numbers differ from run to run.
    """
    told: dict[tuple[int, str], list[dict[str, str]]] = defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            for name, first in {_name(each): each for each in reversed(run.diagnoses)}.items():
                told[arm.number, name].append(first)
    if not told:
        return
    yield Heading("What the doctor said")
    names = dict.fromkeys(name for _, name in told)
    alike = [name for name in names if all(len(told.get((arm.number, name), ())) == len(arm.runs) for arm in arms)]
    if alike:
        yield Text(f"Of every run: {'; '.join(alike)}.")
    for arm in arms:
        for name in names:
            if name not in alike and (said := told.get((arm.number, name))):
                words = "{symptom}. Likely: {cause}. Try: {flag}".format(**said[0])
                yield Text(f"{arm.label}, {len(said)} of {len(arm.runs)} runs: {words}.")
    silent = [arm.label for arm in arms if not any((arm.number, name) in told for name in names if name not in alike)]
    if silent:
        yield Text(f"Nothing {'else ' if alike else ''}of {'; '.join(silent)}.")


def _name(diagnosis: dict[str, str]) -> str:
    return diagnosis["symptom"].partition(":")[0]
