"""Default callbacks of the ``fit`` command."""

from collections.abc import Sequence

from lightning.pytorch import Callback

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, ValidateAtEnd
from lit_gpt_scratch.callbacks.diagnostics import DiagnosticsCallback
from lit_gpt_scratch.callbacks.introspection import ActivationStats, GradientStats
from lit_gpt_scratch.callbacks.loss_breakdown import ConfusionMatrixPlot, LossBreakdown
from lit_gpt_scratch.callbacks.progress import RunProgressBar
from lit_gpt_scratch.callbacks.run_plan import RunPlan, TensorBoardLayout
from lit_gpt_scratch.callbacks.samples import RewardEval, Samples
from lit_gpt_scratch.callbacks.signal_handling import SignalHandling
from lit_gpt_scratch.callbacks.spike_guard import GuardMode, SpikeGuard
from lit_gpt_scratch.callbacks.summary import BaselineMetrics, RunSummary
from lit_gpt_scratch.callbacks.throughput import Throughput


def default_callbacks(
    run_files: Sequence[Callback],
    inspection: ActivationStats,
    signals: SignalHandling,
    checkpointing: Checkpointing | None,
    shows_progress: bool,
    guard: GuardMode,
    max_time_is_a_flag: bool = False,
) -> list[Callback]:
    """Return the default callbacks in the order in which they run.

    Callbacks that do not apply to the task do nothing.

    Args:
        run_files: Callbacks that write the run's flags and provenance to the run directory.
        inspection: Callback that logs activation statistics. ``GradientStats``, ``LossBreakdown`` and ``Samples`` use
            its settings as well.
        signals: Callback that stops the run when a signal is received.
        checkpointing: Callback that saves checkpoints, or None if the run saves no checkpoints.
        shows_progress: Whether to show a progress bar.
        guard: Mode of ``SpikeGuard``, which handles steps with spikes or non-finite values.
        max_time_is_a_flag: Whether the time limit of the run is set by ``--trainer.max_time``, not a custom ``Timer``.
    """
    measuring = [
        SpikeGuard(guard, checkpointing.every_n_steps if checkpointing else None),
        Throughput(),
        GradientStats(inspection.every_n_steps),
        inspection,
        LossBreakdown(inspection.every_n_steps > 0, inspection.pictures),
        Samples(inspection.prompts),
        ConfusionMatrixPlot(),
        RewardEval(),
        ValidateAtEnd(),
    ]
    progress = [RunProgressBar()] if shows_progress else []
    # The order matters: the plan prints the baselines, the layout logs the plan, and diagnostics and summary print
    # after the progress bar is closed.
    reporting = [
        *run_files,
        BaselineMetrics(),
        RunPlan(),
        TensorBoardLayout(),
        *progress,
        DiagnosticsCallback(),
        RunSummary(max_time_is_a_flag),
    ]
    return [*measuring, *reporting, signals, *([checkpointing] if checkpointing else [])]
