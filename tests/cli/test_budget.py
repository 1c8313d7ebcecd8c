"""``fit --budget`` on a machine whose speed is given: no test measures time."""

import gc
import json
import math
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import nn

from lit_gpt_scratch.cli import budget as budget_module
from lit_gpt_scratch.cli.budget import (
    LOOP_SECONDS,
    MAX_MICRO_BATCH_TOKENS,
    SHAPES,
    UNBOUNDED,
    Budget,
    Choice,
    FittedLaw,
    candidate_models,
    choose_learning_rate,
    choose_model,
    choose_tokens_per_step,
    count_parameters,
    n_heads,
    plan_length,
    read_scaling_law,
    split_batch,
)
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.gpt import Block
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.profiling import timed_steps
from lit_gpt_scratch.profiling.flops_and_memory import build_on_meta, training_flops_per_token
from lit_gpt_scratch.profiling.timed_steps import MAX_STEPS, TimedSteps, time_steps
from lit_gpt_scratch.sweeps.scaling_law import ScalingLaw, TrainingCost, compute_optimum

LAW = ScalingLaw(E=0.6, A=30.0, B=60.0, alpha=0.34, beta=0.3)
SPEED = 5e10
"""FLOP/s of the machine."""


class FakeMachine:
    """Time of steps at a constant number of FLOPs per second; the first step takes ten seconds longer.

    A step fits into its memory if parameters and residual streams together have at most ``memory`` elements.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.settings: list[tuple[Any, ...]] = []
        self.memory = math.inf

    def require_memory(self, config: GPTConfig, batch_size: int, vocab_size: int, block_size: int) -> None:
        parameters = sum(p.numel() for p in build_on_meta(config, vocab_size, block_size).parameters())
        if parameters + batch_size * block_size * config.n_embd * config.n_layer > self.memory:
            raise MemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    def time_steps(
        self, config: GPTConfig, vocab_size: int, block_size: int, batch_size: int, accumulate: int, optimizer: Any,
        device: torch.device, *settings: Any,
    ) -> TimedSteps:  # fmt: skip
        self.calls.append((config.n_layer, config.n_embd))
        self.settings.append(settings)
        self.require_memory(config, batch_size, vocab_size, block_size)
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
    text = choice.describe(rejected, FittedLaw(LAW, 40, UNBOUNDED, UNBOUNDED))
    assert text.startswith(f"{best.n_layer} layers of width {best.n_embd}, ")
    assert "have the lowest predicted loss" in text
    assert text.endswith("(law fitted to 40 runs)")


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
        assert choose_tokens_per_step(choice.tokens, 128) == choice.tokens_per_step


def test_batch_rules() -> None:
    """Batches double when the training length quadruples."""
    assert [choose_tokens_per_step(each * 1e6, 256) for each in (0.1, 1, 4, 16, 64)] == [1024, 1024, 2048, 4096, 8192]
    assert [split_batch(tokens, 256) for tokens in (1024, 16_384, 32_768)] == [(4, 1), (64, 1), (64, 2)]
    assert [n_heads(width) for _, width in SHAPES[:5]] == [2, 2, 3, 4, 5]  # as in the ladder
    assert all(width % (2 * n_heads(width)) == 0 for _, width in SHAPES)


@given(st.integers(1, 2**20), st.floats(0, 1e15))
def test_steps_consist_of_whole_micro_batches(block_size: int, tokens: float) -> None:
    """For any context; the batch differs from that of the ladder's context by at most a factor of sqrt(2)."""
    size = choose_tokens_per_step(tokens, block_size)
    batch, accumulate = split_batch(size, block_size)
    assert batch * accumulate * block_size == size
    assert batch == 1 or batch * block_size <= MAX_MICRO_BATCH_TOKENS
    assert accumulate == 1 or 2 * batch * block_size > MAX_MICRO_BATCH_TOKENS
    wanted = choose_tokens_per_step(tokens, 256)
    assert size == block_size > wanted or 0.7 < size / wanted < 1.42


def test_learning_rate_has_an_upper_bound() -> None:
    """It grows with the square root of the batch, and stays below twice the default, which has been measured worse."""
    rates = [choose_learning_rate(0.02, 2**power) for power in range(31)]
    assert rates == sorted(rates)
    assert rates[11:13] == pytest.approx([0.02, 0.02 * 2**0.5])
    assert (rates[0], rates[-1]) == (rates[11], rates[12])


@pytest.mark.parametrize("extra", [{}, {"multi_token_depth": 2}])
def test_counts_the_parameters_that_a_token_uses(extra: dict[str, Any]) -> None:
    """A mixture of 8 experts of which a token uses 2 is a mixture of 2 experts with a larger router."""
    small, large = (GPTConfig(feed_forward="moe", n_experts=n, experts_per_token=2) for n in (2, 8))
    router = large.n_layer * 6 * large.n_embd
    used = sum(p.numel() for p in build_on_meta(small, 300, 32).parameters()) + router
    assert count_parameters(replace(large, **extra), 300, 32) == used
    dense = sum(p.numel() for p in build_on_meta(GPTConfig(), 300, 32).parameters())
    assert count_parameters(GPTConfig(**extra), 300, 32) == dense


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
    message = "--budget is 1min, which is too small for one step: compilation 70 s, validation 1.2 s, step 0.05 s"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        plan_length(Budget("1min", 60.0, True), 70.047, 0.047, 0.3)


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

    short = parse("--budget=2min", "--data.tokens_per_step=100").config.data.init_args  # refused with the text
    assert (short.batch_size, short.tokens_per_step) == (8, 100)

    large = parse("--budget=200h", "--data.batch_size=32").config.model.init_args.optimizer.init_args
    assert (large.lr, large.adamw_lr) == pytest.approx((0.02 * 2**0.5, 8e-3 * 2**0.5))  # 8,192 tokens per step

    preset = parse("--budget=2min", "--preset=nano").config
    assert [preset.model.init_args.gpt[name] for name in ("n_layer", "n_head", "n_embd")] == [4, 2, 128]
    adamw = parse("--budget=2min", "--model.optimizer=AdamW").config
    assert adamw.model.init_args.optimizer.init_args.lr == 3e-3


def test_more_time_chooses_a_larger_model(parse: Callable[..., FitCLI], machine: FakeMachine) -> None:
    short, long = (parse(f"--budget={text}").config.model.init_args.gpt.n_embd for text in ("1min", "2h"))
    assert short < long


def test_times_the_settings_of_the_run(parse: Callable[..., FitCLI], machine: FakeMachine) -> None:
    parse("--budget=2min", "--model.activation_checkpointing=true", "--trainer.precision=bf16")
    assert set(machine.settings) == {("bf16", True)}


@pytest.mark.parametrize(("budget", "block_size"), [("1e12flops", 768), ("1e18flops", 384), ("1h", 100), ("1h", 8192)])
def test_any_context(parse: Callable[..., FitCLI], machine: FakeMachine, budget: str, block_size: int) -> None:
    """The data module accepts the batch, and the number of steps follows from the tokens that a step really has."""
    chosen = parse(f"--budget={budget}", f"--data.block_size={block_size}").config
    gpt, data = chosen.model.init_args.gpt, chosen.data.init_args
    per_micro_batch = data.batch_size * block_size
    tokens = data.tokens_per_step or per_micro_batch
    assert tokens % per_micro_batch == 0
    cost = tokens * training_flops_per_token(build_on_meta(GPTConfig(**gpt.as_dict()), 1024, block_size))
    parsed = Budget.parse(budget)
    cost = cost / SPEED + LOOP_SECONDS if parsed.is_time else cost
    assert chosen.trainer.max_steps == int(parsed.amount / cost)


@pytest.mark.parametrize("memory", [2e5, 4e5, 1e6, 3e6])
def test_chosen_models_fit_into_memory(parse: Callable[..., FitCLI], machine: FakeMachine, memory: float) -> None:
    """Micro-batches are halved for the same step, and nothing is tried after the first candidate that does not fit."""
    machine.memory = memory
    chosen = parse("--budget=20h").config
    gpt, data = GPTConfig(**chosen.model.init_args.gpt.as_dict()), chosen.data.init_args
    machine.require_memory(gpt, data.batch_size, 1024, 256)
    tokens = data.tokens_per_step or data.batch_size * 256
    assert choose_tokens_per_step(chosen.trainer.max_steps * tokens, 256) == pytest.approx(tokens, rel=0.5)
    assert tokens % (data.batch_size * 256) == 0
    next_shape = SHAPES[SHAPES.index((gpt.n_layer, gpt.n_embd)) + 1]
    assert machine.calls[-1] == next_shape
    larger = replace(GPTConfig(), n_layer=next_shape[0], n_head=n_heads(next_shape[1]), n_embd=next_shape[1])
    with pytest.raises(MemoryError):
        machine.require_memory(larger, 1, 1024, 256)


@pytest.mark.parametrize("flags", [[], ["--data.batch_size=32"]])
def test_first_candidate_does_not_fit(parse: Callable[..., FitCLI], machine: FakeMachine, flags: list[str]) -> None:
    machine.memory = 1e5
    with pytest.raises(UserError, match=r"^out of memory while allocating 2.50 GiB; use --model.activation_checkpoi"):
        parse("--budget=2min", *flags)
    assert len(set(machine.calls)) == 1
    assert len(machine.calls) == (1 if flags else 3)  # a given batch is not halved


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=2 days"], "--budget is 2 days; it must be a time such as 2min"),
        (["--budget=1ms"], "--budget is 1ms; it must be a time"),
        (["--budget=0.00001s"], "--budget is 0.00001s, which is too small for one step: step 0.0"),
        (["--budget=1e3flops"], "--budget is 1e3flops, which"),
        (["--budget=1min", "--data.block_size=0"], "data.block_size is 0; it must be positive"),
        (["--budget=1min", "--data.block_size=-1"], "data.block_size is -1; it must be positive"),
        (["--budget=1min", "--data.batch_size=0"], "data.batch_size is 0; it must be positive"),
        (["--budget=1min", "--data.tokens_per_step=0"], "data.tokens_per_step is 0; it must be positive"),
        (["--budget=1min", "--trainer.devices=2"], "--budget measures one device; set --trainer.devices 1"),
        (["--budget=1min", "--trainer.devices=0,1"], "--budget measures one device; set --trainer.devices 1"),
        (["--budget=1min", "--trainer.devices=[0,1]"], "--budget measures one device; set --trainer.devices 1"),
        (["--budget=1min", "--trainer.num_nodes=2"], "--budget measures one device; set --trainer.devices 1"),
        (["--budget=1min", "--trainer.devices=two"], "--trainer.devices is two; use a number of devices"),
        (["--budget=1min", "--trainer.precision=16"], "--trainer.precision 16: gradients overflow in float16"),
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
    assert len(machine.calls) == ("too small" in message)  # other mistakes are found before anything is measured


def test_law_without_budget(cache: Path) -> None:
    with pytest.raises(UserError, match="--scaling_law is set, but --budget is not; add --budget"):
        FitCLI(["--scaling_law=x.json", f"--data.cache={cache}"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"law": {"E": 1}, "n_runs": 2}', '{"law": 3, "n_runs": 2}'])
def test_damaged_law(tmp_path: Path, content: str) -> None:
    path = tmp_path / "law.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^--scaling_law: cannot read .*; pass a scaling_law.json of a sweep$"):
        read_scaling_law(path)


def test_law_of_another_metric(law_file: Path) -> None:
    content = json.loads(law_file.read_text())
    law_file.write_text(json.dumps({**content, "metric": "val/bits_per_byte"}))
    assert read_scaling_law(law_file).law == LAW
    law_file.write_text(json.dumps({**content, "metric": "val/loss"}))
    with pytest.raises(UserError, match=r"its law predicts 'val/loss', not val/bits_per_byte; pass a scaling_law.json"):
        read_scaling_law(law_file)


@pytest.mark.parametrize(
    ("ranges", "beyond"),
    [
        ({}, ""),
        ({"parameters": [1e5, 1e6], "tokens": [5e5, 4e6]}, ""),
        ({"parameters": [1e5, 2e5]}, ", extrapolated beyond the measured 100 k to 200 k parameters"),
        ({"tokens": [4e6, 8e6]}, ", extrapolated beyond the measured 4 M to 8 M tokens"),
        (
            {"parameters": [1000000, 2000000], "tokens": [1e5, 1e6]},
            ", extrapolated beyond the measured 1 M to 2 M parameters and 100 k to 1 M tokens",
        ),
    ],
)
def test_extrapolation_is_stated(law_file: Path, ranges: dict[str, list[float]], beyond: str) -> None:
    law_file.write_text(json.dumps({**json.loads(law_file.read_text()), **ranges}))
    choice = Choice(GPTConfig(), parameters=300_000, tokens_per_step=1024, steps=2000.0, loss=1.5)
    assert choice.describe([], read_scaling_law(law_file)).endswith(f" (law fitted to 40 runs{beyond})")


def test_shipped_law_is_plausible() -> None:
    law, n_runs, *_ = read_scaling_law(budget_module.SHIPPED_LAW)
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


SMALL = GPTConfig(n_layer=1, n_head=1, n_embd=32)
RUN = 64, 16, 2, 1


class RecordingOptimizer:
    """Optimizer that runs a function of the network in each step."""

    def __init__(self, inspect: Callable[[GPT], None]) -> None:
        self.inspect = inspect

    def build(self, net: GPT) -> "RecordingOptimizer":
        self.net = net
        return self

    def step(self) -> None:
        self.inspect(self.net)

    def zero_grad(self) -> None:
        self.net.zero_grad()


def time_recorded(inspect: Callable[[GPT], None], config: GPTConfig = SMALL, *settings: Any, **options: Any) -> None:
    ticks = count()
    optimizer: Any = RecordingOptimizer(inspect)
    options["clock"] = lambda: 2.0 * next(ticks)
    time_steps(config, *RUN, optimizer, torch.device("cpu"), *(settings or ("32-true",)), **options)


@pytest.mark.parametrize(
    "extra", [{}, {"multi_token_depth": 2}, {"feed_forward": "moe", "n_experts": 4}, {"value_embeddings": True}]
)
def test_timed_steps_train_all_weights(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter has a gradient, and each block is compiled and checkpointed, as in the task."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(Block, "compile", lambda block, backend: compiled.append(block))

    def inspect(net: GPT) -> None:
        assert not [name for name, p in net.named_parameters() if p.grad is None]
        assert net.training
        assert net.activation_checkpointing == "keep_matmuls"
        assert compiled == net.all_blocks

    time_recorded(inspect, replace(SMALL, **extra), "32-true", "keep_matmuls", compile_blocks=True)


@pytest.mark.parametrize("precision", [64, 32, "64", "32", "bf16", "64-true", "32-true", "bf16-true", "bf16-mixed"])
def test_precision_is_that_of_the_trainer(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtype of the weights and of autocast, for all names that Lightning accepts on a CPU."""
    plugin = Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False).precision_plugin
    with plugin.module_init_context():
        expected = torch.get_default_dtype()
    with plugin.forward_context():
        autocasts = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    found = []

    def record(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        found.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return token_cross_entropy(logits, labels)

    monkeypatch.setattr(timed_steps, "token_cross_entropy", record)
    time_recorded(lambda net: found.append(net.embedding.weight.dtype), SMALL, precision)
    assert set(found) == {autocasts, expected}


def test_out_of_memory_on_the_cpu() -> None:
    with pytest.raises(MemoryError, match="can't allocate memory"):
        time_steps(SMALL, 64, 16, 2**45, 1, Muon(), torch.device("cpu"), "32-true")


def test_out_of_memory_frees_the_network() -> None:
    """A smaller micro-batch can then be tried on a GPU."""
    networks = []

    def run_out_of_memory(net: GPT) -> None:
        networks.append(weakref.ref(net))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    gc.disable()
    try:
        with suppress(MemoryError):
            time_recorded(run_out_of_memory)
        assert networks[0]() is None
    finally:
        gc.enable()


def test_other_errors_are_not_out_of_memory() -> None:
    def fail(net: GPT) -> None:
        raise RuntimeError("the matrix is singular")

    with pytest.raises(RuntimeError, match="singular"):
        time_recorded(fail)


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
        "--model.activation_checkpointing=true", "--trainer.precision=32",
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
    assert [settings[:2] for settings in machine.settings] == [(32, True)] * (timed - 1) + [("32-true", True)]
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
