"""Hardware configs combine with any experiment, and those this machine supports train."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.end_to_end.conftest import Command

ROOT = Path(__file__).parents[2]
HARDWARE = sorted((ROOT / "experiments/hardware").glob("*.yaml"))


@pytest.fixture(scope="module")
def printed() -> dict[tuple[Path, ...], Any]:
    """Configs that were printed, keyed by the files that they combine."""
    return {}


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_config_changes_only_hardware_flags(
    command: Command, printed: dict[tuple[Path, ...], Any], path: Path
) -> None:
    """Combined with an experiment whose step these devices can share."""
    experiment = ROOT / "experiments/pretrain/gpt2_124m.yaml"
    for files in ((experiment,), (experiment, path)):
        if files not in printed:
            flags = [f"--config={file}" for file in files]
            printed[files] = yaml.safe_load(command("fit", *flags, "--print_config").out)
    alone, composed = printed[(experiment,)], printed[experiment, path]
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
