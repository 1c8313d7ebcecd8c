"""All strategies compute the same, and resume each other's checkpoints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_curves, iterate_leaves, read_curves
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.resume_stress_test import compare_checkpoint_files
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.distributed.layout_parity import ARITHMETIC_CASES, LAYOUTS, LayoutParity
from lit_gpt_scratch.distributed.strategies import ModelParallel, replace_multiprocessing_launcher
from lit_gpt_scratch.errors import UserError
from tests.end_to_end import forked
from tests.end_to_end.conftest import Command
from tests.end_to_end.test_user_errors import one_line

EXPERTS = [
    *("--model.gpt.feed_forward=moe", "--model.gpt.n_shared_experts=1", "--model.gpt.expert_bias_rate=0.01"),
    "--model.gpt.router_z_loss=0.001",
]
MUP = ["--model.gpt.parametrisation=mup", "--model.gpt.mup_base_width=8"]
SHAPE = ["--model.gpt.n_head=4", "--model.gpt.initialisation=gpt2"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_layouts_compute_the_same(small: list[str], tmp_path: Path) -> None:
    """``doctor --parity``; the command itself is tested with the README's commands."""
    flags = [*small, *SHAPE, "--trainer.limit_val_batches=0", "--trainer.max_steps=50"]
    parity = LayoutParity(flags, tmp_path, list(ARITHMETIC_CASES), list(LAYOUTS))
    parity.run()
    assert not parity.violations, f"\n{parity}"
    assert parity.loss.keys() == {(name, kind) for name in LAYOUTS for kind in ARITHMETIC_CASES}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        (
            [
                "--model.gpt.sliding_window=8",
                "--model.gpt.sliding_window_pattern=2",
                "--model.gpt.attention_sinks=true",
            ],
            ["manual attention", "fsdp2_tp 4"],
        ),
        (  # each of two processes has three experts
            [
                *EXPERTS,
                "--model.gpt.n_experts=6",
                "--model.gpt.bias=true",
                "--model.gpt.expert_activation=clamped_swiglu",
            ],
            ["fsdp2_tp 4"],
        ),
    ],
    ids=["sinks", "experts with biases"],
)
def test_sinks_and_biases_are_trained_with_tensor_parallelism(
    small: list[str], tmp_path: Path, settings: list[str], layouts: list[str]
) -> None:
    """Start-up takes most of the time; ``fsdp2_tp 4`` includes the tensor parallelism of ``tp 2``."""
    flags = [*small, *SHAPE, *settings, "--trainer.limit_val_batches=0", "--trainer.max_steps=5"]
    parity = LayoutParity(flags, tmp_path, ["float64"], layouts)
    parity.run()
    assert not parity.violations, f"\n{parity}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("settings", "off", "formats"),
    [
        (["--model.optimizer=AdamW"], 1e-9, ["file"]),
        (["--model.optimizer=AdamW"], 1e-9, ["sharded"]),
        (["--model.optimizer=AdamW"], 1e-9, ["sharded", "file"]),
        # A moment that is rounded to the other neighbour in bfloat16 changes by 0.4%.
        (["--model.optimizer=AdamW", "--model.optimizer.bf16_state=true"], 1e-2, ["sharded", "file"]),
        # Muon orthogonalises in bfloat16.
        (["--model.optimizer=Muon", "--model.optimizer.row_beta=0.9"], 1e-2, ["sharded"]),
        (["--model.optimizer=AdamW", *EXPERTS], 1e-9, ["sharded", "file"]),
        (["--model.optimizer=Muon", "--model.optimizer.row_beta=0.9", *EXPERTS], 1e-2, ["sharded"]),
        (["--model.optimizer=AdamW", *MUP, *EXPERTS], 1e-9, ["file"]),
    ],
    ids=[
        *("adamw", "adamw, sharded", "adamw, alternating formats", "adamw, bfloat16 state", "normuon, sharded"),
        *("adamw, experts", "normuon, experts", "adamw, mup, experts"),
    ],
)
@pytest.mark.slow
def test_run_resumes_with_another_strategy(
    small: list[str], tmp_path: Path, settings: list[str], off: float, formats: list[str]
) -> None:
    """Weights, optimizer state and averaged weights against a run that keeps its strategy; all but two validate."""
    everywhere = [
        "--data.tokens_per_step=128", "--trainer.precision=64-true", "--model.schedule.decay=constant",
        "--model.ema_decay=0.9", "--inspect.every_n_steps=3", *settings,
    ]  # fmt: skip
    ways = [
        [],
        ["--trainer.devices=2", "--trainer.strategy=fsdp2", "--data.batch_size=2"],
        ["--trainer.devices=2", "--trainer.strategy=tp", "--tensor_parallel=2", "--data.batch_size=4"],
        # Four processes on two cores take longer to generate a sample than for all the rest.
        [
            *("--trainer.devices=4", "--trainer.strategy=fsdp2_tp", "--data.batch_size=2"),
            "--trainer.limit_val_batches=0",
        ],
        [
            *(
                "--trainer.devices=4",
                "--trainer.strategy=hsdp",
                "--tensor_parallel=null",
                "--hsdp_groups=2",
                "--data.batch_size=1",
            )
        ],
        [
            *("--trainer.devices=2", "--trainer.strategy=ddp", "--hsdp_groups=null", "--data.batch_size=2"),
            "--trainer.limit_val_batches=1.0",
        ],
        ["--trainer.devices=1", "--trainer.strategy=auto", "--data.batch_size=4"],
    ]
    steps = 3
    uninterrupted = last(
        tmp_path / "uninterrupted", *small, *SHAPE, *everywhere, f"--trainer.max_steps={steps * len(ways)}"
    )
    for turn, way in enumerate(ways, 1):
        flags = ["--ckpt_path=last"] if turn > 1 else [*small, *SHAPE, *everywhere]
        saving = [f"--checkpoint.format={formats[turn % len(formats)]}", f"--checkpoint.background={turn % 3 == 0}"]
        found = last(tmp_path / "moved", *flags, *way, *saving, f"--trainer.max_steps={steps * turn}")
        checkpoint = tmp_path / "moved" / "pretrain" / "version_0" / "checkpoints" / "last.ckpt"
        assert checkpoint.is_dir() == (formats[turn % len(formats)] == "sharded")
        assert not list(checkpoint.parent.glob("replaced-*"))
    for part in ("state_dict", "optimizer_states"):
        expected, values = dict(iterate_leaves(uninterrupted[part])), dict(iterate_leaves(found[part]))
        assert expected.keys() == values.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(values[name], value, rtol=off, atol=off * float(value.abs().max()))
    there, here = (read_curves(tmp_path / name / "pretrain" / "version_0") for name in ("uninterrupted", "moved"))
    measured = {name for name in there if re.match("dynamics|attention|loss_by", name)}
    assert len(measured) > 30
    for name in measured:  # TensorBoard keeps float32
        points = [{step: float(value.strip("[]")) for step, value in run[name]} for run in (there, here)]
        assert points[0].keys() <= points[1].keys()  # each of the others validated at its end
        assert {step: points[1][step] for step in points[0]} == pytest.approx(points[0], rel=max(off, 1e-5), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.devices=2", "--model.gpt.tied_embeddings=true"],
        ["--trainer.devices=2", "--model.train_layers=1"],
        # The input of the head requires no gradients.
        ["--trainer.devices=2", "--model.train_layers=0", "--model.gpt.norm_placement=post"],
        ["--trainer.devices=4", "--trainer.strategy=hsdp", "--hsdp_groups=2", "--trainer.accumulate_grad_batches=2"],
    ],
    ids=["tied", "frozen blocks", "only the head", "hsdp"],
)
def test_loss_in_chunks_trains_the_same_sharded_model(small: list[str], tmp_path: Path, flags: list[str]) -> None:
    layout = ["--trainer.strategy=fsdp2", "--model.optimizer=AdamW", "--trainer.precision=64-true", *flags]
    whole, chunked = (
        last(tmp_path / size, *small, *layout, "--data.batch_size=1", f"--model.max_logits_mb={size}")
        for size in ("1", "0.01")
    )
    start, expected, found = (
        run["state_dict"] for run in (last(tmp_path / "0", *small, *layout, "--trainer.max_steps=1"), whole, chunked)
    )
    assert not torch.equal(start["net.head.weight"], found["net.head.weight"])
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("optimizer", [["--model.optimizer=AdamW"], ["--model.optimizer.row_beta=0.9"]])
def test_offloaded_run_equals_one_whose_weights_stay_on_the_device(
    small: list[str], tmp_path: Path, optimizer: list[str], devices: int
) -> None:
    """Bit for bit, also after resuming; the flag --cpu_offload itself requires a GPU."""
    names = {"usual": False, "offloaded": True}
    strategy = f"{ModelParallel.__module__}.ModelParallel"
    flags = [*small, *optimizer, f"--trainer.strategy={strategy}", "--model.ema_decay=0.9"]
    for name, offload in names.items():
        own = [f"--trainer.devices={devices}", f"--trainer.strategy.cpu_offload={offload}"]
        last(tmp_path / name, *flags, *own, "--trainer.max_steps=6")
        last(tmp_path / name, *own, "--ckpt_path=last", "--trainer.max_steps=12")
    runs = [RunFolder(tmp_path / name / "pretrain" / "version_0") for name in names]
    assert compare_checkpoint_files(*runs) == {}
    assert compare_curves(*(run.path for run in runs)).keys() <= {"curve run/plan/text_summary"}


@pytest.mark.slow
def test_half_precision_trains_validates_and_generates_when_sharded(small: list[str], tmp_path: Path) -> None:
    flags = [
        "--trainer.devices=2",
        "--trainer.strategy=fsdp2",
        "--trainer.precision=bf16-mixed",
        "--model.gpt.bias=true",
    ]
    saved = last(tmp_path, *small, *flags, "--model.gpt.residual_scalars=true", "--trainer.val_check_interval=4")
    assert saved["global_step"] == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--trainer.strategy=tp", "--model.gpt.n_head=3", "--model.gpt.n_embd=48"],
            "n_head is 3, which is not divisible",
        ),
        (
            ["--trainer.strategy=fsdp2_tp", "--tensor_parallel=4", "--model.gpt.n_head=4"],
            "tensor_parallel is 4, but there are 2 processes",
        ),
        (["--trainer.strategy=tp", "--model.gpt.position=alibi"], "position is alibi"),
        (["--trainer.strategy=tp", "--model.lora.rank=2"], "model.lora is not supported with tensor parallelism"),
        (["--trainer.strategy=tp", "--model.gpt.dropout=0.1"], "dropout is 0.1"),
        (["--trainer.strategy=ddp", "--tensor_parallel=2"], "choose tp, fsdp2_tp or hsdp"),
        (["--trainer.strategy=fsdp2", "--hsdp_groups=2"], "choose hsdp, or set --hsdp_groups null"),
        (["--trainer.strategy=hsdp"], "hsdp has one machine; use fsdp2, or set --hsdp_groups"),
        (["--trainer.strategy=tp", "--model.gpt.qk_norm_joint=true"], "normalizes the heads of all processes together"),
        (["--trainer.strategy=hsdp", "--hsdp_groups=1"], "shards the model across all processes; use --trainer"),
        (["--trainer.strategy=hsdp", "--hsdp_groups=0"], "hsdp_groups is 0; it must be positive"),
        (["--trainer.strategy=hsdp", "--hsdp_groups=3"], "there are 2 data-parallel processes, which is not divisible"),
        (["--trainer.strategy=hsdp", "--hsdp_groups=2"], "there are only 2 data-parallel processes"),
    ],
)
def test_model_that_cannot_be_sharded_is_a_one_line_error(
    command: Command, small: list[str], flags: list[str], message: str
) -> None:
    one_line(command("fit", *small, "--trainer.devices=2", *flags), message)
    assert not Path("runs").exists()


LAUNCHERS = "ddp_notebook", "ddp_fork", "ddp_spawn", "ddp_notebook_find_unused_parameters_true"


@pytest.mark.parametrize("strategy", LAUNCHERS)
def test_launchers_that_fork_or_spawn_are_replaced(strategy: str) -> None:
    trainer = L.Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False)
    finds_unused = strategy.endswith("true")
    assert replace_multiprocessing_launcher(trainer.strategy) == ("spawn" if "spawn" in strategy else "fork")
    assert type(trainer.strategy.launcher) is _SubprocessScriptLauncher
    assert replace_multiprocessing_launcher(trainer.strategy) is None
    assert ("find_unused_parameters" in trainer.strategy._ddp_kwargs) == finds_unused  # type: ignore[attr-defined]


def test_processes_are_not_started_from_an_interactive_session(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(strategy="ddp_fork", devices=2, accelerator="cpu", logger=False)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(UserError, match="interactive session"):
        replace_multiprocessing_launcher(trainer.strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", LAUNCHERS)
def test_every_launcher_trains(small: list[str], tmp_path: Path, strategy: str) -> None:
    """In new interpreters, which the launcher starts."""
    flags = [*small, "--trainer.devices=2", f"--trainer.strategy={strategy}", "--data.batch_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "lit_gpt_scratch.fit", *flags, f"--runs={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "pretrain").iterdir()
    assert json.loads((run / "summary.json").read_text())["step"] == 12
    assert (run / "checkpoints/last.ckpt").is_file()


def last(runs: Path, *flags: str) -> dict[str, object]:
    """The last checkpoint of the run."""
    done = forked.fit(runs, *flags, long_samples=True)
    assert done.code == 0, done.err
    return load_checkpoint(runs / "pretrain" / "version_0" / "checkpoints" / "last.ckpt")
