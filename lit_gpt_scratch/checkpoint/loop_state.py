"""How far a run has come, as a trainer writes it into a checkpoint."""

from typing import Any, Final

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.lightning_compat import set_saved_logging_step

Counts = dict[str, int]

BATCH_LAYOUT_KEY: Final = "layout"
"""What a checkpoint calls the ``BatchLayout`` that its batches were counted in."""


def normalize_progress(fit_loop: dict[str, Any]) -> None:
    """Bring the counters of a saved training loop, in place, to what they are between two steps.

    A checkpoint may have been written in a hook before a batch, after it, in a validation or at a run's end, and
    Lightning 2.6 counts an event in four moments of it. Resumed from counters that are halfway through an event, it
    repeats or drops a batch, a validation or the rest of an epoch, depending on the moment. Here only what is
    entirely done counts, and an epoch whose last batch is done is done; so every moment is resumed alike.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]`` of a trainer's checkpoint.
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
        begun = epochs[scope]["started"]
        _set_counts(epochs[scope], begun)
        if not epoch_done:
            epochs[scope] |= {"processed": begun - 1, "completed": begun - 1}
    batches["is_last_batch"] = False
    if epoch_done:
        within_epoch = (batches, fit_loop["epoch_loop.scheduler_progress"], *optimization.values())
        for progress in within_epoch:
            _set_counts(progress["current"], 0)


def rescale_batch_counts(fit_loop: dict[str, Any], before: BatchLayout, now: BatchLayout) -> None:
    """Count the batches of a settled loop, in place, as if they had been dealt out otherwise from the beginning.

    Everything else is counted in steps or epochs, which stay what they are. Where a step is of as many windows as
    before, the next window is the one that would have come; where it is not, the next whole step's first, so that no
    window comes twice in an epoch.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``, settled.
        before: How a step was dealt out when it was saved.
        now: How it is from here on.
    """
    if before == now:
        return
    for counts in (fit_loop["epoch_loop.batch_progress"][scope] for scope in ("current", "total")):
        windows = counts["processed"] * before.rows_per_batch
        _set_counts(counts, -(-windows // now.rows_per_step) * now.accumulate)


def count_finished_epochs(fit_loop: dict[str, Any]) -> int:
    """Whole epochs in a saved training loop that is settled."""
    done: int = fit_loop["epoch_progress"]["current"]["processed"]
    return done


def _set_counts(counts: Counts, n: int) -> None:
    counts.update(dict.fromkeys(counts, n))


def _reset_progress(progress: dict[str, Any]) -> None:
    for scope in ("current", "total"):
        _set_counts(progress[scope], 0)
    progress["is_last_batch"] = False
