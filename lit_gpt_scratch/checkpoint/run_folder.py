"""Manage run folders, ``<runs>/<experiment>/version_N``, and find their checkpoints."""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from lit_gpt_scratch.checkpoint.sharded_checkpoint import is_checkpoint, is_incomplete, saved_at, verify_checkpoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.atomic_files import is_unfinished, remove_unfinished, write_atomically

log = logging.getLogger(__name__)

LOCK_FILE: Final = ".lock"
LOCK_SECONDS: Final = 2.0
"""Maximum time in seconds that a process takes to lock a run folder after creating it."""
EVENTS_PREFIX: Final = "events.out.tfevents."
"""Prefix of TensorBoard event file names, which continue with the time in seconds, host, process id and a counter."""


Facts = dict[str, str | int | float | bool | None]


class SessionFacts(TypedDict, total=False):
    """Entry of ``provenance.json`` and state of ``RunMetadata`` in a checkpoint; both may have additional fields."""

    code: Facts
    versions: Facts
    hardware: Facts
    seed: int
    data: str
    hub_datasets: list[str]


@dataclass(frozen=True)
class RunFolder:
    """Folder that contains all files of a run.

    The files are ``config.yaml``, ``tokenizer.json``, ``provenance.json``, ``summary.json``, TensorBoard events and
    ``checkpoints/``.
    """

    path: Path

    @property
    def version(self) -> int:
        """Number ``N`` in the folder name ``version_N``."""
        return int(self.path.name.removeprefix("version_"))

    @property
    def config(self) -> Path:
        """Path to the file that contains all flags of the run."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Path to the folder that contains the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Path to the checkpoint from which the run can be resumed."""
        return self.checkpoints / "last.ckpt"

    @classmethod
    def create(cls, runs: Path, experiment: str) -> "RunFolder":
        """Create the folder with the next free version number; concurrent processes get different folders.

        Raises:
            UserError: The folder cannot be created.
        """
        if experiment in ("", ".", "..") or Path(experiment).name != experiment:
            raise UserError(f"--experiment is '{experiment}'; it must be a folder name, not a path")
        for flag, name in (("--runs", str(runs)), ("--experiment", experiment)):
            if Path(os.path.expandvars(name)).expanduser() != Path(name):  # a logger would expand it
                raise UserError(
                    f"{flag} is '{name}', but ~ and environment variables are not expanded; pass the expanded value"
                )
        try:
            version = max((run.version for run in _list_runs(runs / experiment)), default=-1) + 1
        except OSError as error:  # e.g. the name is too long
            raise UserError(
                f"cannot create a run folder in {runs}: {error.strerror}; change --runs or --experiment"
            ) from error
        while True:
            path = runs / experiment / f"version_{version}"
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if not path.exists():  # a parent is a file
                    raise UserError(
                        f"cannot create a run folder in {runs}: it is not a folder; change --runs"
                    ) from None
                version += 1
            except OSError as error:
                raise UserError(f"cannot create a run folder in {runs}: {error.strerror}; change --runs") from error

    def delete(self) -> None:
        """Delete the folder, and also its two parent folders if they are empty.

        A folder that contains a checkpoint is kept.
        """
        unfinished = [path for path in self.checkpoints.glob("*") if is_unfinished(path) or is_incomplete(path)]
        others = [path for path in self.path.rglob("*.ckpt") if not {path, *path.parents} & {*unfinished}]
        if others or {*self.checkpoints.glob("*")} - {*unfinished}:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, so that no other process trains in it. The lock is released even if this process is killed.

        Raises:
            UserError: Another process holds the lock.
        """
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self.path} is in use by another training process; wait until it exits, or start a new run"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; check the permissions of the folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def require_only_run(self) -> None:
        """Check that no other run of the experiment is active or has a checkpoint.

        The caller must hold the lock of this folder. If several processes create run folders at the same time, the
        check succeeds only for the one with the lowest version number.

        Raises:
            UserError: An earlier run of the experiment is in use or has a checkpoint.
        """
        for run in _list_runs(self.path.parent):
            if run.version >= self.version:
                continue
            deadline = time.monotonic() + LOCK_SECONDS
            while run.path.is_dir() and not (run.path / LOCK_FILE).exists() and time.monotonic() < deadline:
                time.sleep(0.01)  # its process has created the folder and is about to lock it
            if run.last_saved_at() or run._is_locked():
                raise UserError(
                    f"--ckpt_path auto: another process has started {run.path}; wait until it exits, then run the same "
                    "command again to resume it"
                )

    def _is_locked(self) -> bool:
        try:
            with self.lock():
                return False
        except UserError:
            return self.path.is_dir()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the folder atomically.

        Raises:
            UserError: The file cannot be written.
        """
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / name}: {error.strerror}; check the permissions and the free disk space"
            ) from error

    def read_sessions(self) -> list[SessionFacts]:
        """Return the environment of each session of the run, as recorded in ``provenance.json``, oldest first.

        If the file cannot be read, log a warning and return an empty list; checkpoints contain the same information.
        """
        try:
            content = read_json(self.path / "provenance.json", dict[str, Any])
            return validate(content.get("sessions"), list[SessionFacts], "sessions")
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            log.warning("%s cannot be read; the record of earlier sessions is lost", self.path / "provenance.json")
            return []

    def remove_unfinished(self) -> None:
        """Remove temporary files left by killed processes."""
        remove_unfinished(self.path)

    def order_events(self) -> None:
        """Rename the event files of earlier sessions so that they sort before the files of a session that starts now.

        TensorBoard reads event files in the order of their names. When it reaches the file of a resumed session, it
        discards all points of earlier files at or after the step from which the run was resumed. Without renaming, the
        order would be wrong if the clock was set back or if two sessions started in the same second.
        """
        bound, renamed = int(time.time()), []
        for path in sorted(self.path.glob(f"{EVENTS_PREFIX}*"), reverse=True):
            started, _, rest = path.name.removeprefix(EVENTS_PREFIX).partition(".")
            if not started.isdigit() or int(started) < bound:
                break
            bound -= 1
            renamed.append((path, path.with_name(f"{EVENTS_PREFIX}{bound:010d}.{rest}")))
        for path, name in reversed(renamed):  # oldest first, so that no file is overwritten and a kill keeps the order
            path.rename(name)

    def last_saved_at(self) -> float:
        """Return the time at which the newest checkpoint was saved, as a Unix timestamp, or 0 if there is none."""
        return max((saved_at(path) for path in self.checkpoints.glob("*.ckpt") if is_checkpoint(path)), default=0.0)

    @classmethod
    def has_checkpoint(cls, runs: Path, experiment: str) -> bool:
        """Return whether any run of an experiment has a checkpoint; corrupted checkpoints also count."""
        return any(run.last_saved_at() for run in _list_runs(runs / experiment))

    @classmethod
    def containing(cls, checkpoint: Path) -> "RunFolder | None":
        """Return the run folder that contains a checkpoint, or None if the checkpoint is not in a run folder."""
        path = checkpoint.resolve().parent.parent
        return cls(path) if re.fullmatch(r"version_\d+", path.name) else None


def find_checkpoint(given: str | None, runs: Path, experiment: str | None) -> Path:
    """Find the checkpoint that the user specified.

    Args:
        given: Path to a checkpoint file or a Hugging Face folder, which is returned unchanged, or to a run folder,
            whose last checkpoint is returned. ``last`` or None selects the last checkpoint of the newest run.
        runs: Folder that contains all experiments.
        experiment: Name of the experiment in which to search for the newest run; None searches all experiments.

    Raises:
        UserError: No such checkpoint exists.
    """
    if given not in (None, "last"):
        path = Path(given).expanduser()
        if (path / "config.json").is_file():  # a Hugging Face folder
            return path
        if is_checkpoint(path):
            return path
        if path.is_dir():
            return _newest_intact_checkpoint(path)
        raise UserError(f"no checkpoint at {path}; check the path") from FileNotFoundError(path)
    try:
        experiments = [runs / experiment] if experiment else [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        experiments = []
    newest = [
        max(saved, key=lambda run: run.version)
        for saved in ([run for run in _list_runs(path) if run.last_saved_at()] for path in experiments)
        if saved
    ]
    if not newest:
        where = runs / experiment if experiment else runs
        raise UserError(f"no run with a checkpoint in {where}; train a model with: python -m lit_gpt_scratch.fit")
    chosen = max(newest, key=RunFolder.last_saved_at)
    for run in _list_runs(chosen.path.parent):
        if run.version > chosen.version:
            log.warning("%s has no checkpoint; using %s", run.path, chosen.path)
    return _newest_intact_checkpoint(chosen.path)


def _newest_intact_checkpoint(folder: Path) -> Path:
    """Return a run's newest intact checkpoint, trying ``last.ckpt`` first; log a warning for each corrupted one.

    Raises:
        UserError: There is no intact checkpoint.
    """
    last = [path for path in (folder / "checkpoints" / "last.ckpt", folder / "last.ckpt") if is_checkpoint(path)]
    # The best checkpoints and the checkpoints of a custom Trainer have other names.
    others = [path for path in folder.glob("checkpoints/*.ckpt") if is_checkpoint(path) and path not in last]
    others.sort(key=saved_at, reverse=True)
    for path in (*last, *others):
        try:
            verify_checkpoint(path)
        except UserError as error:
            log.warning("%s", error)
        else:
            return path
    reason = "all are corrupted" if last or others else "there are no .ckpt files in its checkpoints folder"
    raise UserError(f"{folder} contains no checkpoint that can be read: {reason}; use another run")


def _list_runs(experiment: Path) -> Iterator[RunFolder]:
    for path in experiment.glob("version_*"):
        if re.fullmatch(r"version_\d+", path.name):
            yield RunFolder(path)
