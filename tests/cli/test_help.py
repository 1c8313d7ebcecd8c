"""Help of ``fit`` and ``prepare``, and lists of presets and experiments."""

from pathlib import Path

import pytest

from lit_gpt_scratch.cli import config_files, fit, prepare
from lit_gpt_scratch.cli.help import COMMON
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.presets import PRESETS


def shown(capsys: pytest.CaptureFixture[str], *flags: str, command: type[fit.FitCLI] = fit.FitCLI) -> str:
    with pytest.raises(SystemExit) as ended:
        command(list(flags))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_first_page_has_the_flags_people_use_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help")
    assert len(page.splitlines()) <= 90
    assert max(map(len, page.splitlines())) <= 120
    for name in (name for names in COMMON.values() for name in names):
        assert f"--{name} " in page, name
    flags = {line.split()[0]: line for line in page.splitlines() if line.startswith("  --")}
    assert flags["--trainer.max_steps"].endswith("[900]")
    assert flags["--data.block_size"].endswith("[256]")
    assert flags["--model.optimizer.lr"].endswith("[0.02]")
    assert "--help all" in page


def test_all_lists_nested_flags_and_those_of_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help", "all")
    for name in ("model.gpt.n_layer", "model.optimizer.lr", "model.lora.rank", "model.schedule.decay", "data.cleaning",
                 "trainer.profiler", "checkpoint.keep_best", "model.beta", "data.too_long"):  # fmt: skip
        assert f"  --{name} " in page, name


def test_a_fraction_is_distinguished_from_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    """1.0 is all batches, and 1 is one batch."""
    text = " ".join(shown(capsys, "--help", "limit_val_batches").split())
    assert "Value is per device. [1.0]" in text
    assert "Default:" not in text


def test_a_word_finds_flags_by_name_and_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help", "DROPOUT")
    assert "--model.gpt.dropout" in page
    assert "--trainer.devices" not in page
    assert "--model.kl_target" in shown(capsys, "--help=kl_target")
    with pytest.raises(UserError, match="--help zebra: no flag mentions zebra"):
        fit.FitCLI(["--help", "zebra"])


def test_help_follows_the_classes_that_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--model=DPO", "--data", "Preferences", "--help")
    assert "model of DPO:" in page
    assert "--data.packing" not in page
    with pytest.raises(UserError, match="--model Nothing"):
        fit.FitCLI(["--model=Nothing", "--help"])


def test_help_of_prepare_has_no_flags_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    for topic in ([], ["all"]):
        page = shown(capsys, "--help", *topic, command=prepare.PrepareCLI)
        assert "--compare" in page
        assert "--data.store" in page
        assert "--trainer." not in page
        assert "--model." not in page


def test_presets_and_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    presets = shown(capsys, "--preset", "list").splitlines()
    assert [line.split()[0] for line in presets[1:]] == list(PRESETS)
    assert "124.4 M" in presets[4]
    experiments = shown(capsys, "--config=list")
    assert "\nfinetune/spam " in experiments
    assert "sweeps/positions" not in experiments  # a sweep file is not a config of fit


def test_a_shipped_experiment_is_found_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_files.find_config("finetune/spam") == str(config_files.EXPERIMENTS / "finetune/spam.yaml")
    Path("finetune").mkdir()
    Path("finetune/spam").write_text("")
    assert config_files.find_config("finetune/spam") == "finetune/spam"  # a path that exists wins
    with pytest.raises(UserError, match="--config list"):
        config_files.find_config("finetune/ham")
    monkeypatch.setattr(config_files, "EXPERIMENTS", tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        config_files.find_config("finetune/ham")
