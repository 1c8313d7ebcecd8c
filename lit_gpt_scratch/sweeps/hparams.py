"""TensorBoard's tab HParams: every run with its settings; its curves are the metrics."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lit_gpt_scratch.sweeps.run_results import HPARAMS, RunResult
from lit_gpt_scratch.sweeps.sweep_config import Assignment


def write(run: RunResult, assignment: Assignment, group: str) -> None:
    """Put a run's settings into its folder, unless they are there.

    Runs of one group are the seeds of a trial; TensorBoard shows their mean.
    """
    folder = Path(run.folder)
    if any(folder.glob(f"*{HPARAMS}")):
        return
    settings: dict[str, str | float] = {name: _number(setting) for name, setting in assignment.items()}
    start = summary_v2.hparams_pb(settings, trial_id=group)
    status = STATUS_SUCCESS if run.state == "finished" else STATUS_FAILURE
    end = plugin_data_pb2.HParamsPluginData(
        session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    )
    about = metadata.create_summary_metadata(end)
    ends = Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)]
    )
    writer = EventFileWriter(str(folder), filename_suffix=HPARAMS)
    for summary in (start, ends):
        writer.add_event(Event(wall_time=time.time(), summary=summary))
    writer.close()


def _number(setting: str | float) -> str | float:
    """A label that is a number as one, so that TensorBoard orders it."""
    try:
        return float(setting)
    except ValueError:
        return setting
