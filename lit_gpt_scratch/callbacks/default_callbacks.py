"""All that watches and guards a run of ``fit``, in order."""

from collections.abc import Sequence
from typing import Final

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

HOOKS_OF_A_BATCH: Final = (
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
)  # fmt: skip


def default_callbacks(
    written: Sequence[Callback],
    inspection: ActivationStats,
    stopping: SignalHandling,
    saving: Checkpointing | None,
    shows_progress: bool,
    guard: GuardMode,
) -> list[Callback]:
    """Those that suit the task do something; the others know that they have nothing to say.

    Args:
        written: What puts the run's flags and origin into its folder.
        inspection: What looks into the network, and says how often.
        stopping: What ends it by signal.
        saving: What keeps checkpoints, if anything does.
        shows_progress: Whether there is a bar.
        guard: What to do about steps that would spoil the weights.
    """
    guarding = SpikeGuard(guard, saving.every_n_steps if saving else None)
    losses = LossBreakdown(inspection.every_n_steps > 0, inspection.pictures)
    inside = [GradientStats(inspection.every_n_steps), inspection, losses]
    measures = [
        guarding,
        Throughput(),
        *inside,
        Samples(inspection.prompts),
        ConfusionMatrixPlot(),
        RewardEval(),
        ValidateAtEnd(),
    ]
    progress = [RunProgressBar()] if shows_progress else []
    # The plan names the baselines, and the description has the plan; doctor and summary speak when the bar is closed.
    said = [*written, BaselineMetrics(), RunPlan(), TensorBoardLayout(), *progress, DiagnosticsCallback(), RunSummary()]
    all_of_them = [*measures, *said, stopping, *([saving] if saving else [])]
    for callback in all_of_them:
        drop_idle_hooks(callback)
    return all_of_them


def drop_idle_hooks(callback: Callback) -> None:
    """Let the trainer pass over what a callback does not do with a batch.

    It goes through a profiler to call even an empty hook, some ten microseconds with the caches full of weights; twenty
    callbacks with six hooks each cost half a percent of a laptop's step. A hook that is None it does not call.
    """
    for hook in HOOKS_OF_A_BATCH:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            setattr(callback, hook, None)
