"""Parsing of sweep files, and the fit commands they produce."""

from pathlib import Path

import pytest

pytest.importorskip("optuna")

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments, experiment_name, tokens_to_steps
from lit_gpt_scratch.sweeps.search_space import NumericRange
from lit_gpt_scratch.sweeps.sweep_config import SweepConfig, load_sweep

EXAMPLE = """
# Which position encoding is best,
# and at which learning rate?
base: [base.yaml]
fixed: {trainer.max_steps: 200, trainer.accelerator: cpu}
vary:
  model.gpt.position: [learned, rotary]
  model.optimizer.lr: {low: 1e-4, high: 1e-2, log: true}
method: tpe
trials: 8
seeds: [1, 2]
metric: val/loss
direction: minimize
pruning: {MedianPruner: {n_startup_trials: 2}}
""".lstrip()


@pytest.fixture
def sweep_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("trainer:\n  log_every_n_steps: 5\n")
    return tmp_path / "sweep.yaml"


def load_text(path: Path, text: str) -> SweepConfig:
    path.write_text(text)
    return load_sweep(path)


def test_example(sweep_path: Path) -> None:
    sweep = load_text(sweep_path, EXAMPLE)
    assert sweep.question == "Which position encoding is best, and at which learning rate?"
    assert sweep.vary["model.optimizer.lr"] == NumericRange("model.optimizer.lr", 1e-4, 1e-2, log=True)
    assert sweep.n_trials == 8
    assert sweep.baseline_assignment == {"model.gpt.position": "learned", "model.optimizer.lr": pytest.approx(1e-3)}
    given = build_arguments(sweep, {"model.gpt.position": "rotary", "model.optimizer.lr": 0.002}, ResolvedBaseline())
    assert given == [
        "--config=base.yaml", "--trainer.max_steps=200", "--trainer.accelerator=cpu", "--model.gpt.position=rotary",
        "--model.optimizer.lr=0.002",
    ]  # fmt: skip


def test_grid_of_two_dimensions(sweep_path: Path) -> None:
    before = load_text(sweep_path, "vary:\n  a: [1, 2]\n")
    after = load_text(sweep_path, "vary:\n  a: [1, 2]\n  b: [x, y, z]\n")
    assert before.n_trials == 2
    assert after.predefined_assignments == [{"a": a, "b": b} for a in "12" for b in "xyz"]


def test_choices_of_flag_sets_and_classes(sweep_path: Path) -> None:
    sweep = load_text(
        sweep_path,
        "vary:\n"
        "  norm:\n    pre: {}\n    post: {model.gpt.norm_placement: post, model.schedule.warmup_steps: 0}\n"
        "  model.optimizer:\n  - AdamW\n  - {class_path: Muon, init_args: {lr: 0.02}}\n"
        "  model.gpt.attention: [null, mine.Own]\n",
    )
    [*_, last] = sweep.predefined_assignments
    assert last == {"norm": "post", "model.optimizer": "Muon (lr 0.02)", "model.gpt.attention": "mine.Own"}
    assert build_arguments(sweep, last, ResolvedBaseline()) == [
        "--model.gpt.norm_placement=post", "--model.schedule.warmup_steps=0",
        '--model.optimizer={"class_path": "Muon", "init_args": {"lr": 0.02}}', "--model.gpt.attention=mine.Own",
    ]  # fmt: skip
    assert build_arguments(sweep, sweep.baseline_assignment, ResolvedBaseline()) == [
        "--model.optimizer=AdamW"
    ]  # null drops the flag


@pytest.mark.parametrize(
    ("space", "grid", "middle"),
    [
        ({"low": 1, "high": 5, "step": 2}, [1, 3, 5], 3),
        ({"low": 0.1, "high": 0.4, "step": 0.1}, [0.1, 0.2, 0.3, 0.4], 0.3),
        ({"low": 0.0, "high": 1.0, "step": 0.4}, [0.0, 0.4, 0.8], 0.4),
        ({"low": 1e-4, "high": 1e-2, "log": True}, [], 1e-3),
        ({"low": 0.0, "high": 1.0}, [], 0.5),
    ],
)
def test_numeric_range(space: dict[str, float], grid: list[float], middle: float) -> None:
    each = NumericRange("x", **space)  # type: ignore[arg-type]  # as the file gives them
    assert each.grid() == grid
    assert each.baseline == pytest.approx(middle)
    assert not grid or each.baseline in grid
    assert all(map(each.contains, [each.baseline, *grid]))
    assert not any(map(each.contains, [each.high + 1, each.low - 1, "x"]))


@pytest.mark.parametrize(
    ("budget", "flags", "replicas", "expected"),
    [
        (1e6, {"data.tokens_per_step": 4096}, 8, 244),
        (1e6, {"data.batch_size": 8, "data.block_size": 256, "trainer.accumulate_grad_batches": 2}, 2, 122),
        (1, {"data.tokens_per_step": 4096}, 1, 1),
    ],
)
def test_tokens_to_steps(budget: float, flags: dict[str, int], replicas: int, expected: int) -> None:
    assert tokens_to_steps(budget, flags, replicas) == expected


def test_token_budget_depends_on_batch_size(sweep_path: Path) -> None:
    sweep = load_text(sweep_path, "vary: {data.batch_size: [4, 16]}\nbudget: {tokens: 64000}\n")
    known = ResolvedBaseline({"data.batch_size": 8, "data.block_size": 100, "trainer.accumulate_grad_batches": 1})
    found = [build_arguments(sweep, each, known)[-1] for each in sweep.predefined_assignments]
    assert found == ["--trainer.max_steps=160", "--trainer.max_steps=40"]
    minutes = load_text(sweep_path, "vary: {a: [1]}\nbudget: {minutes: 90.5}\n")
    assert (
        build_arguments(minutes, minutes.baseline_assignment, ResolvedBaseline())[-1]
        == "--trainer.max_time=00:01:30:30"
    )


def test_fingerprint_and_experiment_name(sweep_path: Path) -> None:
    sweep = load_text(sweep_path, EXAMPLE)
    assert (
        load_text(sweep_path, "# Why not?\n" + EXAMPLE.replace("trials: 8", "trials: 9")).fingerprint
        == sweep.fingerprint
    )
    for changed in (
        EXAMPLE.replace("val/loss", "val/x"),
        EXAMPLE.replace("learned, ", ""),
        EXAMPLE.replace("200", "201"),
    ):
        assert load_text(sweep_path, changed).fingerprint != sweep.fingerprint
    first = build_arguments(sweep, sweep.baseline_assignment, ResolvedBaseline())
    name = experiment_name(sweep, sweep.baseline_assignment, first, 1)
    assert name.startswith("learned_0.001_seed_1_")
    assert name != experiment_name(sweep, sweep.baseline_assignment, first, 2)
    Path("base.yaml").write_text("trainer:\n  log_every_n_steps: 6\n")
    assert load_sweep(sweep_path).fingerprint != sweep.fingerprint
    assert name != experiment_name(sweep, sweep.baseline_assignment, first, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "with at least the key vary"),
        ("vary: {a: [1]}\nmetrik: x\n", "unknown key metrik; the closest match is metric"),
        ("vary: {}\n", "vary is empty; it must contain at least one flag"),
        ("vary: {a: []}\n", "vary: a has no choices; list at least one"),
        ("vary: {a: 3}\n", "vary: a is 3; it must be a list"),
        ("vary: {a: [1, 1]}\n", "vary: a lists 1 more than once"),
        ("vary: {a: {low: 1, high: 1}}\n", "low is 1 and high is 1; low must be less than high"),
        ("vary: {a: {low: 0, high: 1, log: true}}\n", "low is 0; it must be positive"),
        ("vary: {a: {low: x, high: 1}}\n", "low is x; it must be a number"),
        ("vary: {a: {low: 1, high: 2, sep: 1}}\n", "a range consists of low, high, and optionally log and step"),
        ("vary: {a: {low: 1, high: 2.5}}\n", "a range without a step, which grid search cannot enumerate"),
        ("vary: {a: {b: 3}}\n", "it must be a mapping of flags to values"),
        ("vary: {a: [1]}\nbase: [no.yaml]\n", "base: config file no.yaml not found"),
        ("vary: {a: [1]}\nmethod: magic\n", "method is magic; it must be one of grid, random, tpe"),
        ("vary: {a: [1]}\nmethod: tpe\n", "trials is None; method tpe requires a positive number of trials"),
        ("vary: {a: [1]}\ntrials: 4\n", "grid search runs every combination"),
        ("vary: {a: [1]}\nseeds: []\n", "seeds are []"),
        ("vary: {a: [1]}\nseeds: [1, 1]\n", "they must be distinct"),
        ("vary: {a: [1]}\nseeds: [x]\n", "they must be integers"),
        ("vary: {a: [1]}\ndirection: up\n", "direction is up"),
        ("vary: {a: [1]}\npruning: Magic\n", "pruning is Magic; it must be one of"),
        ("vary: {a: [1]}\npruning: {MedianPruner: {n: 3}}\n", "valid arguments are n_startup_trials"),
        ("vary: {a: [1]}\nbudget: {money: 3}\n", "budget is money; it must be one of steps, tokens, minutes"),
        ("vary: {a: [1]}\nbudget: {steps: 3, tokens: 4}\n", "both set trainer.max_steps"),
        ("vary: {a: [1]}\nbudget: {steps: 0}\n", "it must be positive"),
        ("vary: {trainer.max_steps: [1]}\nbudget: {steps: 3}\n", "which is also listed under fixed or vary"),
        ("vary: {a: [1]}\nfixed: {a: 2}\n", "a is listed under both fixed and vary"),
        ("vary: {seed_everything: [1]}\n", "seed_everything is set by the sweep; use seeds instead"),
        ("vary: {runs: [x]}\n", "runs is set by the sweep"),
        ("vary: {a: [1]}\nbaseline: {b: 1}\n", "baseline: b is not listed under vary"),
        ("vary: {a: [1]}\nbaseline: {a: 2}\n", "baseline: a is 2; it must be one of the settings under vary"),
        ("vary: [1]\n", "vary is [1]; it must be a mapping"),
        ("vary: {a: [1\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_invalid_sweep_file(sweep_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_text(sweep_path, text)
    assert message in str(caught.value)
    assert str(sweep_path) in str(caught.value)
