"""``config.yaml`` holds the values that ran."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.cli.config_defaults import class_defaults, resolve_built_defaults, restore_defaults_0_1
from lit_gpt_scratch.cli.config_files import config_to_dict, read_config
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.optim import AdamW, Muon, Schedule
from lit_gpt_scratch.tasks import Classification

PACKAGE = Path(__file__).parents[2] / "lit_gpt_scratch"
NULLS = {
    # trainer
    "trainer.callbacks": "none in addition to those of fit",
    "trainer.max_epochs": "no limit",
    "trainer.min_epochs": "no minimum",
    "trainer.min_steps": "no minimum",
    "trainer.max_time": "no limit",
    "trainer.check_val_every_n_epoch": "off: val_check_interval counts batches, whatever the epoch",
    "trainer.deterministic": "off: PyTorch's setting is left alone",
    "trainer.benchmark": "off: PyTorch's setting is left alone",
    "trainer.profiler": "off",
    "trainer.plugins": "none",
    "trainer.default_root_dir": "not given: the run folder is used",
    "trainer.model_registry": "off",
    # architecture
    "model.init_args.gpt.n_kv_head": "derived: n_head",
    "model.init_args.gpt.head_dim": "derived: n_embd / n_head",
    "model.init_args.gpt.ffn_dim": "derived: from n_embd, by the kind of feed-forward",
    "model.init_args.gpt.expert_bias_rate": "off: the load of experts is not balanced by biases",
    "model.init_args.gpt.attention": "multi-head, grouped-query or multi-query attention",
    "model.init_args.gpt.latent_kv_rank": "derived: 4 * head_dim, or off without latent attention",
    "model.init_args.gpt.latent_query_rank": "off: queries are not compressed",
    "model.init_args.gpt.latent_rope_dim": "derived: head_dim / 2, or off without latent attention",
    "model.init_args.gpt.latent_value_dim": "derived: head_dim, or off without latent attention",
    "model.init_args.gpt.attention_scale": "derived: 1 / sqrt(head_dim)",
    "model.init_args.gpt.attention_softcap": "off",
    "model.init_args.gpt.sliding_window": "off",
    "model.init_args.gpt.sliding_window_pattern": "off: sliding_window applies to all blocks",
    "model.init_args.gpt.rotary_local_base": "off: the same frequencies in all blocks",
    "model.init_args.gpt.rotary_scaling": "off",
    "model.init_args.gpt.rotary_trained_context": "off: belongs to rotary_scaling",
    "model.init_args.gpt.rotary_slow": "off: belongs to rotary_scaling",
    "model.init_args.gpt.rotary_fast": "off: belongs to rotary_scaling",
    "model.init_args.gpt.rotary_short_factors": "off: belongs to rotary_scaling",
    "model.init_args.gpt.rotary_long_factors": "off: belongs to rotary_scaling",
    "model.init_args.gpt.logit_softcap": "off",
    "model.init_args.gpt.bigram_rows": "off",
    "model.init_args.gpt.rotary_skip_every": "off: all blocks rotate queries and keys",
    "model.init_args.gpt.mup_base_width": "off: belongs to parametrisation",
    "model.init_args.gpt.mup_base_head_dim": "off: belongs to parametrisation",
    # task
    "model.init_args.optimizer.init_args.row_beta": "off",
    "model.init_args.schedule.stages": "off: belongs to multistep",
    "model.init_args.init_from": "off: random weights",
    "model.init_args.lora": "off",
    "model.init_args.train_layers": "all",
    "model.init_args.ema_decay": "off",
    "model.init_args.class_weights": "off",
    "model.init_args.reward": "not given: the reward that belongs to the data",
    "model.init_args.unended_score": "off: no separate score for replies that do not end",
    "model.init_args.kl_target": "off",
    # data
    "data.init_args.source": "not given: examples that the data module generates",
    "data.init_args.config": "not given: no dataset of the Hub",
    "data.init_args.max_bytes": "all",
    "data.init_args.processes": "all cores; the result does not depend on it",
    "data.init_args.store": "not given: tokens are kept in the cache",
    "data.init_args.cache": "the user's cache folder; the result does not depend on it",
    "data.init_args.init_from": "not given: fit passes model.init_from",
    "data.init_args.mixture": "not given",
    "data.init_args.tokens_per_step": "one micro-batch",
    "data.init_args.tokens_per_step_stages": "off: constant",
    "data.init_args.block_size_stages": "off: constant",
    "data.init_args.seed": "seed_everything",
    "data.init_args.vocab_size": "as many as the text gives, which is fewer than the default",
    "data.init_args.checkable": "not given: the preference that belongs to the generated data, or none",
    # run
    "ckpt_path": "off: a new run",
    "preset": "not given",
    "budget": "not given, or replaced by the flags that it chose",
    "scaling_law": "not given: belongs to budget",
    "trust": "no code that files of others name",
    "tensor_parallel": "not given: decided by trainer.strategy",
    "hsdp_groups": "not given: decided by trainer.strategy",
    "collective_timeout": "not given: decided by trainer.strategy",
    "devices_like": "no other machine",
    "checkpoint.every_minutes": "off",
    "inspect.prompts": "not given: prompts from the data",
}
"""Every null that may be left in a run's ``config.yaml``, and its meaning; none is a number that code fills in."""
STAGES = {
    "language model": [f"--data.source={PACKAGE}/**/*.py"],
    "instructions": ["--data=Conversations"],
    "classification": ["--model=Classification", "--data=LabelledText"],
    "reward": ["--model=Reward", "--data=Preferences"],
    "dpo": ["--model=DPO", "--data=Preferences"],
    "ppo": ["--model=PPO", "--data=Prompts"],
    "grpo": ["--model=GRPO", "--data=Prompts"],
}


def saved_config(*flags: str) -> dict[str, Any]:
    """Flat values of the ``config.yaml`` that a run with these flags would save."""
    cli = FitCLI([*flags, "--trainer.accelerator=cpu"])
    cli.datamodule.prepare_data()
    resolve_built_defaults(cli.config, cli.trainer.strategy.root_device, cli.datamodule)
    return flatten(config_to_dict(cli.parser, cli.config))


@pytest.mark.parametrize("stage", STAGES)
def test_every_null_in_a_saved_config_has_a_meaning(stage: str, cache: Path) -> None:
    config = saved_config(*STAGES[stage], f"--data.cache={cache}")
    unknown = {name for name, value in config.items() if value is None} - NULLS.keys()
    assert not unknown
    if stage == "language model":
        assert config["data.init_args.vocab_size"] == 1024
        assert config["data.init_args.source"] is not None
        assert config["model.init_args.optimizer.init_args.lr"] == 0.02
        assert config["model.init_args.schedule.decay_share"] == 0.4
        assert config["trainer.max_steps"] == 900
        assert config["model.init_args.compile"] in ("blocks", False)
        assert config["model.init_args.max_logits_mb"] == 64


def test_a_saved_config_gives_a_swapped_class_its_own_defaults(tmp_path: Path, cache: Path) -> None:
    def parsed(*flags: str) -> dict[str, Any]:
        cli = FitCLI([*flags, f"--data.cache={cache}", "--trainer.accelerator=cpu"])
        return flatten(config_to_dict(cli.parser, cli.config))

    path = tmp_path / "config.yaml"
    cli = FitCLI([f"--data.cache={cache}"])
    path.write_text(cli.parser.dump(cli.config, skip_unset=False))
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.02
    assert parsed(f"--config={path}") == flatten(config_to_dict(cli.parser, cli.config)) | {
        "trainer.accelerator": "cpu"
    }

    swapped = parsed(f"--config={path}", "--model.optimizer=AdamW", "--model.schedule.decay=cosine")
    assert swapped["model.init_args.optimizer.init_args.lr"] == 3e-3
    assert swapped["model.init_args.optimizer.init_args.weight_decay"] == 0.1
    assert swapped["model.init_args.schedule.decay_share"] == 1.0
    assert swapped["model.init_args.schedule.stages"] is None
    given = parsed(f"--config={path}", "--model.optimizer=AdamW", "--model.optimizer.lr=0.02")
    assert given["model.init_args.optimizer.init_args.lr"] == 0.02

    data = parsed(f"--config={path}", "--data=Conversations")
    assert data["data.init_args.source"] is data["data.init_args.vocab_size"] is None
    assert data["data.init_args.validation_share"] == 0.05
    assert data["data.init_args.test_share"] == 0.1


def test_stages_of_a_schedule_are_saved_and_given_up_with_it(tmp_path: Path, cache: Path) -> None:
    def parse(*flags: str) -> FitCLI:
        return FitCLI([*flags, f"--data.cache={cache}", "--trainer.accelerator=cpu"])

    path = tmp_path / "config.yaml"
    for flags, expected in (
        (["--model.schedule.decay=multistep"], [[0.8, 0.316], [0.9, 0.1]]),
        (["--model.schedule.decay=multistep", "--model.schedule.stages=[[0.5, 0.25]]"], [[0.5, 0.25]]),
    ):
        cli = parse(*flags)
        path.write_text(cli.parser.dump(cli.config, skip_unset=False))
        assert yaml.safe_load(path.read_text())["model"]["init_args"]["schedule"]["stages"] == expected
        assert parse(f"--config={path}").model.schedule.stages == tuple(map(tuple, expected))
    cli = parse("--model.schedule.decay=multistep")
    path.write_text(cli.parser.dump(cli.config, skip_unset=False))
    assert parse(f"--config={path}", "--model.schedule.decay=wsd").model.schedule == Schedule(decay_share=0.4)


class OwnMuon(Muon):
    """A user's optimizer, with a different default for one argument."""

    def __init__(self, lr: float = 0.5, weight_decay: float | None = None) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay)


def test_defaults_of_a_users_subclass_are_left_alone() -> None:
    part = Namespace(class_path=f"{__name__}.OwnMuon", init_args=Namespace())  # type: ignore[no-untyped-call]
    assert class_defaults(part) == {"weight_decay": 0.0}


def test_classes_built_by_hand_use_the_same_defaults() -> None:
    for kind in (Muon, AdamW):
        part = Namespace(class_path=f"lit_gpt_scratch.optim.{kind.__name__}", init_args=Namespace())  # type: ignore[no-untyped-call]
        defaults = class_defaults(part)
        assert defaults == {name: getattr(kind(), name) for name in defaults}
    for decay in ("wsd", "linear", "cosine", "multistep"):
        explicit = Schedule(decay=decay, **Schedule.default_arguments({"decay": decay}))
        assert [explicit.factor(step, 100) for step in range(100)] == [
            Schedule(decay=decay).factor(step, 100) for step in range(100)
        ]


def test_nulls_of_0_1_keep_their_meaning(tmp_path: Path) -> None:
    """A run of 0.1 used that version's defaults, whatever they are today; other files get today's."""
    parser = FitCLI(["--trainer.accelerator=cpu"]).parser
    saved = (Path(__file__).parent / "configs_0.1" / "default.yaml").read_text()
    path = tmp_path / "config.yaml"
    for old, new, expected in (
        ("", "", {"lr": 0.02, "weight_decay": 0.0, "decay_share": 0.4}),
        ("lr: null", "lr: 0.5", {"lr": 0.5, "weight_decay": 0.0, "decay_share": 0.4}),
        ("decay: wsd", "decay: cosine", {"lr": 0.02, "weight_decay": 0.0, "decay_share": 1.0}),
        ("decay: wsd", "decay: constant", {"lr": 0.02, "weight_decay": 0.0, "decay_share": None}),
    ):
        path.write_text(saved.replace(old, new))
        config = parser.parse_args(["--config", str(path)])
        restore_defaults_0_1(config, read_config(str(path)))
        arguments = config.model.init_args
        found = {**vars(arguments.optimizer.init_args), **vars(arguments.schedule)}
        assert {name: found[name] for name in expected} == expected


def test_classification_has_its_own_defaults() -> None:
    """Rates, epochs and validation that suit fine-tuning; a limit on the steps replaces the epochs."""

    def parsed(*flags: str) -> dict[str, Any]:
        cli = FitCLI(["--model=Classification", "--data=LabelledText", *flags])
        return flatten(config_to_dict(cli.parser, cli.config))

    found = parsed()
    rates = {name: found[f"model.init_args.optimizer.init_args.{name}"] for name in ("lr", "adamw_lr")}
    assert rates == Classification.optimizer_defaults["Muon"]
    assert (found["trainer.max_epochs"], found["trainer.max_steps"]) == (Classification.default_epochs, -1)
    assert (found["trainer.check_val_every_n_epoch"], found["trainer.val_check_interval"]) == (1, 1.0)
    assert found["model.init_args.ema_decay"] == Classification.argument_defaults["ema_decay"]
    assert parsed("--model.ema_decay=null")["model.init_args.ema_decay"] is None
    assert (found["data.init_args.too_long"], found["model.init_args.pooling"]) == ("windows", "mean")

    adamw = parsed("--model.optimizer=AdamW", "--trainer.max_steps=50", "--trainer.val_check_interval=10")
    assert adamw["model.init_args.optimizer.init_args.lr"] == Classification.optimizer_defaults["AdamW"]["lr"]
    assert (adamw["trainer.max_epochs"], adamw["trainer.max_steps"]) == (None, 50)
    assert (adamw["trainer.check_val_every_n_epoch"], adamw["trainer.val_check_interval"]) == (None, 10)

    by_hand = Classification()
    assert isinstance(by_hand.optimizer, Muon)
    assert {name: getattr(by_hand.optimizer, name) for name in rates} == rates
    assert by_hand.ema.decay == found["model.init_args.ema_decay"]
