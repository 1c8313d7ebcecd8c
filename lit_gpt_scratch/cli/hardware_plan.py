"""``fit --plan --devices_like``: predict memory, checkpoint size and speed of a run on a machine that is not here.

Neither the text is read nor any weight allocated. The lines have the same form as those of the run plan
(``callbacks.run_plan``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy

from lit_gpt_scratch.callbacks.progress import format_bytes, format_count, format_duration, pluralize
from lit_gpt_scratch.cli.config_defaults import published_vocab_size
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_VOCAB_SIZE
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.distributed.hardware_defaults import normalize_precision
from lit_gpt_scratch.distributed.parallelize import validate_tensor_parallel
from lit_gpt_scratch.distributed.strategies import (
    TENSOR_PARALLEL_SIZES,
    ModelParallel,
    build_named_strategy,
    divide_processes,
    divide_replicas,
    resolve_strategy,
    validate_cpu_offload,
)
from lit_gpt_scratch.distributed.validate_hardware import requested_devices
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import MAX_LOGITS_MB_ACCELERATOR
from lit_gpt_scratch.model.activation_checkpointing import validate_checkpointing
from lit_gpt_scratch.profiling.accelerators import Machine, parse_machine
from lit_gpt_scratch.profiling.layout_sizes import (
    WEIGHT_DTYPES,
    LayoutSizes,
    StrategyName,
    TrainingSetup,
    measure_layout,
    rank_memory,
    suggest_flags,
)
from lit_gpt_scratch.profiling.step_time import StepTime, predict_step, utilization
from lit_gpt_scratch.tasks import LanguageModel
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS

WRITE_BANDWIDTH: Final = 2e9
"""Assumed speed of writing a checkpoint in bytes per second: one process that writes one file."""
LAUNCH_BOUND_SECONDS: Final = 0.1
"""Duration of a micro-batch below which kernel launches, which the prediction leaves out, may take longer."""
MAX_OPTIMIZER_SHARE: Final = 0.3
"""Share of the step time above which a replicated optimizer is reported."""
MEMORY_NAMES: Final = {"gathered": "gathered weights and their gradients", "average": "moving average"}
"""Names of parts of the memory that differ from their keys."""
BUCKETS: Final = "gradient buckets"


def plan_for_machine(
    config: Namespace, config_init: Namespace, model: LightningModule, data: LightningDataModule
) -> Iterator[tuple[str, str]]:
    """Yield the lines of the plan as (name, text) pairs; the name of a warning is ``warning``.

    Args:
        config: The parsed flags.
        config_init: The parsed flags, with instantiated classes.
        model: The task.
        data: The data module.

    Raises:
        UserError: The machine is unknown, the flags contradict it, or the plan does not support them.
    """
    machine = parse_machine(config.devices_like)
    _validate_devices(config.trainer, machine, config.devices_like)
    if type(model) is not LanguageModel or not isinstance(data, PackedText):
        raise UserError(
            f"--devices_like supports pretraining with LanguageModel and PackedText, but not {type(model).__name__} "
            f"and {type(data).__name__}; omit it, and use --plan on the machine itself"
        )
    for name in ("init_from", "lora", "train_layers"):
        if getattr(model, name) is not None:
            raise UserError(f"--devices_like does not support model.{name}, because it predicts pretraining; omit it")
    vocab_size, origin = _vocabulary(config, data)
    setup = _training_setup(config_init, model, data, machine, vocab_size)
    validate_tensor_parallel(setup.config, setup.tensor_parallel, setup.precision)
    validate_checkpointing(setup.checkpointing, setup.config)
    sizes = measure_layout(setup)
    yield from _lines(setup, sizes, origin, _planned_steps(config.trainer, data))


def _validate_devices(trainer: Namespace, machine: Machine, name: str) -> None:
    """Check that ``devices`` and ``num_nodes``, unless they have their defaults, agree with the machine."""
    nodes, per_node = trainer.num_nodes, requested_devices(trainer.devices)
    if per_node is None:
        if nodes in (1, machine.nodes):
            return
        per_node = machine.per_node
    if per_node != machine.per_node or nodes != machine.nodes:
        raise UserError(
            f"--devices_like is {name}, with {pluralize(machine.nodes, 'node')} of {machine.per_node} devices, but "
            f"--trainer.num_nodes is {nodes} and --trainer.devices is {trainer.devices}; omit them, or use "
            f"--trainer.num_nodes {machine.nodes} --trainer.devices {machine.per_node}"
        )


def _training_setup(
    config: Namespace, model: LanguageModel, data: PackedText, machine: Machine, vocab_size: int
) -> TrainingSetup:
    """Collect what determines memory and speed.

    Args:
        config: The flags, with instantiated classes.
        model: The task.
        data: The data module.
        machine: The machine.
        vocab_size: Number of token ids.
    """
    trainer = config.trainer
    precision = normalize_precision(trainer.precision)
    if precision not in WEIGHT_DTYPES:
        raise UserError(
            f"--trainer.precision is {precision}, which --devices_like does not support; use one of "
            f"{', '.join(WEIGHT_DTYPES)}"
        )
    strategy, size, groups = _resolve_layout(
        trainer.strategy, config.tensor_parallel, config.hsdp_groups, config.cpu_offload, machine
    )
    if config.cpu_offload:
        validate_cpu_offload(size, precision)
    data_parallel = machine.devices // size
    accumulate = int(trainer.accumulate_grad_batches)
    if data.tokens_per_step is not None:
        accumulate = data.micro_batches_per_step(data_parallel)
    return TrainingSetup(
        config=model.gpt,
        vocab_size=vocab_size,
        block_size=data.block_size,
        batch_size=data.batch_size,
        accumulate=accumulate,
        precision=precision,
        strategy=strategy,
        tensor_parallel=size,
        checkpointing=model.activation_checkpointing,
        optimizer=model.optimizer,
        averaged=model.ema.decay is not None,
        clips=bool(trainer.gradient_clip_val),
        machine=machine,
        groups=groups,
        cpu_offload=config.cpu_offload,
        max_logits_mb=model.max_logits_mb or MAX_LOGITS_MB_ACCELERATOR,
    )


def _resolve_layout(
    strategy: object, tensor_parallel: int | None, groups: int | None, cpu_offload: bool, machine: Machine
) -> tuple[StrategyName, int, int]:
    """Return the name of the strategy, the size of a tensor-parallel group, and the number of groups of ``hsdp``.

    Raises:
        UserError: The strategy is not supported, or the number of devices is not divisible by the sizes.
    """
    resolve_strategy(strategy, tensor_parallel, groups, cpu_offload)  # checks that they agree
    built = build_named_strategy(strategy)
    if isinstance(built, ModelParallel):
        size = divide_processes(machine.devices, built.tensor_parallel_size)
        if built.groups != 1:
            return "hsdp", size, divide_replicas(machine.devices // size, built.groups or machine.nodes)
        return "fsdp2" if size == 1 else "tp" if size == machine.devices else "fsdp2_tp", size, 1
    if isinstance(built, DDPStrategy) or str(strategy).startswith("ddp") or strategy == "auto":
        return ("ddp" if machine.devices > 1 else "single"), 1, 1
    names: dict[str, StrategyName] = {"fsdp2": "fsdp2", "hsdp": "hsdp", "tp": "tp", "fsdp2_tp": "fsdp2_tp"}
    if str(strategy) not in names:
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise UserError(
            f"--trainer.strategy is {name}, which --devices_like does not support; use one of ddp, {', '.join(names)}"
        )
    name = names[str(strategy)]
    size = divide_processes(machine.devices, tensor_parallel or TENSOR_PARALLEL_SIZES[name])
    return name, size, divide_replicas(machine.devices // size, groups or machine.nodes) if name == "hsdp" else 1


def _vocabulary(config: Namespace, data: PackedText) -> tuple[int, str]:
    """Return the number of token ids and where it is from, without reading the text."""
    arguments = config.data.init_args
    if data.mixture_folders:
        return data.vocab_size, "of the token stores"
    tokenizer = arguments.get("tokenizer")
    if tokenizer is not None and tokenizer not in TOKENIZER_KINDS:
        return Tokenizer.load(Path(tokenizer).expanduser()).vocab_size, "of --data.tokenizer"
    if arguments.get("vocab_size") is not None:
        return int(arguments.vocab_size), "of --data.vocab_size"
    if data.store_folder is not None and data.store_folder.is_dir():
        return TokenStore.open(data.store_folder).vocab_size, "of --data.store"
    published = published_vocab_size(config.preset or "")
    if published is not None:
        return published, "of the published model; use its tokenizer with --data.tokenizer, or set --data.vocab_size"
    return DEFAULT_VOCAB_SIZE, "by default"


def _planned_steps(trainer: Namespace, data: PackedText) -> int | None:
    """Return the number of steps, or None if it depends on the text or the time, or if the sizes of steps grow."""
    if trainer.max_steps in (None, -1) or trainer.max_epochs not in (None, -1):
        return None
    grows = data.block_size_stages is not None or data.tokens_per_step_stages is not None
    return None if grows else int(trainer.max_steps)


def _lines(setup: TrainingSetup, sizes: LayoutSizes, origin: str, steps: int | None) -> Iterator[tuple[str, str]]:
    machine, accelerator = setup.machine, setup.machine.accelerator
    network = f", {8e-9 * accelerator.network_bandwidth:.0f} Gb/s between nodes" if machine.nodes > 1 else ""
    yield (
        "device",
        f"{machine}, each with {format_bytes(accelerator.memory)} at {format_bytes(accelerator.memory_bandwidth)}/s, "
        f"{1e-12 * accelerator.tensor_core_flops:,.0f} TFLOP/s in 16 bits, {format_bytes(accelerator.link_bandwidth)}"
        f"/s between devices{network}; {setup.precision}",
    )
    total = sizes.parameters.total()
    parts = ", ".join(f"{part} {format_count(n)}" for part, n in sizes.parameters.items())
    yield "model", f"{format_count(total)} parameters: {parts}; {setup.vocab_size:,} tokens {origin}"
    described = (
        f"{rule} {format_count(n)} in {sizes.groups[rule, name, 'tensors']:,} {name}"
        for (rule, name, kind), n in sizes.groups.most_common()
        if kind == "parameters"
    )
    remarks = {"state in bfloat16": setup.bf16_state, "moving average": setup.averaged}
    yield "optimizer", "; ".join([*described, *(remark for remark, applies in remarks.items() if applies)])
    yield "layout", _describe_layout(setup, sizes)
    yield (
        "batch",
        f"{pluralize(setup.batch_size, 'row')} of {setup.block_size:,} tokens on each of "
        f"{pluralize(setup.data_parallel, 'replica')}, {setup.accumulate:,} "
        f"micro-batch{'es' if setup.accumulate > 1 else ''} per step: {setup.tokens_per_step:,} tokens",
    )
    memory = rank_memory(setup, sizes)
    names = MEMORY_NAMES | ({"gathered": BUCKETS} if setup.strategy == "ddp" else {})
    held = ", ".join(f"{names.get(part, part)} {format_bytes(n)}" for part, n in memory.items())
    yield "memory", f"up to {format_bytes(memory.total())} of {format_bytes(accelerator.memory)} per device: {held}"
    if setup.cpu_offload:
        per_node = sizes.local.total() * min(setup.machine.devices, setup.machine.per_node)
        parts = ", ".join(f"{part} {format_bytes(n)}" for part, n in sizes.local.items() if n)
        yield "host", f"at least {format_bytes(per_node)} of memory per node; for each device {parts}"
    saved = sizes.whole.total() - sizes.whole["gradients"]
    yield (
        "checkpoint",
        f"{format_bytes(saved)} in one file, {format_duration(saved / WRITE_BANDWIDTH)} at "
        f"{format_bytes(WRITE_BANDWIDTH)}/s; rank 0 collects it in the memory of its host",
    )
    if setup.cpu_offload:
        yield "time", "not predicted, because the update on the CPU and the copies from and to it are not modelled"
        yield from _memory_warnings(setup, memory.total())
        return
    time = predict_step(setup, sizes)
    yield "step", _describe_step(time)
    yield "time", _describe_speed(setup, sizes, time, steps)
    yield from _memory_warnings(setup, memory.total())
    yield from _time_warnings(setup, time)


def _describe_layout(setup: TrainingSetup, sizes: LayoutSizes) -> str:
    if setup.strategy in ("single", "ddp"):
        ranks = pluralize(setup.machine.devices, "rank")
        return f"{setup.strategy}: {ranks}, each with all {format_count(sizes.parameters.total())} parameters"
    local = sizes.local["weights"] / setup.weight_bytes
    groups = f" in {setup.groups} groups with all weights" if setup.groups > 1 else ""
    return (
        f"{setup.strategy}: {setup.data_parallel} x {setup.tensor_parallel} ranks (data x tensor parallel){groups}, "
        f"each with {format_count(local)} parameters; built as rank 0 without memory"
    )


def _describe_step(time: StepTime) -> str:
    parts = {
        "matmuls": time.matmuls,
        "attention": time.attention,
        "memory-bound operations": time.memory_bound,
        "communication": time.communication,
        "optimizer": time.optimizer,
    }
    shares = ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in parts.items())
    return f"{_milliseconds(time.total)} predicted: {shares}; each rank sends {format_bytes(time.sent_bytes)}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if seconds >= 0.01 else 2}f} ms"


def _describe_speed(setup: TrainingSetup, sizes: LayoutSizes, time: StepTime, steps: int | None) -> str:
    per_second = setup.tokens_per_step / time.total
    speed = (
        f"{format_count(1 / time.total)} steps and {per_second:,.0f} tokens per second, "
        f"{per_second / setup.machine.devices:,.0f} per device, MFU {utilization(setup, sizes, time.total):.0%}"
    )
    if steps is None:
        return speed
    tokens = format_count(steps * setup.tokens_per_step)
    return (
        f"{speed}; about {format_duration(steps * time.total)} for {pluralize(steps, 'step')} of {tokens} tokens in all"
    )


def _memory_warnings(setup: TrainingSetup, needed: float) -> Iterator[tuple[str, str]]:
    """Yield a warning if the run does not fit, with flags that help."""
    memory = setup.machine.accelerator.memory
    if needed > memory:
        problem = f"up to {format_bytes(needed)} do not fit in the {format_bytes(memory)} of a device"
        found = suggest_flags(setup)
        if found is None:
            yield (
                "warning",
                f"{problem}, nor with fsdp2, activation checkpointing, one row, tensor parallelism and everything in "
                "bfloat16 together, nor with CPU offload; use more devices, a smaller --data.block_size or a smaller "
                "model",
            )
        else:
            flags = " ".join(f"{flag} {value}" for flag, value in found[0].items())
            yield "warning", f"{problem}; {format_bytes(found[1])} fit with {flags}"


def _time_warnings(setup: TrainingSetup, time: StepTime) -> Iterator[tuple[str, str]]:
    """Yield a warning for each reason why the run is slow, or why the prediction may be wrong."""
    if setup.tensor_parallel > setup.machine.per_node:
        yield (
            "warning",
            f"tensor_parallel is {setup.tensor_parallel}, but a node has {setup.machine.per_node} devices: every block "
            f"waits for the network; use --tensor_parallel {setup.machine.per_node} or less",
        )
    if setup.strategy == "ddp" and time.optimizer > MAX_OPTIMIZER_SHARE * time.total:
        yield (
            "warning",
            f"the optimizer takes {time.optimizer / time.total:.0%} of the step, because with ddp every rank updates "
            "all weights; use --trainer.strategy fsdp2, which distributes this, or more tokens per step",
        )
    if time.total / setup.accumulate < LAUNCH_BOUND_SECONDS:
        yield (
            "warning",
            f"micro-batches of {_milliseconds(time.total / setup.accumulate)} are too short for this prediction, which "
            "leaves out kernel launches: expect less; use a larger --data.batch_size",
        )
