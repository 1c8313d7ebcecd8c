"""Run the commands as a user does: flags in; standard output, standard error and an exit code out.

The quick suite has minutes on two cores in total, and importing PyTorch and Lightning alone takes seconds of one. So
a test uses the first of these that proves its claim:

- ``command``: a command in this process; a run with the flags of ``small`` takes a second, half of it to parse flags;
- ``trained``: a run that is only inspected, resumed or altered: trained once, and copied for each test;
- ``forked.fit``: ``fit`` in one or several new processes, forked from one that has done the imports;
- a new interpreter, where the claim is about one: launchers, signals, kills, lazy imports.

Cases that differ only in a flag are rows of ``parametrize`` only if each could fail alone. Compiling takes ten seconds
and more of processor time: tests that compile are ``slow``, except the documented commands and one of generation.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from lit_gpt_scratch.callbacks import default_callbacks, run_plan
from lit_gpt_scratch.callbacks.samples import Samples
from lit_gpt_scratch.cli import convert, doctor, entrypoint, evaluate, fit, generate, prepare, sweep
from lit_gpt_scratch.tasks import gpt_module


@dataclass
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
Trained = Callable[..., None]
SHORT_SAMPLES = partial(Samples, tokens=4, greedy_tokens=2)
"""A tenth of the time of a run would otherwise be spent on samples, which have their own tests."""
LONG_SAMPLES = partial(Samples, tokens=40)
"""Longer than a context of 32; for sharded models."""


@pytest.fixture(autouse=True, scope="session")
def _estimate_once() -> Iterator[None]:
    """Estimate the memory of each model once: pure functions of its config, which take a tenth of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_plan, "activation_bytes", cache(run_plan.activation_bytes))
        require_fits = cache(gpt_module.require_model_fits_memory)  # an exception is not remembered
        patch.setattr(gpt_module, "require_model_fits_memory", require_fits)
        patch.setattr(fit, "require_model_fits_memory", require_fits)
        yield


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process, in an empty folder; a new process would spend seconds on imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr(default_callbacks, "Samples", SHORT_SAMPLES)
    commands = {
        "fit": fit,
        "generate": generate,
        "evaluate": evaluate,
        "convert": convert,
        "doctor": doctor,
        "prepare": prepare,
        "sweep": sweep,
    }

    def run(name: str, *args: str | Path) -> Outcome:
        code = 0
        try:
            entrypoint.run(lambda: commands[name].main([str(arg) for arg in args]))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        output = capsys.readouterr()
        return Outcome(code, output.out, output.err)

    return run


@pytest.fixture
def small(corpus: Path, cache: Path) -> list[str]:
    """Flags of a run that takes a second."""
    return [
        f"--data.source={corpus}", f"--data.cache={cache}", "--data.vocab_size=300", "--data.block_size=32",
        "--data.batch_size=4", "--data.validation_share=0.1", "--model.gpt.n_layer=2", "--model.gpt.n_head=2",
        "--model.gpt.n_embd=32", "--model.compile=false", "--trainer.accelerator=cpu", "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=4", "--trainer.val_check_interval=8", "--trainer.precision=32-true",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished() -> dict[tuple[str, ...], Path]:
    """Flags of finished runs, each with a copy of its ``runs`` folder."""
    return {}


@pytest.fixture
def trained(
    command: Command, finished: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Train to the end, as ``command`` would, but only once per set of flags."""

    def run(*flags: str) -> None:
        runs = next((flag.partition("=")[2] for flag in flags if flag.startswith("--runs=")), "runs")
        if flags in finished:
            shutil.copytree(finished[flags], runs)
            return
        outcome = command("fit", *flags)
        assert outcome.code == 0, outcome.err
        finished[flags] = shutil.copytree(runs, tmp_path_factory.mktemp("finished") / "runs")

    return run


FEW_REPLIES = ["--data.reply_tokens=6", "--data.validation_share=0.04", "--data.test_share=0.04"]
STAGES = {
    "pretraining": [],
    "pretraining, several tokens": ["--model.gpt.multi_token_depth=2"],
    "instructions": ["--data=Conversations", "--data.block_size=64"],
    "instructions, adapters": [
        "--data=Conversations", "--data.block_size=64", "--model.lora.rank=2", "--model.gpt.initialisation=gpt2",
    ],
    "classes": ["--model=Classification", "--data=LabelledText"],
    "classes, last layer, weighted": [
        "--model=Classification", "--data=LabelledText", "--model.train_layers=1", "--model.pooling=mean",
        "--model.class_weights=balanced",
    ],
    "classes, adapters": [
        "--model=Classification", "--data=LabelledText", "--model.lora.rank=2", "--model.gpt.initialisation=gpt2",
    ],
    "rewards": ["--model=Reward", "--data=Preferences", "--data.block_size=96"],
    "preferences": ["--model=DPO", "--data=Preferences", "--data.block_size=96", *FEW_REPLIES],
    "preferences, adapters": [
        "--model=DPO", "--data=Preferences", "--data.block_size=96", *FEW_REPLIES, "--model.lora.rank=2",
        "--model.gpt.initialisation=gpt2", "--model.loss=ipo",
    ],
    "on-policy": [
        "--model=PPO", "--data=Prompts", "--data.block_size=96", *FEW_REPLIES, "--model.kl_target=0.1",
        "--model.reward=tests.custom_reward.letters", "--model.steps_per_phase=2", "--model.gpt.initialisation=gpt2",
    ],
    "on-policy, groups, adapters": [
        "--model=GRPO", "--data=Prompts", "--data.block_size=96", *FEW_REPLIES, "--model.group=4",
        "--model.reward=tests.custom_reward.letters", "--model.steps_per_phase=3", "--model.gpt.initialisation=gpt2",
        "--model.lora.rank=2",
    ],
}  # fmt: skip
"""Flags added to those of ``small``, by stage."""
COMBINED = ("instructions, adapters", "classes, adapters", "classes, last layer, weighted", "preferences, adapters")
"""Stages whose task and whose adapters occur in other stages, too: slow in tests that train several times."""


@pytest.fixture
def staged(small: list[str]) -> Callable[[str], list[str]]:
    """Flags of a run of a stage: on a corpus for pretraining, otherwise on generated data."""

    def flags(stage: str) -> list[str]:
        of_records = any(flag.startswith("--data=") for flag in STAGES[stage])
        kept = [flag for flag in small if not (of_records and flag.startswith("--data.source"))]
        # A class must come before its arguments.
        return [*(flag for flag in STAGES[stage] if "." not in flag), *kept, *(f for f in STAGES[stage] if "." in f)]

    return flags
