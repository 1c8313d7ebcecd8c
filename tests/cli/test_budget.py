"""``fit --budget`` on a machine whose speed is given: no test measures time."""

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_gpt_scratch.cli import budget as budget_module
from lit_gpt_scratch.cli.budget import (
    LOOP_SECONDS,
    SHAPES,
    Budget,
    candidate_models,
    choose_learning_rate,
    choose_model,
    choose_tokens_per_step,
    n_heads,
    plan_length,
    read_scaling_law,
    split_batch,
)
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.profiling.flops_and_memory import build_on_meta, training_flops_per_token
from lit_gpt_scratch.profiling.timed_steps import MAX_STEPS, TimedSteps, time_steps
from lit_gpt_scratch.sweeps.scaling_law import ScalingLaw, TrainingCost, compute_optimum

LAW = ScalingLaw(E=0.6, A=30.0, B=60.0, alpha=0.34, beta=0.3)
SPEED = 5e10
"""FLOP/s of the machine."""


class FakeMachine:
    """Time of steps at a constant number of FLOPs per second; the first step takes ten seconds longer."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def time_steps(
        self, config: GPTConfig, vocab_size: int, block_size: int, batch_size: int, accumulate: int, *_: Any
    ) -> TimedSteps:
        self.calls.append((config.n_layer, config.n_embd))
        flops = training_flops_per_token(build_on_meta(config, vocab_size, block_size))
        seconds = batch_size * accumulate * block_size * flops / SPEED
        return TimedSteps(seconds + 10.0, seconds)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    fake = FakeMachine()
    monkeypatch.setattr(budget_module, "time_steps", fake.time_steps)
    return fake


@pytest.fixture
def law_file(tmp_path: Path) -> Path:
    path = tmp_path / "scaling_law.json"
    law = {name: getattr(LAW, name) for name in ("E", "A", "B", "alpha", "beta")}
    path.write_text(json.dumps({"law": law, "n_runs": 40, "intervals": {}}))
    return path


@pytest.fixture
def parse(law_file: Path, cache: Path) -> Callable[..., FitCLI]:
    """Build ``fit`` with a budget, without running it."""

    def build(*flags: str) -> FitCLI:
        law = [] if any(flag.startswith("--scaling_law") for flag in flags) else [f"--scaling_law={law_file}"]
        return FitCLI([*flags, *law, f"--data.cache={cache}", "--trainer.accelerator=cpu"])

    return build


@pytest.mark.parametrize(
    ("text", "amount", "is_time"),
    [("2min", 120, True), ("1.5h", 5400, True), ("90 s", 90, True), ("1e15flops", 1e15, False)],
)
def test_budget(text: str, amount: float, is_time: bool) -> None:
    assert Budget.parse(text) == (text, amount, is_time)


@pytest.mark.parametrize("text", ["10", "min", "0s", "-1min", "1..2s", "2 days", "1e15 FLOP"])
def test_invalid_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"^--budget is .*; it must be a time such as 2min or 1.5h, or compute such as"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["1e999flops", "1e28flops", "1e9s"])
def test_budget_without_a_bound(text: str) -> None:
    with pytest.raises(UserError, match=r"^--budget is .*; it must be at most 1e\+08s or 1e\+27flops$"):
        Budget.parse(text)


def flops_of_step(gpt: GPTConfig, tokens: int) -> float:
    return tokens * training_flops_per_token(build_on_meta(gpt, 1024, 128))


@pytest.mark.parametrize("flops", [3e12, 1e14, 1e16])
def test_chooses_the_best_of_all_candidates(flops: float) -> None:
    """By brute force over all shapes, at the batch of the choice, and near the optimum of the law."""
    models = candidate_models(GPTConfig(), frozenset())
    assert len(models) == len(SHAPES)
    tried = []

    def cost(gpt: GPTConfig, tokens: int) -> float:
        tried.append(gpt)
        return flops_of_step(gpt, tokens)

    choice, rejected = choose_model(Budget("", flops, False), LAW, models, cost, 1024, 128)
    n = {gpt: sum(p.numel() for p in build_on_meta(gpt, 1024, 128).parameters()) for gpt in models}
    losses = {gpt: LAW.loss(n[gpt], flops / flops_of_step(gpt, 1)) for gpt in models}
    best = min(losses, key=lambda gpt: losses[gpt])
    assert choice.gpt == best
    assert choice.loss == pytest.approx(losses[best], rel=1e-6)
    assert choice.tokens == pytest.approx(flops / flops_of_step(best, 1))
    assert len(set(tried)) <= models.index(best) + 2  # larger candidates are not tried
    assert {other.gpt for other in rejected} == set(tried) - {best}
    ideal = compute_optimum(LAW, TrainingCost(flops_of_step(best, 1) / n[best]), flops)
    assert 0.5 < choice.parameters / ideal.parameters < 2
    text = choice.describe(rejected, 40)
    assert text.startswith(f"{best.n_layer} layers of width {best.n_embd}, ")
    assert "have the lowest predicted loss" in text
    assert "law fitted to 40 runs" in text


def test_more_compute_chooses_larger_models_and_batches() -> None:
    found = [
        choose_model(
            Budget("", flops, False), LAW, candidate_models(GPTConfig(), frozenset()), flops_of_step, 1024, 128
        )[0]
        for flops in (1e11, 1e13, 1e15, 1e17)
    ]  # fmt: skip
    for name in ("parameters", "tokens", "tokens_per_step"):
        values = [getattr(choice, name) for choice in found]
        assert values == sorted(values)
    assert found[0].tokens_per_step == 1024
    for choice in found:
        assert choose_tokens_per_step(choice.tokens) == choice.tokens_per_step


def test_batch_and_learning_rate_rules() -> None:
    """Batches double when the training length quadruples; the rate grows with the square root of the batch."""
    assert [choose_tokens_per_step(each * 1e6) for each in (0.1, 1, 4, 16, 64)] == [1024, 1024, 2048, 4096, 8192]
    assert [choose_learning_rate(0.02, tokens) for tokens in (512, 2048, 8192)] == pytest.approx([0.02, 0.02, 0.04])
    assert [split_batch(tokens, 256) for tokens in (1024, 16_384, 32_768)] == [(4, 1), (64, 1), (64, 2)]
    assert [n_heads(width) for _, width in SHAPES[:5]] == [2, 2, 3, 4, 5]  # as in the ladder
    assert all(width % (2 * n_heads(width)) == 0 for _, width in SHAPES)


def test_candidates_keep_given_fields() -> None:
    assert candidate_models(GPTConfig(), frozenset(("n_layer", "n_head", "n_embd"))) == [GPTConfig()]
    widths = {gpt.n_embd for gpt in candidate_models(GPTConfig(), frozenset(("n_head",)))}  # three heads
    assert widths == {48, 96, 192, 384, 768, 1536}
    with pytest.raises(UserError, match=r"model.gpt.n_embd \(\d+\) is not divisible by model.gpt.n_head \(7\)"):
        candidate_models(GPTConfig(n_head=7, n_embd=7 * 8), frozenset(("n_head",)))


def test_length_by_hand() -> None:
    """100 s minus 5 s of compilation and 4 validation runs of 2 s, divided by 97 ms and the trainer's 3 ms."""
    assert plan_length(Budget("100s", 100.0, True), 5.097, 0.097, 2.0) == (870, 4)
    assert plan_length(Budget("100s", 100.0, True), 5.097, 0.097, 5.0) == (900, 1)  # 20 s would be too much
    with pytest.raises(UserError, match="--budget is 100s, which is too small for one step: a step takes 1e\\+02 s"):
        plan_length(Budget("100s", 100.0, True), 100.02, 0.05, 0.01)


def test_a_choice_is_a_default(parse: Callable[..., FitCLI], machine: FakeMachine) -> None:
    chosen = parse("--budget=2min").config
    gpt, data = chosen.model.init_args.gpt, chosen.data.init_args
    assert (gpt.n_layer, gpt.n_embd) in SHAPES
    assert gpt.n_head == n_heads(gpt.n_embd)
    flops = training_flops_per_token(build_on_meta(GPTConfig(gpt.n_layer, gpt.n_head, gpt.n_embd), 1024, 256))
    seconds = chosen.trainer.max_steps * (data.batch_size * 256 * flops / SPEED + LOOP_SECONDS)
    assert seconds == pytest.approx(120, rel=0.01)

    given = parse("--budget=2min", "--model.gpt.n_layer=2", "--model.optimizer.lr=0.01", "--data.batch_size=3").config
    assert given.model.init_args.gpt.n_layer == 2
    assert given.model.init_args.optimizer.init_args.lr == 0.01
    assert given.data.init_args.batch_size == 3
    assert given.data.init_args.tokens_per_step is None

    large = parse("--budget=200h", "--data.batch_size=32").config.model.init_args.optimizer.init_args
    assert (large.lr, large.adamw_lr) == pytest.approx((0.04, 0.016))  # 8,192 tokens per step

    preset = parse("--budget=2min", "--preset=nano").config
    assert [preset.model.init_args.gpt[name] for name in ("n_layer", "n_head", "n_embd")] == [4, 2, 128]
    adamw = parse("--budget=2min", "--model.optimizer=AdamW").config
    assert adamw.model.init_args.optimizer.init_args.lr == 3e-3


def test_more_time_chooses_a_larger_model(parse: Callable[..., FitCLI], machine: FakeMachine) -> None:
    short, long = (parse(f"--budget={text}").config.model.init_args.gpt.n_embd for text in ("1min", "2h"))
    assert short < long


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=2 days"], "--budget is 2 days; it must be a time such as 2min"),
        (["--budget=1ms"], "--budget is 1ms; it must be a time"),
        (["--budget=0.00001s"], "--budget is 0.00001s, which is too small for one step: a step takes"),
        (["--budget=1e3flops"], "--budget is 1e3flops, which is too small for one step: a step takes"),
        (["--budget=1min", "--trainer.max_steps=3"], "--budget is 1min, but trainer.max_steps is also set; remove one"),
        (["--budget=1min", "--trainer.max_time=00:01:00:00"], "but trainer.max_time is also set; remove one of them"),
        (["--budget=1min", "--ckpt_path=last"], "--budget is 1min, but ckpt_path is also set; remove one of them"),
        (["--budget=1min", "--model.init_from=x"], "but model.init_from is also set; remove one of them"),
        (["--budget=1min", "--model=Reward", "--data=Preferences"], "--budget requires --model LanguageModel and"),
        (["--budget=1min", "--scaling_law=none.json"], "--scaling_law: cannot read none.json: No such file"),
    ],
)
def test_mistakes(parse: Callable[..., FitCLI], machine: FakeMachine, flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_law_without_budget(cache: Path) -> None:
    with pytest.raises(UserError, match="--scaling_law is set, but --budget is not; add --budget"):
        FitCLI(["--scaling_law=x.json", f"--data.cache={cache}"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"law": {"E": 1}, "n_runs": 2}', '{"law": 3, "n_runs": 2}'])
def test_damaged_law(tmp_path: Path, content: str) -> None:
    path = tmp_path / "law.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^--scaling_law: cannot read .*; pass a scaling_law.json of a sweep$"):
        read_scaling_law(path)


def test_shipped_law_is_plausible() -> None:
    law, n_runs = read_scaling_law(budget_module.SHIPPED_LAW)
    assert n_runs >= 3
    assert 0 < law.E < law.loss(1e6, 1e6) < 3
    best = compute_optimum(law, TrainingCost(), 1e13)
    assert 0.1 < best.tokens / best.parameters < 500


def test_times_steps_with_a_clock() -> None:
    """Steps of one second: the first is reported alone, and timing stops after a few seconds or steps."""
    ticks = count()
    found = time_steps(
        GPTConfig(n_layer=1, n_head=1, n_embd=32), 64, 16, 2, 2, Muon(), torch.device("cpu"), "32-true",
        clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert found == TimedSteps(1.0, 1.0)
    assert next(ticks) == 2 * 4  # four steps
    ticks = count()
    time_steps(
        GPTConfig(n_layer=1, n_head=1, n_embd=32), 64, 16, 2, 1, Muon(), torch.device("cpu"), "bf16-mixed",
        clock=lambda: 1e-3 * next(ticks),
    )  # fmt: skip
    assert next(ticks) == 2 * (1 + MAX_STEPS)


def test_run_stores_what_was_chosen_and_resumes_without_measuring(
    law_file: Path, machine: FakeMachine, corpus: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget_module, "SHAPES", SHAPES[:2])
    flags = [
        f"--data.source={corpus}", f"--data.cache={cache}", "--data.vocab_size=300", "--data.block_size=32",
        "--trainer.accelerator=cpu", "--model.compile=false", "--data.validation_share=0.1",
        "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1",
    ]  # fmt: skip
    cli = FitCLI(["--budget=11s", f"--scaling_law={law_file}", "--data.batch_size=1", *flags])
    caplog.set_level("INFO")
    monkeypatch.setattr(budget_module, "LOOP_SECONDS", 0.2)
    cli.fit()
    [folder] = Path("runs/pretrain").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["budget"] is config["scaling_law"] is None
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["step"]
        == config["trainer"]["max_steps"]
        == math.floor((1 - 4 * summary_validation(cli)) / (0.2 + step_seconds(cli)))
    )
    assert config["trainer"]["val_check_interval"] == -(-summary["step"] // 4)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("budget")]
    assert len(lines) == 2
    assert "tokens per step, because" in lines[0]
    assert f"{summary['step']:,} steps of" in lines[1]

    timed = len(machine.calls)
    resumed = FitCLI([f"--ckpt_path={folder}", "--trainer.max_steps=6", f"--data.cache={cache}"])
    resumed.fit()
    assert json.loads((folder / "summary.json").read_text())["step"] == 6
    assert len(machine.calls) == timed
    assert resumed.config.model.init_args.gpt.n_embd == config["model"]["init_args"]["gpt"]["n_embd"]


def step_seconds(cli: FitCLI) -> float:
    return 32 * training_flops_per_token(build_on_meta(cli.model.gpt, 300, 32)) / SPEED


def summary_validation(cli: FitCLI) -> float:
    """Seconds of a validation run of one batch: a third of a step."""
    return step_seconds(cli) / 3


def test_no_budget_measures_nothing(machine: FakeMachine, cache: Path) -> None:
    cli = FitCLI([f"--data.cache={cache}", "--trainer.accelerator=cpu"])
    assert cli.budget is None
    assert not machine.calls
