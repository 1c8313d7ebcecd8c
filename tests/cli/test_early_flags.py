"""Flags that are found before the parser runs."""

from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.cli.config_files import FitParser
from lit_gpt_scratch.cli.early_flags import EarlyFlags
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError


def test_flags_win_over_configs_and_the_last_of_each_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("preset: nano\nruns: a\nmodel:\n  class_path: DPO\n  init_args: {init_from: x}\n")
    second.write_text("runs: b\nmodel:\n  init_args: {gpt: {n_layer: 2}}\n")
    early = EarlyFlags.scan([f"--config={first}", "-c", str(second), "--preset", "mini", "--preset=micro"])
    assert early.get("preset") == "micro"
    assert early.get("runs") == "b"
    assert early.get("model.init_from") == "x"
    assert early.class_of("model") == "DPO"
    assert early.get("ckpt_path") is early.class_of("data") is None
    assert EarlyFlags.scan([f"--config={first}", "--model.init_from=y"]).get("model.init_from") == "y"
    assert EarlyFlags.scan(["--ckpt_path=null"]).get("ckpt_path") is None


@pytest.mark.parametrize(
    ("flags", "topic"), [(["-h"], ""), (["--help", "lr"], "lr"), (["--help=all"], "all"), (["--help", "--plan"], "")]
)
def test_help_may_have_a_topic(flags: list[str], topic: str) -> None:
    assert EarlyFlags.scan(flags).help == topic
    assert EarlyFlags.scan(["--plan"]).help is None


def test_a_missing_config_is_reported() -> None:
    with pytest.raises(UserError, match=r"--config none\.yaml: file not found"):
        EarlyFlags.scan(["--config", "none.yaml"])


def test_flags_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, parsed = ["--preset=nano", "--model.gpt.n_layer=3"], []
    parse = FitParser.parse_args

    def parse_args(parser: FitParser, *args: Any, **kwargs: Any) -> Any:
        parsed.extend(given for given in args if given == flags)  # parsers of single arguments are of the same class
        return parse(parser, *args, **kwargs)

    class ParseOnly(FitCLI):
        def instantiate_classes(self) -> None:
            pass

    monkeypatch.setattr(FitParser, "parse_args", parse_args)
    config = ParseOnly(flags).config
    assert (config.model.init_args.gpt.n_layer, config.model.init_args.gpt.n_embd) == (3, 128)
    assert len(parsed) == 1
