"""Kill runs at random times, resume them, and check that the results equal those of an uninterrupted run."""

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

from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_checkpoints, compare_curves, iterate_leaves
from lit_gpt_scratch.checkpoint.loading import load_checkpoint, load_training_state
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.checkpoint.sharded_checkpoint import has_unfinished_shards, is_checkpoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import find_unfinished

STARTUP_KILL_SHARE: Final = 0.2
"""Fraction of kills that are scheduled to happen during the startup of a run, before its first step."""
EXIT_GRACE_SECONDS: Final = 8.0
"""Number of seconds to wait for the other processes of a run to exit after one process has been killed."""
POLL_SECONDS: Final = 0.002
KILL_SIGNAL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)
FINISHED_MESSAGE: Final = "to continue, set"
"""Part of the error message that ``fit`` prints if a run that it should resume is already finished."""


@dataclass
class StressTestReport:
    """Result of a ``ResumeStressTest``.

    Attributes:
        kills: Number of kills, keyed by the phase in which the run was killed.
        runs: Number of runs that were killed and resumed until they finished.
        bits: Number of bits compared per run.
        differences: Number of differing bits or points, keyed by the name of the checkpoint entry or curve.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    bits: int = 0
    differences: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        phases = ", ".join(f"{n} {phase}" for phase, n in sorted(self.kills.items()))
        head = f"{self.kills.total()} kills ({phases}), {self.runs} runs resumed until they finished"
        if not self.differences:
            return f"exact: {head}; in each run, 0 of {self.bits:,} bits and 0 curve points differ"
        worst = ", ".join(f"{name} ({n})" for name, n in self.differences.most_common(5))
        return f"not exact: {head}; {len(self.differences)} values or curves differ: {worst}"


class ResumeStressTest:
    """Stress test that runs ``fit`` once uninterrupted, then kills and resumes further runs with the same flags.

    Args:
        flags: Command-line flags for ``fit``.
        folder: Folder for the runs.
        seed: Seed for the random kill times.
    """

    def __init__(self, flags: Sequence[str], folder: Path, seed: int = 0) -> None:
        self.flags = list(flags)
        self.folder = folder
        self.random = random.Random(seed)
        self.report = StressTestReport()
        self.started: list[subprocess.Popen[str]] = []

    def run(self, kills: int, on_kill: Callable[[], object] = lambda: None) -> StressTestReport:
        """Kill and resume runs, and compare every finished run with the uninterrupted run.

        Args:
            kills: Total number of kills.
            on_kill: Callback that is called after each kill.

        Raises:
            UserError: A run fails without being killed.
        """
        try:
            return self._run(kills, on_kill)
        finally:
            for process in self.started:
                _kill_group(process)

    def _run(self, kills: int, on_kill: Callable[[], object]) -> StressTestReport:
        reference = RunFolder(self.folder / "uninterrupted" / "pretrain" / "version_0")
        began = time.monotonic()
        self._wait_until_finished(self._start(reference))
        if not (is_checkpoint(reference.last) and reference.config.exists()):
            raise UserError("fit saved no checkpoint with these flags, so no run can be resumed; enable checkpointing")
        self.training_seconds = time.time() - reference.config.stat().st_mtime  # written when training begins
        self.startup_seconds = max(time.monotonic() - began - self.training_seconds, 0.1)
        self.expected = load_checkpoint(reference.last)
        self.report.bits = sum(8 * v.nbytes if hasattr(v, "nbytes") else 64 for _, v in iterate_leaves(self.expected))
        trial = 0
        while self.report.kills.total() < kills:
            run = RunFolder(self.folder / f"trial_{trial}" / "pretrain" / "version_0")
            trial += 1
            while self.report.kills.total() < kills:
                phase = self._kill(self._start(run), run)
                if phase is None:
                    break  # the run finished before the kill
                self.report.kills[phase] += 1
                on_kill()
            else:
                self._wait_until_finished(self._start(run))
            self.report.runs += 1
            self.report.differences.update(compare_checkpoints(self.expected, load_checkpoint(run.last)))
            self.report.differences.update(compare_checkpoint_files(reference, run))
            self.report.differences.update(compare_curves(reference.path, run.path))
        return self.report

    def _start(self, run: RunFolder) -> "subprocess.Popen[str]":
        """Start or resume a run in its own process session, so that all its processes can be killed."""
        resume = []
        if is_checkpoint(run.last):
            resume = [f"--ckpt_path={run.path}"]
        elif run.path.exists():
            run.delete()
        command = [sys.executable, "-m", "lit_gpt_scratch.fit", *self.flags, f"--runs={run.path.parent.parent}"]
        process = subprocess.Popen(
            [*command, "--experiment=pretrain", *resume],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started = [process]
        return process

    def _wait_until_finished(self, process: "subprocess.Popen[str]") -> None:
        _, stderr = process.communicate()
        if process.returncode and FINISHED_MESSAGE not in stderr:  # the run may have been killed after its last save
            lines = stderr.strip().splitlines() or ["no output"]
            raise UserError(
                f"the run failed with exit code {process.returncode} although it was not killed: {lines[-1]}; "
                "run fit with these flags to see the complete error"
            )

    def _kill(self, process: "subprocess.Popen[str]", run: RunFolder) -> str | None:
        """Kill one process of a run at a random time.

        Returns:
            Phase in which the run was killed, or None if it finished before it could be killed.
        """
        config_time = _modified_at(run.config)
        if self.random.random() < STARTUP_KILL_SHARE:
            training, wait = False, self.random.uniform(0.0, self.startup_seconds)
        else:
            while _modified_at(run.config) == config_time and process.poll() is None:
                time.sleep(POLL_SECONDS)
            training, wait = True, self.random.uniform(0.0, self.training_seconds)
        until = time.monotonic() + wait
        while time.monotonic() < until and process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            self._wait_until_finished(process)
            return None
        training = training or _modified_at(run.config) != config_time
        os.kill(self.random.choice(list_group_processes(process.pid)), KILL_SIGNAL)  # any rank or loader worker
        phase = _describe_phase(run) if training else "during startup"
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=EXIT_GRACE_SECONDS)
        _kill_group(process)
        process.communicate()
        return phase


def compare_checkpoint_files(reference: RunFolder, run: RunFolder) -> dict[str, int]:
    """Count the differing bits in all checkpoints except ``last.ckpt``.

    A checkpoint that exists in only one of the runs counts as one differing bit.
    """
    names = [{path.name for path in each.checkpoints.glob("*.ckpt")} for each in (reference, run)]
    found = {f"{name} in only one run": 1 for name in names[0] ^ names[1]}
    for name in (names[0] & names[1]) - {reference.last.name}:
        one, other = (load_checkpoint(each.checkpoints / name) for each in (reference, run))
        found |= {f"{name} {part}": bits for part, bits in compare_checkpoints(one, other).items()}
    return found


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill all remaining processes of a run."""
    for pid in list_group_processes(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, KILL_SIGNAL)


def _describe_phase(run: RunFolder) -> str:
    if find_unfinished(run.checkpoints) or has_unfinished_shards(run.last):
        return "while saving"
    last: dict[str, Any] = load_training_state(run.last) if is_checkpoint(run.last) else {"callbacks": {}}
    validating = any(isinstance(s, dict) and s.get("validation_due") for s in last["callbacks"].values())
    return "during validation" if validating else "between saves"


def _modified_at(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0


def list_group_processes(leader: int) -> list[int]:
    """Return the ids of the live processes in a process group, or only the leader's id if ``/proc`` does not exist."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found or [leader]
