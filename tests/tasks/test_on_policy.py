"""On-policy training: rollouts against the decoder, losses, rewards, KL penalty and invalid settings."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX, BatchLayout
from lit_gpt_scratch.callbacks.run_plan import RunPlan
from lit_gpt_scratch.callbacks.summary import RunSummary
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data import Conversations, Preferences, Prompts
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.losses.rl import grpo_advantages
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.optim import AdamW
from lit_gpt_scratch.optim.gradient_clipping import gradients_of, total_grad_norm
from lit_gpt_scratch.tasks import GRPO, PPO, Reward
from lit_gpt_scratch.tasks.rl.on_policy import ROLLOUTS_KEY, OnPolicyModule
from lit_gpt_scratch.tasks.rl.rollouts import Rollouts, merge_ranks, rank_rows, reply_seeds
from lit_gpt_scratch.text.verifiable_rewards import no_digit

Build = Callable[..., L.Trainer]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, initialisation="gpt2")
POLICIES: dict[str, tuple[type[OnPolicyModule], dict[str, Any]]] = {
    "PPO": (PPO, {}),
    "PPO, adapters": (PPO, {"lora": LoRA(2)}),
    "GRPO": (GRPO, {"group": 4}),
}


@pytest.fixture
def data(cache: Path) -> Callable[..., Prompts]:
    def build(**changes: Any) -> Prompts:
        settings = {"cache": str(cache), "vocab_size": 300, "block_size": 96, "reply_tokens": 8, "batch_size": 4}
        return Prompts(**(settings | {"validation_share": 0.04, "test_share": 0.04} | changes))

    return build


def policy(name: str, **changes: Any) -> OnPolicyModule:
    kind, more = POLICIES[name]
    settings = {"gpt": SHAPE, "reward": "tests.custom_reward.even_tokens", "optimizer": AdamW(1e-3), "compile": False}
    return kind(**(settings | more | changes))


class Seen(L.Callback):
    """Records training batches, and the policy's log-probabilities before it trains on them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.logprobs: list[Tensor] = []
        self.reference_logprobs: list[Tensor] = []
        self.rollouts: list[Rollouts] = []
        self.weights: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Mark the step; its gradient norm is recorded at the end of the batch."""
        self._due = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.__dict__.pop("_due", False):
            self.norms.append(total_grad_norm(gradients_of(pl_module)).item())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        with torch.no_grad():
            self.logprobs.append(pl_module(batch["input_ids"], batch["labels"])[0])
            self.reference_logprobs.append(pl_module.reference_logprobs(batch["input_ids"], batch["labels"]))
        if not self.rollouts or self.rollouts[-1] is not pl_module.rollouts:
            self.rollouts.append(pl_module.rollouts)
            self.weights.append({name: each.clone() for name, each in pl_module.net.state_dict().items()})


@pytest.fixture
def run(trainer: Build, data: Callable[..., Prompts]) -> Callable[..., tuple[OnPolicyModule, Seen]]:
    def fitted(name: str, steps: int = 4, accumulate: int = 1, more: Any = None, **changes: Any) -> Any:
        L.seed_everything(0)
        seen, task = Seen(), policy(name, **({"steps_per_phase": 2, "passes": 2} | changes))
        made = trainer(max_steps=steps, limit_val_batches=0, callbacks=[seen], accumulate_grad_batches=accumulate)
        made.fit(task, data(**(more or {})))
        return task, seen

    return fitted


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_before_an_update_ratio_is_exactly_one_and_kl_exactly_zero(
    run: Callable[..., Any], name: str, accumulate: int
) -> None:
    """Bit for bit, for rows of any length, at the first step of each phase; the KL in the first phase."""
    _, seen = run(name, 8, accumulate)
    assert len(seen.rollouts) == 2
    steps = range(0, len(seen.batches), accumulate)
    for number, first in enumerate(steps):
        for batch, now in list(zip(seen.batches, seen.logprobs, strict=True))[first : first + accumulate]:
            assert torch.equal(batch["logprobs"], now) == (number % 4 == 0)
            if number < 4:
                assert torch.equal(batch["logprobs"], batch["reference"])
    assert seen.rollouts[0].means["kl"] == 0.0
    assert seen.rollouts[1].means["kl"] != 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_match_replies_generated_one_by_one(run: Callable[..., Any], temperature: float) -> None:
    """A reply depends on weights, prompt, seed and its index; its log-probabilities agree within 1e-5."""
    task, seen = run("GRPO", 8, temperature=temperature, rows_at_once=3)
    assert len(seen.rollouts) == 2
    for rollouts, weights in zip(seen.rollouts, seen.weights, strict=True):
        task.net.load_state_dict(weights)
        rows, end = rollouts.rows, task.data_info.end_of_text
        n = len(rows["labels"])
        for row in range(n):
            number = rollouts.phase * n + row
            [place] = task.prompts.shuffled([number // 4])
            [prompt], [asked] = task.prompts.lookup("train", [place])
            logprobs: list[list[float]] = [[]]
            sampling = Sampling(temperature=temperature, top_k=None)
            [seed] = reply_seeds(0, 0, numbers=[number])
            reply = [
                token for _, token in generate(task.net.eval(), [prompt], 8, sampling, [seed], end, logprobs=logprobs)
            ]
            written = [token for token in reply if token is not None]
            ended = len(written) < 8
            within = rows["labels"][row] != IGNORE_INDEX
            assert rows["labels"][row][within].tolist() == [*written, *([end] if ended else [])]
            assert rows["input_ids"][row, : len(prompt)].tolist() == prompt
            assert within.nonzero()[0].item() == len(prompt) - 1
            torch.testing.assert_close(rows["logprobs"][row][within], torch.tensor(logprobs[0]), rtol=0, atol=1e-5)
            reply = task.prompts.decode(written)
            assert rows["scores"][row] == sum(ord(character) % 2 == 0 for character in reply)
            assert rows["ended"][row] == ended
            assert asked.splitlines()[-1] in task.prompts.decode(prompt)


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
def test_step_is_independent_of_gradient_accumulation(run: Callable[..., Any], name: str) -> None:
    """In micro-batches of different widths and numbers of tokens."""
    found = []
    for accumulate, batch_size in ((1, 12), (3, 4)):
        _, seen = run(name, 4, accumulate, more={"batch_size": batch_size}, temperature=3.0)
        found.append((seen.norms, seen.rollouts[0]))
    (one, rollouts), (three, others) = found
    assert len({batch["labels"].size(1) for batch in seen.batches}) > 1
    assert torch.equal(rollouts.rows["input_ids"], others.rows["input_ids"])
    assert three == pytest.approx(one, rel=1e-4)


def test_merge_ranks_restores_the_order_of_the_phase() -> None:
    """Two ranks with three micro-batches of two rows each."""
    ranks = torch.tensor([rank_rows(BatchLayout(2, 2, 3), rank, 12) for rank in range(2)])
    assert merge_ranks(ranks[0], ranks, 2).tolist() == list(range(12))
    assert merge_ranks(ranks[0][:, None], ranks[..., None], 2).squeeze(1).tolist() == list(range(12))


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
def test_padding_does_not_affect_loss_or_gradient(run: Callable[..., Any], name: str) -> None:
    """Different tokens after the replies, and different values at prompts and padding, change nothing."""
    task, seen = run(name, 2, entropy_coefficient=0.1)
    batch = seen.batches[-1]
    labels = batch["labels"]
    within = labels != IGNORE_INDEX
    behind = within.flip(1).cumsum(1).flip(1) == 0
    dirty = {each: value.clone() for each, value in batch.items()}
    dirty["input_ids"][behind] = 7
    for each in {"logprobs", "reference", "values", "returns", "advantages"} & dirty.keys():
        if dirty[each].ndim > 1:
            dirty[each][~within] = 5.0

    def learned(given: dict[str, Tensor]) -> list[Tensor]:
        task.zero_grad()
        loss, counted = task.loss_and_count(given)
        (loss / counted).backward()
        return [loss.detach(), *(p.grad for p in task.parameters() if p.grad is not None)]

    task.trainer.training = True
    for clean, other in zip(learned(batch), learned(dirty), strict=True):
        torch.testing.assert_close(clean, other, rtol=1e-4, atol=1e-6)


def test_grpo_groups_the_replies_to_each_prompt(run: Callable[..., Any]) -> None:
    _, seen = run("GRPO", 4, steps_per_phase=4, group=8)
    rows = seen.rollouts[0].rows
    assert len(rows["scores"]) == 16
    torch.testing.assert_close(rows["advantages"], grpo_advantages(rows["scores"], 8))
    prompt = [
        row[: (labels != IGNORE_INDEX).nonzero()[0] + 1].tolist()
        for row, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]
    assert prompt[:8] == [prompt[0]] * 8
    assert prompt[8:] == [prompt[8]] * 8
    assert prompt[0] != prompt[8]


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
def test_kl_coefficient_adapts_to_its_target(run: Callable[..., Any], name: str) -> None:
    """The first KL is 0, more than a fifth below the target: the coefficient decreases by 2 % per phase."""
    _, seen = run(name, 9, kl_target=1.0, kl_coefficient=0.5)
    assert [rollouts.coefficient for rollouts in seen.rollouts] == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2])
    _, fixed = run(name, 9, kl_coefficient=0.5)
    assert [rollouts.coefficient for rollouts in fixed.rollouts] == [0.5] * 3


@pytest.mark.parametrize("name", POLICIES)
def test_rewarded_replies_become_more_probable_and_the_reference_stays(
    trainer: Build, data: Callable[..., Prompts], name: str
) -> None:
    """Random replies consist of letters by half. The head is not pretrained; adapters leave it frozen."""
    L.seed_everything(0)
    seen = Seen()
    settings = {
        "reward": "tests.custom_reward.letters",
        "optimizer": AdamW(0.02, weight_decay=0.0),
        "kl_coefficient": 0.0,
    }
    task = policy(name, **settings, steps_per_phase=1, passes=2)
    trainer(max_steps=40, limit_val_batches=0, callbacks=[seen]).fit(task, data(batch_size=32, reply_tokens=2))
    rewards = [rollouts.means["reward"] for rollouts in seen.rollouts]
    assert sum(rewards[:2]) / 2 < 0.6
    assert sum(rewards[-2:]) / 2 > 0.85
    first = seen.batches[0]
    with torch.no_grad():
        assert torch.equal(task.reference_logprobs(first["input_ids"], first["labels"]), seen.reference_logprobs[0])
        assert not torch.equal(task(first["input_ids"], first["labels"])[0], seen.logprobs[0])


def test_second_run_of_a_module_generates_its_own_rollouts(
    trainer: Build, data: Callable[..., Prompts], tmp_path: Path
) -> None:
    """Its first phase uses the network as it is, and its own prompts; a checkpoint's phase is continued."""
    task, again, resumed = policy("PPO", kl_target=1.0, steps_per_phase=2), Seen(), Seen()
    made = trainer(max_steps=3, limit_val_batches=0)
    made.fit(task, data())
    made.save_checkpoint(tmp_path / "first.ckpt")
    other = data(split_seed=1)
    trainer(max_steps=2, limit_val_batches=0, callbacks=[again]).fit(task, other)
    assert torch.equal(again.logprobs[0], again.batches[0]["logprobs"])
    assert again.rollouts[0].coefficient == task.kl_coefficient
    [prompt], _ = other.lookup_prompts("train", other.shuffled_prompts([0]))
    assert again.batches[0]["input_ids"][0, : len(prompt)].tolist() == prompt
    going_on = trainer(max_steps=4, limit_val_batches=0, callbacks=[resumed])
    going_on.fit(task, data(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert not torch.equal(resumed.logprobs[0], resumed.batches[0]["logprobs"])
    kept = torch.load(tmp_path / "first.ckpt", weights_only=True)[ROLLOUTS_KEY]["rows"]
    assert kept.keys() == resumed.rollouts[0].rows.keys()
    assert all(torch.equal(rows, kept[name]) for name, rows in resumed.rollouts[0].rows.items())


def test_replies_are_checked_by_the_reward(trainer: Build, data: Callable[..., Prompts], tmp_path: Path) -> None:
    """In training, after resuming, and in a test on other data."""
    task, seen, made = policy("GRPO", reward="no_digit"), Seen(), trainer(max_steps=1, limit_val_batches=0)
    made.callbacks.append(seen)
    made.fit(task, data(batch_size=16))
    made.save_checkpoint(tmp_path / "run.ckpt")
    rows = seen.rollouts[0].rows
    assert 0 < rows["true_reward"].sum() < len(rows["true_reward"])
    assert torch.equal(rows["true_reward"], rows["scores"])
    made.test(task, other := data(split_seed=1), verbose=False)
    assert other.reply_check is no_digit
    again = trainer(max_steps=2, limit_val_batches=0)
    again.fit(policy("GRPO", reward="no_digit"), going_on := data(batch_size=16), ckpt_path=str(tmp_path / "run.ckpt"))
    assert going_on.reply_check is no_digit


@pytest.mark.slow
def test_critic_learns_a_constant_return(trainer: Build, data: Callable[..., Prompts]) -> None:
    """All replies have the same reward, which the critic learns to predict."""
    L.seed_everything(0)
    seen = Seen()
    task = policy("PPO", reward="python_expression", unended_score=0.5, gae_lambda=1.0, kl_coefficient=0.0,
                  value_clip=None, value_coefficient=1.0, whitening=False, optimizer=AdamW(3e-3))  # fmt: skip
    trainer(max_steps=60, limit_val_batches=0, callbacks=[seen]).fit(task, data(batch_size=8, reply_tokens=2))
    rows = seen.rollouts[-1].rows
    ends = (rows["labels"] != IGNORE_INDEX) & (rows["ended"] == 0)[:, None]
    assert seen.rollouts[0].rows["values"].abs().max() == 0
    torch.testing.assert_close(rows["values"][ends], torch.full_like(rows["values"][ends], 0.5), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", POLICIES)
def test_reference_is_not_among_the_parameters(
    trainer: Build, data: Callable[..., Prompts], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The critic is, in the plan and in the summary."""
    summary, task = RunSummary(), policy(name, steps_per_phase=2)
    summary.folder = RunFolder.create(tmp_path, "run")
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        trainer(max_steps=1, limit_val_batches=0, callbacks=[summary, RunPlan()]).fit(task, data())
    contents = json.loads((summary.folder.path / "summary.json").read_text(encoding="utf-8"))
    network, critic = sum(p.numel() for p in task.net.parameters()), SHAPE.n_embd if name.startswith("PPO") else 0
    assert contents["parameters"] == network + critic
    frozen = sum(p.numel() for p in task.net.parameters() if not p.requires_grad)
    assert contents["trained_parameters"] == network + critic - frozen
    [groups] = [text for record in caplog.records if (text := record.getMessage()).startswith("optimizer")]
    tensors = [int(n) for n in re.findall(r" in (\d+) ", groups)]
    assert sum(tensors) == sum(p.requires_grad for p in task.net.parameters()) + bool(critic)


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
def test_test_metrics_cover_each_prompt_once(trainer: Build, data: Callable[..., Prompts], name: str) -> None:
    """In batches, the last one padded, compared with all prompts at once."""
    prompts, task = data(), policy(name, kl_coefficient=0.3)
    made = trainer(max_steps=3, limit_val_batches=0)
    made.fit(task, prompts)
    made.test(task, prompts, verbose=False)
    n = task.prompts.counts["test"]
    assert n % 4
    task.eval()
    rows = task.generator.generate("test", range(n), reply_seeds(0, 1, numbers=range(n)))
    within = rows["labels"] != IGNORE_INDEX
    with torch.no_grad():
        logprobs, logits, _ = task(rows["input_ids"], rows["labels"])
        kl = (logprobs - task.reference_logprobs(rows["input_ids"], rows["labels"]))[within].sum() / n
        chances = logits.softmax(-1)
        entropy = -(chances * chances.log()).sum(-1)[within].mean()
    reward = rows["scores"].mean()
    expected = {"reward": reward, "kl": kl, "entropy": entropy, "ended": rows["ended"].mean()}
    expected["loss"] = 0.3 * kl - reward
    for figure, value in expected.items():
        torch.testing.assert_close(made.callback_metrics[f"test/{figure}"], value, rtol=1e-4, atol=1e-5)


def test_sharded_policies_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process generates by itself, as many tokens as its replies need."""
    monkeypatch.setattr(PPO, "device_mesh", object())
    with pytest.raises(UserError, match=r"PPO supports only DDP; set --trainer\.strategy ddp"):
        policy("PPO").build_auxiliary_networks()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("tests.custom_reward.not_a_number", "tests.custom_reward.not_a_number returned nan for the reply"),
        ("tests.custom_reward.too_few", r"returned shape \(1,\) for 8 replies; it must return one number per reply"),
        ("tests.custom_reward.words", "returned a list; it must return one number per reply"),
        ("tests.custom_reward.NUMBER", "which is of type int, not a function"),
        ("tests.custom_reward.nothing", "cannot be imported"),
        ("no_file.reward", "No module named"),
        ("polite", "does not exist; set it to a run, a function such as my_file.my_reward, or one of full_stop"),
        ("runs/nowhere", "model.reward: no checkpoint"),
    ],
)
def test_invalid_rewards_are_rejected(run: Callable[..., Any], reward: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        run("PPO", reward=reward)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GRPO", {"group": 3}, "model.group is 3, but a rollout phase has 8 replies"),
        ("GRPO", {"group": 1}, "model.group is 1; it must be 2 or more"),
        ("PPO", {"passes": 0}, "model.passes is 0"),
        ("PPO", {"steps_per_phase": 0}, "model.steps_per_phase is 0"),
        ("PPO", {"clip": 0.0}, "model.clip is 0.0; it must be positive"),
        ("PPO", {"temperature": 0.0}, "model.temperature is 0.0; it must be positive"),
        ("PPO", {"kl_target": -1.0}, "model.kl_target is -1.0"),
        ("PPO", {"kl_coefficient": -1.0}, "model.kl_coefficient is -1.0"),
        ("PPO", {"kl_coefficient": math.inf}, "model.kl_coefficient is inf; it must be finite"),
        ("PPO", {"kl_coefficient": math.nan}, "model.kl_coefficient is nan"),
        ("GRPO", {"unended_score": math.nan}, "model.unended_score is nan; it must be finite"),
        ("PPO", {"unended_score": -math.inf}, "model.unended_score is -inf"),
        ("GRPO", {"kl_target": 3.0, "kl_coefficient": 0.0}, r"model.kl_target is 3.0, but model.kl_coefficient is 0"),
        ("GRPO", {"gpt": replace(SHAPE, dropout=0.1)}, "model.gpt.dropout is 0.1, but GRPO .* not support dropout"),
        ("PPO", {"lora": LoRA(2, dropout=0.2)}, "model.lora.dropout is 0.2, but PPO does not support dropout"),
        ("PPO", {"gamma": 1.5}, "model.gamma is 1.5; it must be between 0 and 1"),
        ("PPO", {"value_clip": 0.0}, "model.value_clip is 0.0"),
        ("PPO", {"rows_at_once": 0}, "model.rows_at_once is 0"),
    ],
)
def test_invalid_settings_are_rejected(
    run: Callable[..., Any], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        run(name, **changes)
    assert "\n" not in str(raised.value)


def test_policy_needs_prompts_and_a_reward(
    run: Callable[..., Any], trainer: Build, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(UserError, match="Conversations has no prompts; PPO requires --data Prompts"):
        trainer().fit(policy("PPO"), Conversations(cache=str(cache), vocab_size=300))
    (tmp_path / "asked.jsonl").write_text("\n".join(f'{{"prompt": "Count to {n}."}}' for n in range(60)))
    with pytest.raises(UserError, match="no reward function is specified"):
        run("PPO", reward=None, more={"source": str(tmp_path / "asked.jsonl"), "vocab_size": None})


@pytest.fixture
def reward_run(trainer: Build, cache: Path, tmp_path: Path) -> Callable[..., tuple[Reward, str]]:
    """A reward model and its checkpoint."""

    def trained(**changes: Any) -> tuple[Reward, str]:
        settings = {"cache": str(cache), "vocab_size": 300, "block_size": 96, "batch_size": 4}
        task, made = Reward(SHAPE, compile=False), trainer(max_steps=2, limit_val_batches=0)
        made.fit(task, Preferences(**(settings | changes)))
        made.save_checkpoint(tmp_path / "reward.ckpt")
        return task, str(tmp_path / "reward.ckpt")

    return trained


@pytest.fixture
def same(data: Callable[..., Prompts], tmp_path: Path) -> dict[str, Any]:
    """Data settings with a shared tokenizer."""
    tokens = data()
    tokens.prepare_data()
    tokens.tokenizer.save(tmp_path / "tokenizer.json")
    return {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": None}


def score_alone(model: Reward, rows: dict[str, Tensor]) -> Tensor:
    """The reward of each row's text, scored by itself."""
    found = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        last = int((labels != IGNORE_INDEX).nonzero()[-1])
        whole = torch.cat((ids[: last + 1], labels[last : last + 1]))
        found.append(model.eval()(whole[None], torch.tensor([len(whole)]))[0].detach())
    return torch.stack(found)


@pytest.mark.parametrize("unended", [None, -7.0])
def test_reward_model_is_read_at_the_end_of_replies(
    run: Callable[..., Any],
    reward_run: Callable[..., tuple[Reward, str]],
    same: dict[str, Any],
    unended: float | None,
) -> None:
    """A truncated reply gets the minimum of its phase, or the configured score."""
    model, path = reward_run(**same)
    task, seen = run("PPO", reward=path, unended_score=unended, more=same)
    rows = seen.rollouts[0].rows
    scores, ended = score_alone(model, rows), rows["ended"] > 0
    assert 0 < ended.sum() < len(ended)
    expected = torch.where(ended, scores, scores.min() if unended is None else unended)
    torch.testing.assert_close(rows["scores"], expected, rtol=0, atol=1e-5)
    assert seen.rollouts[0].means["reward"] == pytest.approx(expected.mean().item(), abs=1e-5)

    made, prompts = task.trainer, task.trainer.datamodule
    made.test(task, prompts, verbose=False)
    n = task.prompts.counts["test"]
    task.eval()
    rows = task.generator.generate("test", range(n), reply_seeds(0, 1, numbers=range(n)))
    scores, ended = score_alone(model, rows), rows["ended"] > 0
    mean = torch.where(ended, scores, scores.min() if unended is None else unended).mean()
    torch.testing.assert_close(made.callback_metrics["test/reward"], mean, rtol=0, atol=1e-5)


def test_reward_model_with_another_tokenizer_or_untrusted_code_is_rejected(
    run: Callable[..., Any], reward_run: Callable[..., tuple[Reward, str]]
) -> None:
    _, path = reward_run(vocab_size=280)
    with pytest.raises(UserError, match=r"model.reward: the reward model .* has a different tokenizer"):
        run("PPO", reward=path)
    contents = torch.load(path, weights_only=True)
    contents[METADATA_KEY]["gpt"]["attention"] = own = "tests.custom_attention.DoubledAttention"
    torch.save(contents, path)
    with pytest.raises(UserError, match=f"model.reward: .* pass --model.gpt.attention {own}"):
        run("PPO", reward=path)
    with pytest.raises(UserError, match="different tokenizer"):  # to be trusted with the code is not enough
        run("PPO", reward=path, gpt=replace(SHAPE, attention=own))


def test_reward_model_with_a_shorter_context_is_rejected_before_generating(
    run: Callable[..., Any], reward_run: Callable[..., tuple[Reward, str]], same: dict[str, Any]
) -> None:
    _, path = reward_run(**same, block_size=88)
    message = "has a context of 88 tokens, but data.block_size is 96; lower data.block_size, or .*--data.block_size 96"
    with pytest.raises(UserError, match=message):
        run("PPO", 0, reward=path, more=same)
    run("PPO", 1, reward=path, more=same | {"block_size": 88})
