"""Config files of earlier versions load."""

from importlib import import_module
from pathlib import Path

import pytest

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.cli.config_files import config_to_dict
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.cli.moved_class_paths import MOVED_CLASS_PATHS, replace_moved_class_paths

CONFIGS = sorted(Path(__file__).parent.glob("configs_0.1/*.yaml"))


class ParseOnly(FitCLI):
    def instantiate_classes(self) -> None:
        pass


@pytest.mark.parametrize("path", MOVED_CLASS_PATHS.values())
def test_new_paths_exist(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(import_module(module), name), type)


def test_only_whole_paths_are_replaced() -> None:
    old, new = next(iter(MOVED_CLASS_PATHS.items()))
    assert replace_moved_class_paths(f"- class_path: {old}\n") == f"- class_path: {new}\n"
    for text in (f"{old}2", f"mine.{old}", f"{old}.x"):
        assert replace_moved_class_paths(text) == text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_0_1_loads_with_its_nulls_resolved(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "config.yaml"
    old.write_text(path.read_text().replace("init_from: runs/sft/version_0", "init_from: null"))
    cli = ParseOnly([f"--config={old}"])
    config = flatten(config_to_dict(cli.parser, cli.config))
    assert config["model.init_args.optimizer.init_args.weight_decay"] is not None
    assert config["model.init_args.schedule.decay_share"] is not None
    assert config["data.init_args.validation_share"] is not None


def test_a_config_names_classes_at_their_old_paths(tmp_path: Path) -> None:
    text = CONFIGS[0].read_text()
    text = text.replace("lit_gpt_scratch.optim.Muon", "lit_gpt_scratch.optim.recipes.Muon")
    text = text.replace("callbacks: null", "callbacks:\n  - class_path: lit_gpt_scratch.callbacks.ending.ValidateAtEnd")
    (tmp_path / "config.yaml").write_text(text)
    config = ParseOnly([f"--config={tmp_path / 'config.yaml'}"]).config
    assert config.model.init_args.optimizer.class_path == "lit_gpt_scratch.optim.Muon"
    assert config.trainer.callbacks[0].class_path == "lit_gpt_scratch.callbacks.checkpointing.ValidateAtEnd"
    config = ParseOnly(["--model.optimizer=lit_gpt_scratch.optim.recipes.AdamW"]).config
    assert config.model.init_args.optimizer.init_args.lr == 3e-3
