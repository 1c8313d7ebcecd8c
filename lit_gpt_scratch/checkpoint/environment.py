"""Record the environment of a run: code, library versions and hardware, all of which can affect its results."""

import hashlib
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from lit_gpt_scratch.terminal_output import redact_command

PACKAGE: Final = Path(__file__).parent.parent
LIBRARIES: Final = ("torch", "lightning", "numpy", "tokenizers", "torchmetrics", "jsonargparse")


def collect_environment() -> dict[str, Any]:
    """Return the current time and the command, code version, library versions and hardware of this process."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": redact_command(sys.argv),
        "code": {
            "sources": _hash_sources(),
            "commit": _run_git("rev-parse", "HEAD"),
            "changed_since": _has_uncommitted_changes(),
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
        "hardware": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _hash_sources() -> str:
    """Compute the SHA-256 digest of the package's source files, including uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _has_uncommitted_changes() -> bool | None:
    status = _run_git("status", "--porcelain", "--", ".")
    return None if status is None else bool(status)


def _run_git(*command: str) -> str | None:
    """Return the output of a git command in the package's checkout, or None if the package is not in a git checkout."""
    try:
        done = subprocess.run(["git", *command], cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
