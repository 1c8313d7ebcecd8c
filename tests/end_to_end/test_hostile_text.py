"""Text of documents and names of classes are displayed, not interpreted, by commands and in TensorBoard."""

import json
from html.parser import HTMLParser
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from tests.conftest import sentences
from tests.end_to_end.conftest import Command, Outcome
from tests.hostile import HOSTILE
from tests.text.test_markdown import is_control

RUN = Path("runs/pretrain/version_0")
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


def test_hostile_classes(command: Command, small: list[str]) -> None:
    rows = [{"text": f"{sentences(n, 2)} {TEXTS[n % 4]}", "label": TEXTS[n % 4]} for n in range(120)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [flag for flag in small if not flag.startswith("--data.")]
    flags = ["--model=Classification", "--data=LabelledText", *flags, "--data.source=rows.jsonl"]
    flags += ["--data.vocab_size=300", "--data.block_size=64", "--data.batch_size=4"]
    check(command("fit", *flags))
    for text in texts_in_tensorboard(RUN).values():
        check_markdown(text)
    check(command("evaluate", "--data.source=rows.jsonl", "--task=classification"))
    check(command("evaluate", "--text", TEXTS[0]))
    printed = command("evaluate", "--text", TEXTS[0], "--json")
    check(printed)
    assert json.loads(printed.out)["text"] == TEXTS[0]
