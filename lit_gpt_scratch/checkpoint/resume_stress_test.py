"""Pull the plug on a run, over and over, and see whether it ends where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.checkpoint_io import PARTIAL_SUFFIX
from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_checkpoints, compare_curves, iterate_leaves
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.errors import UserError

STARTUP_KILL_SHARE: Final = 0.2
"""Share of the kills that may hit before the first step."""
EXIT_GRACE_SECONDS: Final = 8.0
"""Seconds that the other processes of a run have to notice that one is gone."""
POLL_SECONDS: Final = 0.002
KILL_SIGNAL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)
FINISHED_MESSAGE: Final = "to go on, ask for more"
"""What ``fit`` says of a run that has nothing left to do."""


@dataclass
class StressTestReport:
    """What the kills did.

    Attributes:
        kills: How many hit in which phase.
        runs: Runs that were killed and resumed until they ended.
        bits: Bits that were compared in each.
        differences: By what differs, how many bits or points.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    bits: int = 0
    differences: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        phases = ", ".join(f"{n} {phase}" for phase, n in sorted(self.kills.items()))
        head = f"{self.kills.total()} kills ({phases}), {self.runs} runs resumed to their end"
        if not self.differences:
            return f"exact: {head}; 0 of {self.bits:,} bits differ in each, and no point of a curve"
        worst = ", ".join(f"{name} ({n})" for name, n in self.differences.most_common(5))
        return f"not exact: {head}; {len(self.differences)} parts differ: {worst}"


class ResumeStressTest:
    """Runs of ``fit`` with the same flags, one undisturbed, the others killed and resumed.

    Args:
        flags: Flags of ``fit``.
        folder: Where the runs go.
        seed: Of the moments.
    """

    def __init__(self, flags: Sequence[str], folder: Path, seed: int = 0) -> None:
        self.flags = list(flags)
        self.folder = folder
        self.random = random.Random(seed)
        self.report = StressTestReport()
        self.started: list[subprocess.Popen[str]] = []

    def run(self, kills: int, tell: Callable[[], object] = lambda: None) -> StressTestReport:
        """Kill so many times, and compare every run that comes to its end.

        Args:
            kills: How many.
            tell: Called after each.

        Raises:
            UserError: The run fails without being killed.
        """
        try:
            return self._run(kills, tell)
        finally:
            for process in self.started:
                _kill_group(process)

    def _run(self, kills: int, tell: Callable[[], object]) -> StressTestReport:
        whole = RunFolder(self.folder / "whole" / "pretrain" / "version_0")
        began = time.monotonic()
        self._to_the_end(self._start(whole))
        if not (whole.last.exists() and whole.config.exists()):
            raise UserError("with these flags fit leaves no run to go on with")
        self.training = time.time() - whole.config.stat().st_mtime  # written when the training begins
        self.starting = max(time.monotonic() - began - self.training, 0.1)
        self.expected = load_checkpoint(whole.last)
        self.report.bits = sum(8 * v.nbytes if hasattr(v, "nbytes") else 64 for _, v in iterate_leaves(self.expected))
        trial = 0
        while self.report.kills.total() < kills:
            run = RunFolder(self.folder / f"trial_{trial}" / "pretrain" / "version_0")
            trial += 1
            while self.report.kills.total() < kills:
                phase = self._kill(self._start(run), run)
                if phase is None:
                    break  # it was quicker than the kill
                self.report.kills[phase] += 1
                tell()
            else:
                self._to_the_end(self._start(run))
            self.report.runs += 1
            self.report.differences.update(compare_checkpoints(self.expected, load_checkpoint(run.last)))
            self.report.differences.update(_compare_checkpoint_files(whole, run))
            self.report.differences.update(compare_curves(whole.path, run.path))
        return self.report

    def _start(self, run: RunFolder) -> "subprocess.Popen[str]":
        """The run, from its checkpoint if it has one; in a session of its own, so that all of it can be killed."""
        go_on = []
        if run.last.exists():
            go_on = [f"--ckpt_path={run.path}"]
        elif run.path.exists():
            run.delete()
        command = [sys.executable, "-m", "lit_gpt_scratch.fit", *self.flags, f"--runs={run.path.parent.parent}"]
        process = subprocess.Popen(
            [*command, "--experiment=pretrain", *go_on],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started = [process]
        return process

    def _to_the_end(self, process: "subprocess.Popen[str]") -> None:
        _, said = process.communicate()
        if process.returncode and FINISHED_MESSAGE not in said:  # a kill can hit a run that has saved its last step
            lines = said.strip().splitlines() or ["nothing"]
            raise UserError(f"the run ended with exit code {process.returncode}, unkilled; it said: {lines[-1]}")

    def _kill(self, process: "subprocess.Popen[str]", run: RunFolder) -> str | None:
        """Kill a process of the run at a random moment; the phase that it was in, or None if it had ended."""
        before = _modified_at(run.config)
        if self.random.random() < STARTUP_KILL_SHARE:
            begun, wait = False, self.random.uniform(0.0, self.starting)
        else:
            while _modified_at(run.config) == before and process.poll() is None:
                time.sleep(POLL_SECONDS)
            begun, wait = True, self.random.uniform(0.0, self.training)
        until = time.monotonic() + wait
        while time.monotonic() < until and process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            self._to_the_end(process)
            return None
        begun = begun or _modified_at(run.config) != before
        os.kill(self.random.choice(list_group_processes(process.pid)), KILL_SIGNAL)  # any rank, or a loader's process
        phase = _describe_phase(run) if begun else "at the start"
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=EXIT_GRACE_SECONDS)
        _kill_group(process)
        process.communicate()
        return phase


def _compare_checkpoint_files(whole: RunFolder, run: RunFolder) -> dict[str, int]:
    """The best models, beside the last: bits that differ, by file and part; 1 for a file that one run lacks."""
    names = [{path.name for path in each.checkpoints.glob("*.ckpt")} for each in (whole, run)]
    found = {f"{name} in one run": 1 for name in names[0] ^ names[1]}
    for name in (names[0] & names[1]) - {whole.last.name}:
        one, other = (load_checkpoint(each.checkpoints / name) for each in (whole, run))
        found |= {f"{name} {part}": bits for part, bits in compare_checkpoints(one, other).items()}
    return found


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill all that is left of a run."""
    for pid in list_group_processes(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, KILL_SIGNAL)


def _describe_phase(run: RunFolder) -> str:
    if any(run.checkpoints.glob(f".*{PARTIAL_SUFFIX}")):
        return "while saving"
    last: dict[str, Any] = load_checkpoint(run.last) if run.last.exists() else {"callbacks": {}}
    due = any(isinstance(s, dict) and s.get("validation_due") for s in last["callbacks"].values())
    return "in a validation" if due else "between saves"


def _modified_at(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0


def list_group_processes(leader: int) -> list[int]:
    """Processes of the leader's group that are alive; the leader alone where the system does not list them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found or [leader]
