"""Replay a run's TensorBoard events in a rule engine."""

from pathlib import Path
from typing import Final

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.util.tensor_util import make_ndarray

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.errors import UserError

TEXT_SUFFIX: Final = "/text_summary"
"""Suffix that PyTorch's ``SummaryWriter`` appends to the tag of logged text."""
DIAGNOSES_NAME: Final = "doctor"
"""Name of the text that contains the table of diagnoses."""
TEST_PREFIX: Final = "test/"
"""Prefix of test metrics. They are computed after training, so the rules do not use them."""


def replay_events(run: Path, engine: RuleEngine) -> None:
    """Add the metrics and text logged by a run to a rule engine, without calling ``engine.finish``.

    Args:
        run: Run folder with event files. The points of a resumed session replace earlier points of the same steps.
        engine: Rule engine to which no metrics have been added yet.

    Raises:
        UserError: The folder contains no events.
    """
    files = [path for path in sorted(run.glob("*tfevents*")) if not path.name.endswith(".hparams")]
    if not files:
        raise UserError(f"{run} contains no TensorBoard events; pass a run folder")
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
