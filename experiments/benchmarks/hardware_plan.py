"""Predictions of ``fit --plan --devices_like`` next to published figures, as the tables in the hardware page.

    python experiments/benchmarks/hardware_plan.py

No figure is measured here: the model is that of ``profiling.step_time``, and the references are in ``PUBLISHED``. The
settings are those of the sources as far as this package has them; each deviation is in the notes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import yaml

from lit_gpt_scratch.callbacks.progress import format_bytes
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.presets import PRESETS
from lit_gpt_scratch.optim import AdamW
from lit_gpt_scratch.profiling.accelerators import Machine, parse_machine
from lit_gpt_scratch.profiling.layout_sizes import TrainingSetup, measure_layout, rank_memory, suggest_flags
from lit_gpt_scratch.profiling.step_time import predict_step, utilization
from lit_gpt_scratch.text.markdown import format_markdown_table

LLAMA3 = PRESETS["llama3_8b"]
LLAMA3_70B = PRESETS["llama3_70b"]
LLAMA2 = replace(
    LLAMA3, n_kv_head=32, ffn_dim=11_008, rotary_scaling=None, rotary_factor=1.0, rotary_trained_context=None,
    rotary_slow=None, rotary_fast=None,
)  # fmt: skip
LLAMA2_70B = replace(LLAMA2, n_layer=80, n_embd=8192, n_head=64, n_kv_head=8, ffn_dim=28_672)
OLMO2 = replace(LLAMA2, qk_norm=True, qk_norm_joint=True, norm_placement="output")

# torchtitan's H100 have HBM2e and a power limit of 500 W; the peak of the ordinary H100 is kept, as its authors do.
H100_HBM2E = parse_machine("8xh100")
H100_HBM2E = H100_HBM2E._replace(accelerator=H100_HBM2E.accelerator._replace(memory=96e9, memory_bandwidth=2.4e12))


class Published(NamedTuple):
    """Published throughput of a training run.

    Attributes:
        name: Name to display, with its deviation from the source in parentheses.
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: Tokens per row.
        rows: Rows per micro-batch and GPU.
        machine: The machine.
        checkpointing: What each block stores for the backward pass.
        figures: Lowest and highest published tokens per second and GPU.
    """

    name: str
    config: GPTConfig
    vocab_size: int
    block_size: int
    rows: int
    machine: Machine
    checkpointing: ActivationCheckpointing
    figures: tuple[int, int]


PUBLISHED: Final = [
    Published("torchtitan 8B, no checkpointing", LLAMA3, 128_256, 8192, 2, H100_HBM2E, False, (6667, 6667)),
    Published("torchtitan 8B, keep_matmuls", LLAMA3, 128_256, 8192, 2, H100_HBM2E, "keep_matmuls", (6667, 6667)),
    Published("torchtitan 8B, full checkpointing", LLAMA3, 128_256, 8192, 2, H100_HBM2E, True, (6667, 6667)),
    Published("OLMo-core 7B", OLMO2, 100_352, 4096, 2, parse_machine("64xh100"), False, (9700, 10_000)),
    Published("fms-fsdp 7B", LLAMA2, 32_000, 4096, 2, parse_machine("128xa100"), False, (3760, 3760)),
    Published("fms-fsdp 70B", LLAMA2_70B, 32_000, 4096, 6, parse_machine("128xa100"), True, (380, 380)),
]


def make_setup(config: GPTConfig, vocab_size: int, block_size: int, machine: Machine) -> TrainingSetup:
    """Return a run with FSDP2, AdamW, ``bf16-mixed`` and one row per rank."""
    return TrainingSetup(
        config=config, vocab_size=vocab_size, block_size=block_size, batch_size=1, accumulate=1,
        precision="bf16-mixed", strategy="fsdp2", tensor_parallel=1, checkpointing=False, optimizer=AdamW(),
        averaged=False, clips=True, machine=machine,
    )  # fmt: skip


def speed(setup: TrainingSetup) -> tuple[float, float]:
    """Return the predicted tokens per second and device, and the MFU."""
    sizes = measure_layout(setup)
    seconds = predict_step(setup, sizes).total
    return setup.tokens_per_step / seconds / setup.machine.devices, utilization(setup, sizes, seconds)


def compare() -> Iterator[tuple[str, ...]]:
    """Yield the rows that compare predictions with published figures."""
    yield "run", "machine", "published", "predicted", "error", "predicted MFU"
    for run in PUBLISHED:
        setup = make_setup(run.config, run.vocab_size, run.block_size, run.machine)
        predicted, mfu = speed(replace(setup, batch_size=run.rows, checkpointing=run.checkpointing))
        errors = sorted({f"{predicted / figure - 1:+.0%}" for figure in run.figures})
        published = " to ".join(f"{figure:,}" for figure in sorted(set(run.figures)))
        yield run.name, str(run.machine), published, f"{predicted:,.0f}", " to ".join(errors), f"{mfu:.0%}"


def predict() -> Iterator[tuple[str, ...]]:
    """Yield the rows for the presets: the run as it is, and with the flags that the plan suggests."""
    yield "model", "machine", "flags", "memory per device", "tokens/s per device", "MFU", "days per T tokens"
    for name, config in {"llama3_8b": LLAMA3, "llama3_70b": LLAMA3_70B}.items():
        for machine in ("8xh200", "16xh100"):
            setup = make_setup(config, 128_256, 8192, parse_machine(machine))
            needed = rank_memory(setup, measure_layout(setup)).total()
            if needed > setup.machine.accelerator.memory and (found := suggest_flags(setup)):
                flags, needed = found
                tensor_parallel = int(flags.get("--tensor_parallel", 1))
                setup = replace(
                    setup,
                    checkpointing=yaml.safe_load(flags.get("--model.activation_checkpointing", "false")),
                    precision=flags.get("--trainer.precision", setup.precision),
                    optimizer=AdamW(bf16_state="--model.optimizer.bf16_state" in flags),
                    strategy="fsdp2_tp" if tensor_parallel > 1 else "fsdp2",
                    tensor_parallel=tensor_parallel,
                    accumulate=tensor_parallel,
                )
                shown = " ".join(f"{flag} {value}" for flag, value in flags.items())
            else:
                shown = "none needed"
            per_device, mfu = speed(setup)
            days = 1e12 / (per_device * setup.machine.devices) / 86_400
            yield name, machine, shown, format_bytes(needed), f"{per_device:,.0f}", f"{mfu:.0%}", f"{days:,.0f}"


def main() -> None:
    """Print both tables."""
    print(format_markdown_table([*compare()], "<<>>>>"))
    print()
    print(format_markdown_table([*predict()], "<<<>>>>"))


if __name__ == "__main__":
    main()
