"""``generate --rank``: collect preferences in the terminal."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.cli import collect_preferences
from lit_gpt_scratch.cli.collect_preferences import QUESTION
from lit_gpt_scratch.data import Preferences
from lit_gpt_scratch.evaluation.chat_eval import ChatReply, generate_replies
from lit_gpt_scratch.terminal_output import escape_terminal
from tests.end_to_end.conftest import Command

FLAGS = ["--max_new_tokens=6", "--temperature=2", "--rank=ranked.jsonl"]


@pytest.fixture
def type_lines(
    command: Command, staged: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Train a model, count all its replies as complete, and return a function that sets standard input."""

    def reply(*args: Any) -> list[ChatReply]:
        return [each._replace(ended=True) for each in generate_replies(*args)]

    monkeypatch.setattr(collect_preferences, "generate_replies", reply)
    assert command("fit", *staged("instructions"), "--trainer.max_steps=2").code == 0

    def set_stdin(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return set_stdin


def ranked() -> list[dict[str, str]]:
    return [json.loads(line) for line in Path("ranked.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_become_preference_pairs(command: Command, type_lines: Callable[[str], None]) -> None:
    """A skipped pair adds no line, an invalid answer is asked again, and an existing file is appended to."""
    Path("ranked.jsonl").write_text('{"prompt": "Before.", "chosen": "a", "rejected": "b"}')  # without a final newline
    type_lines("2\ns\nwhat?\n1\nq\n")
    outcome = command("generate", *FLAGS, *(f"--prompt=Say {n}." for n in range(5)))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(QUESTION) == 5
    before, second, first = ranked()
    assert before["prompt"] == "Before."
    blocks = outcome.out.split("[1] ")[1:]
    for row, block, n, better in ((second, blocks[0], 0, 2), (first, blocks[2], 2, 1)):
        one, _, two = block.partition(QUESTION)[0].rstrip("\n").partition("\n\n[2] ")
        assert row["prompt"] == f"Say {n}."
        shown = [escape_terminal(row["chosen"]), escape_terminal(row["rejected"])]
        assert shown == ([two, one] if better == 2 else [one, two])
    assert len(Preferences(source="ranked.jsonl").records) == 3


def test_typed_prompts_and_a_system_message(command: Command, type_lines: Callable[[str], None]) -> None:
    type_lines("Say so.\n1\n\nAnd so.\n2\n")
    assert command("generate", *FLAGS, "--system=Be brief.").code == 0
    assert [[message["content"] for message in row["prompt"]] for row in ranked()] == [
        ["Be brief.", "Say so."],
        ["Be brief.", "And so."],
    ]


def test_answers_are_kept_after_an_interrupt(
    command: Command, type_lines: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines("")

    def interrupted() -> Iterator[str]:
        yield "1\n"
        assert len(ranked()) == 1  # on disk before the next question
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_gpt_scratch.cli.generate.read_stdin_lines", interrupted)
    assert command("generate", *FLAGS, "--prompt=Say so.", "--prompt=And so.").code == 130
    assert len(ranked()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank=folder", "--prompt=a"], "argument --rank: cannot write folder"),
        (["--rank=ranked.jsonl", "--chat"], "argument --rank cannot be combined with --chat"),
        (["--rank=ranked.jsonl", "--system= "], "argument --system is empty"),
        (["--rank=ranked.jsonl", f"--prompt={'long ' * 99}"], "the prompt has"),
    ],
)
def test_mistakes_are_one_line(
    command: Command, type_lines: Callable[[str], None], flags: list[str], message: str
) -> None:
    Path("folder").mkdir()
    type_lines("1\n")
    outcome = command("generate", *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_equal_replies_are_not_offered(command: Command, type_lines: Callable[[str], None]) -> None:
    type_lines("1\n")
    outcome = command("generate", *FLAGS, "--temperature=0", "--prompt=Say so.")
    assert outcome.code == 0
    assert "The model did not generate two different, complete replies; a higher --temperature may help" in outcome.out
    assert ranked() == []


def test_running_the_command_again_offers_other_pairs(command: Command, type_lines: Callable[[str], None]) -> None:
    for _ in range(2):
        type_lines("1\n2\n")
        assert command("generate", *FLAGS, "--prompt=Say so.", "--prompt=And so.").code == 0
    texts = [row[side] for row in ranked() for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) == 8


def test_truncated_replies_are_sampled_again(
    command: Command, type_lines: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples are truncated here; if all are, no question is asked."""
    type_lines("1\n")
    drawn: list[list[ChatReply]] = []

    def some(*given: Any) -> list[ChatReply]:
        ends = len(drawn) % 2 == 1
        drawn.append([each._replace(ended=ends or row == 0) for row, each in enumerate(generate_replies(*given))])
        return drawn[-1]

    monkeypatch.setattr(collect_preferences, "generate_replies", some)
    assert command("generate", *FLAGS, "--prompt=Say so.").code == 0
    assert len(drawn) == 2
    assert [ranked()[0][side] for side in ("chosen", "rejected")] == [each.text for each in drawn[1]]
    monkeypatch.setattr(
        collect_preferences, "generate_replies", lambda *given: [ChatReply("So", False, 6), ChatReply("No", True, 3)]
    )
    outcome = command("generate", *FLAGS, "--prompt=Say so.")
    assert outcome.code == 0
    assert "a higher --max_new_tokens, so that replies are complete, may help" in outcome.out
    assert len(ranked()) == 1
