"""``evaluate``: every task's output, stored results and errors."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.evaluation.contamination import iterate_training_documents
from lit_gpt_scratch.evaluation.perplexity import score_documents
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised, sentences
from tests.end_to_end.conftest import Command, Outcome

RUN = Path("runs/test/version_0")
STEP = 7


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(seed) for seed in range(3)], 300)


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    return randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=64)


@pytest.fixture
def run(command: Command, model: GPT, tokenizer: Tokenizer) -> Path:
    """A run folder with a checkpoint, and files of rows next to it."""
    contents = CheckpointMetadata(asdict(TINY), tokenizer.vocab_size, 64, tokenizer.to_json())
    weights = {f"{STATE_PREFIX}{name}": weight for name, weight in model.state_dict().items()}
    save_checkpoint(
        {METADATA_KEY: asdict(contents), "state_dict": weights, "global_step": STEP}, RUN / "checkpoints/last.ckpt"
    )
    rng, lines = random.Random(0), sentences(1, 30).splitlines()
    rows("questions", [{"question": line, "choices": rng.sample(lines, 3), "answer": 1} for line in lines[:20]])
    rows("pairs", [{"sentence_good": line, "sentence_bad": line[::-1]} for line in lines])
    rows("prompts", [{"prompt": line[:8], "reference": "x"} for line in lines[:4]])
    rows("asked", [{"instruction": line[:8], "input": "", "output": "x"} for line in lines[:4]])
    return RUN


def rows(name: str, content: list[dict[str, Any]]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def figures(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize(
    ("task", "source", "flags", "names"),
    [
        ("text", "questions", ["--data.text_column=question", "--stride=16"], ["loss", "perplexity", "bits_per_byte"]),
        (
            "multiple_choice",
            "questions",
            [],
            ["accuracy", "accuracy_per_token", "accuracy_per_character", "accuracy_per_byte"],
        ),
        ("minimal_pairs", "pairs", ["--limit=20"], ["accuracy"]),
        ("generation", "prompts", ["--max_new_tokens=5", "--stop=q"], ["exact_match", "distinct_1", "repetition_4"]),
        ("replies", "asked", ["--max_new_tokens=5"], ["exact_match", "in_form", "distinct_1"]),
    ],
)
def test_every_task_is_printed_and_stored(
    command: Command, run: Path, task: str, source: str, flags: list[str], names: list[str]
) -> None:
    asked = [f"--task={task}", f"--data.source={source}.jsonl", *flags]
    found = figures(command("evaluate", run, *asked, "--json"))
    for name in names:
        ends = found["intervals"][name]
        if name.startswith(("distinct", "repetition")):  # a text this short has no repetitions in any resample
            assert ends is None
        else:
            assert ends[0] <= found[name] <= ends[1]
    shown = command("evaluate", run, *asked)
    assert all(f"{found[name]:,.4f}" in shown.out for name in names)
    [path] = (run / "evaluations").glob("*.json")  # the same request overwrites its result
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept.pop("asked")["step"] == STEP
    assert kept == found
    events = EventAccumulator(str(run / "evaluations")).Reload()
    for name in names:
        point = events.Scalars(f"eval/{task}-{source}/{name}")[-1]
        assert (point.step, point.value) == (STEP, pytest.approx(found[name]))
    command("evaluate", run, *asked, "--limit=3")
    assert len([*(run / "evaluations").glob("*.json")]) == 2  # another request does not


def test_json_of_a_text_has_only_the_documented_keys(
    command: Command, run: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    text = sentences(5, 9)
    Path("text.txt").write_text(text, encoding="utf-8")
    found = figures(command("evaluate", run, "--data.source=text.txt", "--json"))
    assert found == pytest.approx(score_documents(model, tokenizer, [text]))
    assert found.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
    assert (run / "evaluations").is_dir()


def test_results_of_a_checkpoint_outside_a_run_are_not_stored(command: Command, run: Path) -> None:
    (run / "checkpoints/last.ckpt").rename("mine.ckpt")
    found = figures(command("evaluate", "mine.ckpt", "--task=minimal_pairs", "--data.source=pairs.jsonl", "--json"))
    assert found["chance"] == 0.5
    assert not [*Path().rglob("evaluations")]


def test_contaminated_rows_are_reported_and_excluded(command: Command, run: Path) -> None:
    lines = [json.loads(line)["sentence_good"] for line in Path("pairs.jsonl").read_text().splitlines()]
    rows("seen", [{"text": lines[0].upper()}, {"text": lines[4]}])  # a line this short counts only as a whole document
    asked = ["--task=minimal_pairs", "--data.source=pairs.jsonl", "--against=seen.jsonl"]
    found = figures(command("evaluate", run, *asked, "--json"))
    seen = sum(line in (lines[0], lines[4]) for line in lines)
    assert found["contamination"]["rows"] == seen
    assert found["contamination"]["clean"]["rows"] == len(lines) - seen
    clean = [{"sentence_good": line, "sentence_bad": line[::-1]} for line in lines if line not in (lines[0], lines[4])]
    rows("clean", clean)
    alone = figures(command("evaluate", run, "--task=minimal_pairs", "--data.source=clean.jsonl", "--json"))
    assert found["contamination"]["clean"]["accuracy"] == alone["accuracy"]
    assert f"{seen} of 30 rows" in command("evaluate", run, *asked).out
    rows(
        "replied",
        [{"instruction": "a", "input": "", "output": "x"}, json.loads(Path("asked.jsonl").read_text().splitlines()[2])],
    )
    replied = command(
        "evaluate", run, "--task=replies", "--data.source=asked.jsonl", "--against=replied.jsonl", "--json"
    )
    assert figures(replied)["contamination"]["rows"] == 1  # rows are read in the task's format
    everything = figures(command("evaluate", run, "--data.source=seen.jsonl", "--against=seen.jsonl", "--json"))
    assert everything["contamination"]["clean"] is None


def test_a_store_is_checked_like_its_text(command: Command, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for seed in range(12):
        (tmp_path / f"texts/{seed}.txt").write_text(sentences(seed, 4), encoding="utf-8")
    made = command("prepare", "--data.source=texts", "--data.store=store", "--data.vocab_size=280")
    assert made.code == 0, made.err
    read, every = set(iterate_training_documents("store")), {sentences(seed, 4) for seed in range(12)}
    assert set(iterate_training_documents("texts")) == every
    assert read < every
    assert len(read) > 6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--task=multiple_choice", "--data.source=prompts.jsonl"],
            "line 1 has no text in column 'question' or 'context'",
        ),
        (["--task=multiple_choice", "--data.source=questions.jsonl", "--few_shot=20"], "20 examples leave none"),
        (["--task=multiple_choice", "--data.source=questions.jsonl", "--few_shot=9"], "lower --few_shot"),
        (["--task=generation", "--data.source=none.jsonl"], "none.jsonl"),
        (["--task=generation", "--data.source=text.txt"], "text.txt is not a table"),
        (
            ["--task=generation", "--data.source=prompts.jsonl", "--few_shot=1"],
            "--few_shot has no effect with",
        ),
        (["--task=generation", "--data.source=prompts.jsonl", "--limit=0"], "--limit is 0; it must be 1 or more"),
        (
            ["--task=replies", "--data.source=asked.jsonl", "--max_new_tokens=0"],
            "--max_new_tokens is 0; it must be 1 or more",
        ),
        (["--task=replies", "--data.source=pairs.jsonl"], "line 1: a record must have 'messages', or 'instruction'"),
        (["--data.source=text.txt", "--window=65"], "--window: 65 is not between 1 and the context length, 64"),
        (["--data.source=text.txt", "--data.label_column=x"], "--data.label_column has no effect with --task text"),
        (
            ["--task=classification", "--data.source=pairs.jsonl"],
            "predicts tokens; use one of text, multiple_choice, minimal_pairs, generation, replies",
        ),
        (["--text=hello"], "is a language model; --text requires a classifier"),
        (["--text=hello", "--task=text"], "--task has no effect with --text"),
        (["--text=hello", "--data.source=text.txt"], "not allowed with"),
        (["--task=quiz", "--data.source=pairs.jsonl"], "quiz"),
        (["--data.source=text.txt", "--against=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(command: Command, run: Path, flags: list[str], expected: str) -> None:
    Path("text.txt").write_text("Some text.", encoding="utf-8")
    outcome = command("evaluate", run, *flags)
    assert outcome.code == 2
    assert outcome.out == ""
    assert expected in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (run / "evaluations").exists()


def test_results_are_deterministic(command: Command, run: Path) -> None:
    torch.manual_seed(1)
    asked = ["--task=generation", "--data.source=prompts.jsonl", "--max_new_tokens=9", "--json"]
    assert command("evaluate", run, *asked).out == command("evaluate", run, *asked).out


@pytest.mark.parametrize("trust", ["tasks", "tasks/", "./tasks//"])
def test_folder_of_tasks_is_trusted_however_it_is_spelled(command: Command, trust: str) -> None:
    pytest.importorskip("lm_eval")
    flags = ["--benchmark=x", "--include_path=tasks/", "--device=cpu"]
    assert "pass --trust tasks" in command("evaluate", *flags).err
    assert "no run with a checkpoint" in command("evaluate", *flags, f"--trust={trust}").err
