"""Run plan: a description of the run that is printed before the first step and logged to TensorBoard."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback
from lit_gpt_scratch.callbacks.introspection import PARAMETER_PARTS, printable_token
from lit_gpt_scratch.callbacks.metric_logging import tensorboard_writers
from lit_gpt_scratch.callbacks.progress import format_bytes, format_count, format_duration, pluralize
from lit_gpt_scratch.callbacks.summary import BaselineMetrics, count_validated_rows
from lit_gpt_scratch.callbacks.throughput import FIRST_STEPS, TIME_SHARE_TAGS, Throughput
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.diagnostics.config_rules import (
    CHINCHILLA_RATIO,
    MAX_BUDGET_FACTOR,
    MAX_EPOCHS,
)
from lit_gpt_scratch.distributed.hardware_defaults import default_precision, explain_no_compile
from lit_gpt_scratch.distributed.parallelize import fsdp_mesh
from lit_gpt_scratch.lightning_compat import batches_in_steps, planned_steps
from lit_gpt_scratch.model.module_metadata import inactive_parameters
from lit_gpt_scratch.profiling.flops_and_memory import (
    activation_bytes,
    count_parameters_by_part,
    state_bytes,
    training_flops_per_token,
)
from lit_gpt_scratch.profiling.layout_sizes import gathered_bytes, gathered_sizes
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown import format_markdown_table, markdown_code

log = logging.getLogger(__name__)


class RunPlan(RunDirCallback):
    """Callback that prints a description of the run at the start and an estimate of its duration after the first steps.

    The step time is measured by a ``Throughput`` callback, which must precede this callback.

    Args:
        only: Whether to stop after printing the estimate (``--plan``). If True, the trainer must not have loggers, save
            checkpoints or run validation.
        limit_val_batches: Value of ``trainer.limit_val_batches`` in the planned run, a number (int) or fraction (float)
            of batches, or None to use the trainer's value.
    """

    def __init__(self, only: bool = False, limit_val_batches: float | None = None) -> None:
        self.only = only
        self.limit_val_batches = limit_val_batches
        self.lines: list[tuple[str, str]] = []
        """Printed lines as (name, text) pairs; an empty list on ranks other than 0."""
        self.budget: list[str] = []
        """Reasons for the choices of ``--budget``."""
        self._throughput: Throughput | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the plan and its warnings."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        self._first_step = trainer.global_step
        if not (isinstance(pl_module, GPTModule) and isinstance(data, BaseDataModule)):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if isinstance(callback, Throughput):
                self._throughput, callback.on_first_steps = callback, partial(self._report_time, trainer)
        if trainer.is_global_zero:
            self.lines = list(self._lines(trainer, pl_module, data))
            for name, text in self.lines:
                log.info("%-11s %s", name, text)
            for warning in plan_warnings(trainer, pl_module, data):
                log.warning("%-11s %s", "warning", warning)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the step time if a ``--plan`` run ended before all of the first ``FIRST_STEPS`` steps were timed."""
        if self.only and self._throughput and self._throughput.on_first_steps is not None:
            self._report_time(trainer)

    def _report_time(self, trainer: L.Trainer) -> None:
        seconds = self._throughput and self._throughput.median_step_seconds
        if seconds and trainer.is_global_zero:
            log.info("%-11s %s", "time", self._time(trainer, seconds))
        trainer.should_stop = trainer.should_stop or self.only

    def _lines(self, trainer: L.Trainer, task: GPTModule, data: BaseDataModule) -> Iterator[tuple[str, str]]:
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        threads = f", {pluralize(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
        processes = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
        default = default_precision(device.type)
        why = default.reason if trainer.precision == default.value else "as requested"
        no_compiler = explain_no_compile(device)
        compiled = "compiled" if task.compiled else f"not compiled{f': {no_compiler}' if no_compiler else ''}"
        yield "device", f"{processes}{name}{threads}; {trainer.precision}: {why}; {compiled}"

        parts = count_parameters_by_part(task.net)
        total = sum(parts.values())
        inactive = inactive_parameters(task.net)
        active = f", of which a token uses {format_count(total - inactive)}" if inactive else ""
        yield (
            "model",
            f"{format_count(total)} parameters{active}: "
            f"{', '.join(f'{part} {format_count(n)}' for part, n in parts.items())}",
        )

        if task.init_from is not None:
            trained = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
            head = "; new head" if task.head_is_new else ""
            yield (
                "begins with",
                f"{task.init_from}{head}; {format_count(trained)} parameters trained, {trained / total:.1%}",
            )
        yield "optimizer", "; ".join(_describe_optimizer(task))

        yield from describe_data(data)
        steps = planned_steps(trainer)
        length = "until stopped"
        unit, note = _describe_padding(data)
        if math.isfinite(steps):
            tokens = planned_tokens(trainer, data, int(steps))
            done = f" ({self._first_step:,} done)" if self._first_step else ""
            mean = " on average" if data.tokens_per_step_stages is not None else ""
            length = (
                f"{pluralize(int(steps), 'step')}{done} of {tokens_per_step(trainer, data):,} {unit}{mean}: "
                f"{format_count(tokens)} {unit}{note}, {_describe_epochs(trainer, data, tokens)}, "
                f"{format_count(tokens / total)} {unit} per parameter"
            )
        yield "run", length
        for reason in self.budget:
            yield "budget", reason

        dtype, autocast = next(task.net.parameters()).dtype, "mixed" in str(trainer.precision)
        sizes = task.net.vocab_size, data.block_size, data.batch_size * data.windows_per_row
        kept = activation_bytes(
            task.gpt, *sizes, device, dtype, autocast, task.activation_checkpointing, task.loss_chunk_size
        )
        held = state_bytes(trainer.optimizers[0], task.ema.decay is not None)
        gathered = ""
        is_offloaded = getattr(trainer.strategy, "cpu_offload", False)
        if task.device_mesh is not None and (is_offloaded or fsdp_mesh(task.device_mesh).size() > 1):
            largest = gathered_bytes(
                *gathered_sizes(task.net, task.device_mesh), dtype.itemsize, str(trainer.precision)
            )
            gathered = f"up to {format_bytes(largest)} for weights that FSDP2 gathers, "
        per = " per process" if trainer.world_size > 1 else ""
        offloaded = " in the memory of the CPU" if is_offloaded else ""
        yield (
            "cost",
            f"{format_count(training_flops_per_token(task.net))} FLOPs per token; "
            f"memory{per} {format_bytes(held)} for weights, gradients and optimizer{offloaded}, {gathered}"
            f"up to {format_bytes(kept)} for activations",
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if isinstance(callback, BaselineMetrics) and callback.figures:
                baselines = ", ".join(f"{name} {value:.3f}" for name, value in callback.figures.items())
                yield "baselines", f"{baselines} {callback.what}"
        yield "folder", "none (--plan)" if self.only else str(self.folder.path if self.folder else "none")

    def _time(self, trainer: L.Trainer, seconds: float) -> str:
        data: BaseDataModule = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        done = self._first_step if self.only else trainer.global_step
        first = self._first_step + 1  # the first step is not timed
        tokens = _tokens_between(trainer, data, first, first + FIRST_STEPS) / FIRST_STEPS
        measured = f"{1000 * seconds:.0f} ms per step, {tokens / seconds:,.0f} tokens per second"
        steps = planned_steps(trainer)
        if not math.isfinite(steps):
            return measured
        if steps == done:
            return measured
        # A forward pass takes about a third of a training step.
        rows = count_validated_rows(trainer, data, self.limit_val_batches)
        validation = rows * data.block_size * data.windows_per_row / tokens * seconds / 3
        validations = self._validations(trainer, done, int(steps)) if rows else 0
        left = f"{measured}; about {{}} for {pluralize(int(steps) - done, 'step')}"
        # Later steps may have more tokens than the timed ones.
        training = _tokens_between(trainer, data, done, int(steps)) / tokens * seconds
        if validations is None:
            return left.format(format_duration(training)) + ", without validation"
        total = training + validations * validation
        return left.format(format_duration(total)) + " and " + pluralize(validations, "validation run")

    def _validations(self, trainer: L.Trainer, done: int, steps: int) -> int | None:
        """Return the number of validation runs that remain after ``done`` of ``steps`` steps, including the final one.

        Returns None if the validation interval is a duration, not a number of steps.
        """
        interval = trainer.val_check_batch  # Lightning counts micro-batches
        if interval is None:
            return None
        per_epoch = int(trainer.num_training_batches)
        if trainer.check_val_every_n_epoch is None:
            every, per_epoch = 1, batches_in_steps(trainer, steps) + 1  # count across epochs
        else:
            every = trainer.check_val_every_n_epoch

        def validations(n_steps: int) -> tuple[int, bool]:
            """Return the number of validation runs in the first ``n_steps`` steps, and whether a final run is added."""
            epochs, rest = divmod(batches_in_steps(trainer, n_steps), per_epoch)
            if trainer.check_val_every_n_epoch is not None and not rest:
                epochs, rest = epochs - 1, per_epoch
            is_validated = (epochs + 1) % every == 0
            runs = epochs // every * int(per_epoch // interval) + is_validated * int(rest // interval)
            return runs, is_validated and rest % interval != 0

        runs, is_final_missing = validations(steps)
        return runs + is_final_missing - (validations(done)[0] if done else 0)


def _describe_optimizer(task: GPTModule) -> Iterator[str]:
    """Yield a description of each optimizer parameter group and, if there is one, of the moving average."""
    for group in task.configured_groups:  # groups of a custom optimizer may have neither a rule nor a name
        rule = group.get("rule", type(task.trainer.optimizers[0]).__name__)
        what = f"{format_count(sum(p.numel() for p in group['params']))} in {len(group['params'])}"
        decay = f" with weight decay {group['weight_decay']:g}" if group.get("weight_decay") else ""
        state = ", state in bfloat16" if group.get("bf16_state") else ""
        yield f"{rule} {what} {group.get('name', 'tensors')} at {group['lr']:g}{decay}{state}"
    if task.ema.decay is not None:
        yield f"moving average {task.ema.decay:g}"


MAX_USEFUL_EPOCHS = 4
"""Maximum number of epochs for which repeated data is about as useful as new data (https://arxiv.org/abs/2305.16264).

For more epochs, the run plan suggests more text instead of more steps.
"""


PURPOSES: Final = {"train": "training", "validation": "validation", "test": "testing"}
"""Purpose of each split, as worded in messages."""


def describe_data(data: BaseDataModule) -> Iterator[tuple[str, str]]:
    """Yield the lines of the run plan that describe the data, as (name, text) pairs."""
    if counts := data.split_counts:
        sizes = [
            f"{pluralize(size.items, data.item_name)} with {format_count(size.tokens)} tokens "
            f"for {PURPOSES.get(split, split)}"
            for split, size in counts.items()
        ]
        train = counts.get("train")
        ratio = f"; {train.n_bytes / max(train.tokens, 1):.2f} bytes per token" if train and train.n_bytes else ""
        yield "data", f"{data.origin}: {', '.join(sizes)}{ratio}"
    if isinstance(data.train_dataset, PackedDataset):
        yield "windows", _describe_windows(data.train_dataset, data.block_size, data.packing or "packed")
    for stages, final, unit in (
        (data.block_size_stages, data.block_size, "tokens per window"),
        (data.tokens_per_step_stages, data.tokens_per_step, "tokens per step"),
    ):
        if stages is not None:
            growth = ", ".join(f"{size:,} until {end:.3g} of the run" for end, size in stages)
            yield "stages", f"{unit}: {growth}, then {final:,}"


def _describe_windows(windows: PackedDataset, block_size: int, packing: str) -> str:
    cost = [part.cost for part in windows.parts]
    crossing = sum(part.crossing for part in cost) / len(windows)
    return (
        f"{format_count(len(windows))} of {block_size} tokens, {packing}: "
        f"{min(part.used for part in cost):.1%} of their positions used, "
        f"{pluralize(sum(part.split for part in cost), 'document')} split, {crossing:.0%} with several documents"
        f"{', masked from each other' if windows.document_mask else ''}"
    )


def _describe_padding(data: BaseDataModule) -> tuple[str, str]:
    """Return the unit of token counts ("positions" if they include padding, else "tokens") and a note about padding."""
    if isinstance(data.train_dataset, PackedDataset):
        used = min(part.cost.used for part in data.train_dataset.parts)
        return ("tokens", "") if used > 0.9995 else ("positions", f" ({used:.1%} tokens, the rest padding)")
    return "positions", " (padding included)"


def planned_tokens(trainer: L.Trainer, data: BaseDataModule, steps: int) -> int:
    """Return the number of token positions in ``steps`` optimizer steps across all ranks, including padding."""
    return batches_in_steps(trainer, steps) * data.tokens_per_batch


def _tokens_between(trainer: L.Trainer, data: BaseDataModule, first: int, end: int) -> int:
    return planned_tokens(trainer, data, end) - planned_tokens(trainer, data, first)


def tokens_per_step(trainer: L.Trainer, data: BaseDataModule) -> int:
    """Return the number of token positions per optimizer step across all ranks, including padding.

    If the number of micro-batches per step changes during the run, this is the mean over the run.
    """
    steps = planned_steps(trainer)
    if not math.isfinite(steps) or not steps:
        return data.tokens_per_batch * trainer.accumulate_grad_batches
    return round(planned_tokens(trainer, data, int(steps)) / steps)


def distinct_train_tokens(trainer: L.Trainer, data: BaseDataModule) -> int:
    """Return the number of distinct token positions available for training, regardless of the run length."""
    overfit_batches: float = trainer.overfit_batches  # type: ignore[attr-defined]  # the trainer sets it late
    if overfit_batches:  # every epoch has the same batches
        return int(trainer.num_training_batches) * data.tokens_per_batch
    return len(data.train_dataset) * data.block_size * data.windows_per_row


def _describe_epochs(trainer: L.Trainer, data: BaseDataModule, tokens: int) -> str:
    """Describe a number of tokens in epochs, and in passes over the data if the trainer limits batches per epoch."""
    per_epoch = int(trainer.num_training_batches) * data.tokens_per_batch
    passes = format_count(tokens / distinct_train_tokens(trainer, data))
    if per_epoch > len(data.train_dataset) * data.block_size * data.windows_per_row - tokens_per_step(trainer, data):
        return f"{passes} epochs"
    epochs = f"{format_count(tokens / per_epoch)} epochs of {trainer.num_training_batches:,.0f} micro-batches"
    return epochs if format_count(tokens / per_epoch) == passes else f"{epochs} ({passes} of the data)"


def plan_warnings(trainer: L.Trainer, task: GPTModule, data: BaseDataModule) -> Iterator[str]:
    """Yield a warning for each setting that is valid but probably a mistake."""
    yield from data.validation_warnings()
    steps = planned_steps(trainer)
    if not math.isfinite(steps):
        return
    if trainer.overfit_batches:  # type: ignore[attr-defined]  # the trainer sets it late
        return  # memorization is the purpose
    tokens = planned_tokens(trainer, data, int(steps))
    epochs = tokens / distinct_train_tokens(trainer, data)
    if epochs > MAX_EPOCHS:
        enough = max(1, int(steps * MAX_EPOCHS / 10 / epochs))
        yield (
            f"{format_count(epochs)} epochs: the model will memorize the {data.item_name}s; use more data or "
            f"fewer steps: --trainer.max_steps {enough}"
        )
        return  # no other warning matters for such a small dataset
    if task.init_from is not None:
        return  # a pretrained model has already been trained on other tokens
    unit, _ = _describe_padding(data)
    each = tokens / sum(p.numel() for p in task.net.parameters())
    if not CHINCHILLA_RATIO / MAX_BUDGET_FACTOR <= each <= CHINCHILLA_RATIO * MAX_BUDGET_FACTOR:
        change = "a larger model or fewer steps"
        if each < CHINCHILLA_RATIO:
            change = f"a smaller model or more {'text' if epochs > MAX_USEFUL_EPOCHS else 'steps'}"
        yield (
            f"{format_count(each)} {unit} per parameter; about {CHINCHILLA_RATIO} are compute-optimal "
            f"(https://arxiv.org/abs/2203.15556): use {change}"
        )


N_LONGEST_TOKENS: Final = 30
"""Number of longest tokens to log; they reveal garbage in the training text."""
CHART_GROUPS: Final[dict[str, dict[str, list[Any]]]] = {
    "dynamics": {
        "gradient norm by component": ["Multiline", [f"dynamics/gradient_norm/({'|'.join(PARAMETER_PARTS)})"]],
        "update ratio by component": ["Multiline", ["dynamics/update_ratio/.*"]],
        "gradient norm by layer": ["Multiline", ["dynamics/gradient_norm/layer_.*"]],
    },
    "attention": {
        "attention to the first token": ["Multiline", ["attention/sink/.*"]],
        "entropy": ["Multiline", ["attention/entropy/.*"]],
        "distance": ["Multiline", ["attention/distance/.*"]],
    },
    "loss breakdown": {
        "loss by position in the window": ["Multiline", ["loss_by_position/.*"]],
        "loss by frequency of the token": ["Multiline", ["loss_by_frequency/.*"]],
    },
    "throughput": {"fraction of step time": ["Multiline", list(TIME_SHARE_TAGS)]},
}
"""Charts shown after the losses in TensorBoard's custom-scalars tab, keyed by group.

Curves are specified by metric names or regular expressions.
"""


class TensorBoardLayout(Callback):
    """Callback that logs the run plan, the cleaning reports, the longest tokens and the chart layout to TensorBoard.

    It must follow ``RunPlan`` and ``BaselineMetrics`` in the list of callbacks. A resumed run logs only the chart
    layout.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the chart layout and, for a new run, the run plan, the cleaning reports and the longest tokens."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        for board in tensorboard_writers(trainer):
            board.add_custom_scalars(chart_layout(trainer))  # TensorBoard reads only one layout per run
            if trainer.global_step == 0:
                for name, text in _run_texts(trainer, data):
                    board.add_text(f"run/{name}", text, 0)


def chart_layout(trainer: L.Trainer) -> dict[str, dict[str, list[Any]]]:
    """Return the chart layout: the losses and their baselines, followed by ``CHART_GROUPS``."""
    first: dict[str, list[Any]] = {"loss": ["Multiline", ["train/loss", "val/loss"]]}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(callback, BaselineMetrics) and callback.figures:
            curves = [callback.metric, *(f"baselines/{name}" for name in callback.figures)]
            first[callback.metric] = ["Multiline", curves]
    return {"the model and its baselines": first, **CHART_GROUPS}


def _run_texts(trainer: L.Trainer, data: Any) -> Iterator[tuple[str, str]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(callback, RunPlan) and callback.lines:
            lines = [line for line in callback.lines if line[0] != "folder"]
            yield "plan", format_markdown_table([("item", "value"), *lines], "<<")
    if isinstance(data, BaseDataModule):
        if reports := data.cleaning_reports:
            yield "audit", "\n\n".join(reports)
        sizes = data.token_bytes
        longest = sorted(range(len(sizes)), key=lambda id_: (-sizes[id_], id_))[:N_LONGEST_TOKENS]
        rows = [[str(sizes[id_]), markdown_code(printable_token(data.tokenizer, id_))] for id_ in longest]
        yield "longest_tokens", format_markdown_table([["bytes", "token"], *rows], "><")
