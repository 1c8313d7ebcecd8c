"""Reward models and DPO: losses, metrics, the reference model, padding, and checked replies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.batch_types import IGNORE_INDEX, PairBatch
from lit_gpt_scratch.callbacks.samples import RewardEval
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint, load_model, load_reward_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.data import Conversations, Preferences
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.chat_eval import ChatReply
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.optim import AdamW
from lit_gpt_scratch.tasks import DPO, LanguageModel, Reward

Build = Callable[..., L.Trainer]
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=32)
HOW: list[dict[str, Any]] = [{}, {"lora": LoRA(2)}]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The checkpoint of a model that was instruction-tuned for a few steps."""
    folder = tmp_path_factory.mktemp("start")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=30, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(LanguageModel(SHAPE, compile=False), Conversations(cache=str(cache), block_size=96))
    trainer.save_checkpoint(folder / "start.ckpt")
    return folder / "start.ckpt"


@pytest.fixture
def align(trainer: Build, start: Path, cache: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Align the initial model; returns the module and its checkpoint."""

    def fitted(task: Any, steps: int = 3, **more: Any) -> tuple[Any, Path]:
        settings = {"init_from": str(start), "cache": str(cache), "block_size": 96, "batch_size": 8, "reply_tokens": 8}
        made = trainer(max_steps=steps, limit_val_batches=1, callbacks=more.pop("callbacks", []))
        made.fit(task, Preferences(**(settings | more)))
        made.save_checkpoint(tmp_path / "aligned.ckpt")
        return task, tmp_path / "aligned.ckpt"

    return fitted


def moved(task: L.LightningModule, scale: float = 0.05) -> None:
    """Move the trained weights away from the initial model."""
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def logprobs(net: Any, ids: Tensor, labels: Tensor) -> float:
    """The log-probability of one row's labels, token by token."""
    chances = net(ids[None])[0].log_softmax(-1)
    return sum(chances[t, label].item() for t, label in enumerate(labels.tolist()) if label != IGNORE_INDEX)


@pytest.mark.parametrize("how", HOW, ids=["all", "adapters"])
def test_dpo_loss_matches_a_loop_over_pairs(
    align: Callable[..., tuple[Any, Path]], start: Path, how: dict[str, Any]
) -> None:
    """Each row by itself and without padding; the reference is the initial checkpoint."""
    task, _ = align(DPO(init_from=str(start), beta=0.3, compile=False, **how))
    moved(task)
    task.eval()
    reference, _ = load_model(start)
    batch: PairBatch = task.trainer.datamodule.train_dataset.make_batch(
        [0, 1, 2, 10**9]
    )  # the last is a pair of no text
    ratios = []
    for row, n in enumerate(batch["lengths"].tolist()):
        ids, labels = batch["input_ids"][row, :n], batch["labels"][row, :n]
        ratios.append(logprobs(task.net, ids, labels) - logprobs(reference, ids, labels) if n else 0.0)
    margins = torch.tensor([ratios[place] - ratios[4 + place] for place in range(3)])
    loss, counted = task.loss_and_count(batch)
    assert counted == 3
    assert loss.item() == pytest.approx(-F.logsigmoid(0.3 * margins).sum().item(), rel=1e-4)
    free = DPO(reference_free=True)
    free.net = task.net
    nats = [logprobs(task.net, *(batch[name][row, :n] for name in ("input_ids", "labels")))
            for row, n in enumerate(batch["lengths"].tolist()) if n]  # fmt: skip
    margins = torch.tensor([nats[place] - nats[3 + place] for place in range(3)])
    assert free.loss_and_count(batch)[0].item() == pytest.approx(-F.logsigmoid(0.1 * margins).sum().item(), rel=1e-4)


@pytest.mark.parametrize("how", HOW, ids=["all", "adapters"])
def test_initial_policy_equals_the_reference(
    trainer: Build, start: Path, cache: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Its log-probabilities are the reference's, bit for bit, and the loss is log 2 per pair."""

    class First(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            task: Any = pl_module
            nats, _ = task.logprobs(batch)
            assert torch.equal(nats, task.reference(batch["input_ids"], batch["labels"]).sum(-1))
            self.loss = (task.loss_and_count(batch)[0] / len(nats) * 2).item()

    first = First()
    contents = torch.load(start, weights_only=True)
    contents[METADATA_KEY]["gpt"]["dropout"] = 0.5  # of a start that was trained with some
    torch.save(contents, tmp_path / "dropping.ckpt")
    data = Preferences(init_from=str(start), cache=str(cache), block_size=96)
    task = DPO(init_from=str(tmp_path / "dropping.ckpt"), compile=False, **how)
    trainer(max_steps=1, limit_val_batches=0, callbacks=[first]).fit(task, data)
    assert first.loss == pytest.approx(0.6931472)


@pytest.mark.parametrize("how", [*HOW, {"train_layers": 1}], ids=["all", "adapters", "last layer"])
def test_reference_is_not_trained(
    align: Callable[..., tuple[Any, Path]], trainer: Build, start: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Also after resuming from its own checkpoint, as ``fit`` does."""
    begun = load_model(start)[0]
    task, path = align(DPO(init_from=str(start), compile=False, **{"gpt": None} | how), steps=4)
    saved = load_checkpoint(path)["state_dict"]
    assert any(name.startswith("reference.") for name in saved) == ("lora" not in how)
    ids = torch.randint(0, begun.vocab_size, (2, 20))
    stepped = {p for group in task.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not stepped & set(task.reference.parameters())
    written, _ = load_model(path)
    with torch.no_grad():
        assert not torch.equal(written(ids), begun(ids))
        for _ in range(2):
            with task.reference.network() as reference:
                assert torch.equal(reference(ids), begun(ids))
                assert not reference.training
            if task.init_from == str(path):
                break
            task = DPO(init_from=str(path), compile=False, **how)
            data = Preferences(init_from=str(path), cache=str(tmp_path), block_size=96, batch_size=8)
            trainer(max_steps=5, limit_val_batches=0).fit(task, data, ckpt_path=str(path))


@pytest.mark.parametrize("build_task", [Reward, DPO])
def test_loss_is_the_mean_over_pairs_in_any_batches(trainer: Build, start: Path, cache: Path, build_task: type) -> None:
    """Rows of different batches are padded to different widths; a step's gradient must not depend on it."""

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            self.found = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]

    def step(batch_size: int) -> list[Tensor]:
        L.seed_everything(0)
        seen = Gradients()
        data = Preferences(
            init_from=str(start), cache=str(cache), block_size=96, batch_size=batch_size, tokens_per_step=8 * 96, seed=1
        )
        task = build_task(init_from=str(start), compile=False)
        made = trainer(max_steps=1, limit_val_batches=0, callbacks=[seen])
        made.fit(task, data)
        assert made.accumulate_grad_batches == 8 // batch_size
        return seen.found

    for whole, parts in zip(step(8), step(2), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_reward_is_read_at_the_last_token_and_learned(
    align: Callable[..., tuple[Any, Path]], start: Path, tmp_path: Path
) -> None:
    """Whatever the padding; and a checkpoint computes the same."""
    task, path = align(Reward(init_from=str(start), optimizer=AdamW(3e-3), compile=False), steps=60)
    task.eval()
    batch: PairBatch = task.trainer.datamodule.test_dataset.make_batch([0, 1, 2])
    with torch.no_grad():
        together = task(batch["input_ids"], batch["lengths"])
        alone = [task.net(batch["input_ids"][row : row + 1, :n])[0, -1] for row, n in enumerate(batch["lengths"])]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    task.trainer.test(task, task.trainer.datamodule, verbose=False)
    assert task.trainer.callback_metrics["test/accuracy"] >= 0.95
    assert task.trainer.callback_metrics["test/margin"] > 1
    tokenizer = task.trainer.datamodule.tokenizer_json
    asked = load_reward_model(str(path), tokenizer).forward_pooled(batch["input_ids"], batch["lengths"])
    torch.testing.assert_close(asked, together)
    assert build_model(load_checkpoint(path), path).metadata.rewards
    with pytest.raises(UserError, match="it predicts rewards"):
        load_model(path)
    with pytest.raises(UserError, match="different tokenizer than the policy"):
        load_reward_model(str(path), tokenizer.replace("endoftext", "end"))
    with pytest.raises(UserError, match="is not a reward model: it predicts tokens"):
        load_reward_model(str(start), tokenizer)


def test_true_reward_is_the_share_of_ended_replies_that_pass_the_check(
    align: Callable[..., tuple[Any, Path]], start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial model's is measured once, on test prompts, and kept when the run resumes."""
    asked = []

    def written(net: Any, tokenizer: Any, prompts: list[list[int]], tokens: int, sampling: Any) -> list[ChatReply]:
        asked.append((prompts, tokens, net.training))
        kinds = [
            ChatReply("Yes.", True, 3),
            ChatReply("Yes.", False, 8),
            ChatReply("Yes", True, 2),
            ChatReply("No.", True, 4),
        ]
        return [kinds[place % 4] for place in range(len(prompts))]

    monkeypatch.setattr("lit_gpt_scratch.callbacks.samples.generate_replies", written)
    watching = RewardEval(prompts=8)
    task, _ = align(DPO(init_from=str(start), compile=False), callbacks=[watching])
    assert watching.start == 0.5
    assert asked == [(task.trainer.datamodule.prompt_ids("test")[:8], 8, False)]
    task.trainer.validate(task, task.trainer.datamodule, verbose=False)
    task.trainer.test(task, task.trainer.datamodule, verbose=False)
    measured = task.trainer.callback_metrics
    assert (measured["test/true_reward"], measured["test/reply_tokens"]) == (0.5, 4.25)
    assert asked[1][0] == task.trainer.datamodule.prompt_ids("validation")[:8]
    again = RewardEval(prompts=8)
    again.load_state_dict(watching.state_dict())
    n = len(asked)
    align(DPO(init_from=str(start), compile=False), callbacks=[again])
    assert again.start == 0.5
    assert len(asked) == n
    align(Reward(init_from=str(start), compile=False), callbacks=[silent := RewardEval()])
    assert silent.start is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"loss": "hinge"}, "model.loss is hinge; it must be one of sigmoid, ipo"),
        ({"beta": 0.0}, "model.beta is 0.0; it must be positive"),
        ({"label_smoothing": 0.5}, "model.label_smoothing is 0.5"),
        ({"gpt": GPTConfig(dropout=0.1)}, "model.gpt.dropout is 0.1, but DPO does not support dropout.*; set it to 0"),
    ],
)
def test_invalid_settings_are_rejected(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPO(**how)


def test_data_without_pairs_is_rejected(trainer: Build, start: Path, cache: Path) -> None:
    data = Conversations(init_from=str(start), cache=str(cache), block_size=96)
    with pytest.raises(
        UserError, match="Conversations does not provide preference pairs; DPO requires --data Preferences"
    ):
        trainer().fit(DPO(init_from=str(start), compile=False), data)


def test_reward_model_rejects_truncated_replies(trainer: Build, start: Path, cache: Path) -> None:
    """Of a truncated pair one could end and the other not, which would give the preference away."""
    data = Preferences(init_from=str(start), cache=str(cache), block_size=96, too_long="cut")
    with pytest.raises(UserError, match=r"data\.too_long is 'cut', but a reward model requires complete replies"):
        trainer().fit(Reward(init_from=str(start), compile=False), data)
