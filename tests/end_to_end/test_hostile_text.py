"""Text of documents, file names, classes and tokens is displayed by every command and in TensorBoard, not interpreted."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from tests.conftest import sentences
from tests.end_to_end.conftest import Command, Outcome
from tests.hostile import HOSTILE
from tests.text.test_escaping import is_control

RUN = Path("runs/pretrain/version_0")
NAME = "a`b` ![x](x.png) <img src=x> [l](x) | \x1b[31m \u202e\n# c.txt"
TEXTS = [text for name, text in HOSTILE.items() if name != "surrogate"]  # not valid UTF-8, so never in a file


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)


def check(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err
    assert not any(map(is_control, (outcome.out + outcome.err).replace("\n", "").replace("\t", "")))


def check_markdown(text: str) -> None:
    tags = _Tags()
    tags.feed(markdown_to_safe_html(text))
    assert not tags.seen & {"a", "img", "script"}, text
    assert not any(map(is_control, text.replace("\n", "").replace("\t", "")))


def texts_in_tensorboard(run: Path) -> dict[str, str]:
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    suffix = "/text_summary"
    return {
        tag.removesuffix(suffix): point.tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith(suffix)
        for point in events.Tensors(tag)
    }


@pytest.fixture
def hostile_corpus(tmp_path: Path) -> Path:
    """Documents of which some are rejected and quoted in the audit; the validation split has hostile beginnings."""
    folder = tmp_path / "hostile `corpus` ![x](x.png) \x1b[31m"
    folder.mkdir()
    for n in range(30):
        text = " ".join(TEXTS[(n + m) % len(TEXTS)] for m in range(4))
        (folder / f"{n}{NAME}").write_text(text + sentences(n, 20) + text, encoding="utf-8")
        if n < 5:
            (folder / f"{n}copy{NAME}").write_text(text + sentences(n, 20) + text, encoding="utf-8")
    return folder


def test_a_hostile_corpus(command: Command, small: list[str], hostile_corpus: Path) -> None:
    flags = [*(flag for flag in small if not flag.startswith("--data.source=")), f"--data.source={hostile_corpus}"]
    flags += ['--data.special_tokens=["![x](x.png)", "<img src=x>", "\x1b]52;c;x\x07", "a|`b"]']
    check(command("prepare", *flags, "--show=3"))
    check(command("prepare", *flags, "--data.store=store"))
    check_markdown(Path("store/audit.md").read_text(encoding="utf-8"))
    assert "exact duplicate" in Path("store/audit.md").read_text(encoding="utf-8")
    check(command("fit", *flags, "--inspect.every_n_steps=4", "--guard=warn"))
    found = texts_in_tensorboard(RUN)
    assert {
        "sample/1",
        "views/hardest_passages",
        "views/logit_lens",
        "run/plan",
        "run/audit",
        "run/longest_tokens",
    } <= {*found}
    for text in found.values():
        check_markdown(text)
    check(command("generate", "--prompt", "\x1b[31m![x](x.png)", "--max_new_tokens", "5", "--json"))
    check(command("evaluate", f"--data.source={hostile_corpus}"))
    check(command("doctor", RUN))
    missing = command("fit", *small, f"--data.source={hostile_corpus}/{TEXTS[0]}")
    assert missing.code == 2
    assert missing.err.startswith("error: ")
    assert not any(map(is_control, missing.err[:-1]))


def test_hostile_classes(command: Command, small: list[str]) -> None:
    rows = [{"text": f"{sentences(n, 2)} {TEXTS[n % 4]}", "label": TEXTS[n % 4]} for n in range(120)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [flag for flag in small if not flag.startswith("--data.")]
    flags = ["--model=Classification", "--data=LabelledText", *flags, "--data.source=rows.jsonl", "--data.vocab_size=300",
             "--data.block_size=64", "--data.batch_size=4"]  # fmt: skip
    check(command("fit", *flags))
    for text in texts_in_tensorboard(RUN).values():
        check_markdown(text)
    check(command("evaluate", "--data.source=rows.jsonl", "--task=classification"))
    check(command("evaluate", "--text", TEXTS[0]))
    printed = command("evaluate", "--text", TEXTS[0], "--json")
    check(printed)
    assert json.loads(printed.out)["text"] == TEXTS[0]
