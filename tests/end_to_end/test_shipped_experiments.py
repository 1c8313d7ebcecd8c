"""The configs in ``experiments/`` are valid, and their runs start."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from lit_gpt_scratch.cli.sweep_precheck import check_sweep
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments
from lit_gpt_scratch.sweeps.search_space import format_label
from lit_gpt_scratch.sweeps.sweep_config import SweepConfig, load_sweep
from tests.end_to_end.conftest import Command

ROOT = Path(__file__).parents[2]
PRETRAIN = sorted(path.relative_to(ROOT) for path in ROOT.glob("experiments/pretrain/*.yaml"))
SWEEPS = sorted(
    path.relative_to(ROOT)
    for folder in ("ablations", "scaling", "sweeps")
    for path in (ROOT / "experiments" / folder).glob("*.yaml")
    if "vary" in yaml.safe_load(path.read_text())
)
TINY = ["--model.gpt.n_layer=2", "--model.gpt.n_head=4", "--model.gpt.n_embd=32", "--model.gpt.ffn_dim=64"]


@pytest.fixture(scope="module")
def two_steps(corpus: Path, cache: Path) -> list[str]:
    """Flags that make any experiment take a second."""
    return [
        f"--data.source={corpus}", f"--data.cache={cache}", "--data.validation_share=0.1", "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.block_size=32", "--model.compile=false",
        "--trainer.val_check_interval=2", "--runs=runs",
    ]  # fmt: skip


def load_from_root(path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    """Load a sweep file from the root of the repository."""
    with monkeypatch.context() as at_the_root:
        at_the_root.chdir(ROOT)
        return load_sweep(path)


def absolute(given: list[str]) -> list[str]:
    return [each.replace("--config=", f"--config={ROOT}/") for each in given]


def assert_starts(command: Command, flags: list[str]) -> None:
    outcome = command("fit", *flags)
    assert outcome.code == 0, outcome.err
    [summary] = Path("runs").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["step"] == 2


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_a_pretraining_experiment_starts(command: Command, two_steps: list[str], path: Path) -> None:
    """With its own settings, except for a small model."""
    narrow = [] if path.stem == "laptop" else [*TINY, "--data.batch_size=2", "--data.tokens_per_step=128"]
    shape = ["--model.gpt.head_dim=8", "--model.gpt.n_kv_head=2"] if path.stem == "llama_shaped" else []
    vocabulary = [] if path.stem == "laptop" else ["--data.vocab_size=300"]
    assert_starts(command, ["--config", str(ROOT / path), *two_steps, *narrow, *shape, *vocabulary])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_fit_accepts_every_setting_of_a_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert sweep.question
    assert len(sweep.seeds) >= (
        3 if sweep.scaling is None else 2
    )  # the points of a law are not compared with each other
    known = check_sweep(sweep)
    for assignment in sweep.predefined_assignments:
        assert any(each.startswith("--config=") for each in build_arguments(sweep, assignment, known))


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_setting_of_a_sweep_runs(
    command: Command, two_steps: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_from_root(path, monkeypatch)
    # A vocabulary of 4,000 needs more text than the corpus of the other tests.
    source = [f"--data.source={ROOT}/lit_gpt_scratch/**/*.py"] if path.stem == "tokenizers" else []
    ends = [f"{name}={setting}" for name, each in sweep.vary.items() for setting in each.example_settings()]
    for name, each in sweep.vary.items():
        for setting in each.example_settings():
            flags = build_arguments(
                sweep, sweep.baseline_assignment | {name: setting}, ResolvedBaseline({"data.tokens_per_step": 1})
            )
            experiment = f"--experiment=trial_{ends.index(f'{name}={setting}')}"
            outcome = command("fit", *absolute(flags), *two_steps, *source, experiment)
            assert outcome.code == 0, (format_label(setting), outcome.err)
    assert len(list(Path("runs").glob("*/*/summary.json"))) == len(ends)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vary: {model.gpt.positon: [rotary]}", "vary: fit has no flag model.gpt.positon; the closest match is model"),
        ("vary: {model.gpt.n_layer: [2]}\nfixed: {trainer.max_stps: 3}", "fixed: fit has no flag trainer.max_stps"),
        ("vary: {model.gpt.position: [rotary, sideways]}", "--model.gpt.position: expected one of"),
        ("vary: {model.optimizer: [{class_path: Nope}]}", "class Nope not found"),
        ("vary: {model.gpt.n_head: [7]}", "model.gpt.n_embd (192) is not divisible by model.gpt.n_head (7)"),
        ("vary: {data.batch_sizes: {low: 1, high: 4}}\nmethod: random\ntrials: 2", "closest match is data.batch_size"),
    ],
)  # fmt: skip
def test_flags_that_fit_rejects(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        check_sweep(load_sweep(path))
    assert expected in str(caught.value)
