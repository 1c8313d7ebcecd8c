"""``fit --plan --devices_like``: the lines, and mistakes in flags."""

import logging

import pytest
import torch.distributed as dist

from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError

NAMES = ["device", "model", "optimizer", "layout", "batch", "memory", "checkpoint", "step", "time"]
SMALL = ["--plan", "--model.gpt.n_head=4", "--model.gpt.n_embd=32", "--data.source=no/such/folder"]


def plan(caplog: pytest.LogCaptureFixture, *flags: str) -> dict[str, str]:
    """Return the lines of a plan, keyed by name; several warnings are joined."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"), pytest.raises(SystemExit) as ended:
        FitCLI(list(flags))
    assert ended.value.code == 0
    assert not dist.is_initialized()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lit_gpt_scratch")]
    lines: dict[str, str] = {}
    for message in messages:
        name = message[:11].strip()
        lines[name] = f"{lines[name]}\n{message[12:]}" if name in lines else message[12:]
    return lines


def test_plan_of_llama3_8b_on_eight_h200(caplog: pytest.LogCaptureFixture) -> None:
    """The text does not exist, and the weights would not fit in this machine."""
    flags = ["--trainer.strategy=fsdp2", "--data.block_size=8192", "--data.batch_size=1", "--model.optimizer=AdamW"]
    lines = plan(caplog, "--plan", "--preset=llama3_8b", "--devices_like=8xh200", "--data.source=no/such", *flags)
    assert list(lines) == NAMES
    assert lines["device"].startswith("8 x H200 SXM, each with 141 GB at 4.8 TB/s, 989 TFLOP/s")
    assert lines["device"].endswith("bf16-mixed")
    assert lines["model"].startswith("8.03 G parameters")
    assert "128,256 tokens of the published model" in lines["model"]
    assert "each with 1 G parameters" in lines["layout"]
    assert lines["batch"].endswith("1 micro-batch per step: 65,536 tokens")
    assert "weights 4.02 GB, gradients 4.02 GB, optimizer 8.03 GB" in lines["memory"]
    assert lines["checkpoint"].startswith("96.4 GB in one file, 0:48 at 2 GB/s")
    assert "MFU" in lines["time"]
    assert "for 900 steps of 59 M tokens" in lines["time"]


@pytest.mark.slow
def test_what_does_not_fit_is_reported_with_the_flags_that_help(caplog: pytest.LogCaptureFixture) -> None:
    lines = plan(caplog, "--plan", "--preset=llama3_8b", "--devices_like=8xh200", "--data.batch_size=1")
    assert lines["layout"].startswith("ddp: 8 ranks, each with all 8.03 G parameters")
    caplog.clear()
    hopeless = plan(caplog, *SMALL, "--model.gpt.n_layer=9999", "--model.gpt.n_embd=8192", "--devices_like=2xl40s")
    assert "use more devices, a smaller --data.block_size or a smaller model" in hopeless["warning"]


def test_cpu_offload_is_counted_in_the_memory_of_the_host(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--trainer.strategy=fsdp2", "--model.optimizer=AdamW", "--cpu_offload=true"]
    lines = plan(caplog, "--plan", "--preset=llama3_8b", "--devices_like=2x8xh200", *flags)
    assert "optimizer" not in lines["memory"]
    assert lines["host"].startswith(
        "at least 64.2 GB of memory per node; for each device weights 2.01 GB"
    )  # 16 B per weight
    assert lines["time"].startswith("not predicted")
    assert "step" not in lines


def test_small_networks_are_bound_by_launches(caplog: pytest.LogCaptureFixture) -> None:
    lines = plan(caplog, *SMALL, "--devices_like=1xh100", "--model.ema_decay=0.9", "--data.vocab_size=300")
    assert "leaves out kernel launches" in lines["warning"]
    assert lines["layout"].startswith("single: 1 rank")
    assert "moving average" in lines["optimizer"]
    assert "300 tokens of --data.vocab_size" in lines["model"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--devices_like=8x"], "--devices_like is 8x; use COUNTxNAME"),
        (["--devices_like=8xh900"], "h900 is unknown; use one of a100_40gb"),
        (["--devices_like=8xh100", "--trainer.devices=4"], "--trainer.devices is 4; omit them"),
        (["--devices_like=16xh100", "--trainer.devices=8"], "--trainer.num_nodes is 1 and --trainer.devices is 8"),
        (["--devices_like=8xh100", "--trainer.num_nodes=2"], "--trainer.num_nodes is 2"),
        (["--devices_like=8xh100", "--tensor_parallel=2"], "not supported with --trainer.strategy auto"),
        (
            ["--devices_like=8xh100", "--trainer.strategy=fsdp2_tp", "--tensor_parallel=3"],
            "tensor_parallel is 3, but there are 8 processes",
        ),
        (["--devices_like=8xh100", "--trainer.strategy=tp"], "model.gpt.n_head is 4, which is not divisible by 8"),
        (["--devices_like=8xh100", "--trainer.strategy=deepspeed"], "--trainer.strategy is deepspeed"),
        (["--devices_like=8xh100", "--trainer.precision=64-true"], "--trainer.precision is 64-true"),
        (
            ["--devices_like=8xh100", "--trainer.strategy=fsdp2", "--cpu_offload=true", "--trainer.precision=16"],
            "--trainer.precision 16-mixed does not support",
        ),
        (
            [
                "--devices_like=8xh100",
                "--trainer.strategy=hsdp",
                "--hsdp_groups=2",
                "--tensor_parallel=2",
                "--cpu_offload=true",
            ],
            "which tensor parallelism does not support",
        ),
        (["--devices_like=8xh100", "--data.tokens_per_step=1000"], "not a multiple of the 16384 tokens"),
        (["--devices_like=8xh100", "--model.lora.rank=8"], "does not support model.lora"),
        (["--devices_like=8xh100", "--data.tokenizer=no/such.json"], "no/such.json"),
    ],
)
def test_mistakes(flags: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        FitCLI([*SMALL, *flags])
    assert expected in str(error.value)


def test_devices_like_requires_plan() -> None:
    with pytest.raises(UserError, match="--plan is not set; add --plan"):
        FitCLI(["--devices_like=8xh100"])
    with pytest.raises(UserError, match="with LanguageModel and PackedText, but not DPO and Preferences"):
        FitCLI(["--plan", "--devices_like=8xh100", "--model=DPO", "--data=Preferences", "--data.source=no/such"])
