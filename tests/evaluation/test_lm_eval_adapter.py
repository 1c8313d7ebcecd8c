"""The same requests to this package's adapter and to ``lm-eval``'s own ``HFLM`` with the same weights.

``python experiments/benchmarks/evaluation.py`` does the same with whole tasks, and prints both results.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.evaluation.intervals import summarize
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence
from lit_gpt_scratch.evaluation.multiple_choice import (
    MultipleChoiceQuestion,
    evaluate_minimal_pairs,
    evaluate_multiple_choice,
)
from lit_gpt_scratch.evaluation.perplexity import score_documents
from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised, sentences
from tests.evaluation.test_multiple_choice import questions
from tests.tokenizer_forms import FORMS, build_tokenizer

LINES = sentences(4, 60).splitlines()


@pytest.fixture
def adapter(model: GPT, tokenizer: Tokenizer) -> Any:
    module = pytest.importorskip("lit_gpt_scratch.evaluation.lm_eval_adapter", exc_type=ImportError)
    return module.LMEvalAdapter(model, tokenizer)


@pytest.fixture
def _own_tasks_alone(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading all tasks of the library takes ten seconds."""
    module = sys.modules[type(adapter).__module__]
    monkeypatch.setattr(module, "TaskManager", partial(module.TaskManager, include_defaults=False))


@pytest.fixture
def reference(adapter: Any, model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Any]:
    """HFLM with the same weights, without its cache of logits: with the cache, 20 of the 71 requests below give other
    results than alone (0.4.13)."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    shape = ModelShape(TINY, tokenizer.vocab_size, model.block_size)
    hf_checkpoint.write_hf_checkpoint(
        hf_checkpoint.PortableModel(shape, model.state_dict(), tokenizer), tmp_path / "hf"
    )
    return lambda **settings: huggingface.HFLM(
        pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4, logits_cache=False, **settings
    )


def requests(kind: str, *args: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in args]


def test_loglikelihood_of_continuations(adapter: Any, reference: Any) -> None:
    """HFLM prepends the start of text to each context, as this package does for each document."""
    pairs = [(" ".join(words[:2]), " " + " ".join(words[2:])) for words in map(str.split, LINES)]
    pairs += [("", line) for line in LINES[:9]] + [("the cat ", "sees"), (" ".join(LINES[:9]), " a dog")]
    instances = requests("loglikelihood", *pairs)
    ours, expected = adapter.loglikelihood(instances), reference(add_bos_token=True).loglikelihood(instances)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in expected], abs=1e-3, rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def test_continuation_longer_than_the_context(
    adapter: Any, reference: Any, model: GPT, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """HFLM refuses it; here every token is scored once, given at least half a context, and a warning names the task."""
    context, long = "the cat", " " + " ".join(LINES)
    instances = requests("loglikelihood", (context, long), ("a", long), (context, " sees"))
    for instance in instances:
        instance.task_name = "stories"
    with pytest.raises(AssertionError):
        reference(add_bos_token=True).loglikelihood(instances)
    (nats, greedy), _, short = adapter.loglikelihood(instances)
    assert caplog.text.count("stories: 2 continuations are longer than the context of 64 tokens") == 1
    assert adapter.loglikelihood(instances[2:]) == [pytest.approx(short)]
    read = [tokenizer.start_of_text, *tokenizer.encode(context)]
    ids = [tokenizer.start_of_text, *tokenizer.encode(context + long)]
    total, first = 0.0, len(read)
    with torch.no_grad():
        for t in range(first, len(ids)):
            stop = min(first + ((t - first) // 32 + 1) * 32, len(ids))  # of the window, which scores 32 tokens
            total += model(torch.tensor([ids[max(0, stop - 65) : t]]))[0, -1].log_softmax(-1)[ids[t]].item()
    assert nats == pytest.approx(total, rel=1e-5)
    assert not greedy


@pytest.mark.parametrize(
    ("n_context", "n_scored", "block_size", "windows"),
    [
        (1, 3, 8, [(0, 4, 3)]),
        (5, 8, 8, [(4, 13, 8)]),  # a continuation that fits exactly, with one token of context
        (1, 9, 8, [(0, 5, 4), (0, 9, 4), (1, 10, 1)]),
        (6, 9, 8, [(1, 10, 4), (5, 14, 4), (6, 15, 1)]),
        (1, 3, 1, [(0, 2, 1), (1, 3, 1), (2, 4, 1)]),
    ],
)
def test_windows_of_a_continuation(
    adapter: Any, n_context: int, n_scored: int, block_size: int, windows: list[tuple[int, int, int]]
) -> None:
    module = sys.modules[type(adapter).__module__]
    ids = list(range(n_context + n_scored))
    found = list(module.split_continuation(ScoredSequence(ids, n_scored), block_size))
    assert found == [ScoredSequence(ids[start:stop], n) for start, stop, n in windows]


def test_rolling_loglikelihood_of_texts(adapter: Any, reference: Any) -> None:
    texts = [("\n".join(LINES[:n]),) for n in (1, 2, 7, 20, 60)]
    instances = requests("loglikelihood_rolling", *texts)
    assert adapter.loglikelihood_rolling(instances) == pytest.approx(
        reference().loglikelihood_rolling(instances), rel=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_bits_per_byte_equal_those_of_evaluate(form: str) -> None:
    """``lm-eval`` divides the log-likelihood by the UTF-8 bytes of the text."""
    module = pytest.importorskip("lit_gpt_scratch.evaluation.lm_eval_adapter", exc_type=ImportError)
    tokenizer, text = build_tokenizer(form), f"ÉCOLE \u2581 東京, {LINES[0]}"
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=256)
    [nats] = module.LMEvalAdapter(model, tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    expected = -nats / math.log(2) / len(text.encode())
    assert score_documents(model, tokenizer, [text])["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_greedy_continuations(adapter: Any, reference: Any) -> None:
    settings = [{"until": ["q"], "max_gen_toks": 12}, {"until": ["z", "b"], "max_gen_toks": 20}]
    instances = requests("generate_until", *((line[: 4 + k], settings[k % 2]) for k, line in enumerate(LINES[:10])))
    both = adapter.generate_until(instances), reference(add_bos_token=True).generate_until(instances)
    # Trailing bytes of an incomplete character are dropped here, and are U+FFFD in HFLM.
    ours, expected = ([text.rstrip("\ufffd") for text in texts] for texts in both)
    assert ours == expected
    long = requests("generate_until", (" ".join(LINES), {"until": [], "max_gen_toks": 500}))
    assert adapter.generate_until(long)[0]


def task(name: str, source: Path, **fields: Any) -> None:
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(source)}},
        "test_split": "test", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (source.parent / f"{name}.yaml").write_text(json.dumps(config | fields), encoding="utf-8")  # JSON is YAML


@pytest.mark.usefixtures("_own_tasks_alone")
def test_benchmark_scores_equal_those_of_our_tasks(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Zero-shot and few-shot; lm-eval takes the examples from the first rows of a separate split."""
    from lit_gpt_scratch.evaluation.lm_eval_adapter import run_lm_eval

    model.block_size = 512  # rotary positions are not limited
    records = [
        {"question": q.context, "choices": [c[1:] for c in q.choices], "answer": q.answer} for q in questions(40)
    ]
    pairs = [{"sentence_good": line, "sentence_bad": line[::-1]} for line in LINES]
    for name, content in (("all", records), ("first", records[:2]), ("others", records[2:]), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    choices = {
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    }  # fmt: skip
    task("own_questions", tmp_path / "all.jsonl", **choices)
    files = {"test": str(tmp_path / "others.jsonl"), "train": str(tmp_path / "first.jsonl")}
    few = {"dataset_kwargs": {"data_files": files}, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    task("own_few_shot", tmp_path / "others.jsonl", **choices, **few, num_fewshot=2)
    good_and_bad = {"doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0}
    task("own_pairs", tmp_path / "pairs.jsonl", doc_to_text="", target_delimiter="", **good_and_bad)
    reference = run_lm_eval(model, tokenizer, ["own_questions", "own_few_shot", "own_pairs"], include_path=tmp_path)
    rows = [MultipleChoiceQuestion.from_row(TableRow("", "", row)) for row in records]
    names = {"acc": "accuracy", "acc_norm": "accuracy_per_character", "acc_bytes": "accuracy_per_byte"}
    for name, shots in (("own_questions", 0), ("own_few_shot", 2)):
        ours = summarize(evaluate_multiple_choice(model, tokenizer, rows, shots))
        assert reference[name].rows == ours.rows
        for reference_name, own in names.items():
            assert reference[name].metrics[reference_name] == pytest.approx(ours.metrics[own])
            assert reference[name].intervals[reference_name] == pytest.approx(ours.intervals[own])
    ours = summarize(
        evaluate_minimal_pairs(
            model, tokenizer, [MultipleChoiceQuestion.from_pair(TableRow("", "", row)) for row in pairs]
        )
    )
    assert reference["own_pairs"].metrics == {"acc": pytest.approx(ours.metrics["accuracy"])}


@pytest.mark.usefixtures("_own_tasks_alone")
def test_unknown_benchmark_is_reported(model: GPT, tokenizer: Tokenizer) -> None:
    from lit_gpt_scratch.errors import UserError
    from lit_gpt_scratch.evaluation.lm_eval_adapter import run_lm_eval

    with pytest.raises(UserError, match="--benchmark: lm-eval has no task no_such_task"):
        run_lm_eval(model, tokenizer, ["no_such_task"])
    assert torch.is_grad_enabled()
