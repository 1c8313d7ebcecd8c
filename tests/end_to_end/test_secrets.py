"""Passwords are not recorded, and errors do not quote files that are not of the expected format."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command

SECRET = "hunter2"
FILES = {
    "accounts": f"root:x:0:0:{SECRET}:/root:/bin/bash\ndaemon:x:1:1:{SECRET}:/:/bin/sh\n",
    "settings of another program": f"password: {SECRET}\nnested: {{token: {SECRET}}}\n",
    "invalid YAML": f"key: [{SECRET}, {{\nother: {SECRET}: x\n",
    "a list": f"- {SECRET}\n- {SECRET}\n",
    "a word": SECRET,
    "binary": f"\0\1{SECRET}\udcff",
}


QUICK = ("accounts",)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FILES])
def secret_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(FILES[request.param].encode(errors="surrogateescape"))
    return path


def test_files_that_are_no_configs(command: Command, small: list[str], secret_file: Path) -> None:
    for flag in (
        "--config", "--data", "--model", "--model.gpt", "--model.optimizer", "--trainer", "--trainer.callbacks",
        "--data.cleaning", "--checkpoint", "--data.tokenizer", "--data.store", "--model.init_from", "--ckpt_path",
    ):  # fmt: skip
        done = command("fit", *small, flag, secret_file)
        assert done.code == 2, (flag, done.err)
        assert SECRET not in done.out + done.err, flag


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz"])
def test_files_that_are_no_tables(command: Command, secret_file: Path, suffix: str) -> None:
    named = secret_file.rename(secret_file.with_name(f"secret{suffix}"))
    done = command("prepare", "--data.source", named, "--data.cache=cache")
    assert done.code == 2, done.err
    assert f"secret{suffix}" in done.err
    assert suffix in (".csv", ".tsv") or SECRET not in done.err  # a header is quoted: the user must choose a column


@pytest.mark.parametrize("name", FILES)
def test_base_of_a_sweep(command: Command, tmp_path: Path, name: str) -> None:
    """The flags of a sweep are checked in a process, which takes seconds: only the parts of ``test_files_that...``."""
    pytest.importorskip("optuna")
    from lit_gpt_scratch.cli import sweep_precheck
    from lit_gpt_scratch.errors import UserError
    from lit_gpt_scratch.sweeps.sweep_config import load_sweep

    (tmp_path / "secret").write_bytes(FILES[name].encode(errors="surrogateescape"))
    (tmp_path / "s.yaml").write_text(f"base: {tmp_path / 'secret'}\nvary: {{model.gpt.n_layer: [1, 2]}}\n")
    with pytest.raises(UserError) as caught:
        sweep_precheck.check_sweep(load_sweep(tmp_path / "s.yaml"))
    assert SECRET not in str(caught.value)
    invalid = command("sweep", tmp_path / "secret")
    assert invalid.code == 2
    assert SECRET not in invalid.err


def test_recorded_commands_have_no_passwords(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", f"--trainer.logger.api_key={SECRET}", f"--x=s3://me:{SECRET}@bucket"])
    assert command("fit", *small, "--trainer.max_steps=1").code == 0
    text = Path("runs/pretrain/version_0/provenance.json").read_text(encoding="utf-8")
    assert SECRET not in text
    assert json.loads(text)["sessions"][0]["command"] == ["fit", "--trainer.logger.api_key=***", "--x=s3://***@bucket"]
