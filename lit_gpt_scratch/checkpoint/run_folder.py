"""One folder a run: ``<runs>/<experiment>/version_N``."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lit_gpt_scratch.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps everything it makes.

    ``config.yaml``, ``tokenizer.json``, ``summary.json``, TensorBoard events and ``checkpoints/``.
    """

    path: Path

    @property
    def version(self) -> int:
        """The ``N`` of ``version_N``."""
        return int(self.path.name.removeprefix("version_"))

    @property
    def config(self) -> Path:
        """Every flag of the run."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.checkpoints / "last.ckpt"

    @classmethod
    def claim(cls, runs: Path, experiment: str) -> "RunFolder":
        """Make the next free folder; of several processes each gets its own.

        Raises:
            UserError: The folder cannot be made.
        """
        if not experiment or Path(experiment).name != experiment:
            raise UserError(f"--experiment is '{experiment}'; it must be the name of a folder")
        version = max((run.version for run in _runs(runs / experiment)), default=-1) + 1
        while True:
            path = runs / experiment / f"version_{version}"
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if not path.exists():  # a parent is a file
                    raise UserError(f"cannot make a run folder in {runs}: it is not a folder (--runs)") from None
                version += 1
            except OSError as error:
                raise UserError(f"cannot make a run folder in {runs}: {error.strerror} (--runs)") from error

    def abandon(self) -> None:
        """Remove the folder, and those around it if nothing else is in them."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    @classmethod
    def of(cls, checkpoint: Path) -> "RunFolder | None":
        """The run that a checkpoint lies in, or None if it lies elsewhere."""
        path = checkpoint.resolve().parent.parent
        return cls(path) if re.fullmatch(r"version_\d+", path.name) else None


def find_checkpoint(given: str | None, runs: Path, experiment: str | None) -> Path:
    """The checkpoint that a user means.

    Args:
        given: A file; a run folder, for its last checkpoint; or ``last`` or None, for the newest run's.
        runs: Folder of all experiments.
        experiment: Look for the newest run in this one only; None looks in all.

    Raises:
        UserError: There is none.
    """
    if given not in (None, "last"):
        path = Path(given).expanduser()
        if path.is_dir():
            inside = [path / "checkpoints" / "last.ckpt", path / "last.ckpt"]
            # A trainer that was built by hand names its checkpoints differently.
            inside += sorted(path.glob("checkpoints/*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
            found = next((file for file in inside if file.is_file()), None)
            if found is None:
                raise UserError(f"{path} holds no checkpoint (looked in its folder checkpoints)")
            return found
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}")
        return path
    try:
        experiments = [runs / experiment] if experiment else [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        experiments = []
    newest = [
        max(saved, key=lambda run: run.version)
        for saved in ([run for run in _runs(path) if run.last.is_file()] for path in experiments)
        if saved
    ]
    if not newest:
        where = runs / experiment if experiment else runs
        raise UserError(f"no run with a checkpoint in {where}; train one with: python -m lit_gpt_scratch.fit")
    return max(newest, key=lambda run: run.last.stat().st_mtime).last


def _runs(experiment: Path) -> Iterator[RunFolder]:
    for path in experiment.glob("version_*"):
        if re.fullmatch(r"version_\d+", path.name):
            yield RunFolder(path)
