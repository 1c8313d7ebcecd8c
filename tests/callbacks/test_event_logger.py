"""TensorBoard events that are written despite a disk that is full for a while, read with TensorBoard's own reader."""

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lit_gpt_scratch.callbacks.event_logger import RunLogger, tolerate_logger_errors, tolerate_write_errors
from lit_gpt_scratch.errors import UserError


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond a size in bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written(folder: Path) -> list[tuple[int, str, bytes]]:
    """Everything but the time of each event of the folder, in the order in which TensorBoard reads it."""
    events = [event for path in sorted(folder.glob("*tfevents*")) for event in EventFileLoader(str(path)).Load()]
    for event in events:
        event.wall_time = 0
        event.ClearField("source_metadata")
    return [event.SerializeToString(deterministic=True) for event in events]


def test_events_equal_those_of_lightnings_logger(tmp_path: Path) -> None:
    ours = RunLogger(tmp_path / "runs" / "ours" / "version_3", first_step=7)
    theirs = TensorBoardLogger(tmp_path / "runs", "theirs", "version_3", default_hp_metric=False, purge_step=7)
    for logger in (ours, theirs):
        logger.log_hyperparams({"a": 1}, {"x": 2.0})
        logger.log_metrics({"x": 1.5}, 8)
        logger.experiment.add_text("t", "some text", 9)
        logger.experiment.add_image("i", np.zeros((4, 4, 3), np.uint8), 9, dataformats="HWC")
        logger.finalize("success")
    found, expected = written(Path(ours.log_dir)), written(Path(theirs.log_dir))
    assert len(found) > 6
    assert [event for event in expected if b"brain.Event:2" not in event] == [
        event for event in found if b"brain.Event:2" not in event
    ]
    assert Path(ours.log_dir, "hparams.yaml").read_text() == Path(theirs.log_dir, "hparams.yaml").read_text()


def test_full_disk_loses_only_the_events_that_did_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next event after the disk has space again is readable, because the incomplete one was removed."""
    folder = tmp_path / "runs" / "x" / "version_0"
    logger = RunLogger(folder, first_step=0)
    logger.log_metrics({"x": 0.0}, 0)
    logger.save()
    [path] = folder.glob("*tfevents*")
    with caplog.at_level(logging.WARNING), limited_files(path.stat().st_size + 30):
        for step in (1, 2):
            logger.log_metrics({"x": 1.0}, step)
            logger.save()
    logger.log_metrics({"x": 3.0}, 3)
    logger.finalize("success")
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("x")] == [(0, 0.0), (3, 3.0)]
    [message] = caplog.messages
    assert message == "cannot write the TensorBoard events: File too large; the run continues without it"


def test_other_loggers_never_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    tolerate_logger_errors(logger)
    with caplog.at_level(logging.WARNING), limited_files(10):
        for step in range(3):
            logger.log_metrics({"x": float(step)}, step)
            logger.save()
    [message] = caplog.messages
    assert message.startswith("cannot write the output of CSVLogger: File too large")
    assert isinstance(pickle.loads(pickle.dumps(logger)), CSVLogger)


def test_only_errors_of_the_operating_system_are_tolerated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), tolerate_write_errors("a"):
        try:
            raise OSError(28, os.strerror(28))
        except OSError as error:
            raise UserError("cannot write") from error
    assert caplog.messages == ["cannot write a: No space left on device; the run continues without it"]
    with pytest.raises(ZeroDivisionError), tolerate_write_errors("a"):
        1 / 0  # noqa: B018
    bug = KeyError("x")
    bug.__context__ = OSError(28, os.strerror(28))  # raised in its handler
    with pytest.raises(KeyError), tolerate_write_errors("a"):
        raise bug
