"""Hardware configs combine with any experiment, and those this machine supports train."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.end_to_end.conftest import Command

ROOT = Path(__file__).parents[2]
HARDWARE = sorted((ROOT / "experiments/hardware").glob("*.yaml"))


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_config_changes_only_hardware_flags(command: Command, path: Path) -> None:
    """Combined with an experiment whose step these devices can share."""
    experiment = ROOT / "experiments/pretrain/gpt2_124m.yaml"
    alone, composed = (
        yaml.safe_load(command("fit", "--config", experiment, *more, "--print_config").out)
        for more in ([], ["--config", path])
    )
    trainer, data = composed["trainer"], composed["data"]["init_args"]
    for key in ("experiment", "preset", "seed_everything", "model", "data"):
        assert composed[key] == alone[key]
    assert {name for name in trainer if trainer[name] != alone["trainer"][name]} <= {
        "accelerator", "devices", "num_nodes", "strategy", "precision",
    }  # fmt: skip
    replicas = trainer["devices"] * trainer["num_nodes"] // (composed.get("tensor_parallel") or 1)
    assert data["tokens_per_step"] % (data["batch_size"] * data["block_size"] * replicas) == 0


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_available_hardware_trains(command: Command, small: list[str], path: Path) -> None:
    trainer = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
    here = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "gpu": torch.cuda.device_count()}
    if trainer["devices"] > 1:
        pytest.skip("a launcher would start the test runner again; tests of several processes start their own")
    if not here[trainer["accelerator"]]:
        pytest.skip(f"this machine has no {trainer['accelerator']}")
    flags = [flag for flag in small if not flag.startswith(("--trainer.accelerator", "--trainer.precision"))]
    outcome = command("fit", *flags, "--trainer.max_steps=2", "--config", path)
    assert outcome.code == 0, outcome.err
