"""Diagnoses of faults planted in small real runs, and of healthy runs.

Seeds and shapes differ from those of the runs that the thresholds were derived from.
"""

import json
import random
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.moe import Router
from lit_gpt_scratch.tasks import LanguageModel

pytestmark = pytest.mark.slow

SMALL = [
    "--data.vocab_size=300", "--data.block_size=48", "--data.batch_size=6", "--data.validation_share=0.15",
    "--model.gpt.n_layer=2", "--model.gpt.n_head=2", "--model.gpt.n_embd=32", "--model.compile=false",
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=200",
    "--trainer.log_every_n_steps=5", "--trainer.val_check_interval=100", "--inspect.every_n_steps=25",
    "--inspect.pictures=false", "--inspect.prompts=[]",
]  # fmt: skip
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's files."""
    folder = tmp_path_factory.mktemp("sources")
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(path for path in library.glob("*.py") if path.stat().st_size < 20_000):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def examine(command: Any, sources: Path, cache: Path) -> Callable[..., list[dict[str, Any]]]:
    """Train with some flags; returns the diagnoses of ``doctor.json``."""

    def run(*flags: str, source: Path = sources) -> list[dict[str, Any]]:
        classes = [flag for flag in flags if flag.count(".") == 1 and flag.startswith("--model.optimizer=")]
        rest = [flag for flag in flags if flag not in classes]
        done = command("fit", *classes, *SMALL, f"--data.source={source}", f"--data.cache={cache}", *rest)
        assert done.code == 0, done.err
        folder = max(Path("runs/pretrain").glob("version_*"), key=lambda path: path.stat().st_mtime)
        found: list[dict[str, Any]] = json.loads((folder / "doctor.json").read_text())
        replayed = command("doctor", folder, "--json")
        assert json.loads(replayed.out) == found  # the same from its events only
        return found

    return run


def names(found: list[dict[str, Any]]) -> set[str]:
    return {diagnosis["symptom"].partition(":")[0] for diagnosis in found}


def nan_batch(patch: pytest.MonkeyPatch) -> None:
    loss_and_count = LanguageModel.loss_and_count

    def faulty(self: LanguageModel, batch: Any) -> Any:
        loss, counted = loss_and_count(self, batch)
        return (
            (loss * float("nan"), counted)
            if torch.is_grad_enabled() and self.trainer.global_step == 77
            else (loss, counted)
        )

    patch.setattr(LanguageModel, "loss_and_count", faulty)


def slow_loader(patch: pytest.MonkeyPatch) -> None:
    getitems = PackedDataset.make_batch

    def slow(self: PackedDataset, indices: Any) -> Any:
        time.sleep(0.3)
        return getitems(self, indices)

    patch.setattr(PackedDataset, "make_batch", slow)


def shifted(by: int) -> Patch:
    getitems = PackedDataset.make_batch

    def faulty(self: PackedDataset, indices: Any) -> Any:
        batch = getitems(self, indices)
        batch["labels"] = batch["input_ids"] if by == 0 else batch["labels"].roll(-1, 1)
        return batch

    return lambda patch: patch.setattr(PackedDataset, "make_batch", faulty)


def dead_relus(patch: pytest.MonkeyPatch) -> None:
    build = GPT.__init__

    def dead(self: GPT, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if "feed_forward" in name and name.endswith("bias") and parameter.numel() > 32:
                torch.nn.init.constant_(parameter, -50.0)

    patch.setattr(GPT, "__init__", dead)


def biased_router(patch: pytest.MonkeyPatch) -> None:
    forward = Router.forward

    def biased(self: Router, input: torch.Tensor) -> torch.Tensor:
        return forward(self, input) + torch.linspace(8, 0, self.config.n_experts)

    patch.setattr(Router, "forward", biased)


RATE = {"loss not falling", "steps too large"}
"""Which of them is found first depends on when the run is inspected."""
HIGH, LOW = ["--model.optimizer.lr=20"], ["--model.optimizer.lr=2e-5"]
FAULTS: dict[str, tuple[set[str], list[str], Patch | None]] = {
    "rate x 1000": (RATE, ["--model.optimizer=AdamW", "--model.optimizer.lr=3"], None),
    "rate x 1000, Muon": ({"steps too large"}, HIGH, None),
    "rate x 1000, both": (RATE, [*HIGH, "--model.optimizer.adamw_lr=8"], None),
    "rate / 1000": ({"steps too small"}, ["--model.optimizer=AdamW", "--model.optimizer.lr=3e-6"], None),
    "rate / 1000, Muon": ({"steps too small"}, LOW, None),
    "rate / 1000, not inspected": (
        {"loss not falling"}, [*LOW, "--model.optimizer.adamw_lr=8e-6", "--inspect.every_n_steps=0"], None,
    ),
    "NaN batch": ({"not finite"}, ["--guard=act"], nan_batch),
    "slow loader": ({"slow loader"}, ["--trainer.max_steps=40"], slow_loader),
    "tiny validation": ({"small validation"}, ["--data.validation_share=0.005"], None),
    "labels not shifted": ({"labels out of place"}, [], shifted(0)),
    "labels shifted twice": ({"labels out of place"}, [], shifted(2)),
    "dead ReLUs": ({"dead units"}, ["--model.gpt.feed_forward=relu", "--model.gpt.bias=true"], dead_relus),
    "collapsed experts": (
        {"expert collapse"}, ["--model.gpt.feed_forward=moe", "--model.gpt.load_balance_loss=0"], biased_router,
    ),
}  # fmt: skip
EXPECTED_CAUSE = {"x 1000": "too high", "/ 1000": "too low"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_diagnosis(examine: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, flags, patch = FAULTS[fault]
    if patch is not None:
        patch(monkeypatch)
    found = examine("--seed_everything=51", *flags)
    few_steps = {"far from compute-optimal"} if "--trainer.max_steps=40" in flags else set()
    symptoms = names(found) - few_steps
    assert symptoms == expected or (expected == RATE and len(symptoms) == 1 and symptoms < RATE), found
    for part, word in EXPECTED_CAUSE.items():
        if part in fault:
            assert all(word in diagnosis["cause"] for diagnosis in found), found


def test_duplicated_text_is_distinguished_from_other_overfitting(examine: Any, sources: Path, tmp_path: Path) -> None:
    rows = [path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())]
    source = tmp_path / "rows.jsonl"
    copies = [text for text in rows[:8] for _ in range(20)] + rows[8:16]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in copies), encoding="utf-8")
    found = examine("--data.cleaning=[]", "--seed_everything=52", "--data.validation_share=0.1", source=source)
    assert names(found) == {"duplicated text"}, found


def test_poisoned_documents_are_named(examine: Any, sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "poisoned"
    shutil.copytree(sources, folder)
    rng = random.Random(3)
    for number, first in enumerate((0x4E00, 0xAC00, 0x0900, 0x1F300)):  # scripts
        noise = "".join(chr(first + rng.randrange(80)) for _ in range(300))
        (folder / f"noise_{number}.py").write_text(noise, encoding="utf-8")
    found = examine(
        "--data.batch_size=1", "--data.block_size=96", "--trainer.max_steps=600", "--seed_everything=53", source=folder
    )
    assert names(found) == {"loss spike"}, found
    assert all("document" in diagnosis["symptom"] for diagnosis in found)


START = [
    "--data=Conversations", "--data.vocab_size=400", "--data.block_size=96", "--data.batch_size=8",
    "--model.gpt.n_layer=1", "--model.gpt.n_head=4", "--model.gpt.n_embd=64", "--model.compile=false",
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=160",
    "--trainer.val_check_interval=160", "--seed_everything=51", "--runs=start",
]  # fmt: skip
"""Flags of a model that replies, but not always to the prompt."""
SMALL_PHASES = [
    "--model.init_from=start/pretrain/version_0", "--data.reply_tokens=16", "--data.batch_size=32",
    "--trainer.accelerator=cpu", "--inspect.every_n_steps=0", "--inspect.pictures=false", "--inspect.prompts=[]",
]  # fmt: skip
FULL_STOP, HIGH_RATE = "--model.reward=full_stop", "--model.optimizer.lr=2e-2"
DEPENDS_ON_ROUNDING = {"high rate": {"KL blow-up"}}
"""Diagnoses that are found on some processors only: rounding changes which replies are sampled. Both name the rate."""
SPOILT: dict[str, tuple[str, set[str], list[str]]] = {
    "no penalty, high rate": ("ppo", {"KL blow-up"}, [FULL_STOP, HIGH_RATE, "--model.kl_coefficient=0"]),
    "high rate": ("ppo", {"KL blow-up", "entropy collapse"}, [FULL_STOP, HIGH_RATE]),
    "high rate, with a target": ("ppo", {"KL blow-up"}, [FULL_STOP, HIGH_RATE, "--model.kl_target=1"]),
    "the flags that these three suggest": (
        "ppo", set(), [FULL_STOP, "--model.optimizer.lr=6.3e-3", "--model.entropy_coefficient=0.01"],
    ),
    "less pays": ("ppo", {"reward hacking", "length collapse"}, ["--model.reward=tests.custom_reward.brevity"]),
    "more pays": (
        "ppo", {"KL blow-up", "reward hacking", "length collapse"},
        ["--model.reward=tests.custom_reward.length", "--model.optimizer.lr=6e-3"],
    ),
    "letters pay": (
        "ppo", {"reward hacking"},
        ["--model.reward=tests.custom_reward.letters", "--model.optimizer.lr=6e-3", "--model.kl_coefficient=0.01"],
    ),
    "nothing, PPO": ("ppo", set(), [FULL_STOP]),
    "nothing, PPO with a target": ("ppo", set(), [FULL_STOP, "--model.kl_target=6"]),
    "nothing, GRPO": ("grpo", set(), [FULL_STOP]),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_each_fault_of_a_policy_is_diagnosed(command: Any, trained: Any, cache: Path, fault: str) -> None:
    kind, expected, flags = SPOILT[fault]
    trained(*START, f"--data.cache={cache}")
    config = Path(__file__).parents[2] / f"experiments/align/{kind}.yaml"
    done = command("fit", "--config", config, *SMALL_PHASES, "--seed_everything=54", f"--data.cache={cache}", *flags)
    assert done.code == 0, done.err
    found = json.loads(Path(f"runs/{kind}/version_0/doctor.json").read_text())
    assert expected - DEPENDS_ON_ROUNDING.get(fault, set()) <= names(found) <= expected, found
    replayed = command("doctor", f"runs/{kind}/version_0", "--json")
    assert json.loads(replayed.out) == found


SHAPES = [
    [], ["--model.optimizer=AdamW"], ["--model.gpt.n_layer=3", "--model.gpt.n_embd=48", "--trainer.max_steps=300"],
    ["--model.gpt.feed_forward=relu2", "--model.gpt.position=alibi"], ["--data.packing=best_fit"],
    ["--model.gpt.norm_placement=sandwich", "--model.gpt.norm=layernorm"], ["--trainer.accumulate_grad_batches=2"],
    ["--model.gpt.dropout=0.1", "--model.ema_decay=0.99"], ["--data.block_size=96", "--data.batch_size=3"],
    ["--model.gpt.n_kv_head=1", "--model.gpt.initialisation=gpt2"],
    ["--model.gpt.feed_forward=moe"], ["--model.optimizer=AdamW", "--model.gpt.feed_forward=moe"],
    ["--model.gpt.feed_forward=moe", "--model.gpt.n_shared_experts=1", "--model.gpt.expert_bias_rate=0.01"],
    ["--model.gpt.attention=latent"], ["--model.gpt.multi_token_depth=1"], ["--model.gpt.attention_sinks=true"],
    ["--model.gpt.parametrisation=mup", "--model.gpt.mup_base_width=16"],
    ["--model.gpt.sliding_window=16", "--model.gpt.sliding_window_pattern=2"],
    ["--model.gpt.attention=experiments.examples.gated_attention.GatedAttention"],
    ["--model.optimizer=AdamW", "--model.gpt.parametrisation=mup", "--model.gpt.mup_base_width=64"],
]  # fmt: skip


@pytest.mark.timeout(3600)
def test_twenty_healthy_runs_raise_one_false_alarm_at_most(examine: Any) -> None:
    alarms = []
    for number in range(20):
        found = examine(*SHAPES[number % len(SHAPES)], f"--seed_everything={1000 + number}")
        alarms += [(number, diagnosis) for diagnosis in found]
    print(f"{len(alarms)} false alarms in 20 runs: {alarms}")
    assert len(alarms) <= 1, alarms
