"""A row of the acceptance table: what it measures, at which sizes, for how long, and what it requires."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from typing_extensions import TypedDict

Value: TypeAlias = float | int | str | bool | None
Values: TypeAlias = dict[str, Value]
"""Measured values, keyed by name and unit, such as ``tokens/s``."""


class RowSkipped(Exception):  # noqa: N818 - an outcome, not an error
    """Raised by a row that does not apply to this machine; the message is the reason."""


class RowFailed(Exception):  # noqa: N818 - an outcome, not an error
    """Raised by a row whose result is wrong; the message is the reason."""


@dataclass(frozen=True)
class RowContext:
    """Where a row runs and where it writes.

    Attributes:
        device: Device to measure.
        out: Folder for files that are kept, such as traces.
        scratch: Temporary folder that is shared by all rows.
        text: Text for the row that trains on tiny Shakespeare; None if the user gave none.
    """

    device: torch.device
    out: Path
    scratch: Path
    text: Path | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""
        synchronize(self.device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all submitted work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


Measure: TypeAlias = Callable[..., Iterator[Values]]
"""Function that measures a row: it takes a ``RowContext`` and the sizes of the row, and yields values when they are
known, so that a row that crashes or runs out of time keeps the values that it has yielded."""
Requirement: TypeAlias = Callable[[RowContext], str | None]
"""Function that returns why a row cannot run on this machine, or None if it can."""


@dataclass(frozen=True)
class AcceptanceRow:
    """A row of the acceptance table.

    Attributes:
        name: Name of the row, unique in the table.
        measure: Function that measures the row.
        seconds: Maximum duration of the row in seconds, in a run of ten minutes; longer runs allow proportionally more.
        sizes: Arguments of ``measure`` on a GPU.
        cpu_sizes: Arguments that replace those in ``sizes`` on a CPU, small enough for a few seconds.
        requires: Requirements; the row is skipped if one of them is not met.
    """

    name: str
    measure: Measure
    seconds: float
    sizes: Mapping[str, Any] = field(default_factory=dict)
    cpu_sizes: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[Requirement, ...] = ()

    def sizes_on(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of ``measure`` for a device."""
        return {**self.sizes, **(self.cpu_sizes if device.type == "cpu" else {})}

    def reason_to_skip(self, context: RowContext) -> str | None:
        """Return the first requirement that is not met, or None if the row can run."""
        return next((reason for requirement in self.requires if (reason := requirement(context))), None)


Status = Literal["ok", "failed", "skipped", "out of time"]
STATUSES: Final[tuple[Status, ...]] = ("ok", "failed", "skipped", "out of time")


class RowRecord(TypedDict):
    """Outcome of a row, as in ``acceptance.json``; ``reason`` is empty if the status is ``ok``."""

    row: str
    status: Status
    reason: str
    seconds: float
    values: dict[str, Any]


def plain_values(values: Values) -> Values:
    """Return values that JSON can represent: numbers that are not finite become text."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Requirements


def cuda(context: RowContext) -> str | None:
    """Require a CUDA GPU."""
    return None if context.on_cuda else "requires a CUDA GPU"


def gpus(count: int) -> Requirement:
    """Require at least ``count`` GPUs."""

    def requirement(context: RowContext) -> str | None:
        found = torch.cuda.device_count() if context.on_cuda else 0
        return None if found >= count else f"requires {count} GPUs; this machine has {found}"

    return requirement


def a_gpu_per_process(context: RowContext) -> str | None:
    """Require two GPUs for two processes; on a CPU, processes share the cores."""
    return gpus(2)(context) if context.on_cuda else None


def libraries(*names: str) -> Requirement:
    """Require that libraries are installed, by the name under which they are imported."""

    def requirement(context: RowContext) -> str | None:
        missing = [name for name in names if find_spec(name) is None]
        return f"requires {', '.join(missing)}, which is not installed" if missing else None

    return requirement


def text(context: RowContext) -> str | None:
    """Require a text from the user."""
    return None if context.text else "requires the text of tiny Shakespeare; pass --text FILE"


def int8_weights(context: RowContext) -> str | None:
    """Require int8 weights in generation, which this version does not have."""
    return "generation has no int8 weights in this version"
