"""Normalize the loop counters in a Trainer's checkpoint, and convert them to a different ``BatchLayout``."""

from typing import Any, Final

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.lightning_compat import set_saved_logging_step

Counts = dict[str, int]

BATCH_LAYOUT_KEY: Final = "layout"
"""Checkpoint key of the ``BatchLayout`` that was in use when the checkpoint was saved."""


def normalize_progress(fit_loop: dict[str, Any]) -> None:
    """Normalize the counters of a saved training loop, in place, to the values they would have between two steps.

    Lightning 2.6 keeps four counters of batches and four of epochs (``ready``, ``started``, ``processed`` and
    ``completed``), which it increments one after another in the course of each batch and epoch. A checkpoint can be
    saved when only some of them have been incremented: before or after a batch, during validation, or at the end of a
    run. Lightning would then repeat or skip a batch, a validation run or the rest of an epoch when the run is resumed.

    This function therefore counts only batches that have been processed, and counts an epoch as completed once its last
    batch has been processed. A run then resumes in the same way regardless of when its checkpoint was saved.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]`` of a Trainer's checkpoint.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    optimization = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    set_saved_logging_step(fit_loop, optimization["step"]["total"]["completed"])
    _reset_progress(fit_loop["epoch_loop.val_loop.batch_progress"])
    if not batches["current"]["ready"]:  # between two epochs
        for scope in ("current", "total"):
            epochs[scope]["completed"] = epochs[scope]["processed"]
        return
    epoch_done = batches["is_last_batch"] and batches["current"]["processed"] == batches["current"]["ready"]
    for scope in ("current", "total"):
        _set_counts(batches[scope], batches[scope]["processed"])
        started = epochs[scope]["started"]
        _set_counts(epochs[scope], started)
        if not epoch_done:
            epochs[scope] |= {"processed": started - 1, "completed": started - 1}
    batches["is_last_batch"] = False
    if epoch_done:
        within_epoch = (batches, fit_loop["epoch_loop.scheduler_progress"], *optimization.values())
        for progress in within_epoch:
            _set_counts(progress["current"], 0)


def rescale_batch_counts(fit_loop: dict[str, Any], before: BatchLayout, now: BatchLayout) -> None:
    """Convert the batch counts of a normalized training loop, in place, to a different batch layout.

    All other counters count steps or epochs and stay the same. If the number of rows per step is unchanged, training
    continues with the next row. Otherwise, training continues with the first full step that contains only unseen rows,
    so that no row is used twice in an epoch.

    Args:
        fit_loop: State of the training loop, ``checkpoint["loops"]["fit_loop"]``, as normalized by
            ``normalize_progress``.
        before: The batch layout when the checkpoint was saved.
        now: The batch layout of the resumed run.
    """
    if before == now:
        return
    for counts in (fit_loop["epoch_loop.batch_progress"][scope] for scope in ("current", "total")):
        rows = counts["processed"] * before.rows_per_batch
        if before.rows_per_step == now.rows_per_step and rows % now.rows_per_batch == 0:
            _set_counts(counts, rows // now.rows_per_batch)  # also between the smaller steps of an early stage
        else:
            _set_counts(counts, -(-rows // now.rows_per_step) * now.accumulate)


def count_finished_epochs(fit_loop: dict[str, Any]) -> int:
    """Return the number of completed epochs of a saved training loop with normalized counters."""
    done: int = fit_loop["epoch_progress"]["current"]["processed"]
    return done


def _set_counts(counts: Counts, n: int) -> None:
    counts.update(dict.fromkeys(counts, n))


def _reset_progress(progress: dict[str, Any]) -> None:
    for scope in ("current", "total"):
        _set_counts(progress[scope], 0)
    progress["is_last_batch"] = False
