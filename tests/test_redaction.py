"""Passwords and tokens are hidden, however they are spelled, and nothing else is."""

import time

import pytest

from lit_gpt_scratch.terminal_output import redact, redact_command

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


@pytest.mark.parametrize("text", ["a" * 10**5, "a_-." * 25_000, "://" * 30_000, "token_" * 10**4, "@" * 10**5])
def test_time_is_linear(text: str) -> None:
    started = time.perf_counter()
    redact(text)
    assert time.perf_counter() - started < 2
