"""No file runs code that the user does not name: every way in, as a table.

``planted`` is a module on the import path that leaves a mark when it is imported. Each way in is tried with a file that
names it: the command fails in one line that says what to do, nothing is imported, and with the flag it works.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_gpt_scratch.checkpoint.adapters import apply_adapter, hash_base_weights
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint, load_model, load_reward_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors
from lit_gpt_scratch.cli.early_flags import EarlyFlags
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import LoRA, add_lora, lora_state_dict
from lit_gpt_scratch.model.output_heads import ScalarHead
from lit_gpt_scratch.tasks import DPO, LanguageModel
from lit_gpt_scratch.trust import record_written_config, require_trusted
from tests.end_to_end.conftest import Command, Trained

PLANTED = """
from pathlib import Path
import lightning as L
from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.feed_forward import SwiGLUFeedForward
from lit_gpt_scratch.tasks import LanguageModel

Path(__file__).with_name("imported").touch()

class Attn(Attention):
    pass

class Swi(SwiGLUFeedForward):
    pass

class Task(LanguageModel):
    pass

class Watch(L.Callback):
    pass

def start(trainer, module):
    pass

def reward(prompts, replies):
    return [1.0] * len(replies)
"""
RUN = Path("runs/pretrain/version_0")
ATTENTION, FEED_FORWARD = "planted.Attn", "planted.Swi"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that exists once ``planted`` has been imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "code" / "imported"


@pytest.fixture
def run(mark: Path, trained: Trained, small: list[str]) -> Path:
    """The folder of a finished run."""
    trained(*small)
    return RUN


def feed_forward_model() -> str:
    contents = load_checkpoint(RUN / "checkpoints/last.ckpt")
    contents[METADATA_KEY] |= {"gpt": contents[METADATA_KEY]["gpt"] | {"feed_forward": FEED_FORWARD}}
    return save(contents, "evil.ckpt")


def with_attention(path: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint's contents whose attention class is ``planted.Attn``."""
    contents = load_checkpoint(path)
    contents[METADATA_KEY] |= {"gpt": contents[METADATA_KEY]["gpt"] | {"attention": ATTENTION}, **changes}
    return contents


def save(contents: dict[str, Any], name: str) -> str:
    save_checkpoint(contents, Path(name))
    return name


def full_model() -> str:
    return save(with_attention(RUN / "checkpoints/last.ckpt"), "evil.ckpt")


def exported_model() -> str:
    export_safetensors(with_attention(RUN / "checkpoints/last.ckpt"), "net.", Path("evil.safetensors"))
    return "evil.safetensors"


def adapted_model() -> str:
    """A run with adapters, whose weights must be merged before an export."""
    contents = load_checkpoint(RUN / "checkpoints/last.ckpt")
    net = build_model(contents, RUN).net
    add_lora(net, LoRA(rank=2))
    contents["state_dict"] = {f"net.{name}": weight for name, weight in net.state_dict().items()}
    contents[METADATA_KEY] |= {"lora": asdict(LoRA(rank=2))}
    save(contents, "adapted.ckpt")
    return save(with_attention(Path("adapted.ckpt")), "evil.ckpt")


def adapter() -> str:
    base = build_model(load_checkpoint(RUN / "checkpoints/last.ckpt"), RUN)
    net = base.net
    digest = hash_base_weights(net.state_dict(), new_head=False)
    add_lora(net, LoRA(rank=2))
    gpt = base.metadata.gpt | {"attention": ATTENTION}
    metadata = replace(base.metadata, gpt=gpt, tokenizer="", lora=asdict(LoRA(rank=2)), base=digest)
    contents = {METADATA_KEY: asdict(metadata), "state_dict": lora_state_dict(net)}
    export_safetensors(contents, "", Path("adapter.safetensors"))
    return "adapter.safetensors"


def reward_model() -> str:
    contents = load_checkpoint(RUN / "checkpoints/last.ckpt")
    metadata = CheckpointMetadata.from_checkpoint(contents)
    net = GPT(metadata.build_configs(RUN, None)[0], metadata.vocab_size, metadata.block_size, ScalarHead())
    contents["state_dict"] = {f"net.{name}": weight for name, weight in net.state_dict().items()}
    save(contents, "reward.ckpt")
    return save(with_attention(Path("reward.ckpt"), rewards=True), "evil.ckpt")


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[], list[str]]:
    """Change the ``config.yaml`` of the run, and resume it."""

    def resume() -> list[str]:
        config = yaml.safe_load((RUN / "config.yaml").read_text())
        change(config)
        (RUN / "config.yaml").write_text(yaml.safe_dump(config))
        return ["fit", f"--ckpt_path={RUN}", "--trainer.max_steps=14"]

    return resume


def set_attention(config: dict[str, Any]) -> None:
    config["model"]["init_args"]["gpt"]["attention"] = ATTENTION
    save(with_attention(RUN / "checkpoints/last.ckpt"), str(RUN / "checkpoints/last.ckpt"))


def set_feed_forward(config: dict[str, Any]) -> None:
    config["model"]["init_args"]["gpt"]["feed_forward"] = FEED_FORWARD
    save(load_checkpoint(Path(feed_forward_model())), str(RUN / "checkpoints/last.ckpt"))


def set_reward(config: dict[str, Any]) -> None:
    arguments = config["model"]["init_args"]
    kept = {name: arguments[name] for name in ("gpt", "optimizer", "schedule", "compile")}
    config["model"] = {"class_path": "lit_gpt_scratch.tasks.PPO", "init_args": {**kept, "reward": "planted.reward"}}
    config["data"] = {"class_path": "lit_gpt_scratch.data.Prompts"}


def set_trusted_class(config: dict[str, Any]) -> None:
    """A config that trusts its own code."""
    config["model"]["class_path"] = config["trust"] = "planted.Task"


def set_nested_config(config: dict[str, Any]) -> None:
    """The code is named in a second file, which the first one names."""
    (RUN / "model.yaml").write_text(yaml.safe_dump(config["model"] | {"class_path": "planted.Task"}))
    config["model"] = "model.yaml"


def set_callback(callback: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["trainer"].update(callbacks=[callback])


LAMBDA = {
    "class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_train_start": "planted.start"},
}  # fmt: skip
SAMPLE = ["--max_new_tokens=2", "--device=cpu"]


@dataclass
class WayIn:
    """A command that reads a file which names ``name``.

    ``then`` is part of the error of the command with the flag, where it fails for another reason.
    """

    arguments: Callable[[], list[str]]
    name: str = ATTENTION
    flag: str = "--trust="
    then: str = ""


START = ["fit", "--runs=new", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--model.compile=false"]
WAYS = {
    "checkpoint": WayIn(lambda: ["generate", full_model(), *SAMPLE]),
    "feed-forward": WayIn(lambda: ["generate", feed_forward_model(), *SAMPLE], name=FEED_FORWARD),
    "init_from, feed-forward": WayIn(
        lambda: [*START, f"--model.init_from={feed_forward_model()}", f"--data.source={__file__}"], name=FEED_FORWARD
    ),
    "init_from, feed-forward by name": WayIn(
        lambda: [*START, f"--model.init_from={feed_forward_model()}", f"--data.source={__file__}"],
        name=FEED_FORWARD,
        flag="--model.gpt.feed_forward=",
    ),
    "resumed feed-forward": WayIn(edit_config(set_feed_forward), name=FEED_FORWARD),
    "safetensors": WayIn(lambda: ["generate", exported_model(), *SAMPLE]),
    "adapters in a checkpoint": WayIn(lambda: ["generate", adapted_model(), *SAMPLE]),
    "adapter": WayIn(
        lambda: ["generate", str(RUN), f"--adapter={adapter()}", *SAMPLE], then="contains a different model"
    ),
    "adapter of a custom model": WayIn(lambda: ["generate", full_model(), f"--adapter={adapter()}", *SAMPLE]),
    "evaluate": WayIn(lambda: ["evaluate", full_model(), f"--data.source={__file__}", "--device=cpu"]),
    "convert": WayIn(lambda: ["convert", "to-safetensors", adapted_model(), "m.safetensors"]),
    "init_from": WayIn(lambda: [*START, f"--model.init_from={full_model()}", f"--data.source={__file__}"]),
    "init_from, by name": WayIn(
        lambda: [*START, f"--model.init_from={full_model()}", f"--data.source={__file__}"],
        flag="--model.gpt.attention=",
    ),
    "init_from, its architecture": WayIn(
        lambda: [*START, "--model.gpt=null", f"--model.init_from={full_model()}", f"--data.source={__file__}"]
    ),
    "reward model": WayIn(
        lambda: [
            *START, "--model=PPO", "--data=Prompts", f"--model.reward={reward_model()}", "--data.block_size=32",
            "--data.reply_tokens=2",
        ],
        then="different tokenizer",
    ),
    "resumed attention": WayIn(edit_config(set_attention)),
    "resumed class": WayIn(
        edit_config(lambda config: config["model"].update(class_path="planted.Task")), name="planted.Task"
    ),
    "resumed callback": WayIn(edit_config(set_callback({"class_path": "planted.Watch"})), name="planted.Watch"),
    "resumed function": WayIn(
        edit_config(set_callback(LAMBDA)), name="planted.start", then="--trust lightning.pytorch.callbacks.Lambda"
    ),
    "resumed reward": WayIn(edit_config(set_reward), name="planted.reward", then="data changed"),
    "resumed class that the config trusts": WayIn(edit_config(set_trusted_class), name="planted.Task"),
    "resumed nested config": WayIn(edit_config(set_nested_config), name="planted.Task"),
}  # fmt: skip


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("way", WAYS)
def test_code_that_a_file_names_runs_only_if_the_user_names_it(command: Command, mark: Path, way: str) -> None:
    known = WAYS[way]
    name, *arguments = known.arguments()
    refused = command(name, *arguments)
    assert refused.code == 2, refused.err
    assert not mark.exists()
    assert len([line for line in refused.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in refused.err
    assert f"would run the custom code {known.name}" in refused.err
    assert f"{known.flag.replace('=', ' ')}{known.name}" in refused.err


QUICK = ("checkpoint", "safetensors", "adapter", "adapter of a custom model", "convert", "init_from, its architecture")
"""Ways in whose commands take little time with the flag."""


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_code_that_the_user_names_runs(command: Command, mark: Path, way: str) -> None:
    known = WAYS[way]
    name, *arguments = known.arguments()
    trusted = command(name, *arguments, f"{known.flag}{known.name}")
    assert trusted.code == (2 if known.then else 0), trusted.err
    assert known.then in trusted.err
    assert mark.exists() or known.name == "planted.reward"


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (lambda: ["convert", "to-hf", full_model(), "exported"], 2, f"custom class {ATTENTION}"),
        (lambda: ["convert", "to-hf", feed_forward_model(), "exported"], 2, f"custom class {FEED_FORWARD}"),
        (lambda: ["convert", "to-hf", adapted_model(), "exported"], 2, f"custom class {ATTENTION}"),
        (lambda: ["convert", "to-safetensors", full_model(), "m.safetensors"], 0, ""),
        (lambda: ["convert", "to-adapter", adapted_model(), "a.safetensors"], 2, "without --model.init_from"),
        (lambda: ["fit", f"--ckpt_path={full_model()}", "--trainer.max_steps=14"], 2, ""),
        (lambda: ["doctor", str(RUN)], 0, ""),
    ],
)
def test_other_commands_import_nothing(
    command: Command, mark: Path, arguments: Callable[[], list[str]], code: int, message: str
) -> None:
    name, *rest = arguments()
    outcome = command(name, *rest)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_comparing_runs_imports_nothing(command: Command, mark: Path) -> None:
    for library in ("optuna", "scipy", "sklearn", "matplotlib", "psycopg"):
        pytest.importorskip(library)
    edit_config(lambda config: config["model"].update(class_path="planted.Task"))()
    outcome = command("sweep", "--compare", RUN, RUN)
    assert "Traceback" not in outcome.err
    assert not mark.exists()


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    "load",
    [
        lambda: load_model(Path(full_model())),
        lambda: load_model(Path(full_model()), trusted="planted"),
        lambda: load_reward_model(reward_model(), ""),
        lambda: apply_adapter(build_model(load_checkpoint(RUN / "checkpoints/last.ckpt"), RUN), Path(adapter())),
        lambda: LanguageModel(init_from=full_model()).gpt,
        lambda: DPO(init_from=full_model()).gpt,
    ],
    ids=["load_model", "a prefix", "load_reward_model", "apply_adapter", "LanguageModel", "DPO"],
)
def test_python_functions_import_nothing(mark: Path, load: Callable[[], object], monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=re.escape(ATTENTION)):
        load()
    assert not mark.exists()


def test_python_classes_trust_on_request(run: Path, mark: Path) -> None:
    model = LanguageModel(init_from=full_model())
    model.trusted = frozenset([ATTENTION])
    assert model.gpt.attention == ATTENTION
    assert load_model(Path("evil.ckpt"), trusted=[ATTENTION])[0].config.attention == ATTENTION
    assert mark.exists()


@pytest.mark.usefixtures("run")
def test_own_run_is_resumed_without_trust_until_somebody_changes_its_config(command: Command, mark: Path) -> None:
    """``test_generate`` tests that ``fit`` records the configs that it writes."""
    resume = edit_config(set_attention)()
    config = RUN / "config.yaml"
    record_written_config(config.read_text())
    assert command(*resume).code == 0
    assert mark.exists()
    assert yaml.safe_load(config.read_text())["trust"] is None
    config.write_text(config.read_text().replace("log_every_n_steps: 4", "log_every_n_steps: 5"))
    refused = command("fit", f"--ckpt_path={RUN}", "--trainer.max_steps=16")
    assert refused.code == 2
    assert f"{config.resolve()} would run the custom code {ATTENTION}" in refused.err


@pytest.mark.parametrize("name", [["planted", "Attn"], {"planted": 1}, 3, True, b"planted.Attn", "planted.Attn.more"])
def test_only_the_exact_name_is_trusted(name: object) -> None:
    with pytest.raises(UserError, match="--trust"):
        require_trusted(name, ATTENTION, "a file")
    with pytest.raises(UserError, match="--trust"):
        require_trusted(name, [ATTENTION], "a file")
    require_trusted(None, None, "a file")


def test_names_of_files_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that somebody named like code must not become trusted because its path is given."""
    monkeypatch.chdir(tmp_path)
    Path("planted.Attn").mkdir()
    Path("own.yaml").write_text("model: mine.Task\ntrainer: {callbacks: [{class_path: mine.Watch}]}\n")
    flags = ["--ckpt_path=planted.Attn", "--data.source", "x/planted.Attn/y", "--config=own.yaml", "--trust", "a.B"]
    assert EarlyFlags.scan(flags).trusted == {"mine.Task", "mine.Watch", "a.B"}
    assert EarlyFlags.scan(["--trust=[a.B, c.D]", "--model.gpt.attention=e.F"]).trusted == {"a.B", "c.D", "e.F"}


@pytest.mark.usefixtures("run")
def test_a_checkpoint_deletes_no_file_outside_its_run(command: Command, tmp_path: Path) -> None:
    """The models that it lists as the best so far are removed once better ones are saved."""
    victims = [tmp_path / "step=1.ckpt", RUN / "step=2.ckpt"]
    last = RUN / "checkpoints/last.ckpt"
    contents = load_checkpoint(last)
    contents["callbacks"]["Checkpoints"]["best"] = {str(victims[0]): 99.0, "../step=2.ckpt": 98.0}
    save(contents, str(last))
    for victim in victims:
        victim.touch()
    assert command("fit", f"--ckpt_path={RUN}", "--trainer.max_steps=16", "--checkpoint.keep_best=1").code == 0
    assert all(victim.exists() for victim in victims)
