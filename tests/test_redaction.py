"""Passwords and tokens are hidden, however they are spelled, and nothing else is."""

import logging

import pytest

from lit_gpt_scratch.terminal_output import VERBATIM, EscapingFormatter, redact, redact_command

SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:hunter2@host/db",
        "cannot reach postgresql+psycopg://me:a@hunter2@host:5432/db?x=1, sorry",
        "postgresql://host/db?user=me&password=hunter2&x=1",
        "postgresql://host/db?passfile=hunter2",
        "postgresql://host/db?sslmode=verify&sslkey=hunter2&sslpassword=hunter2",
        "host=db user=me password='hunter2 and more hunter2'",
        "PGPASSWORD=hunter2",
        "https://host/file?X-Amz-Signature=hunter2&sig=hunter2",
        "s3://key:hunter2@bucket/file",
        "https://hunter2@host/file",
        "https://host/?access_token=hunter2#top",
        "--trainer.logger.api_key=hunter2",
        '--trainer.logger={"class_path": "X", "init_args": {"api_key": "hunter2", "b": 1}}',
        "{'token': 'hunter2'}",
        "password=ab,hunter2;hunter2",
        "postgresql://me:a/hunter2@host/db",
        "https://hunter2@host/file@main",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)
    assert redact_command(["fit", text])[0] == "fit"


@pytest.mark.parametrize(
    "text",
    [
        "--data.tokenizer=runs/tokenizer.json --data.tokens_per_step=4096 --max_new_tokens=3",
        "https://example.org/path?page=2",
        "postgresql://host:5432/db",
        "the next token: the",
        "a@b.example",
        "hf://datasets/me/x@main/a.txt",
        "https://github.com/a/b@v1",
        "https://host:8080/a@v1",
        "http://[::1]:80/a@v1",
        "https://host?to=a@b",
        "model.gpt.n_layer is 0; it must be positive",
    ],
)
def test_other_text_is_kept(text: str) -> None:
    assert redact(text) == text


def test_flags_that_take_a_secret() -> None:
    command = ["fit", "--trainer.logger.api_key", SECRET, "--data.tokenizer", "file", "--password", SECRET]
    assert redact_command(command) == [
        "fit", "--trainer.logger.api_key", "***", "--data.tokenizer", "file", "--password", "***"
    ]  # fmt: skip
    assert redact_command([f"--password=a '{SECRET}", f"--x.token=b&{SECRET}"]) == ["--password=***", "--x.token=***"]


def test_samples_are_not_changed() -> None:
    """The default corpus is Python code."""
    code = "def f(sig=None, token='a'):"
    record = logging.makeLogRecord({"msg": code} | VERBATIM)
    assert EscapingFormatter().format(record) == code
    assert EscapingFormatter().format(logging.makeLogRecord({"msg": "error: sig=None"})) == "error: sig=***"


PARTS = ["a", "a_-.", "://", "/a://", "a://b", "a://b:c", "a://b:", "token_", "token=", "@", "a://b:c@"]


@pytest.mark.parametrize("part", PARTS)
def test_long_texts(part: str) -> None:
    """Each takes less than a second; a pattern with quadratic time would take hours."""
    text = part * (2**20 // len(part))
    assert redact(text) == text or "@" in part or "=" in part
