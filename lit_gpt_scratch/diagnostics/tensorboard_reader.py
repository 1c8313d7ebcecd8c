"""A run's TensorBoard events, as they were written."""

from pathlib import Path
from typing import Final

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.util.tensor_util import make_ndarray

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.errors import UserError

TEXT_SUFFIX: Final = "/text_summary"
"""What PyTorch's writer adds to the name of a text."""
TEST_PREFIX: Final = "test/"
"""Begins the names of what is measured when a training is over, of which the doctor of the live run heard nothing."""


def replay_events(run: Path, examination: RuleEngine) -> None:
    """Let an examination see a run from its folder; that the run is over is not said.

    Args:
        run: A folder with event files; what a resumed session did again takes the place of what was before.
        examination: One that has seen nothing yet.

    Raises:
        UserError: There are no events in the folder.
    """
    files = [path for path in sorted(run.glob("*tfevents*")) if not path.name.endswith(".hparams")]
    if not files:
        raise UserError(f"{run} has no TensorBoard events; name the folder of a run")
    for path in files:
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                if event.session_log.status == SessionLog.START:
                    examination.forget(event.step)
                continue
            for value in event.summary.value:
                if value.tag.startswith(TEST_PREFIX):
                    continue
                kind = value.metadata.plugin_data.plugin_name
                if kind == "scalars":
                    examination.see(event.step, {value.tag: make_ndarray(value.tensor).item()})
                elif kind == "text":
                    text = make_ndarray(value.tensor).ravel()[0].decode()
                    examination.note(event.step, value.tag.removesuffix(TEXT_SUFFIX), text)
