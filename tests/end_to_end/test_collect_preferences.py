"""A person ranks replies in the terminal, and gets a file of preferences to learn from."""

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
from tests.end_to_end.conftest import Command

FLAGS = ["--max_new_tokens=6", "--temperature=2", "--rank=ranked.jsonl"]


@pytest.fixture
def said(
    command: Command, staged: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """A model that replies somehow, to its end for all that anybody knows, and somebody who types."""

    def reply(*args: Any) -> list[ChatReply]:
        return [each._replace(ended=True) for each in generate_replies(*args)]

    monkeypatch.setattr(collect_preferences, "generate_replies", reply)
    assert command("fit", *staged("instructions"), "--trainer.max_steps=2").code == 0

    def types(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return types


def ranked() -> list[dict[str, str]]:
    return [json.loads(line) for line in Path("ranked.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_become_pairs_to_learn_from(command: Command, said: Callable[[str], None]) -> None:
    """A skipped pair leaves no line, what is not understood is asked again, and a file that is there grows."""
    Path("ranked.jsonl").write_text('{"prompt": "Before.", "chosen": "a", "rejected": "b"}')  # its line was not ended
    said("2\ns\nwhat?\n1\nq\n")
    outcome = command("generate", *FLAGS, *(f"--prompt=Say {n}." for n in range(5)))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(QUESTION) == 5
    before, second, first = ranked()
    assert before["prompt"] == "Before."
    blocks = outcome.out.split("[1] ")[1:]
    for row, block, n, better in ((second, blocks[0], 0, 2), (first, blocks[2], 2, 1)):
        one, _, two = block.partition(QUESTION)[0].rstrip("\n").partition("\n\n[2] ")
        assert row["prompt"] == f"Say {n}."
        assert [row["chosen"], row["rejected"]] == ([two, one] if better == 2 else [one, two])
    assert len(Preferences(source="ranked.jsonl").records) == 3


def test_lines_that_are_typed_and_a_system(command: Command, said: Callable[[str], None]) -> None:
    said("Say so.\n1\n\nAnd so.\n2\n")
    assert command("generate", *FLAGS, "--system=Be brief.").code == 0
    assert [[message["content"] for message in row["prompt"]] for row in ranked()] == [
        ["Be brief.", "Say so."],
        ["Be brief.", "And so."],
    ]


def test_what_was_said_is_kept_when_it_ends_amid_a_question(
    command: Command, said: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said("")

    def interrupted() -> Iterator[str]:
        yield "1\n"
        assert len(ranked()) == 1  # on the disk before the next is asked
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_gpt_scratch.cli.generate.read_stdin_lines", interrupted)
    assert command("generate", *FLAGS, "--prompt=Say so.", "--prompt=And so.").code == 130
    assert len(ranked()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank=folder", "--prompt=a"], "argument --rank: cannot write folder"),
        (["--rank=ranked.jsonl", "--chat"], "argument --rank: it excludes --chat"),
        (["--rank=ranked.jsonl", "--system= "], "argument --system: it is empty"),
        (["--rank=ranked.jsonl", f"--prompt={'long ' * 99}"], "the prompt has"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: Command, said: Callable[[str], None], flags: list[str], message: str
) -> None:
    Path("folder").mkdir()
    said("1\n")
    outcome = command("generate", *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_replies_that_are_the_same_are_not_asked_about(command: Command, said: Callable[[str], None]) -> None:
    said("1\n")
    outcome = command("generate", *FLAGS, "--temperature=0", "--prompt=Say so.")
    assert outcome.code == 0
    assert "The model gave no two different replies; a higher --temperature may help" in outcome.out
    assert ranked() == []


def test_the_same_command_again_asks_about_other_pairs(command: Command, said: Callable[[str], None]) -> None:
    for _ in range(2):
        said("1\n2\n")
        assert command("generate", *FLAGS, "--prompt=Say so.", "--prompt=And so.").code == 0
    texts = [row[side] for row in ranked() for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) == 8


def test_replies_that_were_cut_off_are_drawn_again(
    command: Command, said: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of all that are drawn here; if all are, there is no question."""
    said("1\n")
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
