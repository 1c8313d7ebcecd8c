"""``fit --budget``: choose the model, the batch and the number of steps for an amount of time or compute.

The scaling law that a ladder of runs has measured (``experiments/scaling``) predicts the loss of each candidate: the
number of parameters is known, and the number of tokens is that for which the budget suffices. For a budget in FLOPs, it
follows from the FLOPs of a step. For a budget of time, a few steps of each candidate are timed, from the smallest up,
until the predicted loss rises or a candidate does not fit into memory: no cost model is needed, and the time of steps
of small matrices, which is not proportional to their FLOPs, is measured. The chosen model is timed again, compiled and
with the vocabulary of the text, to set the number of steps.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.callbacks.progress import format_count, format_duration, pluralize
from lit_gpt_scratch.callbacks.summary import count_validated_rows
from lit_gpt_scratch.cli.config_defaults import import_class
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.base_datamodule import require_positive_ints
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_VOCAB_SIZE
from lit_gpt_scratch.distributed.hardware_defaults import configure_process, explain_no_compile
from lit_gpt_scratch.distributed.validate_hardware import requested_devices, validate_hardware
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import set_max_steps
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.module_metadata import inactive_parameters
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.profiling.flops_and_memory import build_on_meta, training_flops_per_token
from lit_gpt_scratch.profiling.timed_steps import time_steps
from lit_gpt_scratch.schema import describe, read_json
from lit_gpt_scratch.sweeps.scaling_law import ScalingLaw
from lit_gpt_scratch.tasks import LanguageModel

UNITS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0}
"""Seconds per unit of a budget of time."""
MAX_SECONDS, MAX_FLOPS = 1e8, 1e27
"""Largest budgets: three years, and more compute than any published run."""
SHIPPED_LAW: Final = Path(__file__).parents[1] / "sweeps" / "scaling_law.json"
LAW_METRIC: Final = "val/bits_per_byte"
"""Metric that a law must predict."""
UNBOUNDED: Final = (0.0, math.inf)
"""Measured range of laws that do not state it."""
SHAPES: Final = (
    (2, 48), (3, 64), (3, 96), (4, 128), (5, 160), (6, 192), (7, 256), (8, 320), (10, 384), (12, 512), (12, 768),
    (24, 1024), (24, 1536), (32, 2048),
)  # fmt: skip
"""Numbers of layers and widths among which a budget chooses; the first five are those of the ladder."""
HEAD_DIM, MAX_WIDTH_OF_SMALL_HEADS = 64, 256
"""Preferred channels per head, and the width up to which heads have half as many, as in the ladder."""
TOKENS_PER_STEP, TOKENS_OF_SMALLEST_BATCH = 1024, 1_000_000
"""Tokens per step of the ladder, and the training length from which larger batches pay.

The batch grows in factors of two with the square root of the number of training tokens, as the critical batch size does
(https://arxiv.org/abs/2410.21676).
"""
LR_TOKENS_PER_STEP: Final = 2048, 4096
"""Tokens per step between which Muon's learning rates grow with the square root of the batch.

They grow by a factor of at most sqrt(2): at the default batch, twice the default rate is worse than the default by 0.03
bits per byte (``experiments/ablations``), and higher rates have not been measured with larger batches.
"""
MAX_MICRO_BATCH_TOKENS: Final = 16_384
"""Maximum number of tokens per micro-batch; larger batches accumulate gradients."""
LOOP_SECONDS: Final = 0.003
"""Time per step of the trainer, its callbacks and data loading (``experiments/benchmarks/lightning_cost.txt``)."""
N_VALIDATIONS, MAX_VALIDATION_SHARE = 4, 0.1
"""Number of validation runs, and the share of the budget above which there is only one, at the end."""
VALIDATION_COST: Final = 1 / 3
"""Cost of a forward pass relative to a training step with the same tokens."""


class Budget(NamedTuple):
    """Amount of training: seconds, or FLOPs."""

    text: str
    amount: float
    is_time: bool

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse a value of ``--budget`` such as ``10min`` or ``1e15flops``.

        Raises:
            UserError: The value is not a positive number with a known unit.
        """
        match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) ?(s|min|h|flops)", text)
        try:
            number = float(match[1]) if match else 0.0
        except ValueError:
            number = 0.0
        if match is None or number <= 0:
            raise UserError(f"--budget is {text}; it must be a time such as 2min or 1.5h, or compute such as 1e15flops")
        amount, is_time = number * UNITS.get(match[2], 1.0), match[2] != "flops"
        if amount > (MAX_SECONDS if is_time else MAX_FLOPS):
            raise UserError(f"--budget is {text}; it must be at most {MAX_SECONDS:g}s or {MAX_FLOPS:g}flops")
        return cls(text, amount, is_time)

    def require_step(self, steps: float, **costs: float) -> None:
        """Check that the budget suffices for one step.

        Args:
            steps: Number of steps for which it suffices.
            costs: Seconds or FLOPs that a run with one step takes, keyed by what they are for.

        Raises:
            UserError: It does not.
        """
        if steps < 1:
            unit = "s" if self.is_time else "FLOPs"
            needed = ", ".join(f"{name} {cost:.3g} {unit}" for name, cost in costs.items())
            raise UserError(f"--budget is {self.text}, which is too small for one step: {needed}")


class LawFile(TypedDict):
    """Fields of ``scaling_law.json`` that a budget uses."""

    law: dict[str, float]
    n_runs: int
    metric: NotRequired[str]
    parameters: NotRequired[tuple[float, float]]
    tokens: NotRequired[tuple[float, float]]


class FittedLaw(NamedTuple):
    """Scaling law, the number of runs to which it was fitted, and the ranges of their parameters and tokens."""

    law: ScalingLaw
    n_runs: int
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def describe(self, parameters: float, tokens: float) -> str:
        """Describe the fit, and name the measured ranges that do not contain a model and its training length."""
        numbers = ("parameters", parameters, self.parameters), ("tokens", tokens, self.tokens)
        outside = [
            f"{format_count(low)} to {format_count(high)} {name}"
            for name, value, (low, high) in numbers
            if not low <= value <= high
        ]
        beyond = f", extrapolated beyond the measured {' and '.join(outside)}" if outside else ""
        return f"law fitted to {pluralize(self.n_runs, 'run')}{beyond}"


def read_scaling_law(path: Path) -> FittedLaw:
    """Read a fitted law.

    Raises:
        UserError: The file cannot be read, does not contain a law, or its law predicts another metric.
    """
    try:
        content = read_json(path, LawFile)
        law = ScalingLaw(**content["law"])
        if not all(0 < value < math.inf for value in content["law"].values()):
            raise ValueError("its coefficients are not positive")
        if (metric := content.get("metric", LAW_METRIC)) != LAW_METRIC:
            raise ValueError(f"its law predicts {describe(metric)}, not {LAW_METRIC}")
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--scaling_law: cannot read {path}: {reason}; pass a scaling_law.json of a sweep") from error
    ranges = content.get("parameters", UNBOUNDED), content.get("tokens", UNBOUNDED)
    return FittedLaw(law, content["n_runs"], *ranges)


@dataclass(frozen=True)
class Choice:
    """Model and training length that a budget chose.

    Args:
        gpt: Architecture.
        parameters: Number of parameters; see ``count_parameters``.
        tokens_per_step: Number of tokens per optimizer step.
        steps: Number of optimizer steps for which the budget suffices.
        loss: Predicted loss in bits per byte.
    """

    gpt: GPTConfig
    parameters: int
    tokens_per_step: int
    steps: float
    loss: float

    @property
    def tokens(self) -> float:
        """Number of training tokens."""
        return self.steps * self.tokens_per_step

    def describe(self, rejected: "list[Choice]", fitted: FittedLaw) -> str:
        """Return the reason for the choice.

        Args:
            rejected: Other candidates.
            fitted: The law that predicted the losses.
        """
        others = sorted(rejected, key=lambda other: abs(math.log(other.parameters / self.parameters)))[:2]
        compared = ", ".join(
            f"{format_count(other.parameters)} {other.loss:.3f}" for other in sorted(others, key=lambda o: o.parameters)
        )
        than = f"; other sizes: {compared}" if others else ""
        return (
            f"{self.gpt.n_layer} layers of width {self.gpt.n_embd}, {self.tokens_per_step:,} tokens per step, because "
            f"{format_count(self.parameters)} parameters and {format_count(self.tokens)} tokens have the lowest "
            f"predicted loss, {self.loss:.3f} bits per byte{than} ({fitted.describe(self.parameters, self.tokens)})"
        )


def candidate_models(base: GPTConfig, given: frozenset[str]) -> list[GPTConfig]:
    """Return the architectures among which a budget chooses, from the smallest.

    Args:
        base: Architecture from the flags.
        given: Fields that flags set, which are not changed.

    Raises:
        UserError: The given fields contradict every candidate.
    """
    models: dict[GPTConfig, None] = {}
    for n_layer, n_embd in SHAPES:
        shape = {"n_layer": n_layer, "n_embd": base.n_embd if "n_embd" in given else n_embd}
        shape["n_head"] = n_heads(shape["n_embd"])
        try:
            chosen: dict[str, Any] = {name: size for name, size in shape.items() if name not in given}
            models[replace(base, **chosen)] = None
        except UserError as error:  # not every width is divisible by the given number of heads, for example
            reason = error
    if not models:
        raise reason
    return list(models)


def n_heads(n_embd: int) -> int:
    """Return the number of heads of a model: the width of a head is even and near the preferred one."""
    preferred = HEAD_DIM // 2 if n_embd <= MAX_WIDTH_OF_SMALL_HEADS else HEAD_DIM
    return next(n for n in range(max(1, round(n_embd / preferred)), 0, -1) if n_embd % (2 * n) == 0 or n == 1)


def count_parameters(gpt: GPTConfig, vocab_size: int, block_size: int) -> int:
    """Return the number of parameters to which the law, which was fitted to dense models, applies.

    These are the parameters that a token uses, without the modules for multi-token prediction.
    """
    net = build_on_meta(replace(gpt, multi_token_depth=0), vocab_size, block_size)
    return sum(p.numel() for p in net.parameters()) - inactive_parameters(net)


def choose_tokens_per_step(tokens: float, block_size: int) -> int:
    """Return the number of tokens per step, a power of two of sequences, for a number of training tokens."""
    doublings = max(0, round(0.5 * math.log2(max(tokens, 1.0) / TOKENS_OF_SMALLEST_BATCH)))
    return int(block_size * 2 ** max(0, round(math.log2(TOKENS_PER_STEP / block_size)) + doublings))


def choose_learning_rate(default: float, tokens_per_step: int) -> float:
    """Return Muon's learning rate for a batch."""
    smallest, largest = LR_TOKENS_PER_STEP
    return default * math.sqrt(min(max(tokens_per_step, smallest), largest) / smallest)


def choose_model(
    budget: Budget,
    law: ScalingLaw,
    models: Sequence[GPTConfig],
    step_cost: Callable[[GPTConfig, int], float],
    vocab_size: int,
    block_size: int,
    tokens_per_step: int | None = None,
) -> tuple[Choice, list[Choice]]:
    """Choose the model with the lowest predicted loss.

    Args:
        budget: The budget.
        law: Scaling law of the loss.
        models: Candidates, from the smallest; after the first whose predicted loss rises, the others are not tried.
        step_cost: Function that returns the cost of a step of a model with a number of tokens, in the unit of the
            budget. It raises ``MemoryError`` if the step does not fit; larger candidates are then not tried.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        tokens_per_step: Number of tokens per step, or None to choose it, too.

    Returns:
        The choice and the rejected candidates.

    Raises:
        UserError: The budget is too small for one step of any candidate.
        MemoryError: The first candidate does not fit.
    """
    tried: list[Choice] = []
    for gpt in models:
        size = tokens_per_step or choose_tokens_per_step(0, block_size)
        try:
            cost = step_cost(gpt, size)
            while (
                tokens_per_step is None
                and (wanted := choose_tokens_per_step(budget.amount / cost * size, block_size)) > size
            ):
                size, cost = wanted, step_cost(gpt, wanted)
        except MemoryError:
            if not tried:
                raise
            break
        steps = budget.amount / cost
        if not tried:
            budget.require_step(steps, step=cost)
        elif steps < 1:
            break
        parameters = count_parameters(gpt, vocab_size, block_size)
        tried.append(Choice(gpt, parameters, size, steps, float(law.loss(parameters, steps * size))))
        if len(tried) > 1 and tried[-1].loss > tried[-2].loss:
            break
    best = min(tried, key=lambda choice: choice.loss)
    return best, [choice for choice in tried if choice is not best]


class TrainingLength(NamedTuple):
    """Number of steps and validation runs of a run."""

    steps: int
    validations: int

    def describe(self, step_seconds: float, budget: Budget) -> str:
        """Return the reason for the number of steps."""
        return (
            f"{self.steps:,} steps of {1000 * step_seconds:.0f} ms, as measured, and "
            f"{pluralize(self.validations, 'validation run')} take about {format_duration(budget.amount)}"
        )


def plan_length(budget: Budget, first: float, step: float, validation: float) -> TrainingLength:
    """Return the number of steps that a budget of time allows, including compilation and validation.

    Args:
        budget: The budget.
        first: Duration of the first step in seconds.
        step: Duration of the other steps, without the trainer's overhead.
        validation: Duration of a validation run.

    Raises:
        UserError: The budget is too small for one step.
    """
    validations = N_VALIDATIONS if N_VALIDATIONS * validation <= MAX_VALIDATION_SHARE * budget.amount else 1
    compilation = max(0.0, first - step)
    steps = (budget.amount - compilation - validations * validation) / (step + LOOP_SECONDS)
    budget.require_step(steps, compilation=compilation, validation=validations * validation, step=step + LOOP_SECONDS)
    return TrainingLength(int(steps), validations)


CONTRADICTIONS: Final = (
    "ckpt_path", "devices_like", "model.init_from", "trainer.fast_dev_run", "trainer.max_steps", "trainer.max_epochs",
    "trainer.max_time", "data.block_size_stages", "data.tokens_per_step_stages",
)  # fmt: skip
"""Flags that cannot be combined with a budget."""
SHAPE: Final = ("n_layer", "n_head", "n_embd")
"""Fields of ``GPTConfig`` that a budget chooses."""


def validate_alone(budget: str, is_given: Callable[[str], bool]) -> None:
    """Check that no flag is set that contradicts a budget.

    Args:
        budget: Value of ``--budget``.
        is_given: Function that returns whether the user set a flag, on the command line or in a config file.

    Raises:
        UserError: Such a flag is set.
    """
    for name in CONTRADICTIONS:
        if is_given(name):
            raise UserError(f"--budget is {budget}, but {name} is also set; remove one of them")


class BudgetedRun:
    """Choices of ``--budget`` for a run; flags that are given override them.

    Args:
        config: Parsed flags of the run, which the methods change.
        is_given: Function that returns whether the user set a flag, on the command line or in a config file.

    Raises:
        UserError: The budget, the law, a size or a hardware flag is invalid, there are several devices, or the law does
            not apply to the task or the data.
    """

    def __init__(self, config: Namespace, is_given: Callable[[str], bool]) -> None:
        self.config = config
        self.budget = Budget.parse(config.budget)
        self.reasons: list[str] = []
        """Why the model and the number of steps were chosen, for the run plan."""
        self._is_given = is_given
        if not config.model.class_path.endswith(".LanguageModel") or not config.data.class_path.endswith(".PackedText"):
            raise UserError("--budget requires --model LanguageModel and --data PackedText, to which the law applies")
        data, trainer = config.data.init_args, config.trainer
        require_positive_ints({name: data[name] for name in ("block_size", "batch_size", "tokens_per_step")})
        validate_hardware(trainer, config.cpu_offload)
        self._device = default_device(str(trainer.accelerator))
        n_devices = requested_devices(trainer.devices)
        if n_devices is None:
            n_devices = 1 if self._device.type == "cpu" else torch.accelerator.device_count()
        if n_devices * trainer.num_nodes > 1:
            raise UserError("--budget measures one device; set --trainer.devices 1 and --trainer.num_nodes 1")
        self._fitted = read_scaling_law(Path(config.scaling_law or SHIPPED_LAW))

    def choose_model(self) -> None:
        """Choose the architecture, the batch and the learning rate, and set them in the config."""
        arguments, data, trainer = self.config.model.init_args, self.config.data.init_args, self.config.trainer
        given = frozenset(name for name in SHAPE if self._is_given(f"model.gpt.{name}"))
        if self._is_given("preset") or self._is_given("model.gpt"):
            given = frozenset(SHAPE)
        batch_given = any(map(self._is_given, ("data.batch_size", "data.tokens_per_step")))
        batch_given = batch_given or self._is_given("trainer.accumulate_grad_batches")
        micro_batch = data.batch_size * data.block_size
        accumulated = data.tokens_per_step or micro_batch * trainer.accumulate_grad_batches
        vocab_size = data.vocab_size or DEFAULT_VOCAB_SIZE
        recipe = import_class(arguments.optimizer.class_path, "lit_gpt_scratch.optim")
        optimizer = recipe(**arguments.optimizer.init_args.as_dict())
        options = optimizer, self._device, trainer.precision, arguments.activation_checkpointing
        # Sequences per micro-batch and micro-batches per step of each candidate and number of tokens per step.
        batches: dict[tuple[GPTConfig, int], tuple[int, int]] = {}

        def step_cost(gpt: GPTConfig, tokens: int) -> float:
            if not batch_given:
                batch, accumulate = split_batch(tokens, data.block_size)
            else:
                batch, accumulate = data.batch_size, max(1, tokens // micro_batch)
            if not self.budget.is_time:
                batches[gpt, tokens] = batch, accumulate
                return tokens * training_flops_per_token(build_on_meta(gpt, vocab_size, data.block_size))
            while True:
                try:
                    micro_step = time_steps(gpt, vocab_size, data.block_size, batch, 1, *options).median
                    break
                except MemoryError:
                    if batch_given or batch == 1:
                        raise
                batch, accumulate = batch // 2, 2 * accumulate
            batches[gpt, tokens] = batch, accumulate
            return accumulate * micro_step + LOOP_SECONDS  # the optimizer takes a small share of large micro-batches

        if self.budget.is_time:
            configure_process()
        models = candidate_models(replace(GPTConfig(), **arguments.gpt.as_dict()), given)
        sizes = vocab_size, data.block_size, accumulated if batch_given else None
        choice, rejected = choose_model(self.budget, self._fitted.law, models, step_cost, *sizes)
        for name in SHAPE:
            arguments.gpt[name] = getattr(choice.gpt, name)
        if not batch_given:
            data.batch_size, accumulate = batches[choice.gpt, choice.tokens_per_step]
            data.tokens_per_step = choice.tokens_per_step if accumulate > 1 else None
        for name in ("lr", "adamw_lr") if recipe is Muon else ():
            if not self._is_given(f"model.optimizer.{name}"):
                default = getattr(optimizer, name)
                arguments.optimizer.init_args[name] = choose_learning_rate(default, choice.tokens_per_step)
        trainer.max_steps, trainer.max_epochs = int(choice.steps), None
        self.reasons.append(choice.describe(rejected, self._fitted))

    def choose_length(self, trainer: Trainer, task: LanguageModel, data: PackedText) -> None:
        """Set the number of steps and the validation interval, once the vocabulary and the validation text are known.

        These values replace ``--budget`` in the config, so that a resumed run neither chooses nor measures again.
        """
        sizes = data.vocab_size, data.block_size
        tokens = data.tokens_per_step or data.batch_size * data.block_size * trainer.accumulate_grad_batches
        accumulate = tokens // (data.batch_size * data.block_size)
        if self.budget.is_time:
            device = trainer.strategy.root_device
            compiles = task.compile_network is not False and explain_no_compile(device) is None
            measured = time_steps(
                task.gpt, *sizes, data.batch_size, accumulate, task.optimizer, device, str(trainer.precision),
                task.activation_checkpointing, compiles,
            )  # fmt: skip
            rows = count_validated_rows(trainer, data, self.config.trainer.limit_val_batches)
            validation = rows * data.block_size / tokens * measured.median * VALIDATION_COST
            length = plan_length(self.budget, measured.first, measured.median, validation)
            self.reasons.append(length.describe(measured.median, self.budget))
        else:
            cost = tokens * training_flops_per_token(build_on_meta(task.gpt, *sizes))
            self.budget.require_step(self.budget.amount / cost, step=cost)
            length = TrainingLength(int(self.budget.amount / cost), N_VALIDATIONS)
            self.reasons.append(f"{length.steps:,} steps of {cost:.3g} FLOPs")
        set_max_steps(trainer, length.steps)
        self.config.trainer.max_steps = length.steps
        if not self._is_given("trainer.val_check_interval"):
            interval = -(-length.steps // length.validations) * accumulate
            trainer.val_check_interval = self.config.trainer.val_check_interval = interval
        self.config.budget = self.config.scaling_law = None


def split_batch(tokens: int, block_size: int) -> tuple[int, int]:
    """Return the numbers of sequences per micro-batch and of micro-batches per step, both powers of two.

    Args:
        tokens: Number of tokens per step, a power of two of sequences.
        block_size: Number of tokens per sequence.
    """
    batch = tokens // block_size
    while batch > 1 and batch * block_size > MAX_MICRO_BATCH_TOKENS:
        batch //= 2
    return batch, tokens // (batch * block_size)


def default_device(accelerator: str) -> torch.device:
    """Return the device that Lightning chooses for ``trainer.accelerator``."""
    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
