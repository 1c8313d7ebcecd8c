"""Auxiliary losses, load and biases of experts in training runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim import AdamW
from lit_gpt_scratch.tasks import LanguageModel
from lit_gpt_scratch.tasks.expert_balancing import ExpertBalancing, find_tokens

Build = Callable[..., L.Trainer]
BATCH, CONTEXT, N_EXPERTS, PER_TOKEN = 4, 32, 5, 2


def config(**settings: Any) -> GPTConfig:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_experts": N_EXPERTS, "experts_per_token": PER_TOKEN}
    return GPTConfig(**(sizes | {"feed_forward": "moe", "initialisation": "normal"} | settings))


class Recorder(L.Callback):
    """Copies the load and the metrics after each step, and the gradients before it."""

    def __init__(self) -> None:
        self.loads: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_gradient(self, trainer: L.Trainer, module: LanguageModel) -> None:
        named = module.net.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        assert module.expert_balancing is not None
        self.loads.append(module.expert_balancing.load.clone())
        routers = module.expert_balancing.routers
        if routers[0].balance_bias is not None:
            self.biases.append(torch.stack([router.balance_bias.clone() for router in routers]))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def run(trainer: Build, packed_text: Callable[..., PackedText]) -> Iterator[Callable[..., tuple[Any, Recorder]]]:
    def fit(gpt: GPTConfig, steps: int = 3, batch_size: int = BATCH, **flags: Any) -> tuple[LanguageModel, Recorder]:
        L.seed_everything(0)
        recorder = Recorder()
        compiled = flags.pop("compile", False)
        checkpointing = flags.pop("activation_checkpointing", False)
        model = LanguageModel(gpt, AdamW(lr=1e-3), compile=compiled, activation_checkpointing=checkpointing)
        settings = {"max_steps": steps, "limit_val_batches": 0, "log_every_n_steps": 1, "callbacks": [recorder]}
        trainer(**(settings | flags)).fit(model, packed_text(batch_size=batch_size, block_size=CONTEXT))
        return model, recorder

    return fit


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_token_is_counted(run: Callable[..., Any], checkpointing: bool) -> None:
    """Also if blocks are recomputed, and in steps of several micro-batches."""
    _, whole = run(config(), activation_checkpointing=checkpointing)
    assert torch.equal(whole.loads[0].sum(-1), torch.tensor([BATCH * CONTEXT * PER_TOKEN] * 2))
    _, parts = run(config(), batch_size=2, accumulate_grad_batches=2, activation_checkpointing=checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(whole.loads, parts.loads[1::2], strict=True))


def test_load_is_restored(run: Callable[..., Any], trainer: Build, packed_text: Any, tmp_path: Path) -> None:
    """A validation that is repeated after a kill, before any step, draws the load of the last step."""
    model, recorder = run(config())
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = LanguageModel(config(), AdamW(lr=1e-3), compile=False)
    data = packed_text(batch_size=BATCH, block_size=CONTEXT)
    trainer(max_steps=3, limit_val_batches=0).fit(resumed, data, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.expert_balancing is not None
    assert torch.equal(resumed.expert_balancing.load, recorder.loads[-1])


def test_gradient_is_that_of_the_loss_with_its_auxiliary_losses(
    run: Callable[..., Any], packed_text: Callable[..., PackedText]
) -> None:
    """The load-balancing loss of each block and row, and the z-loss of each block and token, by definition."""
    gpt = config(load_balance_loss=0.3, router_z_loss=0.2)
    batches = []

    class Keep(Recorder):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            batches.append({name: value.clone() for name, value in batch.items()})

    run(gpt, steps=1, callbacks=[keep := Keep()])
    L.seed_everything(0)
    again, _ = run(gpt, steps=1, callbacks=[Recorder()], max_steps=0)
    net, batch = again.net, batches[0]
    hidden: list[Tensor] = []
    for block in net.blocks:
        block.feed_forward.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    nats, tokens = token_cross_entropy(net(batch["input_ids"], batch.get("document_ids")), batch["labels"])
    loss = nats / tokens
    for block, x in zip(net.blocks, hidden, strict=True):
        logits = x @ block.feed_forward.router.weight.T  # (B, T, n_experts)
        probabilities = logits.softmax(-1)
        for row in probabilities:  # (T, n_experts)
            chosen = torch.zeros(N_EXPERTS)
            for token in row:
                for expert in token.topk(PER_TOKEN).indices:
                    chosen[expert] += N_EXPERTS / (PER_TOKEN * CONTEXT)
            loss = loss + 0.3 * (chosen * row.mean(0)).sum() / len(probabilities)
        loss = loss + 0.2 * logits.logsumexp(-1).square().mean()
    loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(keep.gradients[0][name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert keep.metrics[0]["train/loss"] == pytest.approx(float(nats / tokens), rel=1e-5)  # without them


def test_biases_move_by_the_rate_toward_an_even_load(run: Callable[..., Any]) -> None:
    _, recorder = run(config(expert_bias_rate=0.05, load_balance_loss=0), steps=4)
    bias = torch.zeros(2, N_EXPERTS)
    for load, found in zip(recorder.loads, recorder.biases, strict=True):
        mean = BATCH * CONTEXT * PER_TOKEN / N_EXPERTS
        bias = bias + 0.05 * torch.where(load < mean, 1.0, torch.where(load > mean, -1.0, 0.0))
        torch.testing.assert_close(found, bias)
    assert recorder.biases[0].abs().min() > 0


def test_rejected_step_does_not_change_the_biases(run: Callable[..., Any]) -> None:
    class RejectSecond(Recorder):
        def on_train_start(self, trainer: Any, module: LanguageModel) -> None:  # type: ignore[override]
            module.step_filter = lambda loss, norm: len(self.biases) != 1

    run(config(expert_bias_rate=0.05), steps=3, callbacks=[recorder := RejectSecond()])
    assert torch.equal(recorder.biases[0], recorder.biases[1])
    assert not torch.equal(recorder.biases[1], recorder.biases[2])


@pytest.mark.parametrize("balanced", [{"load_balance_loss": 0.1}, {"load_balance_loss": 0, "expert_bias_rate": 0.01}])
def test_balancing_evens_out_the_load(run: Callable[..., Any], balanced: dict[str, Any]) -> None:
    def last_loads(**settings: Any) -> Tensor:
        _, recorder = run(config(**settings), steps=60)
        return torch.stack(recorder.loads[-10:]).double().mean(0)

    def unevenness(load: Tensor) -> float:
        return float((load.max(-1).values / load.mean(-1)).max())

    assert unevenness(last_loads(**balanced)) < 0.9 * unevenness(last_loads(load_balance_loss=0)), balanced


def test_metrics_by_hand() -> None:
    net = GPT(config(n_experts=4), 20, 8)
    balancing = ExpertBalancing(net)
    balancing.load = torch.tensor([[8, 0, 4, 4], [4, 4, 4, 4]])
    metrics = {name: float(value) for name, value in balancing.metrics().items()}
    assert metrics["max_load"] == pytest.approx(2.0)
    assert metrics["unused"] == pytest.approx(1 / 8)
    assert metrics["load_entropy"] == pytest.approx((1.5 - 1) / (2 - 1))  # in bits: 1 for two experts, 2 for four
    assert "router_entropy" not in metrics  # nothing was recorded
    balancing.load = torch.tensor([[8, 8, 0, 0], [4, 4, 4, 4]])
    assert float(balancing.metrics()["load_entropy"]) == pytest.approx(0.0)


def test_router_entropy_excludes_padding() -> None:
    """The only token is the first one, whose scores are equal; those of the padding are not."""
    net = GPT(config(n_experts=4, n_layer=1), 20, 8)
    balancing = ExpertBalancing(net)
    balancing.record()
    net.recorded_router_logits.append(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]]]))
    balancing.loss(torch.tensor([[True, False]]))
    balancing.end_step(lambda load: load)
    assert float(balancing.metrics()["router_entropy"]) == pytest.approx(1.0)
    assert balancing.load.sum() == PER_TOKEN


def test_all_experts_per_token_is_an_equal_load() -> None:
    balancing = ExpertBalancing(GPT(config(n_experts=1, experts_per_token=1, normalize_gates=False), 20, 8))
    assert float(balancing.metrics()["load_entropy"]) == 1.0


def test_find_tokens() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ignored = IGNORE_INDEX
    labels = torch.tensor([[ignored, 5, ignored, ignored], [ignored, ignored, ignored, 7]])  # prompts, then a reply
    expected = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert torch.equal(find_tokens({"input_ids": ids, "labels": labels}), expected)
    lengths = torch.tensor([2, 4])
    assert torch.equal(find_tokens({"input_ids": ids, "labels": torch.tensor([0, 1]), "lengths": lengths}), expected)
    assert find_tokens({"indices": lengths}) is None
