"""Read TensorBoard event files, and replay a run's events in a rule engine.

Event files may be corrupted or written by other programs, so they are validated. For example, the tensor of a scalar
may have any shape and type.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tensorboard import data_compat, dataclass_compat
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.util.tensor_util import make_ndarray

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.errors import UserError

log = logging.getLogger(__name__)

TEXT_SUFFIX: Final = "/text_summary"
"""Suffix that PyTorch's ``SummaryWriter`` appends to the tag of logged text."""
DIAGNOSES_NAME: Final = "doctor"
"""Name of the text that contains the table of diagnoses."""
TEST_PREFIX: Final = "test/"
"""Prefix of test metrics. They are computed after training, so the rules do not use them."""
HPARAMS_SUFFIX: Final = ".hparams"
"""Suffix of event files that contain hyperparameters instead of scalars."""
RECORD_OVERHEAD: Final = 16
"""Number of bytes that a record in an event file occupies in addition to its data: its length and two checksums."""


def event_files(run: Path) -> list[Path]:
    """Return a run's event files that may contain scalars, oldest session first."""
    return [path for path in sorted(run.glob("*tfevents*")) if path.is_file() and path.suffix != HPARAMS_SUFFIX]


def read_events(path: Path, growing: bool = False) -> Iterator[Event]:
    """Yield the events of a file up to the first corrupted or incomplete record, and log a warning if there is one.

    Args:
        path: Path to the event file.
        growing: Whether a process is still writing the file. If so, no warning is logged for an incomplete record.
    """
    size = 0
    initial_metadata: dict[str, Any] = {}
    try:
        for record in RawEventFileLoader(str(path)).Load():
            size += RECORD_OVERHEAD + len(record)
            event = data_compat.migrate_event(Event.FromString(record))
            yield from dataclass_compat.migrate_event(event, initial_metadata)
        unread = path.stat().st_size - size
        damage = f"its last {unread:,} bytes are an incomplete or corrupt record" if unread > 0 and not growing else ""
    except Exception as error:  # the file may contain anything
        damage = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if damage:
        log.warning("%s could not be read completely (%s); later events are missing", path, damage)


def tensor_values(tensor: TensorProto) -> Any:
    """Return the elements of a tensor as nested lists.

    Raises:
        LookupError, TypeError: The dtype is unknown.
        ValueError: The shape does not match the data.
    """
    # `make_ndarray` would repeat a single element to a shape of any size.
    if math.prod(dimension.size for dimension in tensor.tensor_shape.dim) > tensor.ByteSize():
        raise ValueError("the shape of a tensor does not match its data")
    return make_ndarray(tensor).tolist()


def scalar_value(value: Any) -> float | None:
    """Return the number in a summary value, or None if the value is not a scalar."""
    n_elements = math.prod(dimension.size for dimension in value.tensor.tensor_shape.dim)
    if value.metadata.plugin_data.plugin_name != "scalars" or n_elements != 1:
        return None
    try:
        return float(make_ndarray(value.tensor).item())
    except (LookupError, TypeError, ValueError):
        return None


def replay_events(run: Path, engine: RuleEngine) -> None:
    """Add the metrics and text logged by a run to a rule engine, without calling ``engine.finish``.

    Args:
        run: Run folder with event files. The points of a resumed session replace earlier points of the same steps.
        engine: Rule engine to which no metrics have been added yet.

    Raises:
        UserError: The folder contains no events.
    """
    files = event_files(run)
    if not files:
        raise UserError(f"{run} contains no TensorBoard events; pass a run folder")
    for path in files:
        for event in read_events(path):
            if event.HasField("session_log"):
                if event.session_log.status == SessionLog.START:
                    engine.drop_from(event.step)
                continue
            for value in event.summary.value:
                if value.tag.startswith(TEST_PREFIX):
                    continue
                if (number := scalar_value(value)) is not None:
                    engine.add_metrics(event.step, {value.tag: number})
                elif value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
                    text = value.tensor.string_val[0].decode(errors="replace")
                    engine.add_text(event.step, value.tag.removesuffix(TEXT_SUFFIX), text)
