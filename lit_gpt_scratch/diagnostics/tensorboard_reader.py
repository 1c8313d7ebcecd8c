"""Reads a run's TensorBoard events into a rule engine."""

from pathlib import Path
from typing import Final

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.util.tensor_util import make_ndarray

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.errors import UserError

TEXT_SUFFIX: Final = "/text_summary"
"""What PyTorch's writer appends to the name of a text."""
TEST_PREFIX: Final = "test/"
"""Metrics measured after training, which the diagnostics of the live run have not seen."""


def replay_events(run: Path, engine: RuleEngine) -> None:
    """Add the metrics and texts of a run to a rule engine, without finishing it.

    Args:
        run: A directory with event files; points repeated by a resumed session replace the earlier ones.
        engine: Without metrics so far.

    Raises:
        UserError: There are no events in the directory.
    """
    files = [path for path in sorted(run.glob("*tfevents*")) if not path.name.endswith(".hparams")]
    if not files:
        raise UserError(f"{run} has no TensorBoard events; pass the folder of a run")
    for path in files:
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                if event.session_log.status == SessionLog.START:
                    engine.drop_from(event.step)
                continue
            for value in event.summary.value:
                if value.tag.startswith(TEST_PREFIX):
                    continue
                kind = value.metadata.plugin_data.plugin_name
                if kind == "scalars":
                    engine.add_metrics(event.step, {value.tag: make_ndarray(value.tensor).item()})
                elif kind == "text":
                    text = make_ndarray(value.tensor).ravel()[0].decode()
                    engine.add_text(event.step, value.tag.removesuffix(TEXT_SUFFIX), text)
